"""Statistics against numpy, conformal guarantees by simulation, and float32 wherever a calibration goes."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import generator

from diffad import ScoreCalibration
from diffad.calibration.conformal import conformal_threshold
from diffad.calibration.residual_gaussian import RIDGE, residual_gaussian, residual_grid, residual_size
from diffad.moments import PRIOR_IMAGES, FeatureMoments, MomentSums, shrink


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def filled(num_categories: int = 2, num_scores: int = 9, rate: float = 0.1) -> ScoreCalibration:
    """A calibration with a value in every tensor."""
    calibration = ScoreCalibration(num_categories, (2, 4, 4), (3, 2, 2), num_scores, rate)
    for i, (_, buffer) in enumerate(calibration.named_buffers()):
        buffer.copy_(random(*buffer.shape, seed=i).abs() + 0.1)
    for category in range(num_categories):
        scores = 1.0 / 3.0 + torch.arange(num_scores) + category
        calibration.set_thresholds(category, scores, scores + 0.5)
    return calibration


# -- running sums ------------------------------------------------------------------------------------------------


def test_moments_are_numpys():
    values = random(37, 2, 3, 4) * 5.0 + 100.0  # far from zero, where sums of squares cancel
    moments = MomentSums()
    for batch in values.split(10):
        moments.update(batch)
    array = values.double().numpy()
    np.testing.assert_allclose(moments.mean(), array.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance(), array.var(axis=0), rtol=1e-9)
    np.testing.assert_allclose(moments.standard_deviation(0.0), array.std(axis=0), rtol=1e-9)


def test_half_precision_values_are_summed_exactly():
    values = (random(2000, 3, 3) + 10.0).bfloat16()
    moments = MomentSums()
    for batch in values.split(100):
        moments.update(batch)
    torch.testing.assert_close(moments.mean(), values.double().mean(dim=0))


# -- shrinkage ---------------------------------------------------------------------------------------------------


def test_shrinkage_goes_from_uniform_to_untouched():
    variance = random(2, 4, 4).exp().double()
    average = variance.mean(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(shrink(variance, 0, 8.0), average.expand_as(variance))
    torch.testing.assert_close(shrink(variance, 10**9, 8.0), variance)
    torch.testing.assert_close(shrink(variance, 5, 0.0), variance)
    torch.testing.assert_close(shrink(variance, 8, 8.0), (variance + average) / 2.0)
    # the average over positions stays
    torch.testing.assert_close(shrink(variance, 3, 8.0).mean(dim=(-2, -1)), average[..., 0, 0])


def test_shrinkage_of_few_images_makes_no_position_almost_constant():
    moments = MomentSums()
    moments.update(random(3, 50, 50))
    raw = moments.standard_deviation(0.0)
    shrunk = moments.standard_deviation()
    assert raw.min() < 0.05  # by chance, with three images
    assert shrunk.min() > 0.5
    assert PRIOR_IMAGES == 8.0


def test_the_deviation_of_a_single_image_is_that_between_its_places():
    values = random(1, 2, 5, 6)
    moments = MomentSums()
    moments.update(values)
    expected = values[0].double().std(dim=(1, 2), correction=0)
    torch.testing.assert_close(moments.standard_deviation(), expected[:, None, None].expand(2, 5, 6))


def test_constant_images_leave_a_positive_deviation():
    moments = MomentSums()
    moments.update(torch.full((5, 3, 4, 4), 2.5))
    deviation = moments.standard_deviation()
    assert deviation.isfinite().all()
    assert (deviation > 0).all()
    # one varying position among constant ones lends them its deviation
    values = torch.zeros(5, 4, 4)
    values[:, 0, 0] = random(5)
    moments = MomentSums()
    moments.update(values)
    assert moments.standard_deviation()[3, 3] > 0.01


# -- conformal thresholds and p-values ---------------------------------------------------------------------------


def test_threshold_is_the_order_statistic():
    scores = torch.arange(1.0, 100.0)  # 99 of them: rank 100 (1 - rate)
    assert conformal_threshold(scores, 0.1) == 90.0
    assert conformal_threshold(scores, 0.05) == 95.0
    assert conformal_threshold(scores, 0.01) == 99.0
    assert conformal_threshold(scores, 0.5) == 50.0
    assert conformal_threshold(scores[:10], 0.2) == 9.0  # ceil(11 * 0.8)


def test_too_few_images_for_the_rate_are_told():
    with pytest.warns(UserWarning, match=r"5 good images.*0\.01.*0\.17.*at least 99"):
        assert conformal_threshold(torch.arange(5.0), 0.01) == 4.0


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_rate_outside_of_zero_and_one_is_refused(rate):
    with pytest.raises(ValueError, match="`false_alarm_rate`"):
        conformal_threshold(torch.arange(5.0), rate)


@pytest.mark.parametrize(("count", "rate"), [(99, 0.1), (40, 0.05), (19, 0.2)])
def test_new_good_images_raise_no_more_alarms_than_promised(count, rate):
    rng = np.random.default_rng(0)
    calibration = ScoreCalibration(1, num_scores=count, false_alarm_rate=rate)
    alarms, pixels_alarm, below = [], [], []
    for _ in range(1500):
        # skewed, and exchangeable rather than independent: each trial has a level of its own
        scores = torch.from_numpy(rng.gamma(2.0, size=count + 50) * rng.uniform(0.5, 2.0)).float()
        calibration.set_thresholds(0, scores[:count], scores[:count] * 3.0)
        new = scores[count:]
        alarms.append((new > calibration.image_threshold[0]).float().mean())
        pixels_alarm.append((new * 3.0 > calibration.pixel_threshold[0]).float().mean())
        below.append((calibration.p_value(new, torch.zeros(50, dtype=torch.long)) <= rate).float().mean())
    noise = 0.01
    for shares in (alarms, pixels_alarm, below):
        assert rate - 1.0 / (count + 1) - noise < float(np.mean(shares)) < rate + noise


def test_p_values_of_good_images_are_uniform():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.exponential(size=20_199)).float()
    calibration = ScoreCalibration(1, num_scores=199, false_alarm_rate=0.05)
    p_values = []
    for block in scores[199:].view(100, 200):  # a calibration of its own for each block
        shuffled = scores[torch.from_numpy(rng.permutation(len(scores))[:199])]
        calibration.set_thresholds(0, shuffled, shuffled)
        p_values.append(calibration.p_value(block, torch.zeros(200, dtype=torch.long)))
    p_values = torch.cat(p_values)
    for level in (0.05, 0.1, 0.25, 0.5, 0.9):
        assert float((p_values <= level).float().mean()) == pytest.approx(level, abs=0.02)


def test_p_values_by_hand():
    calibration = ScoreCalibration(1, num_scores=4, false_alarm_rate=0.3)
    calibration.set_thresholds(0, [3.0, 1.0, 2.0, 2.0], [3.0, 1.0, 2.0, 2.0])
    scores = torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0, 3.5])
    p = calibration.p_value(scores, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(p, torch.tensor([5.0, 5.0, 4.0, 4.0, 2.0, 1.0]) / 5.0)
    assert p.dtype == torch.float32


def test_an_alarm_and_a_small_p_value_are_the_same_thing():
    scores = random(57)
    calibration = ScoreCalibration(1, num_scores=57, false_alarm_rate=0.1)
    calibration.set_thresholds(0, scores, scores)
    new = torch.cat([random(500, seed=1), scores])
    p = calibration.p_value(new, torch.zeros(len(new), dtype=torch.long))
    assert torch.equal(new > calibration.image_threshold[0], p <= 0.1)


def test_categories_of_different_sizes_are_padded():
    calibration = ScoreCalibration(2, num_scores=4, false_alarm_rate=0.5)
    calibration.set_thresholds(0, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    calibration.set_thresholds(1, [10.0, 20.0], [10.0, 20.0])
    assert calibration.normal_scores[1].isnan().tolist() == [False, False, True, True]
    p = calibration.p_value(torch.tensor([3.5, 3.5, 15.0]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(p, torch.tensor([2.0 / 5.0, 3.0 / 3.0, 2.0 / 3.0]))
    assert calibration.image_threshold.tolist() == pytest.approx([3.0, 20.0], rel=1e-5)


def test_fewer_scores_than_before_replace_all_of_them():
    calibration = ScoreCalibration(1, num_scores=4, false_alarm_rate=0.5)
    calibration.set_thresholds(0, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    calibration.set_thresholds(0, [7.0, 8.0], [7.0, 8.0])
    p = calibration.p_value(torch.tensor([7.5, 2.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(p, torch.tensor([2.0 / 3.0, 1.0]))


def test_before_any_threshold_nothing_is_anomalous():
    calibration = ScoreCalibration(2, (2, 4, 4), None, 3)
    assert calibration.image_threshold.tolist() == [float("inf")] * 2
    assert calibration.pixel_threshold.tolist() == [float("inf")] * 2
    assert calibration.residual_mean is None


# -- normalisation -----------------------------------------------------------------------------------------------


def test_maps_are_normalised_per_category_and_place():
    calibration = filled()
    maps, category = random(3, 2, 4, 4), torch.tensor([1, 0, 1])
    expected = torch.stack(
        [(m - calibration.map_mean[c]) / calibration.map_std[c] for m, c in zip(maps, (1, 0, 1), strict=True)]
    )
    torch.testing.assert_close(calibration.normalize(maps, category), expected)


MIXING = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.5, 2.0]])


def residuals(count: int, seed: int = 0, spread: float = 1.0, size: tuple[int, int] = (4, 5)) -> torch.Tensor:
    """Residuals (N, 3, h, w) of good images: channels that vary together, places of different mean and deviation."""
    places = (0.4 * random(1, *size, seed=1)).exp() * spread
    offset = random(3, *size, seed=2) * spread
    return torch.einsum("cd,ndhw->nchw", MIXING, random(count, 3, *size, seed=seed)) * places + offset


def fitted(calibration: ScoreCalibration, category: int, good: torch.Tensor, batch_size: int = 50) -> ScoreCalibration:
    grid = calibration.grid
    moments = FeatureMoments(grid[0] * grid[1], good.shape[1])
    for batch in good.split(batch_size):
        moments.update(F.adaptive_avg_pool2d(batch, grid).flatten(2))
    mean = good.double().mean(dim=0).flatten(1).mT
    calibration.set_residual_gaussian(category, *residual_gaussian(moments, mean, grid))
    return calibration


def distance_of(calibration: ScoreCalibration, *args, **kwargs) -> torch.Tensor:
    (distance,) = calibration.log_distances(*args, **kwargs)
    return distance.exp()


@pytest.mark.parametrize(
    ("size", "num_channels", "num_categories", "grid"),
    [
        ((32, 32), 176, 1, (32, 32)),
        ((64, 96), 176, 1, (32, 32)),
        ((32, 32), 176, 2, (16, 16)),
        ((28, 20), 176, 3, (14, 10)),
        ((7, 34), 176, 1, (7, 17)),
        ((64, 64), 1792, 1, (2, 2)),
        ((64, 64), 20, 1, (64, 64)),
        ((8, 8), 1792, 500, (1, 1)),
    ],
)
def test_the_grid_divides_the_map_and_is_bounded(size, num_channels, num_categories, grid):
    assert residual_grid(size, num_channels, num_categories) == grid


@pytest.mark.parametrize(
    ("size", "grid", "num_channels", "expected"),
    [
        ((32, 32), (16, 16), 352, (32, 32)),
        ((64, 64), (16, 16), 352, (32, 32)),
        ((28, 42), (14, 14), 352, (28, 14)),
        ((32, 32), (2, 2), 1792, (16, 16)),
        ((64, 64), (64, 64), 2000, (64, 64)),
        ((5, 3), (5, 3), 100_000, (5, 3)),
    ],
)
def test_positions_divide_the_map_and_are_bounded(size, grid, num_channels, expected):
    assert residual_size(size, grid, num_channels) == expected


def test_places_and_positions_are_measured_by_the_covariance_of_the_place():
    good, new = residuals(2000), residuals(6, seed=7)
    calibration = fitted(ScoreCalibration(1, (2, 4, 5), (3, 4, 5), residual_places=(2, 1)), 0, good)
    category = torch.zeros(6, dtype=torch.long)
    places, positions = (d.exp() for d in calibration.log_distances(new, category))
    assert (places.shape, positions.shape) == ((6, 2, 1), (6, 4, 5))
    averages = fitted(ScoreCalibration(1, (1, 2, 1), (3, 2, 1)), 0, F.adaptive_avg_pool2d(good, (2, 1)))
    torch.testing.assert_close(places, distance_of(averages, F.adaptive_avg_pool2d(new, (2, 1)), category))
    whitening = torch.zeros(2, 3, 3)
    whitening[:, torch.ones(3, 3).tril().bool()] = calibration.residual_whitening[0]
    offset = new - calibration.residual_mean[0].mT.unflatten(1, (4, 5))
    around = F.interpolate(places[:, None], (4, 5), mode="bilinear")[:, 0]
    for row, column in ((0, 0), (1, 4), (2, 3), (3, 1)):
        own = (offset[:, :, row, column] @ whitening[row // 2].mT).square().mean(dim=1)
        torch.testing.assert_close(positions[:, row, column], (own + around[:, row, column]) / 2.0)


def test_a_small_deviation_is_found_where_it_is_within_its_place():
    good = residuals(500, size=(4, 4))
    calibration = fitted(ScoreCalibration(1, (2, 4, 4), (3, 4, 4), residual_places=(2, 2)), 0, good)
    new = residuals(1, seed=7, size=(4, 4)) * 0.1 + 0.9 * good.mean(dim=0)
    new[:, :, 1, 2] += 3.0 * good.std(dim=0)[:, 1, 2] * torch.tensor([1.0, -1.0, 1.0])
    places, positions = calibration.log_distances(new, torch.tensor([0]))
    assert int(places.flatten().argmax()) == 1
    assert int(positions.flatten().argmax()) == 1 * 4 + 2
    alike = calibration.log_distances(good.mean(dim=0)[None], torch.tensor([0]))[0]
    assert (places - alike)[0, 0, 1] > 1.0


def test_the_distance_is_mahalanobis_with_enough_images():
    good, new = residuals(20_000), residuals(7, seed=7)
    calibration = fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, good, 1000)
    distance = distance_of(calibration, new, torch.zeros(7, dtype=torch.long))
    assert distance.shape == (7, 4, 5)
    for row, column in ((0, 0), (3, 1), (2, 4)):
        array = good[:, :, row, column].double().numpy()
        deviation = np.diag(array.std(axis=0))
        correlation = (1.0 - RIDGE) * np.corrcoef(array.T) + RIDGE * np.eye(3)
        inverse = np.linalg.inv(deviation @ correlation @ deviation)
        offset = new[:, :, row, column].double().numpy() - array.mean(axis=0)
        expected = np.einsum("nc,cd,nd->n", offset, inverse, offset) / 3.0
        np.testing.assert_allclose(distance[:, row, column], expected, rtol=0.01)


def test_good_images_lie_at_a_distance_of_one_at_every_place_and_category():
    calibration = ScoreCalibration(2, (1, 4, 5), (3, 4, 5))
    fitted(calibration, 0, residuals(500))
    fitted(calibration, 1, residuals(500, spread=20.0))
    category = torch.tensor([1, 0] * 150)
    new = torch.where(
        category.bool()[:, None, None, None],
        residuals(300, seed=7, spread=20.0),
        residuals(300, seed=8),
    )
    distance = distance_of(calibration, new, category)
    for index in (0, 1):
        assert 0.75 < float(distance[category == index].mean()) < 1.05  # the ridge takes some
    one_by_one = torch.cat([distance_of(calibration, new[i : i + 1], category[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(distance[:3], one_by_one)


def test_a_deviation_against_the_habit_of_the_channels_counts_more():
    calibration = fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, residuals(1000))
    mean = calibration.residual_mean.mT.unflatten(2, (4, 5))  # (1, C, h, w)
    along, against = mean.clone(), mean.clone()
    along[:, 0] += 1.0
    against[:, 0] += 1.0
    along[:, 1] += 0.9
    against[:, 1] -= 0.9
    first, second = (distance_of(calibration, r, torch.tensor([0])).mean() for r in (along, against))
    assert second > 5.0 * first


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_give_something_sane(count):
    calibration = fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, residuals(count))
    distance = distance_of(calibration, residuals(200, seed=7), torch.zeros(200, dtype=torch.long))
    assert 0.1 < float(distance.mean()) < 20.0


def test_constant_residuals_leave_it_finite():
    calibration = fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, torch.zeros(4, 3, 4, 5))
    assert distance_of(calibration, torch.zeros(1, 3, 4, 5), torch.tensor([0])).isfinite().all()


def test_a_second_fit_replaces_the_first():
    calibration = fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, residuals(100))
    new, category = residuals(2, seed=7), torch.zeros(2, dtype=torch.long)
    before = distance_of(calibration, new, category)
    fitted(calibration, 0, residuals(100, spread=10.0))
    assert (distance_of(calibration, new, category) - before).abs().min() > 1e-3


def test_it_can_be_pickled():
    calibration = fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, residuals(100))
    again = pickle.loads(pickle.dumps(calibration))
    new, category = residuals(2, seed=7), torch.zeros(2, dtype=torch.long)
    assert torch.equal(distance_of(again, new, category), distance_of(calibration, new, category))


def test_loaded_statistics_replace_those_that_were_used():
    first, second = (
        fitted(ScoreCalibration(1, (1, 4, 5), (3, 4, 5)), 0, residuals(100, seed, spread=1.0 + seed)) for seed in (0, 1)
    )
    new, category = residuals(3, seed=9), torch.tensor([0, 0, 0])
    distance_of(first, new, category)  # the whitening is unpacked
    first.load_state_dict(second.state_dict())
    assert torch.equal(distance_of(first, new, category), distance_of(second, new, category))


def test_another_resolution_reads_the_statistics_between_the_pixels():
    calibration = ScoreCalibration(1, (1, 4, 4), (2, 2, 2), 3)
    calibration.map_mean.fill_(2.0)
    calibration.map_std.fill_(4.0)
    calibration.set_residual_gaussian(0, torch.zeros(4, 2), torch.tensor([[2.0, 0.0, 2.0]]))
    category = torch.tensor([0])
    normalized = calibration.normalize(torch.full((1, 1, 9, 6), 10.0), category)
    torch.testing.assert_close(normalized, torch.full((1, 1, 9, 6), 2.0))
    for size in ((5, 3), (1, 1), (4, 4)):
        distance = distance_of(calibration, torch.ones(1, 2, *size), category)
        torch.testing.assert_close(distance, torch.full((1, 2, 2), 4.0))


# -- float32, always ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move", [lambda c: c.to(torch.bfloat16), lambda c: c.half(), lambda c: c.to("cpu", torch.float16)]
)
def test_half_precision_leaves_it_as_it_is(move):
    calibration = move(filled())
    expected = dict(filled().named_buffers())
    for name, buffer in calibration.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, expected[name]), name


def test_it_moves_to_another_device():
    calibration = filled().to("meta")
    assert {buffer.device.type for buffer in calibration.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in calibration.buffers()} == {torch.float32}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_saved_and_loaded_to_the_bit(tmp_path, dtype):
    calibration = filled()
    calibration.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ScoreCalibration.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    assert loaded.config.false_alarm_rate == 0.1
    expected = dict(calibration.named_buffers())
    assert expected.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, expected[name]), name
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".json"] == [".safetensors"]


def wide_residuals(count: int, num_channels: int = 40, seed: int = 0) -> torch.Tensor:
    """(N, C, 2, 2) of correlated channels: about as many as images, so that each image bends the covariance."""
    mixing = random(num_channels, num_channels, seed=1) / num_channels**0.5 + torch.eye(num_channels)
    return torch.einsum("cd,ndhw->nchw", mixing, random(count, num_channels, 2, 2, seed=seed)) + 0.3


def test_an_image_the_gaussian_has_seen_is_measured_by_the_others():
    good, category = wide_residuals(60), torch.zeros(1, dtype=torch.long)

    def without(i: int) -> torch.Tensor:
        calibration = fitted(ScoreCalibration(1, (1, 2, 2), (40, 2, 2)), 0, good[[j for j in range(60) if j != i]])
        return distance_of(calibration, good[i : i + 1], category)[0]

    expected = torch.stack([without(i) for i in range(60)])
    calibration = fitted(ScoreCalibration(1, (1, 2, 2), (40, 2, 2)), 0, good)
    seen = distance_of(calibration, good, category.expand(60), num_seen=60)
    taken_in = distance_of(calibration, good, category.expand(60))
    assert taken_in.mean() < 0.6 * expected.mean()
    torch.testing.assert_close(seen, expected, rtol=0.15, atol=0.0)
    torch.testing.assert_close(seen.mean(), expected.mean(), rtol=0.05, atol=0.0)


def test_so_are_the_positions_of_a_place():
    good, category = wide_residuals(60), torch.zeros(1, dtype=torch.long)
    shape = {"map_shape": (2, 2, 2), "residual_shape": (40, 2, 2), "residual_places": (1, 1)}

    def without(i: int) -> torch.Tensor:
        calibration = fitted(ScoreCalibration(1, **shape), 0, good[[j for j in range(60) if j != i]])
        return calibration.log_distances(good[i : i + 1], category)[1][0].exp()

    expected = torch.stack([without(i) for i in range(60)])
    calibration = fitted(ScoreCalibration(1, **shape), 0, good)
    seen = calibration.log_distances(good, category.expand(60), num_seen=60)[1].exp()
    torch.testing.assert_close(seen, expected, rtol=0.25, atol=0.0)
    torch.testing.assert_close(seen.mean(), expected.mean(), rtol=0.05, atol=0.0)
