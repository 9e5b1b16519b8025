"""Names in Unicode's two forms, which look the same, meet wherever people type or list them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import textures, tiny_pipeline, write_folder, write_mvtec, write_png

from diffad.data import load_anomaly_dataset
from diffad.data.regions_of_interest import read_roi
from diffad.prediction.input_sources import find_inputs
from diffad.prediction.part_verdicts import read_parts

NFC, NFD = (unicodedata.normalize(form, "Gehäuse") for form in ("NFC", "NFD"))
BOTH_WAYS = pytest.mark.parametrize(("kept", "given"), [(NFD, NFC), (NFC, NFD), (NFD, NFD)])


def only_form_that_is_there(path: Path) -> None:
    if path.exists():
        pytest.skip("this file system takes both forms for one name")


@BOTH_WAYS
def test_a_model_and_data_know_a_category_by_either_form(tmp_path, kept, given):
    root = write_mvtec(tmp_path / "data", {kept: 2, "Bottle": 2})
    assert set(load_anomaly_dataset(root, "train", given)["category"]) == {kept}
    assert set(load_anomaly_dataset(root, "train", [kept, given])["category"]) == {kept}
    with pytest.raises(ValueError, match="must be among"):
        load_anomaly_dataset(root, "train", "Gehause")
    pipeline = tiny_pipeline(categories=["Bottle", kept])
    assert pipeline.category_index(given) == 1
    pipeline(textures(2), category=[given, "Bottle"])
    for unknown in ("Gehause", 2, True):
        with pytest.raises(ValueError, match="is unknown"):
            pipeline.category_index(unknown)


@BOTH_WAYS
def test_an_exported_model_knows_a_category_by_either_form(tmp_path, kept, given):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from diffad.deployment import Runtime

    pipeline = tiny_pipeline(categories=["Bottle", kept])
    for category in pipeline.categories:
        pipeline.calibrate(textures(8), category=category, false_alarm_rate=0.2)
    runtime = Runtime(pipeline.export(tmp_path / "model.onnx"))
    assert runtime.category_index(given) == 1
    with pytest.raises(ValueError, match="is unknown"):
        runtime.category_index("Gehause")


@BOTH_WAYS
def test_regions_are_found_by_either_form(tmp_path, kept, given):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    write_png(tmp_path / f"{kept}.png", mask)
    assert read_roi(tmp_path, given).sum() == 16
    coco = {
        "images": [{"id": 1, "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": kept}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": [[2, 2, 5, 2, 5, 5, 2, 5]]},
            {"image_id": 1, "segmentation": [[0, 0, 7, 0, 7, 7, 0, 7]]},  # of no category
        ],
    }
    (tmp_path / "roi.json").write_text(json.dumps(coco))
    assert read_roi(tmp_path / "roi.json", given).sum() == 16
    with pytest.raises(ValueError, match="has no polygon of 'Gehause'"):
        read_roi(tmp_path / "roi.json", "Gehause")


@BOTH_WAYS
def test_tables_name_files_by_either_form(tmp_path, kept, given):
    folder = write_folder(tmp_path / "in", 2)
    (folder / "000.png").rename(folder / f"{kept}.png")
    if given != kept:
        only_form_that_is_there(folder / f"{given}.png")
    (folder / "images.csv").write_text(f"path\n{given}.png\n001.png\nkeiner-{given}.png\n", encoding="utf-8")
    manifest = find_inputs([folder / "images.csv"])
    assert [one.path.name for one in manifest.first(3)] == [f"{kept}.png", "001.png", f"keiner-{given}.png"]
    assert next(manifest.entries()) == f"{given}.png"  # as it stands there
    (folder / "parts.csv").write_text(f"image,part\n{given}.png,a\n", encoding="utf-8")
    assert read_parts(folder / "parts.csv") == {str(folder / f"{kept}.png"): "a"}


def test_of_two_files_that_look_the_same_the_named_one_is_taken(tmp_path):
    write_folder(tmp_path, 1)
    for name in (NFC, NFD):
        only_form_that_is_there(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "000.png").read_bytes())
    for name in (NFC, NFD):
        (tmp_path / "images.csv").write_text(f"path\n{name}.png\n", encoding="utf-8")
        assert find_inputs([tmp_path / "images.csv"]).first(1)[0].path.name == f"{name}.png"
