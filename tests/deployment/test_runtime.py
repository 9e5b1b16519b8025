"""An exported model is called as its pipeline, on the same inputs and without torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import textures, tiny_extractor, write_folder, write_mvtec, write_png
from PIL import Image
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline, AnomalyOutput
from diffad.cli import app
from diffad.deployment import Runtime, RuntimeOutput
from diffad.image_arrays import resized_array
from diffad.images import resize_image

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
    monkeypatch.setattr("diffad.image_arrays.BAND_PIXELS", 203 * 17)
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
    ],
)
def test_wrong_arguments_are_named(model, image, options, message):
    with pytest.raises(ValueError, match=message):
        Runtime(model[1])(image, **options)


def test_devices_that_are_not_there_are_named(model):
    with pytest.raises(ValueError, match="`device` 'tpu' is not there"):
        Runtime(model[1], device="tpu")


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

    from diffad.inputs import find_images
    from diffad.predict import predict_files

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


WATCH = """
import threading
from diffad.deployment import Runtime
from diffad.deployment.watch import watch_folder

stop = threading.Event()
watch_folder(Runtime(sys.argv[1]), sys.argv[2], sys.argv[3], stop, settle=0.1,
             report=lambda event: stop.set() if len(open(sys.argv[3] + "/scores.csv").readlines()) > 3 else None)
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
    # SciPy, which lists regions, comes with neither; services list them
    missing = WITHOUT_TORCH if command == "watch" else WITHOUT_TORCH.replace('"scipy", ', "")
    code = f"{missing}sys.meta_path.insert(0, Missing())\n{WATCH if command == 'watch' else SERVE}"
    arguments = [sys.executable, "-c", code, str(path), str(parts), str(tmp_path / "output")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if command == "watch":
        with open(tmp_path / "output" / "scores.csv", newline="") as file:
            found = {Path(row["path"]).name: row for row in csv.DictReader(file)}
        assert json.loads((tmp_path / "output" / "calibration.json").read_text())["false_alarm_rate"] == 0.2
    else:
        found = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
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
