from __future__ import annotations

import logging

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from diffad.models.semantic_guided_network import SemanticGuidedNetwork

WIDTHS = (8, 16, 24, 32)  # no two alike: the SFF block must fit each skip's own
STACK = (4, 8)  # the autoencoder's factor is 2
PROMPT = 12


def make_unet(**config) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "block_out_channels": WIDTHS,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": PROMPT,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        }
    ).eval()


def make_network(unet: UNet2DConditionModel, random: bool = False, **config) -> SemanticGuidedNetwork:
    network = SemanticGuidedNetwork.from_unet(unet, **{"conditioning_embedding_out_channels": STACK, **config}).eval()
    if random:
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter.data.normal_(std=0.2)
    return network


def make_inputs(batch_size: int = 2, size: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "sample": torch.randn(batch_size, 4, size, size),
        "timestep": torch.tensor([901, 101])[:batch_size],
        "encoder_hidden_states": torch.randn(1, 5, PROMPT),
        "pixel_values": torch.randn(batch_size, 3, 2 * size, 2 * size),
    }


def denoise(unet, network, inputs) -> torch.Tensor:
    residuals = {}
    if network is not None:
        output = network(**inputs)
        residuals = {
            "down_block_additional_residuals": output.down_block_res_samples,
            "mid_block_additional_residual": output.mid_block_res_sample,
        }
    sample = inputs["sample"]
    prompt = inputs["encoder_hidden_states"].expand(len(sample), -1, -1)
    return unet(sample, inputs["timestep"], prompt, **residuals).sample


ABLATIONS = [
    # guidance_outputs, skips that receive, zero convolutions (with the SFF block's sources)
    (("middle", "sgdb4"), {9, 10, 11}, {6, 7, 8, 9, 10, 11}),
    (("middle",), set(), set()),
    (("middle", "sgdb3"), {6, 7, 8}, {6, 7, 8}),
    (("sgdb4",), {9, 10, 11}, {6, 7, 8, 9, 10, 11}),
    (("sgdb3",), {6, 7, 8}, {6, 7, 8}),
    (("middle", "sgdb3", "sgdb4"), {6, 7, 8, 9, 10, 11}, {6, 7, 8, 9, 10, 11}),
]


@pytest.mark.parametrize(("guidance_outputs", "skips", "convolutions"), ABLATIONS)
@torch.no_grad()
def test_only_the_chosen_outputs_reach_the_denoiser(guidance_outputs, skips, convolutions):
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, random=True, guidance_outputs=guidance_outputs)
    output = network(**inputs)
    assert len(output.down_block_res_samples) == 12
    assert {i for i, residual in enumerate(output.down_block_res_samples) if residual.ndim} == skips
    assert (output.mid_block_res_sample.ndim > 0) == ("middle" in guidance_outputs)
    nothing = [r for r in (*output.down_block_res_samples, output.mid_block_res_sample) if not r.ndim]
    assert all(float(residual) == 0.0 for residual in nothing)
    assert {int(skip) for skip in network.controlnet_down_blocks} == convolutions
    assert not torch.equal(denoise(unet, network, inputs), denoise(unet, None, inputs))


@pytest.mark.parametrize("guidance_outputs", [ablation[0] for ablation in ABLATIONS])
@pytest.mark.parametrize("fusion", ["instance_norm_silu", "batch_norm_relu", None])
@torch.no_grad()
def test_denoiser_is_unchanged_at_initialisation(guidance_outputs, fusion):
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, guidance_outputs=guidance_outputs, fusion=fusion)
    torch.testing.assert_close(denoise(unet, network, inputs), denoise(unet, None, inputs), rtol=0, atol=0)


def test_encoder_and_middle_block_are_copies():
    unet = make_unet()
    network = make_network(unet)
    for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
        copy = getattr(network, name).state_dict()
        for key, weight in getattr(unet, name).state_dict().items():
            assert torch.equal(copy[key], weight)
            assert copy[key].data_ptr() != weight.data_ptr()


@torch.no_grad()
def test_fusion_is_equation_8():
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, random=True)
    zero_convolved = {}
    for skip, convolution in network.controlnet_down_blocks.items():
        convolution.register_forward_hook(lambda _, __, out, skip=int(skip): zero_convolved.__setitem__(skip, out))
    residuals = network(**inputs).down_block_res_samples
    for target, start, stop in ((9, 0, 24), (10, 24, 56), (11, 56, 88)):  # skip 9 still has the upper level's width
        expected = zero_convolved[target]
        for source, downsampler in zip((6, 7, 8), network.feature_fusion.downsamplers, strict=True):
            kernel = downsampler[0].weight[start:stop]
            expected = expected + F.silu(F.instance_norm(F.conv2d(zero_convolved[source], kernel, stride=2, padding=1)))
        torch.testing.assert_close(residuals[target], F.silu(expected))


@torch.no_grad()
def test_without_fusion_the_zero_convolutions_are_the_output():
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, random=True, fusion=None)
    seen = []
    network.controlnet_down_blocks["11"].register_forward_hook(lambda _, __, out: seen.append(out))
    assert torch.equal(network(**inputs).down_block_res_samples[11], seen[0])
    assert set(network.controlnet_down_blocks) == {"9", "10", "11"}


@torch.no_grad()
def test_batch_norm_takes_maps_of_one_position():
    unet = make_unet()
    network = make_network(unet, random=True, fusion="batch_norm_relu")
    residuals = network(**make_inputs(size=8)).down_block_res_samples
    assert residuals[9].shape == (2, 24, 1, 1)
    assert min(r.min() for r in residuals[9:]) >= 0  # ReLU


def test_every_weight_learns():
    """Also those of the SFF block, which have no gradient while they and the zero convolutions are both zero."""
    for guidance_outputs, *_ in ABLATIONS[:1] + ABLATIONS[-2:]:
        unet = make_unet().requires_grad_(False)
        network = make_network(unet, guidance_outputs=guidance_outputs).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(3):  # the zero convolutions move first, then the image's stack, whose last layer is zero too
            optimizer.zero_grad()
            denoise(unet, network, make_inputs()).square().mean().backward()
            optimizer.step()
        still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert not still, guidance_outputs


@pytest.mark.parametrize(
    ("guidance_outputs", "fusion"), [(("middle", "sgdb4"), "instance_norm_silu"), (("sgdb3",), None)]
)
def test_beside_an_untrained_denoiser_the_image_counts_from_the_first_step(guidance_outputs, fusion):
    """With zero convolutions, a denoiser trained from scratch draws the same part for every image for long."""
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, guidance_outputs=guidance_outputs, fusion=fusion).train()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert torch.equal(denoise(unet, network, inputs), denoise(unet, network, other))
    network.initialize_beside_untrained()
    assert not torch.allclose(denoise(unet, network, inputs), denoise(unet, network, other), atol=1e-4)
    denoise(unet, network, inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    unet, inputs = make_unet(), make_inputs()
    gradients = []
    for checkpointing in (False, True):
        network = make_network(unet, random=True).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
            assert network.is_gradient_checkpointing
        denoise(unet, network, inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_condition_is_embedded_once_for_all_steps():
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, random=True)
    embedding = network.embed_condition(inputs["pixel_values"])
    assert embedding.shape == (2, WIDTHS[0], 16, 16)
    calls = []
    network.controlnet_cond_embedding.register_forward_hook(lambda *_: calls.append(1))
    expected = denoise(unet, network, inputs)
    embedded = {name: value for name, value in inputs.items() if name != "pixel_values"}
    given = denoise(unet, network, {**embedded, "conditioning_embedding": embedding})
    assert torch.equal(given, expected)
    assert len(calls) == 1  # by `expected` alone


@pytest.mark.parametrize("timestep", [901, 901.0, torch.tensor(901), torch.tensor([901]), torch.tensor([901, 901])])
@torch.no_grad()
def test_one_image_prompt_and_timestep_serve_a_batch(timestep):
    network = make_network(make_unet(), random=True)
    inputs = make_inputs()
    sample, prompt = inputs["sample"], inputs["encoder_hidden_states"]
    embedding = network.embed_condition(inputs["pixel_values"][:1])
    together = network(sample, timestep, prompt, conditioning_embedding=embedding)
    for i in range(2):
        alone = network(sample[i : i + 1], 901, prompt, conditioning_embedding=embedding)
        torch.testing.assert_close(together.mid_block_res_sample[i : i + 1], alone.mid_block_res_sample)
        torch.testing.assert_close(together.down_block_res_samples[9][i : i + 1], alone.down_block_res_samples[9])


def test_saved_and_loaded_without_a_warning(tmp_path):
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    try:
        network = make_network(make_unet(), random=True, guidance_outputs=("middle", "sgdb3"), fusion="batch_norm_relu")
        network.save_pretrained(tmp_path)
        loaded = SemanticGuidedNetwork.from_pretrained(tmp_path)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert messages == []
    assert list(loaded.config.guidance_outputs) == ["middle", "sgdb3"]
    assert loaded.config.fusion == "batch_norm_relu"
    inputs = make_inputs()
    with torch.no_grad():
        expected, output = network(**inputs, return_dict=False), loaded(**inputs, return_dict=False)
    assert torch.equal(output[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(output[0][6:9], expected[0][6:9], strict=True))


@torch.no_grad()
def test_output_passes_through_offloading_hooks():
    unet, inputs = make_unet(), make_inputs()
    network = make_network(unet, random=True)
    expected = denoise(unet, network, inputs)
    for model in (unet, network):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(denoise(unet, network, inputs), expected)


def test_bad_arguments_are_named():
    unet = make_unet()
    with pytest.raises(ValueError, match="`guidance_outputs`"):
        make_network(unet, guidance_outputs=("sgdb2",))
    with pytest.raises(ValueError, match="`guidance_outputs`"):
        make_network(unet, guidance_outputs=())
    with pytest.raises(ValueError, match="`fusion`"):
        make_network(unet, fusion="layer_norm")
    with pytest.raises(ValueError, match=r"`unet`.*num_class_embeds"):
        make_network(make_unet(num_class_embeds=3))
    with pytest.raises(ValueError, match="`block_out_channels`"):
        SemanticGuidedNetwork(block_out_channels=(32,), down_block_types=("DownBlock2D",))

    network, inputs = make_network(unet), make_inputs()
    embedding = network.embed_condition(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"`conditioning_embedding`.*`pixel_values`"):
        network(**inputs, conditioning_embedding=embedding)
    pixel_values = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match=r"`conditioning_embedding`.*`pixel_values`"):
        network(**inputs)
    with pytest.raises(ValueError, match="`conditioning_embedding_out_channels`"):
        network(**inputs, pixel_values=pixel_values[..., :16])
    with pytest.raises(ValueError, match="`sample` of 8 x 8 is too small: instance norm"):
        network(**make_inputs(size=8))
