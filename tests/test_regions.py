"""Defects as a list: regions of a mask, and the files that `diffad predict` writes of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, textures, tiny_pipeline, write_folder, write_png
from PIL import Image
from scipy import ndimage

from diffad import AnomalyDenoisePipeline
from diffad.predict import find_images, predict_files
from diffad.regions import Region, find_regions, level_of_area, outlined_regions, run_lengths, without_small_regions
from diffad.scoring import cut_small_peaks


@pytest.fixture(scope="module")
def strict():
    """A pipeline that every image alarms, and that outlines all but what is far below the mean of good images."""
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.calibration.image_threshold.fill_(-1e9)
    pipeline.calibration.pixel_threshold.fill_(-3.0)
    return pipeline


def read_table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "regions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_regions_have_their_box_area_peak_and_mean():
    anomaly_map = np.zeros((6, 8), np.float32)
    anomaly_map[1, 2:5] = (2.0, 4.0, 3.0)
    anomaly_map[2, 5] = 7.0  # touches the corner of the last
    anomaly_map[5, 0] = 5.0
    assert find_regions(anomaly_map, anomaly_map > 1.0) == [
        Region(box=(2, 1, 4, 2), area=4, peak=7.0, mean=4.0),
        Region(box=(0, 5, 1, 1), area=1, peak=5.0, mean=5.0),
    ]
    assert find_regions(anomaly_map, anomaly_map > 9.0) == []


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_run_lengths_are_those_of_coco(density):
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in ((7, 11), (1, 5), (9, 1)):
        defect = rng.random(size) < density
        found = outlined_regions(defect.astype(np.float32), defect)
        together = np.zeros(size, np.uint8)
        for region, inside in found:
            x, y, _, _ = region.box
            encoded = mask.frPyObjects({"counts": run_lengths(inside, x, y, *size), "size": list(size)}, *size)
            decoded = mask.decode(encoded)
            assert mask.area(encoded) == region.area
            assert mask.toBbox(encoded).tolist() == list(region.box)
            together += decoded
        assert np.array_equal(together, defect)  # each pixel in one region


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_an_output_lists_the_regions_of_its_masks(strict, output_type):
    output = strict(textures(2), output_type=output_type)
    assert [len(one) > 0 for one in output.regions] == [True, True]
    for anomaly_map, mask, regions in zip(output.anomaly_map, output.anomaly_mask, output.regions, strict=True):
        assert regions == find_regions(np.asarray(anomaly_map), np.asarray(mask))
        assert sum(region.area for region in regions) == np.asarray(mask).sum()
    assert tiny_pipeline()(textures(2), output_type=output_type).regions is None


def test_an_image_without_an_alarm_has_no_regions(strict):
    strict.calibration.image_threshold.fill_(1e9)
    try:
        assert strict(textures(2)).regions == [[], []]
    finally:
        strict.calibration.image_threshold.fill_(-1e9)


def test_predict_writes_a_table_and_coco_of_what_the_masks_show(strict, tmp_path):
    coco_tools = pytest.importorskip("pycocotools.coco")
    parts = write_folder(tmp_path / "parts", 2)
    write_png(parts / "sub" / "wide.png", textures(1, (20, 30))[0])
    turned = Image.fromarray(textures(1, (14, 22))[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by a quarter
    turned.save(parts / "turned.jpg", exif=exif)
    (parts / "broken.png").write_bytes(b"")
    out = tmp_path / "out"
    predict_files(strict, find_images([parts]), out, batch_size=2)

    coco = coco_tools.COCO(out / "regions.json")
    images = {one["file_name"]: one for one in coco.loadImgs(coco.getImgIds())}
    assert sorted(images) == ["000.png", "001.png", "sub/wide.png", "turned.jpg"]
    assert (images["turned.jpg"]["width"], images["turned.jpg"]["height"]) == (14, 22)
    table = read_table(out)
    with open(out / "scores.csv", newline="") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    for name, image in images.items():
        row = rows[Path(name).name]
        mask = np.asarray(Image.open(out / "masks" / row["picture"])) > 0
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert found
        assert np.array_equal(sum(coco.annToMask(one) for one in found), mask)
        low, high = float(row["map_low"]), float(row["map_high"])
        stored = np.asarray(Image.open(out / "maps" / row["picture"])) / 65535 * (high - low) + low
        of_table = [one for one in table if one["image"] == row["path"]]
        for one, listed in zip(found, of_table, strict=True):
            inside = coco.annToMask(one) > 0
            assert one["area"] == inside.sum() == int(listed["area"])
            assert one["bbox"] == [int(listed[column]) for column in ("x", "y", "width", "height")]
            np.testing.assert_allclose(one["score"], stored[inside].max(), atol=1e-3 * (high - low))
            np.testing.assert_allclose(float(listed["mean"]), stored[inside].mean(), atol=1e-3 * (high - low))
    loaded = coco.loadRes([{**one} for one in coco.loadAnns(coco.getAnnIds())])  # as results of a detector
    assert len(loaded.anns) == len(table)


def test_regions_of_a_killed_run_are_taken_up(strict, tmp_path):
    parts = write_folder(tmp_path / "parts", 4)
    paths, out = find_images([parts]), tmp_path / "out"
    predict_files(strict, paths, tmp_path / "whole", batch_size=1)
    predict_files(strict, paths[:2], out, batch_size=1)
    lines = (out / "regions.jsonl").read_text().splitlines(keepends=True)
    # killed after the regions of an image, and before its score
    (out / "scores.csv").rename(out / "scores.partial.csv")
    (out / "regions.jsonl").write_text("".join(lines) + lines[0].replace("000.png", "002.png") + lines[1][:40])
    assert predict_files(strict, paths, out, batch_size=1)["skipped"] == 2
    assert read_table(out) == read_table(tmp_path / "whole")
    assert (out / "regions.json").read_text() == (tmp_path / "whole" / "regions.json").read_text()
    # a file that was replaced has the regions of the new one
    write_png(parts / "001.png", textures(1, (9, 9), first_seed=50)[0])
    predict_files(strict, paths, out)
    images = json.loads((out / "regions.json").read_text())["images"]
    assert [(one["file_name"], one["height"]) for one in images if one["height"] != 16] == [("001.png", 9)]
    assert len(images) == 4


def test_a_run_without_thresholds_or_alarms(strict, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 2)])
    predict_files(tiny_pipeline(), paths, tmp_path / "raw")
    assert not list((tmp_path / "raw").glob("regions.*"))
    calm = tiny_pipeline()
    calm.calibrate(textures(12), false_alarm_rate=0.25)
    calm.calibration.image_threshold.fill_(1e9)
    predict_files(calm, paths, tmp_path / "calm")
    assert read_table(tmp_path / "calm") == []
    found = json.loads((tmp_path / "calm" / "regions.json").read_text())
    assert (len(found["images"]), found["annotations"]) == (2, [])


def test_the_level_of_an_area_is_the_highest_at_which_a_region_has_it():
    rng = np.random.default_rng(0)
    for size in ((12, 17), (1, 9), (5, 5)):
        rough = rng.standard_normal(size).astype(np.float32)
        for anomaly_map in (rough, ndimage.gaussian_filter(rough, 1.5), np.zeros(size, np.float32)):
            for num_pixels in (1, 2, 4, 7, anomaly_map.size):
                levels = np.unique(anomaly_map)
                areas = [max(r.area for r in find_regions(anomaly_map, anomaly_map >= level)) for level in levels]
                expected = levels[np.flatnonzero(np.array(areas) >= num_pixels)[-1]]
                assert level_of_area(anomaly_map, num_pixels) == expected


def test_small_regions_leave_a_mask_and_small_peaks_a_map():
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[0, 0] = 9.0
    anomaly_map[4:6, 4:6] = 5.0
    anomaly_map[4, 4] = 6.0
    mask = without_small_regions(anomaly_map > 1.0, 0.04)
    assert [region.box for region in find_regions(anomaly_map, mask)] == [(4, 4, 2, 2)]
    assert not without_small_regions(anomaly_map > 5.5, 0.04).any()
    assert find_regions(anomaly_map, without_small_regions(anomaly_map > 1.0, 0.0))[0].peak == 9.0
    maps = torch.from_numpy(anomaly_map)[None]
    assert torch.equal(cut_small_peaks(maps, 0.04), maps.clamp(max=5.0))  # four pixels stand together there
    assert torch.equal(cut_small_peaks(maps, 0.0), maps)
    assert torch.equal(cut_small_peaks(3.0 * maps, 0.04), 3.0 * cut_small_peaks(maps, 0.04))


def test_a_smallest_area_is_dropped_before_thresholds_are_set(tmp_path):
    """The rate holds for what remains: the scores of calibration are those of calls, and a speck raises no alarm."""
    share, images = 0.1, textures(60, first_seed=100)
    plain, with_area = tiny_pipeline(kl_sigma=0.0, feature_sigma=0.0), tiny_pipeline(kl_sigma=0.0, feature_sigma=0.0)
    plain.calibrate(images, false_alarm_rate=0.1, generator=generator())
    with_area.calibrate(images, false_alarm_rate=0.1, generator=generator(), smallest_area=share)
    assert with_area.calibration.image_threshold < plain.calibration.image_threshold
    with_area.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    output = loaded(textures(40, first_seed=200), output_type="pt")
    for anomaly_map, score in zip(output.anomaly_map.numpy(), output.anomaly_score, strict=True):
        assert float(score) == anomaly_map.max() == level_of_area(anomaly_map, 26)  # a tenth of 256 pixels
    loaded.calibration.image_threshold.fill_(-1e9)
    loaded.calibration.pixel_threshold.fill_(0.5)
    regions = loaded(textures(40, first_seed=200)).regions
    assert min(region.area for one in regions for region in one) >= 26
    predict_files(loaded, find_images([write_folder(tmp_path / "parts", 4)]), tmp_path / "out")
    assert all(int(row["area"]) >= 26 for row in read_table(tmp_path / "out"))
    masks = [np.asarray(Image.open(path)) > 0 for path in sorted((tmp_path / "out" / "masks").iterdir())]
    assert all(region.area >= 26 for mask in masks for region in find_regions(mask.astype(float), mask))
    loaded.calibrate(images, false_alarm_rate=0.1)  # which keeps it
    assert loaded.calibration.smallest_area == share
    assert loaded.calibrate(images, false_alarm_rate=0.1, smallest_area=0.0).calibration.smallest_area == 0.0
    with pytest.raises(ValueError, match="`smallest_area` is a share"):
        plain.calibrate(images, smallest_area=30)


def test_the_false_alarm_rate_holds_for_regions_of_the_smallest_area():
    """Of new good images, on average over calibrations, no more than the rate raise an alarm."""
    rate, alarms = 0.2, []
    for seed in range(12):
        pipeline = tiny_pipeline()
        images = textures(58, first_seed=1000 * seed)
        pipeline.calibrate(images[:38], false_alarm_rate=rate, generator=generator(seed), smallest_area=0.05)
        alarms += pipeline(images[38:], generator=generator(seed + 100)).is_anomalous.tolist()
    # 240 images, of which 12 calibrations are common: three deviations of the mean over these
    assert np.mean(alarms) < rate + 3 * np.sqrt(rate * (1 - rate) * (1 / 19 + 1 / 20) / 12)
    assert np.mean(alarms) > 0.05


def test_another_programs_annotations_are_not_replaced(strict, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 1)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "regions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"regions\.json exists, but .*`output_dir`"):
        predict_files(strict, paths, tmp_path / "out")
    assert (tmp_path / "out" / "regions.json").read_text() == "{}"
