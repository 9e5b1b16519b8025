"""The report: its fields, and that batches and processes change nothing but times."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import texture, textures, tiny_pipeline, write_mvtec, write_png
from diffusers import DiffusionPipeline
from launching import launch
from PIL import Image

from diffad.data import load_anomaly_dataset
from diffad.evaluation.detectors import evaluate_category
from diffad.evaluation.metrics import AnomalyMetrics
from diffad.precision import resolve_precision
from diffad.seeding import image_generator
from diffad.training import evaluate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

METRICS = (
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "pixel_pro",
    "pixel_aupimo",
    "pixel_dice",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pipeline = tiny_pipeline().calibrate(textures(60), false_alarm_rate=0.1)
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two categories: seven test images, and a single one, which leaves one of two processes without any."""
    root = write_mvtec(tmp_path_factory.mktemp("data"), {"tile": 2})
    for split in ("train", "test"):
        write_png(root / "wood" / split / "good" / "000.png", texture(9))
    return root


def run(model: Path, data: Path, output: Path, *more: object) -> dict[str, Any]:
    arguments = ["--model", model, "--data", data, "--output", output, "--resolution", 32, *more]
    evaluate.main([str(argument) for argument in arguments])
    return json.loads(output.read_text())


def assert_same_results(report: dict[str, Any], expected: dict[str, Any]) -> None:
    for category, result in expected["results"].items():
        for name, value in result.items():
            if name not in ("seconds", "images_per_second"):
                assert report["results"][category][name] == pytest.approx(value, abs=1e-5), (category, name)
    assert report["scores"].keys() == expected["scores"].keys()
    for category, records in expected["scores"].items():
        for record, other in zip(report["scores"][category], records, strict=True):
            assert {**record, "score": None} == {**other, "score": None}
            assert record["score"] == pytest.approx(other["score"], rel=1e-3, abs=1e-3)


def test_the_report_says_which_precision_auto_was(model, data, tmp_path):
    report = run(model, data, tmp_path / "report.json", "--mixed_precision", "auto")
    assert report["mixed_precision"] == resolve_precision("auto")
    assert f"--mixed_precision {resolve_precision('auto')}" in report["command"]


def test_the_report_of_a_calibrated_model(model, data, tmp_path, capsys):
    report = run(model, data, tmp_path / "deep" / "report.json")
    assert report["model"] == str(model)
    assert report["data"] == str(data)
    assert (report["resolution"], report["pro_fpr_limit"]) == (32, 0.3)
    assert (report["mixed_precision"], report["processes"]) == ("no", 1)
    assert set(report["machine"]) == {"device", "platform", "torch", "diffad"}

    tile = report["results"]["tile"]
    assert (tile["good_images"], tile["defective_images"]) == (3, 4)
    for name in METRICS:
        assert 0.0 <= tile[name] <= 1.0, name
    assert tile["image_auroc"] == 1.0  # dark squares stand out, also to an untrained network
    assert tile["defects_found"] == 1.0
    assert tile["pixel_auroc"] > 0.6
    assert tile["seconds"] > 0
    assert tile["images_per_second"] > 0
    wood = report["results"]["wood"]  # good images only: nothing to rank, and nothing invented
    assert all(wood[name] is None for name in METRICS)
    assert wood["defects_found"] is None
    assert wood["false_alarms"] in (0.0, 1.0)
    assert set(report["results"]) == {"tile", "wood", "mean"}

    records = report["scores"]["tile"]
    assert [Path(r["path"]).parent.name for r in records] == ["good"] * 3 + ["hole"] * 4
    assert [r["label"] for r in records] == [0] * 3 + [1] * 4
    assert [r["defect"] for r in records] == ["good"] * 3 + ["hole"] * 4
    good = [r["is_anomalous"] for r in records if not r["label"]]
    assert tile["false_alarms"] == pytest.approx(np.mean(good), abs=1e-6)
    for record in records:
        assert record["is_anomalous"] == (record["p_value"] <= 0.1)
    scores = AnomalyMetrics()
    scores.update(anomaly_score=[r["score"] for r in records], label=[r["label"] for r in records])
    assert tile["image_ap"] == pytest.approx(scores.compute()["image_ap"], abs=1e-6)

    printed = capsys.readouterr().out
    assert "| tile | 100.0 |" in printed
    assert str(tmp_path / "deep" / "report.json") in printed
    rows = list(csv.DictReader((tmp_path / "deep" / "report.csv").open()))
    assert float(rows[0]["pixel_pro"]) == tile["pixel_pro"]
    assert "| tile | 100.0 |" in (tmp_path / "deep" / "report.md").read_text()
    page = (tmp_path / "deep" / "report.html").read_text()
    assert page.count("data:image/") == 7 + 1  # every image of either category is a case
    assert "defective, highest score" in page
    for kind in ("defective", "good"):
        with Image.open(tmp_path / "deep" / f"report-{kind}.png") as sheet:
            assert sheet.width > 200


def test_what_an_evaluation_writes_is_no_image_of_the_folder(model, tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 2}) / "tile"
    run(model, data, data / "test" / "good" / "report.json")
    assert (data / "test" / "good" / "report-good.png").is_file()
    assert len(load_anomaly_dataset(data, "test")) == 7
    for name in ("other-good.png", "other-defective.png"):
        write_png(data / name, texture(1))
        with pytest.raises(ValueError, match=rf"`output`: .*{name} would be replaced"):
            run(model, data, data / "other.json")
        (data / name).unlink()


def test_padim_stands_beside_the_model(model, data, tmp_path, capsys):
    for i in range(3):
        write_png(data / "wood" / "train" / "good" / f"{i + 1:03}.png", texture(10 + i))
    report = run(model, data, tmp_path / "report.json", "--category", "tile")
    padim = report["baselines"]["padim"]
    assert set(padim) == {"tile", "mean"}
    assert padim["tile"]["defective_images"] == 4
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[-1].startswith("| PaDiM | ")
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(row["method"], row["category"]) for row in rows][-2:] == [("padim", "tile"), ("padim", "mean")]
    without = run(model, data, tmp_path / "without.json", "--category", "tile", "--baselines", "none")
    assert without["baselines"] == {}
    assert without["results"]["tile"]["image_auroc"] == report["results"]["tile"]["image_auroc"]


def test_what_is_outside_of_the_region_of_interest_counts_nowhere(tmp_path):
    left = np.zeros((32, 32), np.uint8)
    left[:, :12] = 255
    write_png(tmp_path / "left.png", left)
    pipeline = tiny_pipeline().calibrate(textures(40), false_alarm_rate=0.1, roi=tmp_path / "left.png")
    pipeline.save_pretrained(tmp_path / "model")
    data = write_mvtec(tmp_path / "data", {"tile": 4})
    report = run(tmp_path / "model", data, tmp_path / "report.json")
    for mask in (data / "tile" / "ground_truth").rglob("*.png"):  # as if no defect reached beyond the region
        inside = np.array(Image.open(mask))
        assert inside[:, 6:].any()
        inside[:, 6:] = 0
        write_png(mask, inside)
    again = run(tmp_path / "model", data, tmp_path / "again.json")
    assert_same_results(again, report)
    for name in METRICS:
        assert again["baselines"]["padim"]["tile"][name] == report["baselines"]["padim"]["tile"][name], name
    for picture in (data / "tile" / "test").rglob("*.png"):
        pixels = np.array(Image.open(picture))
        pixels[:, -8:] = 255 * (picture.stem > "001")
        write_png(picture, pixels)
    changed = run(tmp_path / "model", data, tmp_path / "changed.json")
    assert_same_results(changed, report)


def test_defects_too_thin_for_the_pixels_of_the_maps_are_told(model, tmp_path, capsys):
    data = write_mvtec(tmp_path / "data", {"tile": 2}, bad=1, size=64)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 20] = 255
    write_png(data / "tile" / "ground_truth" / "hole" / "000_mask.png", mask)
    run(model, data, tmp_path / "report.json", "--resolution", 16)
    assert "At 16 x 16 pixels, of tile's 1 defects 1 have no pixel. A larger" in capsys.readouterr().out
    run(model, data, tmp_path / "report.json", "--resolution", 64)
    assert "A larger --resolution" not in capsys.readouterr().out


def test_no_training_images_leave_padim_out(model, data, tmp_path, capsys):
    folder = tmp_path / "test_only"
    shutil.copytree(data / "tile" / "test", folder / "tile" / "test")
    shutil.copytree(data / "tile" / "ground_truth", folder / "tile" / "ground_truth")
    report = run(model, folder, tmp_path / "report.json")
    assert report["baselines"] == {}
    assert "its row is left out" in capsys.readouterr().out


def test_padim_never_sees_the_test_images(model, tmp_path, capsys):
    for name in ("good", "dent"):  # a plain folder has one set of good images
        for i in range(4):
            write_png(tmp_path / "parts" / name / f"{i}.png", texture(i, defect=name == "dent"))
    with pytest.warns(UserWarning, match="good images are the same"):
        report = run(model, tmp_path / "parts", tmp_path / "report.json")
    assert report["baselines"] == {}
    assert "all of them are in its test split" in capsys.readouterr().out


def test_an_uncalibrated_model_reports_no_alarms(data, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "raw")
    report = run(tmp_path / "raw", data, tmp_path / "report.json", "--category", "tile")
    assert set(report["results"]) == {"tile", "mean"}
    assert "false_alarms" not in report["results"]["tile"]
    assert "defects_found" not in report["results"]["tile"]
    assert all(r["p_value"] is r["is_anomalous"] is None for r in report["scores"]["tile"])


def test_the_mean_is_over_categories(model, tmp_path):
    data = write_mvtec(tmp_path / "data", {"a": 2, "b": 2}, bad=2)
    results = run(model, data, tmp_path / "report.json")["results"]
    for name in ("image_auroc", "pixel_auroc", "pixel_pro"):
        assert results["mean"][name] == pytest.approx((results["a"][name] + results["b"][name]) / 2.0, abs=1e-6)
    assert "seconds" not in results["mean"]


def test_a_unified_model_takes_each_images_category(tmp_path):
    pipeline = tiny_pipeline(categories=["a", "b"])
    for number, category in enumerate("ab"):
        good = textures(12, first_seed=1000 * number)
        pipeline.calibrate(good, false_alarm_rate=0.3, category=category)
    pipeline.save_pretrained(tmp_path / "model")
    data = write_mvtec(tmp_path / "data", {"a": 2, "b": 2}, bad=2)
    records = run(tmp_path / "model", data, tmp_path / "report.json")["scores"]
    direct = DiffusionPipeline.from_pretrained(tmp_path / "model")
    image = Image.open(records["b"][0]["path"])
    score = direct(image, category="b").anomaly_score[0]
    assert records["b"][0]["score"] == pytest.approx(float(score), rel=1e-3, abs=1e-3)
    with pytest.raises(ValueError, match=r"`category` 'tile'.*a, b"):
        run(tmp_path / "model", write_mvtec(tmp_path / "other", {"tile": 2}), tmp_path / "other.json")


def test_a_category_without_thresholds_is_told_before_others_are_evaluated(tmp_path):
    data = write_mvtec(tmp_path / "data", {"a": 4, "b": 4})
    pipeline = tiny_pipeline(categories=["a", "b"]).calibrate(textures(12), category="a", false_alarm_rate=0.3)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="Category 'b' is not calibrated"):
        run(tmp_path / "model", data, tmp_path / "report.json")
    tiny_pipeline(categories=["a", "z"]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`category` 'b' is unknown: this model knows a, z"):
        run(tmp_path / "other", data, tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_the_batch_size_changes_nothing(model, data, tmp_path):
    expected = run(model, data, tmp_path / "a.json", "--batch_size", 16)
    assert_same_results(run(model, data, tmp_path / "b.json", "--batch_size", 2), expected)


def test_every_image_and_seed_draws_its_own_noise():
    draws = {float(torch.rand(1, generator=image_generator(s, i))) for s in range(20) for i in range(20)}
    assert len(draws) == 400


def test_images_without_a_mask_cost_no_other_image_its_place(model, data):
    """A Hub data set may lack some masks: what shares a batch with such an image still counts."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    whole = load_anomaly_dataset(data, split="test", category="tile")
    missing = whole.map(lambda row, i: {"mask": None if i == 4 else row["mask"]}, with_indices=True)
    assert missing[4]["mask"] is None
    assert missing[5]["mask"] is not None
    accelerator = Accelerator()
    results = [
        evaluate_category(pipeline, missing, "tile", accelerator, resolution=32, batch_size=size)[0]
        for size in (1, 3, 16)
    ]
    for name in METRICS:
        assert results[0][name] is not None
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-5), name
        assert results[2][name] == pytest.approx(results[0][name], abs=1e-5), name


def test_without_ground_truth_there_are_image_metrics_only(model, tmp_path):
    data = write_mvtec(tmp_path / "data")
    for path in sorted((data / "tile" / "ground_truth").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (data / "tile" / "ground_truth").rmdir()
    results = run(model, data, tmp_path / "report.json")["results"]
    assert results["tile"]["image_auroc"] == 1.0
    assert results["tile"]["pixel_auroc"] is None
    assert "pixel_auroc" not in results["mean"]


def test_two_processes_report_the_same(model, data, tmp_path):
    expected = run(model, data, tmp_path / "one.json", "--batch_size", 2)
    arguments = ["--model", model, "--data", data, "--output", tmp_path / "two.json", "--resolution", 32]
    launch("diffad.training.evaluate", *arguments, "--batch_size", 2, processes=2, cwd=tmp_path)
    report = json.loads((tmp_path / "two.json").read_text())
    assert report["processes"] == 2
    assert_same_results(report, expected)


def test_maps_are_saved_as_float32_tiff(model, data, tmp_path):
    report = run(model, data, tmp_path / "report.json", "--save_maps", tmp_path / "maps")
    files = sorted(path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.tiff"))
    assert files[:2] == ["tile/test/good/000.tiff", "tile/test/good/001.tiff"]
    assert len(files) == 8
    saved = np.asarray(Image.open(tmp_path / "maps" / "tile/test/hole/002.tiff"))
    assert saved.shape == (32, 32)
    assert saved.dtype == np.float32
    assert saved.max() == pytest.approx(report["scores"]["tile"][5]["score"], rel=0.2)


def test_maps_are_not_saved_between_images(model, tmp_path):
    """Named as MVTec's evaluation expects it, they would replace images that are TIFF files."""
    data = write_mvtec(tmp_path / "data")
    good = data / "tile" / "test" / "good" / "000"
    Image.open(good.with_suffix(".png")).save(good.with_suffix(".tiff"))
    good.with_suffix(".png").unlink()
    content = good.with_suffix(".tiff").read_bytes()
    for source, folder in ((data, data), (data / "tile", data)):
        with pytest.raises(ValueError, match=r"`save_maps`: maps would lie between the images in .*test"):
            run(model, source, tmp_path / "report.json", "--save_maps", folder)
    assert good.with_suffix(".tiff").read_bytes() == content


def test_an_interrupted_evaluation_goes_on(model, data, tmp_path):
    first = run(model, data, tmp_path / "report.json", "--category", "tile")
    marked = json.loads((tmp_path / "report.json").read_text())
    marked["results"]["tile"]["seconds"] = 12345.0  # to be seen again, as it is not measured anew
    (tmp_path / "report.json").write_text(json.dumps(marked))
    second = run(model, data, tmp_path / "report.json", "--resume")
    assert second["results"]["tile"]["seconds"] == 12345.0
    assert second["scores"]["tile"] == first["scores"]["tile"]
    assert set(second["results"]) == {"tile", "wood", "mean"}
    with pytest.raises(ValueError, match=r"--resume.*another category"):
        run(model, data, tmp_path / "report.json", "--resume", "--category", "wood")
    changed = shutil.copytree(model, tmp_path / "model")
    tiny_pipeline().calibrate(textures(20), false_alarm_rate=0.2).save_pretrained(changed)
    report = tmp_path / "changed.json"
    run(changed, data, report, "--category", "wood")
    tiny_pipeline().calibrate(textures(30), false_alarm_rate=0.2).save_pretrained(changed)
    with pytest.raises(ValueError, match=r"--resume.*another model_files"):
        run(changed, data, report, "--resume", "--category", "wood")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model, --data"),
        (("--model", "m"), "--data"),
        (("--model", "m", "--data", "d", "--batch", "x"), "--batch"),
    ],
)
def test_wrong_arguments_end_in_one_clear_line(arguments, words, capsys):
    with pytest.raises(SystemExit):
        evaluate.create_parser().parse_args(arguments)
    assert words in capsys.readouterr().err.rstrip().splitlines()[-1]


def test_wrong_folders_are_named(model, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such"):
        run(model, tmp_path / "no_such", tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"`category`.*bolt"):
        run(model, data, tmp_path / "report.json", "--category", "bolt")
    with pytest.raises(ValueError, match=r"--output.*\.json"):
        run(model, data, tmp_path / "report.txt")
