"""The backbone's fastest form gives what the backbone gives."""

import copy

import pytest
import timm
import torch
from torch import nn

from diffad import TimmFeatureExtractor
from diffad.models.inference_network import EvenlyPadded, fold_batch_norms, inference_network


def backbone(name: str) -> nn.Module:
    """Random weights, and norms that change what passes them."""
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True, out_indices=[0, 1, 2], pretrained=False).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return network


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050", "regnety_002"])
@torch.no_grad()
def test_it_gives_the_same_layers_by_less_work(name):
    network, images = backbone(name), torch.randn(2, 3, 64, 64)
    faster = inference_network(network, images[:1])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in faster.modules())
    for found, expected in zip(faster(images), network(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_blocks_behind_the_last_layer_do_not_run():
    network = backbone("tf_efficientnet_lite0")  # layers of strides 2, 4 and 8, of 7 stages
    assert len(inference_network(network, torch.randn(1, 3, 64, 64)).blocks) == 3
    assert len(network.blocks) == 7


class Reordered(nn.Module):
    """A norm that is listed behind a convolution, and runs before it."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.running_mean += 2.0
        self.feature_info = timm.models.FeatureInfo([{"num_chs": 3, "reduction": 1, "module": "convolution"}], [0])

    def forward(self, images):
        return [self.convolution(self.norm(images))]


@torch.no_grad()
def test_a_network_that_folding_would_change_stays_as_it_is():
    network = Reordered().eval()
    assert fold_batch_norms(copy.deepcopy(network)) == 1
    assert inference_network(network, torch.randn(1, 3, 8, 8)) is network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision_it_is_tried_in_full(dtype):
    images = torch.randn(1, 3, 64, 64)
    assert inference_network(Reordered().eval().to(dtype), images.to(dtype)).norm.running_mean.dtype == dtype
    faster = inference_network(backbone("resnet18").to(dtype), images.to(dtype))
    assert {parameter.dtype for parameter in faster.parameters()} == {dtype}
    for found, expected in zip(faster(images.to(dtype)), backbone("resnet18")(images), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=0.0, atol=0.05 * float(expected.abs().max()))


@torch.no_grad()
def test_a_network_without_batch_norms_is_not_copied():
    network = timm.create_model("convnext_atto", features_only=True, out_indices=[3], pretrained=False).eval()
    assert inference_network(network, torch.randn(1, 3, 32, 32)) is network


@torch.no_grad()
def test_weights_that_change_after_a_call_count():
    extractor = TimmFeatureExtractor("resnet18", [2, 4])
    images = torch.rand(1, 3, 32, 32)
    before = extractor.layers(images)
    nn.init.zeros_(extractor.network.conv1.weight)
    after = extractor.layers(images)
    assert (before[0] != after[0]).any()
    torch.testing.assert_close(after, extractor.network(normalized(extractor, images)))
    assert [layer.dtype for layer in extractor.half().float().layers(images)] == [torch.float32] * 2
    assert set(extractor.state_dict()) == set(TimmFeatureExtractor("resnet18", [2, 4]).state_dict())


@torch.no_grad()
def test_weights_that_are_replaced_count():
    extractor, other = (TimmFeatureExtractor("resnet18", [2, 4]) for _ in range(2))
    images = torch.rand(1, 3, 32, 32)
    extractor.layers(images)
    extractor.network = other.network
    torch.testing.assert_close(extractor.layers(images), other.network(normalized(extractor, images)))
    for seed in range(2):
        torch.manual_seed(seed)
        weights = TimmFeatureExtractor("resnet18", [2, 4]).state_dict()
        extractor.load_state_dict(weights, assign=True)
        torch.testing.assert_close(extractor.layers(images), extractor.network(normalized(extractor, images)))


def normalized(extractor, images):
    return (images / 2.0 + 0.5 - extractor.image_mean) / extractor.image_std


def test_gradients_reach_images_after_inference_mode_and_weights_that_are_trained():
    extractor = TimmFeatureExtractor("resnet18", [2, 4])
    with torch.inference_mode():
        extractor.layers(torch.rand(1, 3, 32, 32))
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    extractor.layers(images)[0].sum().backward()
    assert images.grad.abs().sum() > 0.0
    extractor.requires_grad_(True)
    extractor.layers(images)[0].sum().backward()
    assert extractor.network.conv1.weight.grad.abs().sum() > 0.0


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (30, 35)])
@torch.no_grad()
def test_padding_is_folded_in_for_sides_of_any_length(size):
    network = backbone("tf_efficientnet_lite0")
    faster = inference_network(network, torch.randn(1, 3, 64, 64))
    assert sum(isinstance(module, EvenlyPadded) for module in faster.modules()) == 2  # of strides 4 and 8
    images = torch.randn(2, 3, *size)
    for found, expected in zip(faster(images), network(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))
