"""`diffad predict` over folders: every input accounted for, killed runs go on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import textures, tiny_pipeline, write_folder, write_png
from PIL import Image

from diffad.prediction import find_images, predict_files


def read_scores(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def calibrated():
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_input_stands_in_the_scores_and_pictures_match_it(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 5)
    write_png(parts / "sub" / "000.png", textures(1, (20, 30))[0])
    (parts / "broken.png").write_bytes(b"")
    paths = find_images([parts])
    counts = predict_files(calibrated, paths, tmp_path / "out", batch_size=4)
    rows = read_scores(tmp_path / "out")
    assert [row["path"] for row in rows] == [str(p) for p in paths]
    assert counts["unreadable"] == 1
    assert counts["normal"] + counts["anomalous"] == 6
    broken = next(row for row in rows if row["path"].endswith("broken.png"))
    assert broken["verdict"] == "unreadable"
    assert "broken.png" in broken["message"]
    row = next(row for row in rows if row["path"].endswith("sub/000.png"))
    stored = np.asarray(Image.open(tmp_path / "out" / "maps" / "sub" / "000.png"))
    assert stored.shape == (20, 30)  # the image's own size
    assert (stored.min(), stored.max()) == (0, 65535)
    assert float(row["map_high"]) > float(row["map_low"])
    assert np.asarray(Image.open(tmp_path / "out" / "overlays" / "sub" / "000.png")).shape == (20, 30, 3)
    assert set(np.unique(Image.open(tmp_path / "out" / "masks" / "sub" / "000.png"))) <= {0, 255}
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_scores_are_those_of_the_pipeline_and_do_not_depend_on_the_batch(calibrated, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 5)])
    for batch_size in (1, 3):
        predict_files(calibrated, paths, tmp_path / str(batch_size), batch_size=batch_size)
    one, three = (np.array([float(r["score"]) for r in read_scores(tmp_path / b)]) for b in ("1", "3"))
    np.testing.assert_allclose(one, three, rtol=1e-3)


def test_a_second_run_does_only_what_is_new(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 3)
    predict_files(calibrated, find_images([parts]), tmp_path / "out")
    before = {row["path"]: row for row in read_scores(tmp_path / "out")}
    write_png(parts / "new.png", textures(1, first_seed=99)[0])
    seen = []
    counts = predict_files(calibrated, find_images([parts]), tmp_path / "out", report=seen.append)
    assert counts["skipped"] == 3
    assert [Path(row["path"]).name for row in seen] == ["new.png"]
    after = {row["path"]: row for row in read_scores(tmp_path / "out")}
    assert len(after) == 4
    assert all(after[path] == row for path, row in before.items())


def test_a_half_written_line_of_a_killed_run_is_done_again(calibrated, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 3)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.partial.csv").write_text(
        f"path,score,p_value,verdict,map_low,map_high,message\n{paths[0]},1.5,0.5,normal,0,1,\n{paths[1]},2.5,0."
    )
    counts = predict_files(calibrated, paths, out)
    assert counts["skipped"] == 1
    rows = read_scores(out)
    assert [row["path"] for row in rows] == [str(p) for p in paths]
    assert rows[0]["score"] == "1.5"
    assert not (out / "scores.partial.csv").exists()


def test_sigkill_leaves_no_half_file_and_the_next_run_goes_on(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path / "model")
    parts = write_folder(tmp_path / "parts", 60)
    command = [sys.executable, "-m", "diffad.cli", "predict", str(tmp_path / "model"), str(parts)]
    command += ["--output", str(tmp_path / "out"), "--batch-size", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    deadline = time.time() + 120
    while len(list((tmp_path / "out" / "maps").glob("*.png"))) < 3 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "scores.csv").exists()  # it says that all is done
    for path in (tmp_path / "out").rglob("*.png"):
        if not path.name.startswith("."):
            Image.open(path).load()  # whole
    counts = predict_files(calibrated, find_images([parts]), tmp_path / "out")
    assert counts["skipped"] >= 2
    assert len(read_scores(tmp_path / "out")) == 60


def test_uncalibrated_gives_scores_without_verdict(tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 2)])
    counts = predict_files(tiny_pipeline(), paths, tmp_path / "out")
    assert counts["scored"] == 2
    assert not (tmp_path / "out" / "masks").exists()
    assert {row["verdict"] for row in read_scores(tmp_path / "out")} == {"scored"}


def test_find_images_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no images"):
        find_images([tmp_path])
