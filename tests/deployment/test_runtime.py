"""An exported model is called as its pipeline, on the same inputs and without torch."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import textures, tiny_extractor, write_folder, write_mvtec, write_png
from PIL import Image
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline, AnomalyOutput
from diffad.cli import app
from diffad.deployment import Runtime, RuntimeOutput
from diffad.images import resize_image
from diffad.reading.image_arrays import resized_array

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

# what an installation of NumPy, Pillow, typer, rich and a runtime lacks, for a process that may not import it
WITHOUT_TORCH = """
import sys

MISSING = {"accelerate", "datasets", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "onnx", "onnxscript",
           "safetensors", "scipy", "timm", "torch", "torchmetrics", "torchvision"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[AnomalyDenoisePipeline, Path]:
    pipeline = AnomalyDenoisePipeline(
        None, None, tiny_extractor(image_size=24), weights={"gaussian": 1.0, "nearest": 1.0}, feature_sigma=1.0
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.calibrate(textures(12), false_alarm_rate=0.2)
    return pipeline, pipeline.export(tmp_path_factory.mktemp("model") / "model.onnx")


def assert_same(actual: RuntimeOutput, expected: AnomalyOutput) -> None:
    assert actual.anomaly_map.shape == expected.anomaly_map.shape
    assert np.abs(actual.anomaly_map - expected.anomaly_map).max() < 2e-4 * np.abs(expected.anomaly_map).max()
    assert np.allclose(actual.anomaly_score, expected.anomaly_score, rtol=1e-4)
    for name in ("anomaly_mask", "is_anomalous", "p_value"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name


def photographs(folder: Path) -> dict[str, object]:
    """Every kind of image that a pipeline takes, but tensors."""
    pixels, wide = textures(1, size=40)[0], textures(1, size=(30, 50))[0]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(wide).save(folder / "turned.jpg", exif=turned)
    deep = (pixels[..., 0].astype(np.uint16) * 13) + 5
    Image.fromarray(deep).save(folder / "deep.png")
    transparent = Image.fromarray(np.dstack([wide, np.full((30, 50, 1), 100, np.uint8)]))
    return {
        "array": pixels,
        "grey array": pixels[..., 0],
        "float array": wide.astype(np.float64) / 255.0,
        "batch": np.stack(textures(3, size=20)),
        "deep array": deep,
        "path": write_png(folder / "part.png", wide),
        "text": str(write_png(folder / "part2.png", pixels)),
        "turned": folder / "turned.jpg",
        "deep": folder / "deep.png",
        "transparent": transparent,
        "palette": Image.fromarray(pixels).convert("P"),
        "list": [pixels, Image.fromarray(pixels)],
    }


def test_every_kind_of_image_gives_what_the_pipeline_gives(model, tmp_path):
    pipeline, path = model
    runtime = Runtime(path)
    for name, image in photographs(tmp_path).items():
        for match in (True, False):
            expected = pipeline(image, match_input_resolution=match)
            actual = runtime(image, batch_size=2, match_input_resolution=match)
            assert actual.anomaly_map.shape == expected.anomaly_map.shape, name
            assert_same(actual, expected)


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (301, 203)])
def test_images_are_resized_as_torch_does(size):
    image = Image.fromarray(textures(1, size=size)[0])
    expected = resize_image(image, (37, 24))[0].movedim(0, -1).numpy()
    assert np.abs(resized_array(image, (37, 24)) - expected).max() < 1e-6


def test_large_images_are_resized_in_bands(monkeypatch):
    image = Image.fromarray(textures(1, size=(301, 203))[0])
    whole = resized_array(image, (24, 24))
    monkeypatch.setattr("diffad.reading.image_arrays.BAND_PIXELS", 203 * 17)
    assert np.abs(resized_array(image, (24, 24)) - whole).max() < 1e-6


def test_the_output_has_the_fields_of_a_pipelines_output():
    names = [*RuntimeOutput.__dataclass_fields__]
    assert names == [*AnomalyOutput.__dataclass_fields__][: len(names)]


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ([], {}, "`image` is an empty list"),
        (np.zeros((4, 4, 2), np.uint8), {}, "must have 1 or 3 channels"),
        (np.full((4, 4), 2.0), {}, r"must lie in \[0, 1\]"),
        (textures(1) + textures(1, size=20), {}, "images of different sizes"),
        (textures(1)[0], {"batch_size": 0}, "`batch_size` must be a positive integer"),
        (textures(2), {"category": ["default"]}, "`category` lists 1 names for 2 images"),
        (textures(1)[0], {"category": "cable"}, "`category` 'cable' is unknown"),
        (textures(1)[0], {"category": False}, "`category` False is unknown"),
        (textures(1)[0], {"category": 0.0}, r"`category` 0\.0 is unknown.*or its index, an integer"),
        (textures(2), {"category": [0, 0.0]}, r"`category` 0\.0 is unknown"),
    ],
)
def test_wrong_arguments_are_named(model, image, options, message):
    with pytest.raises(ValueError, match=message):
        Runtime(model[1])(image, **options)


@pytest.mark.parametrize("uint8", [False, True])
def test_pixels_of_either_type_are_the_same(model, uint8, tmp_path):
    pipeline, path = model
    runtime = Runtime(pipeline.export(tmp_path / "model.onnx", input_type="uint8") if uint8 else path)
    pixels = np.stack(textures(3, size=24))
    expected = runtime.run(pixels / np.float32(255.0))
    assert np.array_equal(runtime.run(pixels).anomaly_score, expected.anomaly_score)
    assert np.allclose(runtime(pixels).anomaly_score, expected.anomaly_score, rtol=1e-4)
    for wrong, message in (
        (pixels.astype(np.int64), "must be uint8, or floating point .*int64"),
        (pixels.astype(np.float32), r"must lie in \[0, 1\] .*, but spans \[.*Divide by 255"),
        (np.full((1, 24, 24, 3), np.nan), "holds NaN"),
    ):
        with pytest.raises(ValueError, match=f"`pixels` {message}"):
            runtime.run(wrong)


def test_numpys_integers_are_integers(model):
    images = textures(3)
    expected = Runtime(model[1])(images).anomaly_score
    for options in (
        {"category": np.int64(0)},
        {"category": np.zeros(3, np.uint8)},
        {"batch_size": np.int64(2)},
        {"batch_size": np.int8(1)},
    ):
        np.testing.assert_allclose(Runtime(model[1])(images, **options).anomaly_score, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "`device` 'tpu' is not there"),
        ({"device": 0}, "`device` must be a name such as .*, but is 0"),
        ({"false_alarm_rate": "0.1"}, r"`false_alarm_rate` must be a number in \(0, 1\), or None, but is '0.1'"),
        ({"false_alarm_rate": 1.0}, "`false_alarm_rate` must be"),
    ],
)
def test_wrong_arguments_of_loading_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        Runtime(model[1], **options)


def test_importing_it_needs_no_torch():
    code = "import sys; import diffad.deployment; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_predict_without_torch_writes_what_it_writes_with_the_pipeline(model, tmp_path):
    pipeline, path = model
    pipeline.save_pretrained(tmp_path / "pipeline")
    parts = write_folder(tmp_path / "parts", 3, size=40)
    code = f"{WITHOUT_TORCH}sys.meta_path.insert(0, Missing())\nfrom diffad.cli import main; main()"
    arguments = ["predict", str(path), str(parts), "--output", str(tmp_path / "without"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]

    from diffad.predict import predict_files
    from diffad.reading.inputs import find_images

    expected: list[dict] = []
    predict_files(pipeline, find_images([parts]), tmp_path / "with", report=expected.append)
    assert [row["verdict"] for row in rows] == [row["verdict"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["score"] == pytest.approx(float(other["score"]), rel=1e-4)
        assert row["p_value"] == pytest.approx(float(other["p_value"]))
        for folder in ("maps", "masks", "overlays"):
            pictures = [
                np.asarray(Image.open(tmp_path / run / folder / row["picture"])).astype(float)
                for run in ("without", "with")
            ]
            scale = 65535.0 if folder == "maps" else 255.0
            assert np.abs(pictures[0] - pictures[1]).max() < 0.01 * scale
    assert (tmp_path / "without" / "most_anomalous.png").is_file()
    assert "No drift in 3 parts" in " ".join(done.stderr.split())


def test_drift_without_matplotlib_says_what_it_found(model, tmp_path):
    parts = write_folder(tmp_path / "parts", 3, size=40)
    table = tmp_path / "out" / "scores.csv"
    CliRunner().invoke(app, ["predict", str(model[1]), str(parts), "--output", str(table.parent)])
    code = f"{WITHOUT_TORCH}sys.meta_path.insert(0, Missing())\nfrom diffad.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "drift", str(table)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No drift in 3 parts")
    assert "No plot, which takes matplotlib" in done.stderr
    command = [sys.executable, "-c", code, "drift", str(table), "--output", str(tmp_path / "plot.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "This needs the package matplotlib" in done.stderr


WATCH = """
import threading
from diffad.deployment import Runtime
from diffad.deployment.watch import watch_folder

stop = threading.Event()
watch_folder(Runtime(sys.argv[1]), sys.argv[2], sys.argv[3], stop, settle=0.1,
             report=lambda event: stop.set() if len(open(sys.argv[3] + "/scores.csv").readlines()) > 4 else None)
"""

SERVE = """
import csv
import json
from pathlib import Path
from diffad.deployment import Runtime
from diffad.deployment.detector import Detector
from diffad.deployment.service import create_app, describe

detector = Detector(Runtime(sys.argv[1]))
create_app(detector.pipeline, page=False)
for path in sorted(Path(sys.argv[2]).iterdir()):
    sent = detector.read(path.name, path.read_bytes())
    print(json.dumps(describe(detector, path.name, sent, detector.submit([sent])[0].result(), True)))
"""


@pytest.mark.parametrize("command", ["watch", "serve"])
def test_watch_and_serve_need_no_torch(model, command, tmp_path):
    pytest.importorskip("watchfiles" if command == "watch" else "fastapi")
    pipeline, path = model
    parts = write_folder(tmp_path / "parts", 3, size=40)
    write_png(parts / "flat.png", np.full((40, 40, 3), 255, np.uint8))  # an alarm
    code = f"{WITHOUT_TORCH}sys.meta_path.insert(0, Missing())\n{WATCH if command == 'watch' else SERVE}"
    arguments = [sys.executable, "-c", code, str(path), str(parts), str(tmp_path / "output")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if command == "watch":
        with open(tmp_path / "output" / "scores.csv", newline="") as file:
            found = {Path(row["path"]).name: row for row in csv.DictReader(file)}
        assert json.loads((tmp_path / "output" / "calibration.json").read_text())["false_alarm_rate"] == 0.2
    else:
        found = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
        assert all("regions" not in one for one in found.values())  # which SciPy would list
    images = sorted(parts.iterdir())
    assert [*found] == [one.name for one in images]
    expected = pipeline([str(one) for one in images])
    for row, score, p_value in zip(found.values(), expected.anomaly_score, expected.p_value, strict=True):
        assert float(row["score"]) == pytest.approx(float(score), rel=1e-4)
        assert float(row["p_value"]) == pytest.approx(float(p_value), abs=1e-6)


def test_an_exported_file_is_evaluated_and_timed_as_a_pipeline_is(model, tmp_path):
    from diffad.evaluation.speed import benchmark_pipeline
    from diffad.training.evaluate import main as evaluate

    pipeline, path = model
    pipeline.save_pretrained(tmp_path / "pipeline")
    data = write_mvtec(tmp_path / "data")
    reports = [
        evaluate(
            ["--model", str(one), "--data", str(data), "--output", str(tmp_path / f"{i}.json"), "--baselines", "none"]
        )
        for i, one in enumerate((path, tmp_path / "pipeline"))
    ]
    for results in zip(*(report["results"].values() for report in reports), strict=True):
        for name, value in results[0].items():
            if isinstance(value, float) and "second" not in name:
                assert value == pytest.approx(results[1][name], abs=1e-3), name
    speed = benchmark_pipeline(Runtime(path), batch_size=2, repeats=1)
    assert speed["images_per_second"] > 0.0
    assert [*speed["milliseconds_by_part"]] == ["rest"]


@pytest.mark.parametrize("suffix", [".ONNX", ".XML"])
def test_an_ending_in_capitals_is_the_same(model, tmp_path, suffix):
    if suffix == ".XML":
        pytest.importorskip("openvino")
    path = model[0].export(tmp_path / f"model{suffix.lower()}")
    expected = Runtime(path)(textures(2))
    for file in tmp_path.iterdir():
        file.rename(file.with_name(f"E{file.suffix.upper()}"))
    write_folder(tmp_path / "parts", 2)
    arguments = ["predict", str(tmp_path / f"E{suffix}"), str(tmp_path / "parts"), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    with open(tmp_path / "out" / "scores.csv", newline="") as table:
        scores = [float(row["score"]) for row in csv.DictReader(table)]
    np.testing.assert_allclose(scores, expected.anomaly_score, rtol=1e-5)


def test_a_score_that_is_no_number_is_no_verdict(model, tmp_path):
    damaged = onnx.load(model[1])
    for weight in damaged.graph.initializer:
        if len(weight.dims) == 4:
            weight.CopyFrom(onnx.numpy_helper.from_array(np.full(weight.dims, np.nan, np.float32), weight.name))
    onnx.save(damaged, tmp_path / "damaged.onnx")
    with pytest.raises(ValueError, match=r"Scores are NaN.*float32"):
        Runtime(tmp_path / "damaged.onnx")(textures(1)[0])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_named(model, tmp_path, share):
    content, path = model[1].read_bytes(), tmp_path / "cut.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.onnx is damaged.*export the model again"):
        Runtime(path)


@pytest.fixture(scope="module")
def openvino_files(model, tmp_path_factory) -> Path:
    """A folder with two models of the same networks, whose statistics differ."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("openvino")
    other = AnomalyDenoisePipeline(**model[0].components, weights={"gaussian": 1.0, "nearest": 1.0}, feature_sigma=1.0)
    other.set_progress_bar_config(disable=True)
    other.calibrate(textures(12, first_seed=50), false_alarm_rate=0.2)
    model[0].export(folder / "one.xml")
    other.export(folder / "other.xml")
    return folder


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_threads_may_share_one(model, openvino_files, suffix):
    runtime = Runtime(model[1] if suffix == ".onnx" else openvino_files / "one.xml")
    images = textures(8)
    expected = [float(runtime(one).anomaly_score[0]) for one in images]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda i: float(runtime(images[i % 8]).anomaly_score[0]), range(400)))
    np.testing.assert_allclose(actual, 50 * expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".bin", lambda whole: b""),
        (".bin", lambda whole: whole[: len(whole) // 2]),
        (".xml", lambda whole: b""),
        (".xml", lambda whole: whole[: len(whole) // 2]),
        (".xml", lambda whole: b"<?xml version='1.0'?><html><body/></html>"),
    ],
)
def test_files_of_openvino_that_are_damaged_are_named(openvino_files, tmp_path, ending, content):
    for name in ("one.xml", "one.bin"):
        shutil.copy(openvino_files / name, tmp_path / name)
    damaged = tmp_path / f"one{ending}"
    damaged.write_bytes(content(damaged.read_bytes()))
    with pytest.raises(ValueError, match=r"one\.xml or .*one\.bin is damaged.*export the model again"):
        Runtime(tmp_path / "one.xml")


def test_weights_of_another_model_are_refused(openvino_files, tmp_path):
    """They fit, and would give wrong verdicts."""
    assert (openvino_files / "one.bin").stat().st_size == (openvino_files / "other.bin").stat().st_size
    shutil.copy(openvino_files / "one.xml", tmp_path / "one.xml")
    shutil.copy(openvino_files / "other.bin", tmp_path / "one.bin")
    with pytest.raises(ValueError, match=r"one\.bin is damaged, or not the one that .*one\.xml was exported with: put"):
        Runtime(tmp_path / "one.xml")
    shutil.copy(openvino_files / "one.bin", tmp_path / "one.bin")
    expected = Runtime(openvino_files / "one.xml")(textures(2)).anomaly_score
    np.testing.assert_array_equal(Runtime(tmp_path / "one.xml")(textures(2)).anomaly_score, expected)

    text = (tmp_path / "one.xml").read_text()
    without = re.sub(r"<diffad_weights [^>]*>", "", text)  # as versions before it wrote files
    assert without != text
    (tmp_path / "one.xml").write_text(without)
    np.testing.assert_array_equal(Runtime(tmp_path / "one.xml")(textures(2)).anomaly_score, expected)
