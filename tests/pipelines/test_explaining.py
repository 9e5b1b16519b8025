"""What a score is made of adds up, and points at what was done to the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_extractor, tiny_pipeline, write_png

from diffad import AnomalyDenoisePipeline
from diffad.pipelines.explaining import nearest_shares
from diffad.warn_once import warn_once


@pytest.fixture(scope="module")
def of_features() -> AnomalyDenoisePipeline:
    weights = {"gaussian": 0.75, "nearest": 0.25}
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), position_trust=0.0, weights=weights)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.calibrate(textures(20, 32, first_seed=100), textures(30, 32), false_alarm_rate=0.1)


def marked(row: int, column: int, size: int = 64) -> np.ndarray:
    image = texture(900, size)
    image[row : row + 12, column : column + 12] = 0
    return image


def test_the_peak_lies_on_the_defect_in_the_images_own_pixels(of_features):
    for row, column in ((8, 40), (40, 8)):
        told = of_features.explain(marked(row, column))
        assert row - 8 <= told.peak[0] < row + 20
        assert column - 8 <= told.peak[1] < column + 20
        output = of_features(marked(row, column))
        assert told.score == pytest.approx(float(output.anomaly_score[0]), rel=1e-5)


def test_maps_add_up_to_the_score(of_features):
    told = of_features.explain(marked(8, 40))
    assert set(told.maps) == {"gaussian", "nearest"}
    assert sum(told.maps.values()) == pytest.approx(told.score, rel=1e-4)
    assert set(told.layers) == {"gaussian", "nearest"}
    for shares in told.layers.values():
        assert sum(shares.values()) == pytest.approx(1.0, rel=1e-4)
    assert set(told.layers["gaussian"]) == {"stride 2", "stride 4"}
    assert told.levels == {}
    assert told.nearest == []


@pytest.mark.parametrize("config", [{}, {"weights": {"kl": 1.0, "feature_error": 2.0, "gaussian": 1.0}}])
def test_noise_levels_are_told_apart(config):
    pipeline = tiny_pipeline(timesteps=[5, 100], **config).calibrate(textures(20), false_alarm_rate=0.1)
    image = texture(900, defect=True)
    told = pipeline.explain(image, generator=generator())
    expected = pipeline(image, generator=generator(), match_input_resolution=False)
    assert told.score == pytest.approx(float(expected.anomaly_score[0]), rel=1e-5)
    plain = pipeline(image, match_input_resolution=False)  # whose noise is the same each time
    assert pipeline.explain(image).score == pytest.approx(float(plain.anomaly_score[0]), rel=1e-5)
    assert {"kl at 5", "kl at 100", "feature_error"} <= set(told.maps)
    assert sum(told.maps.values()) == pytest.approx(float(expected.anomaly_map.max()), rel=1e-4)
    assert set(told.levels) == {"at 5", "at 100"}
    assert sum(told.levels.values()) == pytest.approx(1.0, rel=1e-4)
    assert sum(told.layers["feature_error"].values()) == pytest.approx(1.0, rel=1e-4)
    good = [texture(7), image, texture(8)]
    assert pipeline.explain(image, good_images=good, num_nearest=1).nearest == [(1, pytest.approx(0.0, abs=1e-3))]


def test_a_change_of_one_layer_alone_is_told_of_it(of_features):
    """Features that leave the mean in the channels of one stride only, along a direction of their own."""
    channels = of_features.feature_extractor.layer_channels
    patch = of_features.calibration.coreset[0, 5].float()
    layers = of_features.patch_layers
    patch[: channels[layers[0]]] += 0.05
    shares = nearest_shares(of_features, patch[None, :, None, None], 0, (0.5, 0.5))
    stride = of_features.feature_extractor.layer_strides[layers[0]]
    assert shares[f"stride {stride}"] == pytest.approx(1.0)


def test_layers_share_a_distance_that_is_taken_along_principal_directions():
    extractor = tiny_extractor((8, 16), image_size=64)
    pipeline = AnomalyDenoisePipeline(None, None, extractor, position_trust=0.0, weights={"nearest": 1.0})
    pipeline.calibrate(textures(20, 64), false_alarm_rate=0.1)
    assert pipeline.calibration.patch_directions.shape[2] < sum(extractor.layer_channels)
    shares = pipeline.explain(marked(20, 24)).layers["nearest"]
    assert shares.keys() == {"stride 8", "stride 16"}
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-4)

    # the nearest lies along one direction from the patch, whose squares say how much of it is in which channels
    directions = pipeline.calibration.patch_directions[0]
    patch = torch.randn(len(directions), generator=generator())
    pipeline.calibration.coreset[0] = 100.0
    pipeline.calibration.coreset[0, 7] = (patch @ directions).half()
    pipeline.calibration.coreset[0, 7, 3] += 2.0
    fine = directions[: extractor.layer_channels[0], 3].square().sum()
    shares = nearest_shares(pipeline, patch[None, :, None, None], 0, (0.5, 0.5))
    assert 0.01 < fine < 0.99
    assert shares["stride 8"] == pytest.approx(float(fine), abs=0.02)


def test_the_good_image_most_like_it_comes_first(of_features, tmp_path):
    shades = [(texture(i, 32) * (0.5 + 0.1 * i)).astype(np.uint8) for i in range(6)]
    good = [write_png(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(shades)]
    image = shades[3].copy()
    image[4:8, 4:8] = 0
    told = of_features.explain(image, good_images=[str(path) for path in good], num_nearest=2, batch_size=4)
    assert told.nearest[0][0] == 3
    assert len(told.nearest) == 2
    assert told.nearest[0][1] < told.nearest[1][1]
    itself = of_features.explain(str(good[2]), good_images=[str(path) for path in good])
    assert itself.nearest[0] == (2, pytest.approx(0.0, abs=1e-3))


def test_outside_of_the_region_nothing_is_the_peak():
    weights = {"gaussian": 1.0}
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), position_trust=0.0, weights=weights)
    inside = np.zeros((32, 32), bool)
    inside[:, 16:] = True
    pipeline.calibrate(textures(20, 32), false_alarm_rate=0.1, roi=inside)
    assert pipeline.explain(marked(8, 4)).peak[1] >= 32


def test_what_cannot_be_explained_is_refused(of_features):
    with pytest.raises(ValueError, match="`image` must be one image, but holds 2"):
        of_features.explain(textures(2, 32))
    with pytest.raises(ValueError, match=r"`good_images` must be a sequence.*find_images"):
        of_features.explain(texture(0), good_images="good_parts")
    with pytest.raises(ValueError, match="calibrated"):
        tiny_pipeline().explain(texture(0))
    for wrong in ({"num_nearest": -1}, {"num_nearest": "3"}, {"batch_size": 0}, {"generator": 3}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            of_features.explain(texture(0), **wrong)
    assert isinstance(of_features.explain(torch.zeros(3, 32, 32)).score, float)


def test_it_checks_the_calibration_as_a_call_does(caplog):
    warn_once.cache_clear()
    unified = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), categories=["a", "b"])
    unified.calibrate(textures(12, 32), category="a", false_alarm_rate=0.3)
    with pytest.raises(ValueError, match=r"'b' is not calibrated.*category='b'"):
        unified.explain(texture(0, 32), category="b")
    unified.explain(texture(0, 32), category="a")
    assert "other settings" not in caplog.text
    unified.register_to_config(feature_sigma=3.0)
    unified.explain(texture(0, 32), category="a")
    assert "calibrated with other settings (feature_sigma)" in caplog.text
