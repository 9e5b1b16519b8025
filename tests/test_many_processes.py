"""`diffad predict` by any number of processes, over a manifest of any length: one table, to the bit."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import BACKBONE, relative_error, save_tiny_pipeline, textures, tiny_pipeline, write_folder, write_png
from launching import launch, launch_command
from PIL import Image

from diffad import AnomalyDenoisePipeline
from diffad.pipelines.updating import load_good_images
from diffad.predict import predict_files
from diffad.prediction.file_scoring import batch_shape
from diffad.prediction.input_sources import find_inputs
from diffad.prediction.journal import process_journals
from diffad.prediction.manifest import Manifest
from diffad.reading.inputs import find_images

TABLES = ("scores.csv", "regions.csv", "regions.json", "regions.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """97 images, one of which cannot be read."""
    folder = write_folder(tmp_path_factory.mktemp("many") / "parts", 96)
    (folder / "050.jpg").write_bytes(b"")
    return folder


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def read_scores(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def arguments(model: Path, inputs: Path, output: Path, batch_size: int = 7) -> list:
    return ["predict", model, inputs, "--output", output, "--batch-size", batch_size]


def predict(model: Path, inputs: Path, output: Path, processes: int, cwd: Path, *more: object) -> str:
    flags = [*arguments(model, inputs, output)[1:], *more]
    return launch("diffad.predict", *flags, processes=processes, cwd=cwd)


@pytest.fixture(scope="module")
def of_one_process(model, parts, tmp_path_factory) -> Path:
    """A batch of seven is one in whose sums places differ: see `test_a_place_in_the_batch...`."""
    output = tmp_path_factory.mktemp("one")
    predict(model, parts, output, 1, output)
    return output


@pytest.mark.parametrize("processes", [2, 4])
def test_tables_are_those_of_one_process_to_the_bit(model, parts, of_one_process, tmp_path, processes):
    told = predict(model, parts, tmp_path / "out", processes, tmp_path)
    assert tables(tmp_path / "out") == tables(of_one_process)
    rows = read_scores(tmp_path / "out")
    assert [row["path"] for row in rows] == [str(path) for path in find_images([parts])]
    assert [row["path"] for row in rows if row["verdict"] == "unreadable"] == [str(parts / "050.jpg")]
    assert told.count("1 unreadable") == 1  # only one of them speaks
    for folder in ("overlays", "maps", "masks"):
        assert len(list((tmp_path / "out" / folder).iterdir())) == 96
    assert (tmp_path / "out" / "most_anomalous.png").read_bytes() == (
        of_one_process / "most_anomalous.png"
    ).read_bytes()
    assert not list((tmp_path / "out").glob("*partial*"))


def test_one_that_is_killed_ends_the_others_and_another_number_goes_on(model, parts, of_one_process, tmp_path):
    output = tmp_path / "out"
    command = launch_command("diffad.predict", *arguments(model, parts, output)[1:], processes=2)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        deadline = time.time() + 300
        while time.time() < deadline and not process_journals(output):
            time.sleep(0.005)
        children = [child.pid for child in psutil.Process(run.pid).children()]
        while time.time() < deadline and sum(p.read_bytes().count(b"\n") for p in process_journals(output)) < 10:
            time.sleep(0.002)
        os.kill(children[-1], signal.SIGKILL)
        told = run.communicate(timeout=120)[0]
    assert run.returncode != 0
    assert "nother process of this run has ended" in told
    assert "start the same command again" in told
    assert not (output / "scores.csv").exists()
    told = predict(model, parts, output, 1, tmp_path)
    assert "(0 done before)" not in told
    assert tables(output) == tables(of_one_process)


def test_an_error_of_the_inputs_is_told_once(model, tmp_path):
    command = launch_command(
        "diffad.predict", *arguments(model, tmp_path / "nowhere", tmp_path / "out")[1:], processes=2
    )
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0
    assert done.stdout.count("There is no file or folder at") == 1


def assert_equal_calibrations(first: Path, second: Path, tolerance: float = 1e-6) -> None:
    """To a share of each buffer's norm."""
    one, two = (AnomalyDenoisePipeline.from_pretrained(folder).calibration for folder in (first, second))
    for (name, values), others in zip(one.named_buffers(), two.buffers(), strict=True):
        known = ~values.isnan()
        assert torch.equal(known, ~others.isnan()), name
        if (expected := values[known].double()).norm() > 0:
            assert relative_error(others[known], expected) < tolerance, name


def test_calibrate_finds_what_one_process_does(model, tmp_path):
    good = write_folder(tmp_path / "good", 13, first_seed=200)
    for count in (1, 2):
        flags = ["--data", good, "--false-alarm-rate", 0.2, "--output", tmp_path / str(count)]
        launch("diffad.cli", "calibrate", model, *flags, processes=count, cwd=tmp_path)
    # batches of other sizes have other last digits, and so have scores in good images' narrow deviations
    assert_equal_calibrations(tmp_path / "1", tmp_path / "2", tolerance=1e-5)


def test_fit_and_update_find_what_one_process_does(tmp_path):
    """Also where an image comes twice, and where one process has none to look at."""
    first, second = write_folder(tmp_path / "first", 30, 32), write_folder(tmp_path / "second", 13, 32, first_seed=200)
    write_png(second / "again.png", textures(1, 32, first_seed=201)[0])
    write_png(tmp_path / "third" / "one.png", textures(1, 32, first_seed=300)[0])
    flags = ["--backbone", BACKBONE, "--backbone_weights", "random", "--feature_strides", 2, 4]
    flags += ["--resolution", 32, "--false_alarm_rate", 0.2, "--kept_images", 8]
    said = {}
    for count in (1, 2):
        model = tmp_path / f"model-{count}"
        launch(
            "diffad.training.fit",
            "--train_data_dir",
            first,
            "--output_dir",
            model,
            *flags,
            processes=count,
            cwd=tmp_path,
        )
        said[count] = [
            launch("diffad.cli", "update", model, "--data", data, processes=count, cwd=tmp_path).replace(str(model), "")
            for data in (second, tmp_path / "third")
        ]
        assert [text.count("Learned") for text in said[count]] == [1, 1]
    assert_equal_calibrations(tmp_path / "model-1", tmp_path / "model-2")
    for what in (r"Learned .*", r".*raised an alarm before", r"Left out \d+ good images"):
        # each process warns of copies
        assert [{*re.findall(what, text)} for text in said[1]] == [{*re.findall(what, text)} for text in said[2]]
    kept = [
        load_good_images(AnomalyDenoisePipeline.from_pretrained(folder), folder) for folder in tmp_path.glob("model-*")
    ]
    for name in ("for_statistics", "for_thresholds"):
        assert getattr(kept[0], name).keys() == getattr(kept[1], name).keys()
    assert kept[0].num_seen == kept[1].num_seen
    assert kept[0].seen == kept[1].seen


# -- manifests -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    return pipeline


def write_manifest(path: Path, lines: list[str]) -> Path:
    if path.suffix == ".csv":
        path.write_text("".join(f"{line}\n" for line in ["path", *lines]))
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"url": lines, "other": [0] * len(lines)}), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_row_for_each_line_of_a_manifest_in_its_order(pipeline, tmp_path, suffix):
    write_folder(tmp_path / "parts", 3)
    lines = ["parts/002.png", "parts/000.png", "parts/missing.png", "parts/000.png", *["parts/001.png"] * 6]
    manifest = find_inputs([write_manifest(tmp_path / f"m{suffix}", lines)])
    counts = predict_files(pipeline, manifest, tmp_path / "out", batch_size=4)
    rows = read_scores(tmp_path / "out")
    assert [row["file"] for row in rows] == lines
    assert [row["verdict"] == "unreadable" for row in rows] == [False, False, True, *[False] * 7]
    assert counts["unreadable"] == 1
    assert float(rows[1]["score"]) == pytest.approx(float(rows[3]["score"]), rel=1e-4)  # one file has one score
    for row in rows:
        if row["score"]:
            assert Image.open(tmp_path / "out" / "maps" / row["picture"]).size == (16, 16)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_line_without_an_image_is_a_row_and_no_error(pipeline, tmp_path, suffix):
    write_folder(tmp_path / "parts", 2)
    path = tmp_path / f"m{suffix}"
    if suffix == ".csv":
        path.write_text("number,path\n1\n2,parts/000.png\n3,\n4,parts/001.png\n")
    else:
        write_manifest(path, [None, "parts/000.png", "", "parts/001.png"])
    for _ in range(2):
        counts = predict_files(pipeline, find_inputs([path]), tmp_path / "out", batch_size=2)
        rows = read_scores(tmp_path / "out")
        assert [row["file"] for row in rows] == ["", "parts/000.png", "", "parts/001.png"]
        assert [bool(row["score"]) for row in rows] == [False, True, False, True]
        assert rows[0]["message"] == "`image`: this line of the manifest names none."
        assert counts["unreadable"] == 2
    assert counts["skipped"] == 2


def test_a_manifest_is_gone_on_with_and_only_what_failed_is_done_again(pipeline, tmp_path):
    write_folder(tmp_path / "parts", 9)
    (tmp_path / "parts" / "004.png").rename(tmp_path / "late.png")
    path = write_manifest(tmp_path / "m.csv", [f"parts/{i:03}.png" for i in range(9)])
    assert predict_files(pipeline, Manifest(path), tmp_path / "out", batch_size=4)["unreadable"] == 1
    (tmp_path / "late.png").rename(tmp_path / "parts" / "004.png")
    seen: list = []
    counts = predict_files(pipeline, Manifest(path), tmp_path / "out", batch_size=4, report=seen.append)
    assert [row["file"] for row in seen] == ["parts/004.png"]
    assert (counts["skipped"], counts["unreadable"]) == (8, 0)
    predict_files(pipeline, Manifest(path), tmp_path / "whole", batch_size=4)
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")
    path.write_text(path.read_text() + "parts/000.png\n")
    with pytest.raises(ValueError, match=r"another manifest.*`output_dir`"):
        predict_files(pipeline, Manifest(path), tmp_path / "out", batch_size=4)
    with pytest.raises(ValueError, match=r"another manifest.*`output_dir`"):
        predict_files(pipeline, find_images([tmp_path / "parts"]), tmp_path / "out", batch_size=4)


def test_a_manifest_keeps_its_order_however_often_it_is_gone_on_with(pipeline, tmp_path):
    write_folder(tmp_path / "parts", 6)
    path = write_manifest(tmp_path / "m.csv", [f"parts/{i:03}.png" for i in range(6)])
    for name in ("001", "003"):
        (tmp_path / "parts" / f"{name}.png").rename(tmp_path / f"{name}.png")
    predict_files(pipeline, Manifest(path), tmp_path / "out", batch_size=4)
    (tmp_path / "001.png").rename(tmp_path / "parts" / "001.png")

    def stop(row: dict) -> None:
        if row["verdict"] != "unreadable":
            raise KeyboardInterrupt  # as the row of 001.png stands in its journal

    with pytest.raises(KeyboardInterrupt):
        predict_files(pipeline, Manifest(path), tmp_path / "out", batch_size=4, report=stop)
    for _ in range(2):
        predict_files(pipeline, Manifest(path), tmp_path / "out", batch_size=4)
        assert [row["file"] for row in read_scores(tmp_path / "out")] == [f"parts/{i:03}.png" for i in range(6)]


def test_equal_manifests_of_other_folders_are_not_taken_for_each_other(pipeline, tmp_path):
    paths = []
    for day in ("one", "two"):
        write_folder(tmp_path / day / "parts", 2)
        paths.append(write_manifest(tmp_path / day / "m.csv", ["parts/000.png", "parts/001.png"]))
    predict_files(pipeline, Manifest(paths[0]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"another manifest.*`output_dir`"):
        predict_files(pipeline, Manifest(paths[1]), tmp_path / "out")


def test_files_of_other_programs_are_no_journals(pipeline, tmp_path):
    write_folder(tmp_path / "parts", 2)
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "scores.partial-backup.csv"
    kept.write_text("mine")
    predict_files(pipeline, find_images([tmp_path / "parts"]), tmp_path / "out")
    assert kept.read_text() == "mine"


def test_above_the_limit_there_are_scores_and_the_sheet_and_no_pictures(pipeline, tmp_path):
    write_folder(tmp_path / "parts", 9)
    write_png(tmp_path / "parts" / "large.png", textures(1, (40, 30))[0])
    paths = find_images([tmp_path / "parts"])
    pipeline.calibration.image_threshold.fill_(-1e9)  # everything is above it
    pipeline.calibration.pixel_threshold.fill_(0.0)
    for name, most in (("with", 10), ("without", 9)):
        predict_files(pipeline, paths, tmp_path / name, batch_size=4, max_pictures=most)
    for name in ("regions.csv", "regions.json", "most_anomalous.png"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert [row["score"] for row in read_scores(tmp_path / "with")] == [
        row["score"] for row in read_scores(tmp_path / "without")
    ]
    assert (tmp_path / "with" / "overlays").is_dir()
    assert not any((tmp_path / "without" / name).exists() for name in ("overlays", "maps", "masks"))


def test_batches_are_even_and_little_is_filled_up():
    assert batch_shape(1, 16) == 1
    assert batch_shape(17, 16) == 9
    assert batch_shape(997, 16) == 16
    assert batch_shape(256, 16) == 16


def test_a_manifest_must_name_images_and_stand_alone(tmp_path):
    empty = tmp_path / "m.csv"
    empty.write_text("path\n")
    with pytest.raises(ValueError, match="has no line"):
        Manifest(empty)
    with pytest.raises(FileNotFoundError, match=r"no file at .*none.csv"):
        Manifest(tmp_path / "none.csv")
    empty.write_text("a.png\n")
    with pytest.raises(ValueError, match=r"`images`.*alone"):
        find_inputs([empty, tmp_path])
    assert list(Manifest(empty).entries()) == ["a.png"]  # without a header
