"""Maps and scores against scipy, against the papers' equations written out, and on maps of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from diffad.scoring import (
    cosine_distance_map,
    feature_error,
    gaussian_smooth,
    heighten_contrast,
    joint_map,
    max_score,
    resize_maps,
    top_fraction_score,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 4.0, 5.0])
@pytest.mark.parametrize("shape", [(32, 24), (7, 40), (3, 2), (1, 9), (1, 1)])
def test_smoothing_is_scipys(shape, sigma):
    maps = random(2, 3, *shape).double()
    smooth = gaussian_smooth(maps, sigma)
    for i in np.ndindex(2, 3):
        expected = ndimage.gaussian_filter(maps[i].numpy(), sigma, mode="reflect", truncate=4.0)
        np.testing.assert_allclose(smooth[i].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (2, 3), (16, 16)])
def test_smoothing_keeps_constants_and_their_type(shape):
    for dtype in (torch.float32, torch.float64):
        maps = torch.full((2, *shape), 3.25, dtype=dtype)
        smooth = gaussian_smooth(maps, 6.0)
        assert smooth.dtype == dtype
        torch.testing.assert_close(smooth, maps)


def test_no_sigma_no_smoothing():
    maps = random(2, 5, 5)
    assert torch.equal(gaussian_smooth(maps, 0.0), maps)
    with pytest.raises(ValueError, match="`sigma`"):
        gaussian_smooth(maps, -1.0)


def test_smoothing_is_float32_inside_autocast():
    maps = random(2, 3, 16, 16) + 100.0
    with torch.autocast("cpu", torch.bfloat16):
        smooth = gaussian_smooth(maps, 2.0)
    assert smooth.dtype == torch.float32
    assert torch.equal(smooth, gaussian_smooth(maps, 2.0))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 4.0])
@pytest.mark.parametrize("size", [(32, 24), (9, 11), (4, 40)])
def test_maps_are_resized_and_smoothed_at_once_as_one_after_the_other(size, sigma):
    maps = random(2, 3, 9, 11)
    expected = gaussian_smooth(torch.nn.functional.interpolate(maps, size, mode="bilinear"), sigma)
    torch.testing.assert_close(resize_maps(maps, size, sigma), expected, atol=5e-6, rtol=0.0)
    with pytest.raises(ValueError, match="`sigma`"):
        resize_maps(maps, size, -1.0)


def test_feature_error_is_the_mean_square_over_each_layers_channels():
    residual = random(2, 3, 5, 4, 6)  # N, T, C, h, w
    error = feature_error(residual, (2, 3))
    assert error.shape == (2, 6, 4, 6)  # T * L: level by level, in each layer by layer
    for level in range(3):
        torch.testing.assert_close(error[:, 2 * level], (residual[:, level, :2] ** 2).sum(dim=1) / 2.0)
        torch.testing.assert_close(error[:, 2 * level + 1], (residual[:, level, 2:] ** 2).sum(dim=1) / 3.0)
    torch.testing.assert_close(feature_error(residual, [5]), residual.square().mean(dim=2))
    with pytest.raises(RuntimeError, match="sum exactly to 5"):
        feature_error(residual, (2, 2))


def test_joint_map_is_equation_11():
    kl, feature = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    expected = sum(0.3 * kl[:, t] + 0.7 * feature[:, t] for t in range(3)) / 3.0
    torch.testing.assert_close(joint_map(kl, feature, 0.3), expected)
    torch.testing.assert_close(joint_map(kl, feature, 1.0), kl.mean(dim=1))
    torch.testing.assert_close(joint_map(kl, feature, 0.0), feature.mean(dim=1))
    # with more layers, alpha still weighs all KL maps against all features
    layers = feature.repeat_interleave(2, dim=1)
    torch.testing.assert_close(joint_map(kl, layers, 0.3), expected)


def test_cosine_distance_of_equal_and_opposite_features():
    layers = [random(2, 6, 8, 8), random(2, 3, 4, 4)]
    equal = cosine_distance_map(layers, [2.0 * layer for layer in layers], (16, 12))  # length does not count
    torch.testing.assert_close(equal, torch.zeros(2, 16, 12), atol=1e-6, rtol=0.0)
    one_opposite = cosine_distance_map(layers, [layers[0], -layers[1]], (16, 12))
    torch.testing.assert_close(one_opposite, torch.full((2, 16, 12), 2.0))
    all_opposite = cosine_distance_map(layers, [-layer for layer in layers], (16, 12))
    torch.testing.assert_close(all_opposite, torch.full((2, 16, 12), 4.0))


def test_cosine_distance_keeps_its_place_and_its_precision():
    layer, other = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    other[0, :2, 2, 5] = -1.0  # orthogonal there: half of the channels turned
    distance = cosine_distance_map([layer], [other], (8, 8))
    assert float(distance[0, 2, 5]) == pytest.approx(1.0)
    assert float(distance.sum()) == pytest.approx(1.0, abs=1e-5)
    half = cosine_distance_map([layer.bfloat16()], [other.bfloat16()], (8, 8))
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="argument"):
        cosine_distance_map([layer], [other, other], (8, 8))


def test_max_score_after_eight_rounds_of_pooling():
    maps = random(2, 80, 70)
    kernel = np.ones((1, 1))
    for _ in range(8):
        kernel = signal.convolve2d(kernel, np.full((8, 8), 1.0 / 64.0))
    expected = [signal.fftconvolve(m.double().numpy(), kernel, mode="valid").max() for m in maps]
    np.testing.assert_allclose(max_score(maps, 8, 8).numpy(), expected, rtol=1e-4)
    assert torch.equal(max_score(maps), maps.flatten(1).max(dim=1).values)


def test_pooling_stops_at_maps_smaller_than_the_window():
    torch.testing.assert_close(max_score(torch.full((2, 5, 40), 1.5), 8, 8), torch.full((2,), 1.5))
    maps = random(1, 12, 12)  # one round leaves 5 x 5
    expected = torch.nn.functional.avg_pool2d(maps, 8, stride=1).max().view(1)
    torch.testing.assert_close(max_score(maps, 8, 8), expected)


def test_top_fraction_is_the_mean_of_the_highest_pixels():
    maps = torch.stack([torch.arange(100.0).view(10, 10), torch.arange(100.0).flip(0).view(10, 10) * 2.0])
    torch.testing.assert_close(top_fraction_score(maps, 0.05), torch.tensor([97.0, 194.0]))
    torch.testing.assert_close(top_fraction_score(maps, 1.0), maps.mean(dim=(1, 2)))
    torch.testing.assert_close(top_fraction_score(maps, 1e-6), max_score(maps))
    for fraction in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="`fraction`"):
            top_fraction_score(maps, fraction)


def test_contrast_lowers_what_lies_below_the_peak_and_keeps_the_score():
    maps = random(3, 5, 4)
    heightened = heighten_contrast(maps, 0.4)
    for one, before in zip(heightened, maps, strict=True):
        assert one.max() == before.max()  # to the bit: so scores, p-values and alarms stay
        above = before >= before.mean()
        torch.testing.assert_close(one[above], before[above] - 0.4 * (before.max() - before[above]))
        torch.testing.assert_close(one[~above], before[~above] - 0.4 * (before.max() - before.mean()))
        assert torch.equal(one.flatten().argsort(), before.flatten().argsort())
    assert torch.equal(heighten_contrast(maps, 0.0), maps)
    inside = torch.zeros(1, 5, 4, dtype=torch.bool)
    inside[:, 1:4, :3] = True
    found = heighten_contrast(maps, 0.4, inside)[:, 1:4, :3]
    torch.testing.assert_close(found, heighten_contrast(maps[:, 1:4, :3], 0.4))  # nothing outside counts


def test_contrast_of_maps_that_are_flat_or_not_finite():
    flat = torch.full((1, 224, 224), 1.7)  # whose mean is rounded
    assert torch.equal(heighten_contrast(flat, 0.2), flat)
    maps = torch.ones(1, 4, 4)
    maps[0, 1, 1] = torch.inf
    assert torch.equal(heighten_contrast(maps, 0.2), maps)
