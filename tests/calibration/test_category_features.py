"""Which category an image is of: by the features' Gaussians, and in a call that names none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import generator, textures, tiny_pipeline

from diffad import AnomalyDenoisePipeline
from diffad.calibration.category_features import nearest_category


def test_the_nearest_counts_deviations_and_not_lengths():
    means = torch.tensor([[0.0, 0.0], [4.0, 1.0]])
    covariances = torch.diag(torch.tensor([100.0, 0.01])).expand(2, 2, 2)
    # nearer to the first by length, to the second by its second channel, which hardly varies
    features = torch.tensor([[0.0, 0.9], [4.0, 0.1]])
    assert nearest_category(features, means, covariances).tolist() == [1, 0]


def test_a_category_that_is_not_calibrated_is_never_taken():
    means = torch.tensor([[float("nan")] * 2, [9.0, 9.0], [0.0, 0.0]])
    covariances = torch.eye(2).expand(3, 2, 2).clone()
    covariances[0] = float("nan")
    assert nearest_category(torch.tensor([[8.0, 8.0], [1.0, 1.0]]), means, covariances).tolist() == [1, 2]
    with pytest.raises(ValueError, match="`category` is needed: no category has been calibrated"):
        nearest_category(torch.zeros(1, 2), means[:1], covariances[:1])


def bright(first_seed: int, count: int) -> list[np.ndarray]:
    return [255 - image // 4 for image in textures(count, first_seed=first_seed)]


def dark(first_seed: int, count: int) -> list[np.ndarray]:
    return [image // 4 for image in textures(count, first_seed=first_seed)]


def test_a_call_without_a_category_takes_the_nearest(tmp_path):
    pipe = tiny_pipeline(categories=["bright", "dark"])
    for name, images in (("bright", bright(0, 12)), ("dark", dark(0, 12))):
        pipe.calibrate(images, false_alarm_rate=0.2, category=name, generator=generator())
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = [*bright(50, 3), *dark(50, 3)]
    expected = loaded(images, category=["bright"] * 3 + ["dark"] * 3, generator=generator())
    found = loaded(images, batch_size=4, generator=generator())
    np.testing.assert_allclose(found.anomaly_score, expected.anomaly_score, rtol=1e-4, atol=1e-4)
    # one image does not depend on those beside it
    alone = loaded(images[5], generator=generator())
    of_dark = loaded(images[5], category="dark", generator=generator())
    np.testing.assert_array_equal(alone.anomaly_map, of_dark.anomaly_map)


def test_an_earlier_calibration_asks_for_the_category():
    pipe = tiny_pipeline(categories=["bright", "dark"])
    pipe.calibrate(dark(0, 8), false_alarm_rate=0.2, category="dark", generator=generator())
    pipe.calibration.category_mean = None
    with pytest.raises(ValueError, match=r"`category` is needed: this model knows bright, dark.*calibrate it again"):
        pipe(dark(50, 1))


def test_a_category_that_nothing_is_kept_of_is_asked_for():
    pipe = tiny_pipeline(categories=["bright", "dark"])
    for name, images in (("bright", bright(0, 8)), ("dark", dark(0, 8))):
        pipe.calibrate(images, false_alarm_rate=0.3, category=name, generator=generator())
    pipe.calibration.category_mean[1] = float("nan")
    with pytest.raises(ValueError, match="`category` is needed"):
        pipe(dark(50, 1))
