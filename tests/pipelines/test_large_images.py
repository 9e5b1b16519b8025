"""Images in tiles: calibrated, called, saved, and the rate that thresholds promise for images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_extractor, tiny_pipeline, write_mvtec, write_png
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_diad import tiny_diad
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.cli import app
from diffad.pipelines.large_images import MAX_STATISTICS_TILES
from diffad.predict import predict_files

SIZE = (72, 56)
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot vouch")


def with_dot(pixels: np.ndarray, row: int = 40, column: int = 30, side: int = 3) -> np.ndarray:
    changed = pixels.copy()
    changed[row : row + side, column : column + side] = 0
    return changed


def of_features(**config) -> AnomalyDenoisePipeline:
    options = {"position_trust": 0.0, "weights": {"gaussian": 0.5, "nearest": 0.5}, "tile_size": 16}
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=16), **{**options, **config})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def calibrated() -> AnomalyDenoisePipeline:
    return of_features().calibrate(textures(30, SIZE), false_alarm_rate=0.1)


def test_a_small_defect_is_found_in_tiles_and_lost_in_the_whole(calibrated):
    good, bad = texture(90, SIZE), with_dot(texture(90, SIZE))
    output = calibrated([good, bad])
    assert output.anomaly_map.shape == (2, *SIZE)
    assert output.is_anomalous.tolist() == [False, True]
    assert output.p_value[1] == pytest.approx(1 / 16)
    row, column = np.unravel_index(output.anomaly_map[1].argmax(), SIZE)
    assert abs(row - 41) <= 4
    assert abs(column - 31) <= 4
    whole = of_features(tile_size=None).calibrate(textures(30, SIZE), false_alarm_rate=0.1)
    of_whole = whole([good, bad]).anomaly_score
    assert output.anomaly_score[1] - output.anomaly_score[0] > 1.5 * (of_whole[1] - of_whole[0])


def test_contrast_is_that_of_the_image_and_not_of_each_tile(calibrated):
    images = [texture(99, SIZE), Image.fromarray(with_dot(np.asarray(texture(98, SIZE))))]
    plain = calibrated(images, match_input_resolution=False)
    heightened = of_features(contrast=0.3).calibrate(textures(30, SIZE), false_alarm_rate=0.1)(
        images, match_input_resolution=False
    )
    peak, mean = (getattr(plain.anomaly_map, name)(axis=(1, 2), keepdims=True) for name in ("max", "mean"))
    expected = plain.anomaly_map - 0.3 * np.minimum(peak - plain.anomaly_map, peak - mean)
    np.testing.assert_allclose(heightened.anomaly_map, expected, atol=1e-4)
    assert np.array_equal(heightened.anomaly_score, plain.anomaly_score)


def test_the_batch_of_tiles_changes_only_rounding(calibrated):
    images = [texture(91, SIZE), with_dot(texture(92, SIZE))]
    outputs = [calibrated(images, batch_size=size) for size in (1, 7, 64)]
    for output in outputs[1:]:
        assert np.allclose(output.anomaly_map, outputs[0].anomaly_map, rtol=1e-3, atol=1e-3)


def test_every_kind_of_input_gives_the_same_map(calibrated, tmp_path):
    pixels = texture(93, SIZE)
    path = write_png(tmp_path / "part.png", pixels)
    expected = calibrated(path).anomaly_map
    for image in (Image.open(path), pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert np.allclose(calibrated(image).anomaly_map, expected, atol=1e-4)


def test_sizes_may_differ_where_maps_come_as_they_were_blended(calibrated):
    images = [texture(94, SIZE), texture(95, (16, 16)), texture(96, (40, 90))]
    output = calibrated(images, match_input_resolution=False)
    assert output.anomaly_map.shape == (3, 18, 14)  # cells of 4 x 4 pixels of the first
    assert np.array_equal(calibrated(images[1]).anomaly_score, output.anomaly_score[1:2])
    with pytest.raises(ValueError, match="`image` holds images of different sizes"):
        calibrated(images)


def test_saved_and_loaded_to_the_bit(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    image = with_dot(texture(97, SIZE))
    assert loaded.tile_size == (16, 16)
    assert loaded.config.tile_overlap == 0.25
    assert np.array_equal(loaded(image).anomaly_map, calibrated(image).anomaly_map)
    assert np.array_equal(loaded(image).p_value, calibrated(image).p_value)


def test_the_false_alarm_rate_is_that_of_images():
    alarms = []
    for seed in range(4):
        pipeline = of_features(weights={"gaussian": 1.0})
        pipeline.calibrate(
            textures(19, (40, 40), 1000 * seed), textures(12, (40, 40), 1000 * seed + 200), false_alarm_rate=0.2
        )
        alarms.append(pipeline(textures(30, (40, 40), 1000 * seed + 400)).is_anomalous.mean())
    assert 0.05 <= np.mean(alarms) <= 0.35  # 120 images; one set's own rate has a deviation of 0.09


def test_maps_of_new_good_images_have_deviation_one(calibrated):
    maps = calibrated(textures(20, SIZE, 600)).anomaly_map
    assert 0.7 < maps.std() < 1.4


def test_what_is_wrong_at_large_shows_in_the_whole_image(calibrated):
    # each tile shows stripes as good ones do; of the whole, one half is another's
    image = np.asarray(Image.fromarray(texture(98, SIZE)).rotate(0)).copy()
    image[:, 28:] = (image[:, 28:] * 0.97).astype(np.uint8)
    output = calibrated([texture(98, SIZE), image])
    assert output.anomaly_score[1] > output.anomaly_score[0]


def test_a_denoiser_looks_at_tiles_as_well():
    pipeline = tiny_pipeline(sample_size=16, image_size=32, tile_size=32)
    pipeline.calibrate(textures(12, (64, 48)), false_alarm_rate=0.2, generator=generator())
    good, bad = texture(60, (64, 48)), with_dot(texture(60, (64, 48)), side=6)
    output = pipeline([good, bad], generator=[generator(), generator()])
    assert output.anomaly_score[1] > output.anomaly_score[0]
    assert np.array_equal(pipeline(bad, generator=generator()).anomaly_map[0], output.anomaly_map[1])
    single, several = (pipeline(bad, generator=generator(), batch_size=size).anomaly_map for size in (1, 4))
    assert np.allclose(single, several, rtol=1e-3, atol=1e-3)


def test_thresholds_come_of_the_noise_that_calls_have():
    pipeline = tiny_pipeline(sample_size=16, image_size=32, tile_size=32)
    good = textures(20, (64, 48))
    pipeline.calibrate(good[12:], good[:12], false_alarm_rate=0.2)
    scores = pipeline(good[12:], batch_size=2).anomaly_score
    np.testing.assert_allclose(np.sort(scores), pipeline.calibration.good_scores(0), rtol=1e-3, atol=1e-3)


def test_uncalibrated_maps_are_raw():
    output = tiny_pipeline(tile_size=16)(texture(0, (40, 24)), generator=generator())
    assert output.anomaly_map.shape == (1, 40, 24)
    assert np.isfinite(output.anomaly_map).all()
    assert output.is_anomalous is None


def test_what_waits_while_calibrating_is_bounded(monkeypatch):
    counted = []
    pipeline = of_features()
    measure = pipeline.measure_pixels

    def counting(pixel_values, category, generators, of_tiles=False):
        counted.append(len(pixel_values) if of_tiles else 0)
        return measure(pixel_values, category, generators, of_tiles)

    monkeypatch.setattr(pipeline, "measure_pixels", counting)
    monkeypatch.setattr("diffad.pipelines.large_images.MAX_STATISTICS_TILES", 12)
    monkeypatch.setattr("diffad.pipelines.large_images.MAX_PLACE_IMAGES", 2)
    assert MAX_STATISTICS_TILES == 512
    pipeline.calibrate(textures(1, SIZE, 50), textures(6, SIZE), false_alarm_rate=0.5)
    of_one_image = 6 * 5
    assert sum(counted) == 12 + 2 * of_one_image + of_one_image
    assert max(counted) <= 16


def test_statistics_of_tiles_are_small(calibrated):
    tiles = calibrated.tile_calibration
    assert tiles.feature_whitening.shape[:2] == (1, 1)  # one covariance for every position
    assert not tiles.has_thresholds


def test_each_category_keeps_its_tiles():
    pipeline = of_features(categories=["stripes", "columns"])
    turned = [np.ascontiguousarray(one.swapaxes(0, 1)) for one in textures(8, (56, 72))]
    pipeline.calibrate(textures(8, SIZE), category="stripes", false_alarm_rate=0.25)
    before = pipeline(texture(70, SIZE), category="stripes").anomaly_map
    pipeline.calibrate(turned, category="columns", false_alarm_rate=0.25)
    assert np.array_equal(pipeline(texture(70, SIZE), category="stripes").anomaly_map, before)
    scores = [pipeline(texture(70, SIZE), category=name).anomaly_score[0] for name in ("stripes", "columns")]
    assert scores[1] > scores[0]


def test_files_are_predicted_at_their_own_size(calibrated, tmp_path):
    write_png(tmp_path / "in" / "good.png", texture(90, SIZE))
    write_png(tmp_path / "in" / "bad.png", with_dot(texture(90, SIZE)))
    deep = with_dot(texture(90, SIZE))[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "in" / "deep.png")
    paths = sorted((tmp_path / "in").iterdir())
    counts = predict_files(calibrated, paths, tmp_path / "out")
    assert counts["anomalous"] == 2  # the grey one is of no camera that was calibrated
    assert counts["normal"] == 1
    for folder in ("maps", "masks", "overlays"):
        assert Image.open(tmp_path / "out" / folder / "bad.png").size == (SIZE[1], SIZE[0])
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "bad.png"))
    assert mask[41, 31] == 255
    assert np.array_equal(mask > 0, calibrated(tmp_path / "in" / "bad.png").anomaly_mask[0])


def test_another_resolution_is_refused(calibrated):
    with pytest.raises(ValueError, match="`processing_resolution` must be 16, or None"):
        calibrated(texture(0, SIZE), processing_resolution=32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile_size": 4}, "`tile_size` must be a side of at least 8"),
        ({"tile_size": (16, 16, 16)}, "`tile_size`"),
        ({"tile_overlap": 0.9}, r"`tile_overlap` must lie in \[0, 0.75\]"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        of_features(**options)


def test_tiles_are_asked_for_by_calibration_and_by_enough_images():
    whole = tiny_pipeline().calibrate(textures(8, SIZE), false_alarm_rate=0.3, generator=generator())
    tiled = tiny_pipeline(tile_size=16, calibration=whole.calibration)
    with pytest.raises(ValueError, match="`tile_size` is 16, but this pipeline was calibrated without tiles"):
        tiled(texture(0, SIZE))
    with pytest.raises(ValueError, match="`statistics_images`: 2 images tell too little of tiles"):
        of_features().calibrate(textures(2, SIZE), textures(2, SIZE), false_alarm_rate=0.5)
    for wrong in (256.0, [256], (), 7):
        with pytest.raises(ValueError, match="`tile_size` must be a side of at least 8 pixels"):
            tiny_pipeline(tile_size=wrong)


@pytest.fixture(scope="module")
def diad():
    pipeline = tiny_diad()
    pipeline.register_to_config(tile_size=16)
    return pipeline.calibrate(textures(12, (40, 56)), false_alarm_rate=0.2, generator=generator())


def test_diad_looks_at_tiles_as_well(diad):
    good, bad = texture(60, (40, 56)), with_dot(texture(60, (40, 56)), row=20, side=6)
    output = diad([good, bad], generator=[generator(), generator()])
    assert output.anomaly_map.shape == (2, 40, 56)
    assert output.reconstruction is None
    assert output.p_value is not None
    changed = np.abs(output.anomaly_map[1] - output.anomaly_map[0])
    assert changed[16:30, 26:40].mean() > changed.mean()
    single, several = (diad(bad, generator=generator(), batch_size=size).anomaly_map for size in (1, 5))
    assert np.allclose(single, several, rtol=1e-3, atol=1e-3)


def test_diad_in_tiles_keeps_the_rate_of_images(diad):
    assert diad(textures(30, (40, 56), 400), generator=generator()).is_anomalous.mean() <= 0.5
    assert (diad.calibration.num_good_images(0), diad.tile_calibration.has_thresholds) == (6, False)


def test_diad_in_tiles_is_saved_and_predicts(diad, tmp_path):
    diad.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.tile_size == (16, 16)
    image = with_dot(texture(61, (40, 56)), row=20)
    expected = diad(image, generator=generator())
    assert np.allclose(loaded(image, generator=generator()).anomaly_map, expected.anomaly_map, atol=1e-4)
    path = write_png(tmp_path / "in" / "part.png", image)
    assert sum(predict_files(loaded, [path], tmp_path / "out").values()) == 1
    assert Image.open(tmp_path / "out" / "maps" / "part.png").size == (56, 40)


@pytest.mark.parametrize(
    "options", [{"num_inference_steps": 3}, {"strength": 0.5}, {"latents": torch.zeros(1, 4, 8, 8)}]
)
def test_tiles_of_diad_take_no_other_reverse_process(diad, options):
    with pytest.raises(
        ValueError, match=f"`{next(iter(options))}` cannot be given where images are looked at in tiles"
    ):
        diad(texture(0, (40, 56)), **options)


@pytest.mark.parametrize("alike", [True, False])
def test_places_have_statistics_of_their_own_where_good_images_agree(alike):
    rng = np.random.default_rng(0)

    def image(seed: int) -> np.ndarray:
        pixels = texture(seed, SIZE)
        row = 16 if alike else int(rng.integers(0, SIZE[0] - 8))
        pixels[row : row + 8] = 255 - pixels[row : row + 8] // 4
        return pixels

    pipeline = of_features(weights={"gaussian": 1.0})
    pipeline.calibrate([image(i) for i in range(30)], false_alarm_rate=0.2)
    of_places = pipeline.tile_calibration.place_mean
    assert bool(of_places.std() > 1e-6) == alike
    assert 0.5 < pipeline([image(i) for i in range(100, 110)]).anomaly_map.std() < 2.0


def test_the_maps_last_cell_is_cut_off_where_the_image_ends():
    size = (70, 54)  # 17.5 cells of 4 pixels, and 13.5
    pipeline = of_features().calibrate(textures(12, size), false_alarm_rate=0.25)
    image = with_dot(texture(97, size), row=60, column=44)
    cells, pixels = (pipeline(image, match_input_resolution=match).anomaly_map[0] for match in (False, True))
    assert cells.shape == (18, 14)
    expected = torch.nn.functional.interpolate(torch.from_numpy(cells)[None, None], (72, 56), mode="bilinear")
    assert np.allclose(pixels, expected[0, 0, :70, :54].numpy(), atol=1e-4)


def test_files_and_calls_have_the_same_mask_where_an_image_ends_within_a_cell(calibrated, tmp_path):
    path = write_png(tmp_path / "in" / "part.png", with_dot(texture(90, (70, 54))))
    predict_files(calibrated, [path], tmp_path / "out")
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "part.png")) > 0
    assert mask.any()
    assert np.array_equal(mask, calibrated(path).anomaly_mask[0])


@pytest.mark.usefixtures("fresh_accelerate")
def test_commands_take_diad_in_tiles(tmp_path):
    pipeline = tiny_diad()
    pipeline.register_to_config(tile_size=16)
    pipeline.save_pretrained(tmp_path / "model")  # calibrated for whole images, so far
    data = write_mvtec(tmp_path / "data", {"tile": 12}, size=40)
    for command in (
        ["calibrate", tmp_path / "model", "--data", data, "--false-alarm-rate", 0.25],
        ["evaluate", tmp_path / "model", "--data", data, "--output", tmp_path / "report.json"],
    ):
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"]["tile"]["image_auroc"] is not None
    assert len(report["scores"]["tile"]) == 7
