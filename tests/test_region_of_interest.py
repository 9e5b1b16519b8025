"""Regions of interest: read from files, and what lies outside counts nowhere."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_extractor, tiny_pipeline, write_folder, write_png
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_diad import tiny_diad
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.calibration.recorded_settings import SMOOTHS_INSIDE
from diffad.cli import app
from diffad.data.regions_of_interest import read_roi
from diffad.images import ImageSequence
from diffad.moments import FeatureMoments, MomentSums
from diffad.predict import predict_files
from diffad.region_of_interest import hide_outside, inside_region, stand_ins
from diffad.resizing import region_at
from diffad.scoring import cut_small_peaks, gaussian_smooth, outline_by_positions, resize_maps
from diffad.training.data import load_region
from diffad.warn_once import warn_once

pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.filterwarnings("ignore:.*cannot vouch")]
SIZE = 32
MASK = np.zeros((SIZE, SIZE), bool)
MASK[:, 12:] = True
COCO = {
    "images": [{"id": 1, "width": 20, "height": 10}],
    "categories": [{"id": 1, "name": "bottle"}, {"id": 2, "name": "cable"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 9, 0, 9]]},
        {"image_id": 1, "category_id": 2, "segmentation": [[10, 0, 19, 0, 19, 9, 10, 9]]},
    ],
}


def of_features(**config) -> AnomalyDenoisePipeline:
    options = {"position_trust": 0.0, "weights": {"gaussian": 0.75, "nearest": 0.25}}
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=SIZE), **{**options, **config})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_clutter(pixels: np.ndarray, seed: int, until: int = 8) -> np.ndarray:
    """Something else at the left of an image, well outside the region."""
    changed = pixels.copy()
    changed[:, :until] = np.random.default_rng(seed).integers(0, 256, changed[:, :until].shape)
    return changed


# -- reading -----------------------------------------------------------------------------------------------------


def test_a_region_is_a_mask_or_polygons(tmp_path):
    path = write_png(tmp_path / "bottle.png", MASK.astype(np.uint8) * 255)
    for roi, category in ((MASK, None), (path, None), (tmp_path, "bottle"), (MASK.astype(np.uint8), "any")):
        assert np.array_equal(read_roi(roi, category), MASK)
    coco = tmp_path / "regions.json"
    coco.write_text(json.dumps(COCO), encoding="utf-8-sig")  # as some editors write it
    assert read_roi(coco, "bottle").sum() == 5 * 10
    assert read_roi(coco, "cable").sum() == 10 * 10
    assert read_roi(coco).sum() == 15 * 10
    assert read_roi(coco).shape == (10, 20)
    assert read_roi(np.ones((3000, 1500))).shape == (1024, 512)


def test_a_drawn_box_is_a_region(tmp_path):
    box = {"image_id": 1, "category_id": 1, "segmentation": [], "bbox": [2, 1, 4, 6]}
    (tmp_path / "box.json").write_text(json.dumps({**COCO, "annotations": [box]}))
    expected = np.zeros((10, 20), bool)
    expected[1:8, 2:7] = True
    assert np.array_equal(read_roi(tmp_path / "box.json", "bottle"), expected)


def test_polygons_are_those_of_the_image_that_they_are_drawn_on(tmp_path):
    """A file of a labelling tool lists all its images, of any sizes."""
    path = tmp_path / "regions.json"
    content = {**COCO, "images": [{"id": 7, "width": 400, "height": 300}, *COCO["images"]]}
    path.write_text(json.dumps(content))
    assert read_roi(path, "bottle").shape == (10, 20)
    content["annotations"] = [*COCO["annotations"], {**COCO["annotations"][0], "image_id": 7}]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="polygons on 2 images: keep those of one"):
        read_roi(path, "bottle")


def test_the_smallest_region_outlives_that_a_large_mask_is_reduced():
    mask = np.zeros((3000, 4000), bool)
    mask[1501, 2001] = True
    inside = read_roi(mask)
    assert inside.shape == (768, 1024)
    assert np.argwhere(inside).tolist() == [[384, 512]]


def test_a_model_of_one_category_takes_the_one_mask_of_a_folder(tmp_path):
    write_png(tmp_path / "bottle.png", MASK.astype(np.uint8) * 255)
    assert np.array_equal(read_roi(tmp_path), MASK)
    write_png(tmp_path / "cable.png", MASK.astype(np.uint8) * 255)
    with pytest.raises(FileNotFoundError, match="holds 2 masks, and this model has one category: give the mask's own"):
        read_roi(tmp_path)


def test_regions_of_other_sizes_count_alike_in_training_and_calibration(tmp_path):
    thin = np.zeros((400, 400), np.uint8)
    thin[201] = 255
    write_png(tmp_path / "a.png", MASK.astype(np.uint8) * 255)
    write_png(tmp_path / "b.png", thin)
    region = load_region(Namespace(roi=str(tmp_path)), ["a", "b"])
    pipeline = of_features(categories=["a", "b"])
    for name in ("a", "b"):
        pipeline.calibrate(textures(6, SIZE), category=name, roi=tmp_path, false_alarm_rate=0.3)
    assert region.shape == (2, SIZE, SIZE)
    assert region[1].any(dim=1).sum() == 1  # row
    assert torch.equal(region, pipeline.region.cpu())


def test_wrong_regions_are_named(tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    huge = {**COCO, "images": [{"id": 1, "width": 10**6, "height": 10**6}]}
    (tmp_path / "huge.json").write_text(json.dumps({**huge, "categories": [{"id": 1, "name": "screw"}]}))
    in_runs = {"image_id": 1, "category_id": 3, "segmentation": {"counts": "abc", "size": [10, 20]}}
    (tmp_path / "runs.json").write_text(
        json.dumps({**COCO, "categories": [{"id": 3, "name": "screw"}], "annotations": [in_runs]})
    )
    no_corner = {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 4, 0, float("nan"), 9]]}
    (tmp_path / "nan.json").write_text(
        json.dumps({**COCO, "categories": [{"id": 3, "name": "screw"}], "annotations": [no_corner]})
    )
    (tmp_path / "none.json").write_text(json.dumps({**COCO, "annotations": []}))
    with pytest.raises(ValueError, match=r"none.json has no polygon\.$"):
        read_roi(tmp_path / "none.json")
    screw = {"categories": [{"id": 3, "name": "screw"}]}
    elsewhere = {"image_id": 9, "category_id": 3, "segmentation": [[0, 0, 4, 0, 4, 9]]}
    two = [*COCO["images"], {"id": 2, "width": 30, "height": 30}]
    (tmp_path / "elsewhere.json").write_text(json.dumps({**COCO, **screw, "images": two, "annotations": [elsewhere]}))
    shares = {"image_id": 1, "category_id": 3, "segmentation": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.9]]}
    (tmp_path / "shares.json").write_text(json.dumps({**COCO, **screw, "annotations": [shares]}))
    of_screw = {"image_id": 1, "category_id": 3}
    for name, drawn in (("two", {"segmentation": [[0, 0, 4, 0]]}), ("nothing", {"segmentation": [], "bbox": []})):
        annotations = [{**of_screw, **drawn}]
        (tmp_path / f"{name}.json").write_text(json.dumps({**COCO, **screw, "annotations": annotations}))
    (tmp_path / "text.png").write_text("no picture")
    exact = {**COCO, "images": [{"id": 1, "width": 20.0, "height": 10.0}]}
    (tmp_path / "exact.json").write_text(json.dumps(exact))
    assert read_roi(tmp_path / "exact.json").shape == (10, 20)
    for roi, error, words in (
        (tmp_path / "runs.json", ValueError, r"a mask in run lengths: draw a polygon, or give a PNG"),
        (tmp_path / "nan.json", ValueError, "one of the polygons has a corner that is no number"),
        (tmp_path / "elsewhere.json", ValueError, "no image has the polygons' image_id, 9"),
        (tmp_path / "shares.json", ValueError, "at most 1: give them in pixels"),
        (tmp_path / "two.json", ValueError, "`roi`: .*one of the polygons has fewer than three corners"),
        (tmp_path / "nothing.json", ValueError, "`roi`: .*neither a polygon nor a box"),
        (tmp_path / "text.png", ValueError, "`roi`: .*text.png cannot be read as a mask"),
        ("", ValueError, "`roi` is an empty path"),
        (tmp_path / "none.png", FileNotFoundError, "`roi`: no file at"),
        (tmp_path, FileNotFoundError, "screw.png"),
        (tmp_path / "empty.json", ValueError, "is no COCO JSON"),
        (tmp_path / "huge.json", ValueError, r"is no COCO JSON.*an image of 1000000 x 1000000 pixels"),
        (tmp_path / "coco.json", ValueError, "no polygon of 'screw', but of bottle, cable"),
        (np.zeros((4, 4)), ValueError, "holds no pixel that counts"),
        (np.ones((4, 4, 3)), ValueError, r"must be a mask \(H, W\)"),
    ):
        with pytest.raises(error, match=words):
            read_roi(roi, "screw")


# -- tensors -----------------------------------------------------------------------------------------------------


def test_a_region_has_pixels_at_every_size():
    region = torch.zeros(1, 100, 100, dtype=torch.bool)
    region[0, 40:43, 50:52] = True
    for size in ((100, 100), (7, 9), (400, 200), (1, 1)):
        assert inside_region(region, torch.tensor([0]), size).any()
    assert inside_region(None, torch.tensor([0]), (3, 3)) is None


def test_what_is_hidden_has_the_mean_colour_of_what_is_not():
    images, inside = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[:, 1] = True
    hidden = hide_outside(images, inside)
    assert torch.equal(hidden[:, :, 1], images[:, :, 1])
    assert torch.allclose(hidden[:, :, 0], images[:, :, 1].mean(dim=2, keepdim=True).expand(-1, -1, 4))


def test_sums_of_places_outside_are_those_of_places_inside():
    inside = torch.tensor([False, True, True, False, False, True])
    index = stand_ins(inside)
    assert index[inside].tolist() == [1, 2, 5]
    assert inside[index].all()
    features, moments, sums = torch.randn(5, 3, 6), FeatureMoments(6, 3), MomentSums()
    moments.update(features)
    moments.replace_positions(index)
    assert torch.allclose(moments.mean(), features.double().mean(dim=0).mT[index])
    sums.update(features.unflatten(2, (2, 3)))
    sums.replace_positions(index)
    assert torch.allclose(sums.mean().flatten(1), features.double().mean(dim=0)[:, index])


# -- pipelines ---------------------------------------------------------------------------------------------------

PIPELINES = {
    "features": of_features,
    "denoiser": lambda: tiny_pipeline(sample_size=SIZE, weights={"kl": 1, "feature_error": 1, "gaussian": 1}),
    "fraction": lambda: of_features(score_fraction=0.1, contrast=0.2),
    "tiles": lambda: of_features(tile_size=SIZE),
    "diad": tiny_diad,
}


def calibrate(name: str, images: list[np.ndarray], **options) -> AnomalyDenoisePipeline:
    return PIPELINES[name]().calibrate(images, false_alarm_rate=0.25, generator=generator(), **options)


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_outside_counts(name):
    scale = 2 if name == "tiles" else 1  # tiles of the size of the smaller images
    size, until = scale * SIZE, 8 * scale
    good = textures(12, size)
    clean = calibrate(name, good, roi=MASK)
    cluttered = calibrate(name, [with_clutter(one, i, until) for i, one in enumerate(good)], roi=MASK)
    for key, values in clean.calibration.state_dict().items():
        torch.testing.assert_close(cluttered.calibration.state_dict()[key], values, rtol=0, atol=0, equal_nan=True)
    image = texture(50, size)
    outputs = [
        pipe(one, generator=generator())
        for pipe in (clean, cluttered)
        for one in (image, with_clutter(image, 99, until))
    ]
    for output in outputs[1:]:
        assert np.array_equal(output.anomaly_map, outputs[0].anomaly_map)
        assert np.array_equal(output.anomaly_score, outputs[0].anomaly_score)
    assert (outputs[0].anomaly_map[:, :, : 12 * scale] == 0).all()
    assert (outputs[0].anomaly_map[:, :, 12 * scale :] != 0).any()


def test_a_region_of_another_ratio_than_the_images_is_told():
    with pytest.warns(UserWarning, match=r"`roi` is 32 x 16 pixels, and one of the images 32 x 32: it is") as told:
        calibrate("features", textures(12, SIZE), roi=MASK[:, ::2])
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_roi(np.ones((70, 20000)), image_size=(70, 20000))


def test_a_defect_counts_inside_and_not_outside():
    pipe = calibrate("features", textures(30, SIZE), roi=MASK)
    outside, inside = texture(60, SIZE), texture(60, SIZE)
    outside[10:16, 0:6], inside[10:16, 20:26] = 0, 0
    output = pipe([outside, inside, texture(60, SIZE)])
    assert output.is_anomalous.tolist() == [False, True, False]
    assert not output.anomaly_mask[:, :, :12].any()
    assert output.anomaly_mask[1].any()
    assert output.anomaly_score[0] == pytest.approx(output.anomaly_score[2], rel=1e-5)


@pytest.mark.parametrize("name", ["features", "tiles"])
def test_the_false_alarm_rate_holds(name):
    alarms = []
    for seed in range(6):
        pipe = PIPELINES[name]()
        pipe.calibrate(textures(19, 40, 1000 * seed), textures(12, 40, 1000 * seed + 200), 0.2, roi=MASK)
        images = [with_clutter(one, i) for i, one in enumerate(textures(40, 40, 1000 * seed + 400))]
        alarms.append(pipe(images).is_anomalous.mean())
    assert 0.05 <= np.mean(alarms) <= 0.35  # 240 images; one set's own rate has a deviation of 0.09


def test_a_model_with_a_region_of_an_earlier_version_warns(caplog):
    warn_once.cache_clear()
    pipe = calibrate("features", textures(12, SIZE), roi=MASK)
    pipe(texture(1, SIZE))
    assert "other settings" not in caplog.text
    settings = {name: one for name, one in pipe.calibration.config.settings.items() if name != SMOOTHS_INSIDE}
    pipe.calibration.register_to_config(settings=settings)
    pipe(texture(1, SIZE))
    assert "calibrated with other settings (smooths_inside)" in caplog.text


def test_images_left_out_in_turn_tell_a_threshold_that_defects_pass():
    """What a Gaussian outside has not seen would be magnified a million times, and show inside."""
    found, alarms = [], []
    for seed in range(3):
        pipe = PIPELINES["features"]()
        pipe.calibrate(textures(40, SIZE, 1000 * seed), false_alarm_rate=0.1, leave_one_out=True, roi=MASK)
        alarms.append(pipe(textures(40, SIZE, 1000 * seed + 500)).is_anomalous.mean())
        defective = [texture(1000 * seed + 700 + i, SIZE) for i in range(20)]
        for pixels in defective:
            pixels[10:18, 18:26] = 0
        found.append(pipe(defective).is_anomalous.mean())
    assert np.mean(found) > 0.9
    assert np.mean(alarms) < 0.25


def test_nothing_outside_shows_inside_by_smoothing():
    maps, inside = torch.rand(2, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    inside[..., 2:6, 2:6] = True
    other = torch.where(inside, maps, 1e9)
    for smooth in (partial(gaussian_smooth, sigma=2.0), partial(resize_maps, size=(16, 16), sigma=2.0)):
        assert torch.equal(smooth(maps, inside=inside), smooth(other, inside=inside))
        assert torch.allclose(smooth(torch.ones_like(maps), inside=inside)[..., 6:10, 6:10], torch.ones(1), rtol=1e-5)


def test_peaks_and_small_regions_are_those_inside():
    inside = torch.zeros(1, 8, 8, dtype=torch.bool)
    inside[:, :, 4:] = True
    of_cells, of_positions = torch.zeros(2, 1, 8, 8)
    of_cells[0, 0, 0], of_cells[0, 5, 5], of_positions[0, 5, 5] = 9.0, 3.0, 1.0
    assert outline_by_positions(of_cells, of_positions, inside)[0, 5, 5] == 3.0  # the cells' peak inside
    maps = torch.zeros(1, 8, 8)
    maps[0, 3, 2:5] = 5.0  # two of the three pixels lie outside
    assert cut_small_peaks(maps, 3 / 64)[0, 3, 4] == 5.0
    assert cut_small_peaks(maps, 3 / 64, inside)[0, 3, 4] == 0.0


def test_a_region_is_saved_and_stays_until_another_is_given(tmp_path):
    pipe = calibrate("features", textures(12, SIZE), roi=MASK)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert np.array_equal(loaded(texture(70, SIZE)).anomaly_map, pipe(texture(70, SIZE)).anomaly_map)
    loaded.calibrate(textures(12, SIZE), false_alarm_rate=0.25)
    assert np.array_equal(loaded.region[0].numpy(), MASK)
    loaded.calibrate(textures(12, SIZE), false_alarm_rate=0.25, roi=~MASK)
    assert np.array_equal(loaded.region[0].numpy(), ~MASK)


def test_each_category_has_its_own(tmp_path):
    write_png(tmp_path / "stripes.png", MASK.astype(np.uint8) * 255)
    pipe = of_features(categories=["stripes", "plain"])
    options = {"false_alarm_rate": 0.25}
    pipe.calibrate(textures(8, SIZE), category="plain", **options)
    pipe.calibrate(textures(8, SIZE), category="stripes", roi=tmp_path, **options)
    maps = [pipe(texture(71, SIZE), category=name).anomaly_map[0] for name in ("stripes", "plain")]
    assert (maps[0][:, :12] == 0).all()
    assert (maps[1][:, :12] != 0).any()


def shown_inside(category: int, seed: int, outside: int) -> np.ndarray:
    """A texture or its negative in the middle, and a grey level around it."""
    pixels, pattern = np.full((SIZE, SIZE, 3), outside, np.uint8), texture(100 * category + seed, 16)
    pixels[8:24, 8:24] = pattern if category == 0 else 255 - pattern
    return pixels


def test_categories_are_told_apart_by_what_is_inside():
    middle = np.zeros((SIZE, SIZE), bool)
    middle[8:24, 8:24] = True
    pipe = of_features(categories=["a", "b"])
    for category, outside in ((0, 20), (1, 200)):
        good = [shown_inside(category, i, outside) for i in range(8)]
        pipe.calibrate(good, category=category, false_alarm_rate=0.25, roi=middle)
    images = [shown_inside(category, 50, outside) for category in (0, 1) for outside in (20, 120, 200)]
    assert pipe.recognise(ImageSequence(images), batch_size=4) == [0, 0, 0, 1, 1, 1]
    scores = pipe(images).anomaly_score
    assert scores[0] == scores[1] == scores[2]


def test_each_category_is_recognised_by_its_own_region(tmp_path):
    pipe = of_features(categories=["left", "right"])
    left, right = np.zeros((2, SIZE, SIZE), bool)
    left[:, :12], right[:, 20:] = True, True
    for name, roi in (("left", left), ("right", right)):
        good = [image if name == "left" else 255 - image for image in textures(8, SIZE)]
        pipe.calibrate(good, category=name, false_alarm_rate=0.25, roi=roi)
    pipe.save_pretrained(tmp_path)
    images = [texture(50, SIZE), 255 - texture(51, SIZE)]
    images += [image.copy() for image in images]
    for image in images[2:]:
        image[:, 12:20] = 255 - image[:, 12:20]  # where no category looks
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    assert loaded.recognise(ImageSequence(images), batch_size=3) == [0, 1, 0, 1]


def test_a_calibration_of_an_earlier_version_recognises_as_it_did(caplog):
    warn_once.cache_clear()
    pipe = of_features(categories=["a", "b"])
    for category, outside in ((0, 20), (1, 200)):
        good = [shown_inside(category, i, outside) for i in range(8)]
        pipe.calibrate(good, category=category, false_alarm_rate=0.25)
    region = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    region[:, 8:24, 8:24] = True
    pipe.calibration.register_buffer("region", region)
    images = ImageSequence([shown_inside(0, 50, 20), shown_inside(1, 50, 200)])
    assert pipe.recognise(images, batch_size=2) == [0, 1]
    assert "by an earlier version" in caplog.text
    with pytest.raises(ValueError, match=r"recognises_inside.*calibrate every category"):
        pipe.calibrate(textures(8, SIZE), category="a", false_alarm_rate=0.25)


def test_without_a_region_calibrations_are_as_they_were():
    pipe = calibrate("features", textures(12, SIZE))
    assert pipe.region is None
    assert "region" not in pipe.calibration.state_dict()
    everything = calibrate("features", textures(12, SIZE), roi=np.ones((4, 4)))
    assert np.array_equal(everything(texture(72, SIZE)).anomaly_map, pipe(texture(72, SIZE)).anomaly_map)


def test_commands_take_it(tmp_path):
    from diffad.training import fit, train_ddpm

    good: Path = write_folder(tmp_path / "good", 24, SIZE)
    mask = write_png(tmp_path / "roi.png", MASK.astype(np.uint8) * 255)
    backbone = ["--backbone", "test_resnet", "--backbone_weights", "random", "--feature_strides", 2, 4]
    shared = ["--train_data_dir", good, "--false_alarm_rate", 0.3, *backbone, "--resolution", 32, "--roi", mask]
    fit.main([str(one) for one in (*shared, "--output_dir", tmp_path / "fit")])
    steps = ["--preset", "cpu-64", "--max_train_steps", 2, "--train_batch_size", 4, "--lr_warmup_steps", 1]
    steps += ["--timesteps", 100, "--choose", "--output_dir", tmp_path / "train"]
    train_ddpm.main([str(one) for one in (*shared, *steps)])
    for name in ("fit", "train"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert np.array_equal(pipe.region[0].numpy(), MASK)
        assert (pipe(texture(80, SIZE)).anomaly_map[:, :, :12] == 0).all()
    other = write_png(tmp_path / "other.png", (~MASK).astype(np.uint8) * 255)
    arguments = ["calibrate", tmp_path / "fit", "--data", good, "--roi", other, "--false-alarm-rate", 0.3]
    assert CliRunner().invoke(app, [str(one) for one in arguments]).exit_code == 0
    assert (DiffusionPipeline.from_pretrained(tmp_path / "fit")(texture(80, SIZE)).anomaly_map[:, :, 12:] == 0).all()


def test_files_show_nothing_outside_of_a_region_at_their_own_size(tmp_path):
    pipe = calibrate("features", textures(12, SIZE), roi=MASK)
    picture = texture(60, (97, 90))
    picture[40:50, 28:60] = 0  # a defect across the region's edge, at 33.75 pixels
    path = write_png(tmp_path / "in" / "part.png", picture)
    predict_files(pipe, [path], tmp_path / "out")
    written = {name: np.asarray(Image.open(tmp_path / "out" / name / "part.png")) for name in ("maps", "masks")}
    expected = pipe(path)
    assert np.array_equal(written["masks"] > 0, expected.anomaly_mask[0])
    assert written["masks"][:, 33:].any()  # of pixel 33, half of the region's pixels that it meets count
    assert not written["masks"][:, :33].any()
    assert len(np.unique(written["maps"][:, :33])) == 1


@pytest.mark.parametrize("size", [(32, 32), (97, 90), (16, 24), (5, 7)])
def test_a_region_is_the_same_with_numpy_and_torch(size):
    region = np.zeros((31, 47), bool)
    region[3:17, 9:40], region[28, 2] = True, True
    expected = inside_region(torch.from_numpy(region)[None], torch.tensor([0]), size)[0]
    assert np.array_equal(region_at(region, size), expected)


def test_tiles_that_are_larger_than_a_region_learn_from_what_they_show():
    small = np.zeros((2 * SIZE, 2 * SIZE), bool)
    small[20:32, 24:44] = True
    good = textures(12, 2 * SIZE)
    pipe = of_features(tile_size=SIZE, weights={"gaussian": 1.0}).calibrate(good, false_alarm_rate=0.25, roi=small)
    whole = of_features(tile_size=SIZE, weights={"gaussian": 1.0}).calibrate(good, false_alarm_rate=0.25)
    # hidden positions are flat: with them the features would hardly vary, and each texture would look unusual
    spreads = [one.tile_calibration.feature_whitening[0, 0].float().abs().mean() for one in (pipe, whole)]
    assert spreads[0] < 3.0 * spreads[1]
    assert np.isfinite(pipe(texture(60, 2 * SIZE)).anomaly_score).all()


def test_diad_pools_the_score_of_a_region():
    maps, inside = torch.rand(2, 20, 20), torch.zeros(20, 20, dtype=torch.bool)
    inside[:, 8:] = True
    cleared = torch.where(inside, maps, 0.0)
    pipe = tiny_diad()
    pipe.register_to_config(pooling_size=3, pooling_rounds=1)
    pooled = torch.nn.functional.avg_pool2d(maps[:, None, :, 8:], 3, stride=1)
    score = pipe.image_scores(cleared, inside)
    assert (score >= pooled.flatten(1).amax(dim=1) - 1e-6).all()  # and windows that lie half inside
    assert (score < maps[:, :, 8:].flatten(1).amax(dim=1)).all()
    assert torch.equal(pipe.image_scores(torch.where(inside, maps, 7.0), inside), score)
    assert torch.equal(pipe.image_scores(maps, torch.ones_like(inside)), pipe.image_scores(maps))
