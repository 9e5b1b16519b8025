"""The `diffad` command: help that fits a screen, errors of one line, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_pipeline, textures, tiny_pipeline, write_folder, write_mvtec, write_png
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

from diffad import __version__, cli
from diffad.cli import app, describe_error

COMMANDS = (
    "demo",
    "train",
    "fit",
    "predict",
    "explain",
    "drift",
    "update",
    "watch",
    "serve",
    "evaluate",
    "calibrate",
    "benchmark",
    "export",
    "convert",
    "push",
)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_one_screen(command, monkeypatch):
    """Of 80 columns and 24 lines, the last of which is the prompt's."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*command.split(), "--help").splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    if not command:
        assert not any(line.endswith("...") for line in lines[1:])  # no summary is cut off
        assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)


def test_help_loads_no_library_that_takes_seconds(tmp_path):
    code = (
        "import sys; from diffad import cli; sys.argv = ['diffad', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print(sorted({'torch', 'diffusers', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "benchmark" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_predict_prints_json_lines_and_fails_on_anomaly_when_asked(model, tmp_path):
    parts = write_folder(tmp_path / "parts", 3)
    rows = [
        json.loads(line) for line in run("predict", model, parts, "--output", tmp_path / "a", "--json").splitlines()
    ]
    assert [Path(row["path"]).name for row in rows] == ["000.png", "001.png", "002.png"]
    assert all(0.0 < row["p_value"] <= 1.0 for row in rows)
    alarm = any(row["verdict"] == "anomalous" for row in rows)
    run("predict", model, parts, "--output", tmp_path / "a", "--fail-on-anomaly", code=3 if alarm else 0)


def test_a_second_run_tells_of_pictures_that_it_does_not_draw(model, tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    (tmp_path / "manifest.csv").write_text("parts/000.png\nparts/001.png\n")
    for name, inputs in (("of_folder", parts), ("of_manifest", tmp_path / "manifest.csv")):
        command = ["predict", str(model), str(inputs), "--output", str(tmp_path / name)]
        for flags, is_told in ((("--max-pictures", "0"), False), (("--max-pictures", "0"), False), ((), True)):
            shown = " ".join(CliRunner().invoke(app, [*command, *flags], catch_exceptions=False).output.split())
            told = "2 of those done before have no pictures: give another --output" in shown
            assert told == is_told
    again = CliRunner().invoke(app, ["predict", str(model), str(parts), "--output", str(tmp_path / "again")])
    assert "no pictures" not in again.output


def test_drift_is_told_from_a_table_and_drawn(model, tmp_path):
    """From what `predict` wrote, and from the same with parts added that score otherwise."""
    parts = write_folder(tmp_path / "parts", 12, first_seed=100)
    shown = CliRunner().invoke(app, ["predict", str(model), str(parts), "--output", str(tmp_path / "out")])
    assert "No drift in 12 parts" in " ".join(shown.output.split())
    scores = tmp_path / "out" / "scores.csv"
    assert "No drift in 12 parts" in run("drift", scores)
    assert np.asarray(Image.open(tmp_path / "out" / "drift.png")).std() > 0
    calibration = json.loads((tmp_path / "out" / "calibration.json").read_text())
    lowest = min(calibration["normal_scores"])
    row = scores.read_text().splitlines()[1].split(",")
    with open(scores, "a") as file:
        for i in range(300):
            file.write(",".join([f"later{i}.png", f"{lowest - 1:.6g}", *row[2:]]) + "\n")
    said = run("drift", scores, "--output", tmp_path / "plot.png", "--fail-on-drift", code=3)
    assert said.startswith("DRIFT: at part")
    assert "Parts score lower than before" in said
    assert "later" in said
    assert (tmp_path / "plot.png").is_file()
    text = scores.read_bytes()
    scores.write_bytes(text.replace(b"later", b"later\xff"))  # a name that is no UTF-8
    assert "later?" in run("drift", scores)
    scores.write_bytes(text)
    for own in (scores, scores.with_name("calibration.json")):
        before = own.read_bytes()
        with pytest.raises(ValueError, match="`output` must be the plot's own file"):
            run("drift", scores, "--output", own)
        assert own.read_bytes() == before
    assert run("predict", model, tmp_path / "out", parts, "--output", tmp_path / "again") == ""
    assert len((tmp_path / "again" / "scores.csv").read_text().splitlines()) == 13  # a plot is no input


def test_a_name_that_the_terminal_lacks_ends_nothing(model, tmp_path, monkeypatch):
    """As of Windows, where output that goes to a file has 256 letters."""
    write_png(tmp_path / "parts" / "部品.png", textures(1)[0])
    run("predict", model, tmp_path / "parts", "--output", tmp_path / "out")
    table = tmp_path / "out" / "scores.csv"
    calibration = json.loads((tmp_path / "out" / "calibration.json").read_text())
    with open(table, "a", encoding="utf-8") as file:
        for i in range(300):
            file.write(f"部品{i}.png,{min(calibration['normal_scores']) - i:.6g},1,normal,0,1,,,,,\n")
    for command in (["explain", model, tmp_path / "parts"], ["drift", table]):
        printed = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        with monkeypatch.context() as patched:
            patched.setattr("sys.stdout", printed)
            with suppress(SystemExit):
                cli.main([str(word) for word in command])
        printed.flush()
        assert b"\\u90e8\\u54c1" in printed.buffer.getvalue()


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
    assert (tmp_path / "r.csv").read_text().splitlines()[1].split(",")[:2] == ["", "tile"]


@pytest.mark.parametrize(("package", "brought"), [("torch", "diffad"), ("datasets", "'diffad[train]'")])
def test_a_command_that_lacks_its_packages_says_what_brings_them(package, brought):
    program = f"import sys; sys.modules[{package!r}] = None; from diffad.cli import main; main()"
    command = [sys.executable, "-c", program, "fit", "good", "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: This needs the package {package}: pip install {brought} brings it." in done.stderr


def test_calibrate_changes_thresholds_in_place(model, tmp_path):
    good = write_folder(tmp_path / "good", 9, first_seed=50)
    run("calibrate", model, "--data", good, "--output", tmp_path / "new", "--false-alarm-rate", 0.4)
    from diffad import AnomalyDenoisePipeline

    calibration = AnomalyDenoisePipeline.from_pretrained(tmp_path / "new").calibration
    assert calibration.config.false_alarm_rate == 0.4
    assert calibration.normal_scores.shape == (1, 5)


def test_calibrate_keeps_the_rate_and_tells_whose_thresholds_another_moves(tmp_path):
    from diffad import AnomalyDenoisePipeline

    good = write_folder(tmp_path / "good", 9, first_seed=50)
    unified = tiny_pipeline(categories=["bottle", "cable"])
    unified.calibrate(textures(9), false_alarm_rate=0.4, category="bottle").save_pretrained(tmp_path / "model")
    command = ["calibrate", str(tmp_path / "model"), "--data", str(good), "--category", "cable"]
    assert "bottle" not in CliRunner().invoke(app, command, catch_exceptions=False).output
    calibration = AnomalyDenoisePipeline.from_pretrained(tmp_path / "model").calibration
    assert calibration.false_alarm_rate == 0.4
    said = CliRunner().invoke(app, [*command, "--false-alarm-rate", "0.2"], catch_exceptions=False).output
    moved = AnomalyDenoisePipeline.from_pretrained(tmp_path / "model").calibration
    assert moved.image_threshold[0] > calibration.image_threshold[0]
    assert "bottle, whose thresholds were set anew: " in said


def test_a_model_of_one_category_is_calibrated_by_one_of_several(model, tmp_path):
    """The data tell the categories apart; of the model itself the name says nothing."""
    from diffad import AnomalyDenoisePipeline

    data = write_mvtec(tmp_path / "data", {"tile": 8, "wood": 8})
    run("calibrate", model, "--data", data, "--category", "wood", "--output", tmp_path / "new")
    run(
        "calibrate", model, "--data", data / "wood" / "train" / "good", "--category", "good", "--output", tmp_path / "2"
    )
    one, other = (AnomalyDenoisePipeline.from_pretrained(tmp_path / name).calibration for name in ("new", "2"))
    assert torch.equal(one.normal_scores, other.normal_scores)


def test_calibrate_keeps_the_photographs_of_a_part_together(model, tmp_path):
    """Thresholds from other photographs of parts that the statistics know would not hold for new parts."""
    from diffad import AnomalyDenoisePipeline

    serials = [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
    good = write_folder(tmp_path / "good", len(serials), first_seed=50)
    paths = []
    for i, (path, serial) in enumerate(zip(sorted(good.iterdir()), serials, strict=True)):
        paths.append(path.rename(good / f"{i:02}-serial{serial}.png"))
    run("calibrate", model, "--data", good, "--output", tmp_path / "new", "--part-pattern", r"serial\d+")
    scores = AnomalyDenoisePipeline.from_pretrained(tmp_path / "new").calibration.normal_scores

    # each serial goes to the side that has fewer images
    sides = [
        [path for path, serial in zip(paths, serials, strict=True) if serial in side] for side in ((0, 3, 4), (1, 2))
    ]
    pipe = AnomalyDenoisePipeline.from_pretrained(model)
    pipe.calibrate(*sides)
    assert torch.equal(scores, pipe.calibration.normal_scores)


def test_calibrate_in_place_removes_the_old_report(model, tmp_path):
    """It was measured with other statistics, and a model card would show it."""
    shutil.copytree(model, tmp_path / "model")
    for name in ("report.json", "report.csv", "report.html"):
        (tmp_path / "model" / name).write_text("{}")
    for name in ("training.json", "report.pdf", "report-of-june.png"):
        (tmp_path / "model" / name).write_text("{}")
    good = write_folder(tmp_path / "good", 9, first_seed=50)
    run("calibrate", tmp_path / "model", "--data", good, "--false-alarm-rate", 0.4)
    # what others have written stays
    assert sorted(path.name for path in (tmp_path / "model").glob("report*")) == ["report-of-june.png", "report.pdf"]
    assert (tmp_path / "model" / "training.json").exists()  # the weights are the same
    assert json.loads((tmp_path / "model" / "calibration" / "config.json").read_text())["false_alarm_rate"] == 0.4


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_unreadable_files_are_named_and_skipped_where_asked(model, tmp_path, command):
    data = write_mvtec(tmp_path / "data")
    split = "test" if command == "evaluate" else "train"
    bad = data / "tile" / split / "good" / "bad.tif"
    Image.fromarray(np.full((24, 24), np.nan, np.float32)).save(bad)
    arguments = (command, model, "--data", data, "--output", tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"`on_bad_image` 'skip'.*\n.*bad\.tif: .*nan"):
        run(*arguments)
    run(*arguments, "--on-bad-image", "ignore", code=2)
    with pytest.warns(UserWarning, match=r"Skipped 1 images.*\n.*bad\.tif"):
        run(*arguments, "--on-bad-image", "skip")
    assert (tmp_path / "out.json").exists()


def test_a_test_of_one_kind_gets_a_word(model, tmp_path, capsys):
    data = write_mvtec(tmp_path / "data")
    shutil.rmtree(next(one for one in (data / "tile" / "test").iterdir() if one.name != "good"))
    assert [one.name for one in (data / "tile" / "test").iterdir()] == ["good"]
    assert "All images of tile are good: what compares both kinds" in run(
        "evaluate", model, "--data", data, "--output", tmp_path / "r.json"
    )


def test_benchmark_says_where_the_time_goes(model):
    result = json.loads(run("benchmark", model, "--batch-size", 2, "--repeats", 2, "--json", "--device", "cpu"))
    assert set(result["milliseconds_by_part"]) == {"unet", "feature_extractor", "rest"}
    assert sum(result["milliseconds_by_part"].values()) == pytest.approx(result["milliseconds_per_image"], rel=0.8)
    assert result["peak_memory_mib"] > 0


def test_predict_exits_with_4_where_nothing_could_be_read(model, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "broken.png").write_bytes(b"no image")
    command = ["predict", str(model), str(parts), "--output", str(tmp_path / "out")]
    for flags in ((), ("--fail-on-anomaly",)):
        result = CliRunner().invoke(app, [*command, *flags], catch_exceptions=False)
        assert result.exit_code == 4
        assert "most_anomalous" not in result.output  # there is no such file
    write_folder(parts, 1)
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0  # one was scored, the other has its row
    assert f"the most anomalous: {tmp_path / 'out' / 'most_anomalous.png'}" in result.output
    assert "4 if none" in " ".join(run("predict", "--help").split())


def test_a_mistyped_folder_is_no_id_of_the_hub(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "parts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    message = fail(monkeypatch, capsys, "benchmark", "runs/prts")
    assert "runs/prts holds no pipeline: there is no such folder. Did you mean runs/parts?" in message


def fail(monkeypatch, capsys, *arguments: object) -> str:
    """What the command says on standard error, having failed."""
    monkeypatch.setattr(sys, "argv", ["diffad", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    return capsys.readouterr().err


@pytest.fixture
def damaged(model, tmp_path) -> Path:
    """A model whose weights are cut off."""
    shutil.copytree(model, tmp_path / "damaged")
    weights = next((tmp_path / "damaged" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path / "damaged"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("predict nowhere empty --output out", ["no images", "in empty"]),
        ("predict nowhere missing.png --output out", ["no file or folder at missing.png"]),
        ("predict nowhere parts --output out", ["nowhere holds no pipeline", "Give the folder"]),
        ("predict {model} parts --output parts/000.png", ["parts/000.png is a file", "Give another"]),
        ("predict {model} parts --output out --category x", ["--category 'x' is unknown", "knows"]),
        ("predict {model} parts --output out --dtype int8", ["--dtype must be float32, bfloat16 or float16"]),
        ("predict {model} parts --output out --device cuda", ["--device is cuda", "no GPU", "Leave it out"]),
        ("predict {damaged} parts --output out", ["damaged", "copy it again"]),
        ("predict {model} parts --output out --device gpu", ["--device must be cpu, cuda", "'gpu'"]),
        ("export parts.onnx other.onnx", ["MODEL must be a saved pipeline", "parts.onnx is an exported file"]),
        ("fit nowhere --output out", ["DATA", "--dataset hub"]),
        ("fit parts.zip --output out", ["DATA", "parts.zip is a file", "unpack an archive"]),
        ("fit mean --output out", ["A category is named 'mean'", "Rename it"]),
        ("export {model} x.onnx --precision int8 --data broken", ["1 images cannot be read", "--on-bad-image 'skip'"]),
        ("export {model} x.onnx --precision int8 --data broken --on-bad-image skip", ["--data holds 3 good images"]),
        ("benchmark nowhere/at/all", ["holds no pipeline"]),
        (
            "benchmark {model} --compare --batch-size 4",
            ["--compare takes batches of 1 and 16", "leave out --batch-size"],
        ),
        ("drift missing.csv", ["no table at missing.csv", "Give the scores.csv"]),
        ("drift parts/000.png", ["holds no score"]),
        ("drift semicolons.csv", ["semicolons.csv holds no score", "commas"]),
        ("drift scores.csv", ["scores.csv holds the score 'none' of a.png"]),
        ("predict {model} '' --output out", ["INPUT...: one of the paths is empty"]),
        ("predict {model} parts --output ''", ["--output is empty", "variable of the shell"]),
        ("predict '' parts --output out", ["MODEL is empty", "variable of the shell"]),
        ("fit '' --output out", ["DATA is empty", "variable of the shell"]),
        ("train '' --output out", ["DATA is empty", "variable of the shell"]),
        ("calibrate {model} --data parts --output=", ["--output is empty", "variable of the shell"]),
        ("watch {model} '' --output out", ["FOLDER is an empty path", "variable of the shell"]),
        ("calibrate {model} --data ''", ["--data is empty", "variable of the shell"]),
        ("calibrate {model} --data parts --output parts", ["--output: parts holds images, 000.png first"]),
        ("fit parts --output parts", ["--output: parts holds images, 000.png first"]),
        ("evaluate {model} --data parts --output mine.json", ["--output: mine.csv would be replaced"]),
        ("evaluate {model} --data parts --output other.json", ["--output: other.json is no report of diffad's"]),
        ("evaluate {model} --data parts --output folder.json", ["--output must be a file"]),
        ("watch {model} missing --output out --poll", ["FOLDER must be a folder", "missing"]),
        ("watch {model} parts --output out --poll --settle 0", ["--settle must be above 0"]),
        ("watch {model} parts --output out --poll --settle nan", ["--settle must be above 0", "finite"]),
        ("watch {model} parts --output out --on-anomaly here", ["--on-anomaly must be a URL", "'here'"]),
        ("watch {model} parts --output out --mqtt mqtt://host", ["--mqtt must be mqtt://host/topic"]),
        ("evaluate {model} --data missing", ["--data: there is no folder at", "missing"]),
        ("evaluate {model} --data parts --output r.txt", ["--output must end in .json"]),
        ("calibrate {model} --data missing", ["missing"]),
        ("calibrate {model} --data parts --false-alarm-rate 7", ["--false-alarm-rate must lie in (0, 1)"]),
        ("calibrate {model} --data parts --part-pattern (a", ["--part-pattern is no regular expression"]),
        ("calibrate {model} --data parts --part-pattern serial", ["--part-pattern 'serial' finds no part in the path"]),
        ("calibrate {model} --data parts --part-pattern png", ["--part-pattern 'png' finds the same part in all"]),
        ("calibrate {model} --data two", ["--category is needed: two holds tile, wood"]),
        ("export {model} x.onnx --precision int8 --data two", ["--data: two holds tile, wood"]),
        ("export {model} x.onnx --precision int8 --data parts", ["--data holds 3 good images", "at least 20"]),
        ("calibrate org/name --data parts", ["--output is needed", "org/name is not a folder"]),
        ("calibrate {model} --data parts --category nuts", ["--category is 'nuts'", "of 'parts'", "Leave it out"]),
        ("fit parts --output parts/000.png/x", ["parts/000.png is a file", "Give another"]),
        ("export {model} x.foo", ["The output must end in .onnx", "but is x.foo."]),
        ("convert sgd x.ckpt out", ["'diad' and 'taef2'"]),
        ("convert taef2 parts out", ["parts", "taef2_encoder.safetensors"]),
        ("convert diad x.ckpt out", ["CHECKPOINT: no file at x.ckpt", ".safetensors"]),
        ("convert diad parts/000.png out", ["CHECKPOINT: parts/000.png is damaged"]),
        ("convert diad x.ckpt parts/000.png", ["parts/000.png is a file"]),
        ("push {model} a/b/c", ["a/b/c"]),
        ("push nowhere org/name", ["nowhere holds no pipeline"]),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    arguments, words, model, damaged, tmp_path, monkeypatch, capsys, fresh_accelerate
):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "parts", 3)
    (write_folder(tmp_path / "broken", 3) / "cut.png").write_bytes(b"no picture")
    write_mvtec(tmp_path / "two", {"tile": 2, "wood": 2})
    write_mvtec(tmp_path / "mean", {"mean": 2, "wood": 2})
    for folder in ("empty", "folder.json"):
        (tmp_path / folder).mkdir()
    for name, text in (
        ("mine.csv", "1"),
        ("other.json", "[1]"),
        ("parts.zip", "PK"),
        ("scores.csv", "path,score,verdict\na.png,none,normal\n"),
        ("semicolons.csv", "path;score;verdict\na.png;1.0;normal\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    typed = [word.format(model=model, damaged=damaged) for word in shlex.split(arguments)]
    message = fail(monkeypatch, capsys, *typed)
    errors = [line for line in message.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message.endswith(f"{errors[0]}\n")  # nothing follows
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "m/.unfinished-1234.json"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_by_the_output(error):
    expected = f"{os.strerror(errno.ENOSPC)}, while --output m was written. Free space there, or give another."
    assert describe_error(error, ["fit", "parts", "--output", "m"]) == expected
    assert describe_error(error, ["fit", "parts", "--output=m"]) == expected
    assert "while the output was written" in describe_error(error, ["export", "m", "m.onnx"])


def test_a_category_without_thresholds_is_told_what_calibrates_it():
    pipeline = tiny_pipeline(categories=["bolt", "tile"])
    pipeline.calibrate(textures(4), category="tile", false_alarm_rate=0.5)
    with pytest.raises(ValueError, match="not calibrated") as raised:
        pipeline(textures(1), category="bolt")
    expected = "Category 'bolt' is not calibrated. Run `diffad calibrate --category 'bolt'` first."
    for command in ("predict", "evaluate", "watch", "explain"):
        assert describe_error(raised.value, [command, "model", "--category", "bolt"]) == expected


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder that takes no files")
def test_what_cannot_be_written_is_told_before_the_work(model, tmp_path, monkeypatch, capsys):
    good = write_folder(tmp_path / "good", 4)
    for command in (
        ["fit", good, "--output", "/proc/model"],
        ["evaluate", model, "--data", tmp_path / "none", "--output", "/proc/report.json"],
        ["export", model, "/proc/model.onnx"],
        ["predict", model, good, "--output", "/proc/results"],
    ):
        said = fail(monkeypatch, capsys, *command)
        assert "nothing can be written to /proc" in said
        assert ("OUTPUT" if command[0] == "export" else "--output") in said


def test_the_version_can_be_asked_for():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"diffad {__version__}\n")


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path, monkeypatch, capsys):
    for arguments in (["--debug", "benchmark", "nowhere"], ["benchmark", "nowhere", "--debug"]):
        message = fail(monkeypatch, capsys, *arguments)
        assert "Traceback" in message
        assert "FileNotFoundError: nowhere holds no pipeline" in message


def test_messages_are_shown_as_they_are(monkeypatch, capsys):
    """Square brackets are no markup, and an error that nobody foresaw has its kind."""

    def broken(*_):
        raise error

    monkeypatch.setattr("diffad.commands.models.load_pipeline", broken)
    error: Exception = ImportError('It needs timm:\n  pip install "diffad[demo]"')
    assert fail(monkeypatch, capsys, "benchmark", "m") == 'error: It needs timm: pip install "diffad[demo]"\n'
    error = KeyError("unet")
    assert fail(monkeypatch, capsys, "benchmark", "m") == "error: KeyError: 'unet' (--debug shows where)\n"


@pytest.mark.parametrize("flag", ["--false-alarm-rate", "--false_alarm_rate"])
def test_what_a_script_says_of_a_flag_is_one_line(flag, tmp_path, capsys):
    write_folder(tmp_path / "parts", 3)
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", str(tmp_path / "parts"), "--output", str(tmp_path / "out"), flag, "nan"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --false_alarm_rate must lie in (0, 1), but is nan\n"


def test_a_part_pattern_may_begin_with_a_dash(tmp_path):
    from diffad.training.fit import parse_args

    options = (None, None, 0.1, r"-(\d+)", cli.OnBadImage.skip, 0, None, None, None)
    args = parse_args(cli.training_flags(str(tmp_path), tmp_path / "model", *options))
    assert (args.part_pattern, args.on_bad_image) == (r"-(\d+)", "skip")


def test_the_command_itself_fails_with_one_line(tmp_path):
    command = [sys.executable, "-m", "diffad.cli", "benchmark", "nowhere/at/all"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: nowhere/at/all holds no pipeline")
    assert "Traceback" not in result.stderr
