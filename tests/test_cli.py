"""The `diffad` command: help that fits a screen, errors of one line, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import textures, tiny_pipeline, write_folder, write_mvtec
from typer.testing import CliRunner

from diffad.cli import app

COMMANDS = ("demo", "predict", "evaluate", "calibrate", "benchmark", "convert", "push")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_one_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = run(command, "--help")
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100


def test_predict_prints_json_lines_and_fails_on_anomaly_when_asked(model, tmp_path):
    parts = write_folder(tmp_path / "parts", 3)
    rows = [
        json.loads(line) for line in run("predict", model, parts, "--output", tmp_path / "a", "--json").splitlines()
    ]
    assert [Path(row["path"]).name for row in rows] == ["000.png", "001.png", "002.png"]
    assert all(0.0 < row["p_value"] <= 1.0 for row in rows)
    alarm = any(row["verdict"] == "anomalous" for row in rows)
    run("predict", model, parts, "--output", tmp_path / "a", "--fail-on-anomaly", code=3 if alarm else 0)


def test_fail_on_anomaly_exits_with_3(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.calibration.image_threshold.fill_(-1e9)  # everything is above it
    pipeline.save_pretrained(tmp_path / "strict")
    parts = write_folder(tmp_path / "parts", 2)
    run("predict", tmp_path / "strict", parts, "--output", tmp_path / "out", "--fail-on-anomaly", code=3)


def test_evaluate_writes_the_report_and_its_tables(model, tmp_path):
    data = write_mvtec(tmp_path / "data")
    run("evaluate", model, "--data", data, "--output", tmp_path / "r.json", "--batch-size", 4)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["results"]["tile"]["good_images"] == 3
    assert report["results"]["tile"]["image_auroc"] == report["results"]["mean"]["image_auroc"]
    assert (tmp_path / "r.md").read_text().startswith("| category | image AUROC |")
    assert (tmp_path / "r.csv").read_text().splitlines()[1].startswith("tile,")


def test_calibrate_changes_thresholds_in_place(model, tmp_path):
    good = write_folder(tmp_path / "good", 9, first_seed=50)
    run("calibrate", model, "--data", good, "--output", tmp_path / "new", "--false-alarm-rate", 0.4)
    from diffad import AnomalyDenoisePipeline

    calibration = AnomalyDenoisePipeline.from_pretrained(tmp_path / "new").calibration
    assert calibration.config.false_alarm_rate == 0.4
    assert calibration.normal_scores.shape == (1, 3)


def test_benchmark_says_where_the_time_goes(model):
    result = json.loads(run("benchmark", model, "--batch-size", 2, "--repeats", 2, "--json", "--device", "cpu"))
    assert set(result["milliseconds_by_part"]) == {"unet", "feature_extractor", "rest"}
    assert sum(result["milliseconds_by_part"].values()) == pytest.approx(result["milliseconds_per_image"], rel=0.8)
    assert result["peak_memory_mib"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "nowhere", ".", "--output", "out"), "no images"),
        (("benchmark", "nowhere/at/all"), "holds no pipeline"),
        (("convert", "sgd", "x.ckpt", "out"), "'diad'"),
    ],
)
def test_errors_are_one_line(arguments, words, tmp_path):
    command = [sys.executable, "-m", "diffad.cli", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    message = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1
    assert words in message[0]
    assert "Traceback" not in result.stderr
    command.insert(3, "--debug")
    assert "Traceback" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr
