"""The denoiser: diffusers' own network underneath, its feature head, saving, and the presets."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import generator, tiny_unet
from diffusers import UNet2DModel

from diffad import DenoisingUNet2DModel
from diffad.models.denoising_unet_2d import DENOISING_UNET_PRESETS


def noisy(count: int = 2, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=generator())


TIMESTEPS = torch.tensor([5, 100])


def test_shapes_of_both_outputs():
    output = tiny_unet()(noisy(), TIMESTEPS)
    assert output.sample.shape == (2, 6, 16, 16)
    assert output.features.shape == (2, 64, 8, 8)
    sample, features = tiny_unet()(noisy(), TIMESTEPS, return_dict=False)
    assert torch.equal(sample, output.sample)
    assert torch.equal(features, output.features)


@pytest.mark.parametrize("feature_resolution", [16, 8, 4])
def test_features_at_every_level_of_the_decoder(feature_resolution):
    unet = tiny_unet(
        feature_resolution=feature_resolution,
        block_out_channels=(4, 8, 16),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    assert unet(noisy(), 5).features.shape == (2, 64, feature_resolution, feature_resolution)
    # another size keeps the ratio
    assert unet(noisy(2, 3, 8, 24), 5).features.shape == (2, 64, feature_resolution // 2, feature_resolution * 3 // 2)


def test_without_a_feature_head():
    unet = tiny_unet(feature_channels=0)
    output = unet(noisy(), 5)
    assert output.features is None
    assert unet(noisy(), 5, return_dict=False)[1] is None
    assert output.sample.shape == (2, 6, 16, 16)
    with pytest.raises(ValueError, match="`features_only` needs a feature head"):
        unet(noisy(), 5, features_only=True)


def test_features_alone_are_the_same_and_spare_the_rest_of_the_decoder():
    unet = tiny_unet().eval()
    expected, ran = unet(noisy(), 5), []
    unet.up_blocks[-1].resnets[-1].register_forward_hook(lambda *_: ran.append("resnet"))
    unet.conv_out.register_forward_hook(lambda *_: ran.append("out"))
    output = unet(noisy(), 5, features_only=True)
    assert torch.equal(output.features, expected.features)
    assert output.sample is None
    assert ran == []
    assert torch.equal(unet(noisy(), 5, return_dict=False, features_only=True)[1], expected.features)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_class_embeds": 2},
        {"upsample_type": "resnet", "downsample_type": "resnet", "mid_block_type": None},
        {
            "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
            "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D"),
        },
        {"time_embedding_type": "fourier", "center_input_sample": True, "resnet_time_scale_shift": "scale_shift"},
    ],
)
def test_underneath_it_is_diffusers_network(config):
    unet = tiny_unet(**config).eval()
    own = ("sample_size", "feature_channels", "feature_resolution")
    plain = UNet2DModel(**{k: v for k, v in unet.config.items() if k not in own and not k.startswith("_")}).eval()
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("feature_head")}
    plain.load_state_dict(weights)  # strict: the same tensors under the same names
    labels = torch.tensor([0, 1]) if "num_class_embeds" in config else None
    for timestep in (5, torch.tensor(5), TIMESTEPS):
        expected = plain(noisy(), timestep, class_labels=labels).sample
        assert torch.equal(unet(noisy(), timestep, class_labels=labels).sample, expected)


@pytest.mark.parametrize(("feature_resolution", "module"), [(8, "up_blocks.0.upsamplers.0"), (16, "conv_norm_out")])
def test_features_are_predicted_from_what_a_level_hands_on(feature_resolution, module):
    unet, handed_on = tiny_unet(feature_resolution=feature_resolution).eval(), []
    unet.get_submodule(module).register_forward_pre_hook(lambda _, args: handed_on.append(args[0]))
    features = unet(noisy(), TIMESTEPS).features
    assert torch.equal(features, unet.feature_head(handed_on[0]))


def test_one_channel():
    assert tiny_unet(in_channels=1)(noisy(channels=1), 5).sample.shape == (2, 2, 16, 16)


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match=r"`feature_resolution`.*\[16, 8\].*is 5"):
        tiny_unet(feature_resolution=5)
    with pytest.raises(ValueError, match=r"`out_channels`.*6.*is 3"):
        tiny_unet(out_channels=3)
    assert tiny_unet(out_channels=6).config.out_channels == 6
    with pytest.raises(ValueError, match=r"`up_block_types`.*'AttnUpBlock2D'.*holds \['SkipUpBlock2D'\]"):
        tiny_unet(up_block_types=("AttnUpBlock2D", "SkipUpBlock2D"))
    with pytest.raises(ValueError, match=r"`down_block_types`.*'SkipDownBlock2D'.*Use DownBlock2D"):
        tiny_unet(down_block_types=("DownBlock2D", "SkipDownBlock2D"))


def test_class_labels_are_asked_for_and_refused():
    with pytest.raises(ValueError, match="`class_labels` is needed"):
        tiny_unet(num_class_embeds=3)(noisy(), 5)
    with pytest.raises(ValueError, match=r"`class_labels` has no use here.*`num_class_embeds`"):
        tiny_unet()(noisy(), 5, class_labels=torch.tensor([0, 1]))


def test_offloading_by_groups_takes_layers_not_blocks():
    unet, expected = tiny_unet().eval(), tiny_unet().eval()(noisy(), 5).features
    with pytest.raises(ValueError, match=r'`offload_type` must be "leaf_level"'):
        unet.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)
    unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(unet(noisy(), 5).features, expected)


def test_the_class_label_matters():
    unet = tiny_unet(num_class_embeds=3)
    outputs = [unet(noisy(), 5, class_labels=torch.tensor([c, c])) for c in range(3)]
    assert not torch.equal(outputs[0].sample, outputs[1].sample)
    assert not torch.equal(outputs[1].features, outputs[2].features)


def test_every_parameter_learns():
    unet = tiny_unet(num_class_embeds=2)
    output = unet(noisy(), TIMESTEPS, class_labels=torch.tensor([0, 1]))
    (output.sample.square().mean() + output.features.square().mean()).backward()
    without = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    # the features' error alone reaches the encoder's first layer
    unet.zero_grad()
    unet(noisy(), TIMESTEPS, class_labels=torch.tensor([0, 1])).features.square().mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
    assert unet.conv_out.weight.grad is None


def test_gradient_checkpointing_changes_memory_and_not_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        output = unet(noisy(), TIMESTEPS)
        (output.sample.square().mean() + output.features.square().mean()).backward()
        gradients.append({n: p.grad for n, p in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_copy_keeps_its_own_features():
    unet = tiny_unet()
    twin = copy.deepcopy(unet)
    torch.nn.init.zeros_(twin.conv_in.weight)
    kept = unet(noisy(), 5).features
    assert not torch.equal(twin(noisy(), 5).features, kept)
    assert torch.equal(unet(noisy(), 5).features, kept)


def test_no_activation_is_kept_after_a_pass():
    unet = tiny_unet()
    unet(noisy(), 5)
    assert not [name for name, value in vars(unet).items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("classes", [None, 2])
def test_saved_and_loaded_to_the_bit(tmp_path, classes):
    unet = tiny_unet(num_class_embeds=classes).eval()
    unet.save_pretrained(tmp_path)
    loaded = DenoisingUNet2DModel.from_pretrained(tmp_path)
    labels = None if classes is None else torch.tensor([0, 1])
    expected, actual = (model(noisy(), TIMESTEPS, class_labels=labels) for model in (unet, loaded))
    assert torch.equal(actual.sample, expected.sample)
    assert torch.equal(actual.features, expected.features)
    assert loaded.config.feature_resolution == 8
    assert loaded.config.out_channels == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    unet = tiny_unet().eval()
    expected = unet(noisy(), TIMESTEPS)
    output = unet.to(dtype)(noisy().to(dtype), TIMESTEPS)
    assert output.sample.dtype == output.features.dtype == dtype
    torch.testing.assert_close(output.sample.float(), expected.sample, atol=0.05, rtol=0.05)
    torch.testing.assert_close(output.features.float(), expected.features, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("preset", "size", "feature_size", "millions"),
    [("paper-256", 256, 64, (100, 200)), ("cpu-64", 64, 16, (3, 6)), ("cpu-128", 128, 32, (6, 10))],
)
def test_presets(preset, size, feature_size, millions):
    with torch.device("meta"):  # shapes without the work
        unet = DenoisingUNet2DModel(**DENOISING_UNET_PRESETS[preset], feature_channels=272)
        output = unet(torch.empty(1, 3, size, size), torch.zeros(1, dtype=torch.long))
    assert output.sample.shape == (1, 6, size, size)
    assert output.features.shape == (1, 272, feature_size, feature_size)
    assert millions[0] < sum(p.numel() for p in unet.parameters()) / 1e6 < millions[1]


def test_attention_of_the_paper_stands_at_32_16_and_8():
    with torch.device("meta"):
        unet = DenoisingUNet2DModel(**DENOISING_UNET_PRESETS["paper-256"])
    sizes = [256 // 2**level for level, block in enumerate(unet.down_blocks) if hasattr(block, "attentions")]
    assert sizes == [32, 16, 8]
