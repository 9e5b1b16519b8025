"""An exported graph gives what the pipeline gives, in both runtimes."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.evaluate_runtimes import compare
from conftest import texture, textures, tiny_extractor, tiny_pipeline, write_folder, write_mvtec
from PIL import Image

from diffad import AnomalyDenoisePipeline, TimmFeatureExtractor
from diffad.commands.transfer import export
from diffad.data import load_anomaly_dataset
from diffad.deployment import Runtime
from diffad.deployment.export import InspectionGraph, halve_weights, write_graph
from diffad.deployment.metadata import OUTPUTS
from diffad.evaluation.detectors import image_auroc
from diffad.models.feature_extractor import LITE0_BACKBONE

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
IMAGES = [*textures(3, first_seed=100), *(texture(200 + i, defect=True) for i in range(2))]


def without_denoiser(
    extractor: TimmFeatureExtractor | None = None, categories: list[str] | None = None
) -> AnomalyDenoisePipeline:
    pipeline = AnomalyDenoisePipeline(
        unet=None,
        scheduler=None,
        feature_extractor=extractor or tiny_extractor(image_size=24),
        weights={"gaussian": 0.75, "nearest": 0.25},
        contrast=0.2,
        feature_resolution=5,  # windows that overlap
        feature_sigma=1.0,
        categories=categories,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def graph_output(pipeline: AnomalyDenoisePipeline, pixels: np.ndarray, category: int | None = None) -> dict:
    """What torch makes of the graph's images, with the graph's noise."""
    index = None if category is None else torch.tensor(category)
    with torch.no_grad():
        outputs = InspectionGraph(pipeline)(torch.from_numpy(pixels), category=index)
    return {name: value.numpy() for name, value in zip(OUTPUTS, outputs, strict=False)}


def assert_equal(actual, expected: dict) -> None:
    for name in OUTPUTS[: len(expected)]:
        found = getattr(actual, name)
        assert found.dtype == expected[name].dtype
        if found.dtype == bool:
            assert np.array_equal(found, expected[name]), name
        else:
            assert np.abs(found - expected[name]).max() <= 2e-5 * np.abs(expected[name]).max(), name


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], tuple[AnomalyDenoisePipeline, Path]]:
    """Pipelines and their .onnx files by name, each exported when it is first asked for, as that takes seconds."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> tuple[AnomalyDenoisePipeline, Path]:
        if name == "denoiser":
            pipeline = tiny_pipeline(timesteps=[5, 100], image_size=24).to("cpu")
        elif name == "predicted features":  # the denoiser ends with them
            pipeline = tiny_pipeline(timesteps=[100], image_size=24, alpha=0.0).to("cpu")
        elif name == "unified":
            pipeline = tiny_pipeline(timesteps=[50], categories=["a", "b"]).to("cpu")
        else:
            pipeline = without_denoiser()
        for number, category in enumerate(pipeline.categories or [None]):
            if name != "uncalibrated":
                images = textures(12, first_seed=50 * number)
                pipeline.calibrate(images, false_alarm_rate=0.2, category=category)
        return pipeline, pipeline.export(folder / f"{name}.onnx")

    return make


@pytest.mark.parametrize("name", ["denoiser", "predicted features", "features"])
def test_a_graph_gives_what_the_pipeline_gives_in_batches_of_any_size(models, name):
    pipeline, path = models(name)
    runtime = Runtime(path)
    side = pipeline.input_resolution
    for count in (1, 3, 70):  # 140 samples of the denoiser
        pixels = np.random.default_rng(count).random((count, side, side, 3), dtype=np.float32)
        assert_equal(runtime.run(pixels), graph_output(pipeline, pixels))


def test_a_graph_has_the_noise_of_a_generator_that_its_documentation_names(models):
    pipeline, path = models("denoiser")
    noises = [torch.Generator().manual_seed(0) for _ in IMAGES]
    for expected in (pipeline(IMAGES, generator=noises), pipeline(IMAGES), pipeline(IMAGES, batch_size=2)):
        assert_equal(Runtime(path)(IMAGES), {name: getattr(expected, name) for name in OUTPUTS})


@pytest.mark.parametrize("name", ["denoiser", "features"])
def test_it_compiles_as_one_graph(models, name):
    pipeline, _ = models(name)
    graph = InspectionGraph(pipeline)
    pixels = torch.rand(2, 24, 24, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = graph(pixels)
        # AOT without inductor, which takes a minute
        compiled = torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=False)(pixels)
    for found, one in zip(compiled, expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)


def test_calibration_is_inside(models):
    pipeline, path = models("features")
    expected = pipeline(IMAGES)
    assert expected.is_anomalous.any()
    assert not expected.is_anomalous.all()
    actual = Runtime(path)(IMAGES)
    assert_equal(actual, {name: getattr(expected, name) for name in OUTPUTS})


def test_a_graph_of_several_categories_takes_one_at_a_time(models):
    pipeline, path = models("unified")
    runtime = Runtime(path)
    pixels = np.random.default_rng(0).random((2, 16, 16, 3), dtype=np.float32)
    outputs = [graph_output(pipeline, pixels, index) for index in (0, 1)]
    for index, expected in enumerate(outputs):
        assert_equal(runtime.run(pixels, index), expected)
    assert np.abs(outputs[0]["anomaly_map"] - outputs[1]["anomaly_map"]).max() > 0.1
    mixed = runtime(list(pixels), category=["b", "a"])
    assert np.allclose(mixed.anomaly_map[0], outputs[1]["anomaly_map"][0], atol=1e-3)
    assert np.allclose(mixed.anomaly_map[1], outputs[0]["anomaly_map"][1], atol=1e-3)


def test_without_a_calibration_there_are_maps_and_scores_alone(models):
    pipeline, path = models("uncalibrated")
    pixels = np.random.default_rng(0).random((2, 24, 24, 3), dtype=np.float32)
    output = Runtime(path).run(pixels)
    assert_equal(output, graph_output(pipeline, pixels))
    assert output.is_anomalous is None


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_export_leaves_no_graph_with_the_numbers_of_another(models, tmp_path):
    pytest.importorskip("openvino")
    path, target = models("features")[1], tmp_path / "model.xml"
    write_graph(onnx.load(path), Runtime(path).metadata, target)
    program = f"""
import os, signal, sys, onnx
from pathlib import Path
from diffad.deployment.export import write_graph
from diffad.deployment.runtime import Runtime

def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".xml"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
write_graph(onnx.load({str(path)!r}), Runtime({str(path)!r}).metadata, Path({str(target)!r}))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"no file at .*model.xml"):
        Runtime(target)


@pytest.mark.parametrize("name", ["denoiser", "features", "unified"])
def test_openvino_gives_the_same(models, name, tmp_path):
    pytest.importorskip("openvino")
    pipeline, path = models(name)
    if name == "features":
        pipeline.export(tmp_path / "model.xml")
    else:  # the same, without a second trace
        write_graph(onnx.load(path), Runtime(path).metadata, tmp_path / "model.xml")
    runtime = Runtime(tmp_path / "model.xml")
    side = pipeline.input_resolution
    for count in (1, 3):
        pixels = np.random.default_rng(count).random((count, side, side, 3), dtype=np.float32)
        expected = graph_output(pipeline, pixels, 1 if name == "unified" else None)
        assert_equal(runtime.run(pixels, 1 if name == "unified" else 0), expected)
    assert runtime.metadata == Runtime(models(name)[1]).metadata


def test_half_precision_halves_the_networks_and_little_else(models, tmp_path):
    pipeline, path = models("denoiser")
    model, half = onnx.load(path), tmp_path / "half.onnx"
    halve_weights(model)
    write_graph(model, Runtime(path).metadata, half)
    runtime = Runtime(half)
    assert path.stat().st_size - half.stat().st_size > 1.5 * sum(p.numel() for p in pipeline.unet.parameters())
    pixels = np.random.default_rng(0).random((3, 24, 24, 3), dtype=np.float32)
    actual, expected = runtime.run(pixels), graph_output(pipeline, pixels)
    assert np.abs(actual.anomaly_map - expected["anomaly_map"]).max() < 0.05 * np.abs(expected["anomaly_map"]).max()


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_int8_is_calibrated_anew(tmp_path, suffix):
    pytest.importorskip("nncf")
    if suffix == ".xml":
        pytest.importorskip("openvino")
    # of a real network's size: what is smaller is folded into the file's constants, which hides what NNCF cannot read
    pipeline = without_denoiser(TimmFeatureExtractor.from_backbone(LITE0_BACKBONE, (8, 16), 32, weights="random"))
    pipeline.calibrate(textures(24), false_alarm_rate=0.2)
    assert pipeline.calibration.patch_directions.shape[2] < pipeline.calibration.patch_directions.shape[1]
    good = textures(50, first_seed=300)
    runtime = Runtime(pipeline.export(tmp_path / f"int8{suffix}", precision="int8", images=good))
    output = runtime([*good[::5], *IMAGES[3:]], batch_size=1)  # sums in the same order
    # at most 20% of the images that set them, as is stated, and what is defective
    assert output.is_anomalous[:10].mean() <= 0.2
    assert output.is_anomalous[10:].all()
    assert output.p_value[10:].max() == pytest.approx(1 / 11)
    assert runtime.metadata.image_threshold != pipeline.calibration.image_threshold.tolist()
    found = runtime.metadata.quantization
    assert found["images"] == 10
    assert found["alarms"] == pytest.approx(output.is_anomalous[:10].mean())
    assert found["alarms_before"] == pytest.approx(pipeline(good[::5]).is_anomalous.mean())


def test_int8_counts_maxima_inside_a_region_alone(tmp_path):
    """Outside, maps are 0, which may be above all that is inside."""
    pytest.importorskip("nncf")
    pipeline = without_denoiser()
    region = np.zeros((32, 32), dtype=bool)
    region[:8, :8] = True
    pipeline.calibrate(textures(24, 32), false_alarm_rate=0.2, roi=region)
    good = textures(50, 32, first_seed=300)
    runtime = Runtime(pipeline.export(tmp_path / "int8.onnx", precision="int8", images=good))
    maps = runtime(good[::5], batch_size=1, match_input_resolution=False).anomaly_map
    inside = runtime.inside_region(maps.shape[1:])
    expected = maps[:, inside].max(axis=1)
    assert expected.min() < 0.0
    np.testing.assert_allclose(np.sort(runtime.metadata.normal_maxima[0]), np.sort(expected), rtol=1e-4)
    assert runtime.metadata.pixel_threshold[0] == pytest.approx(np.sort(expected)[-2], rel=1e-4)  # one of ten is above


def test_int8_says_what_it_costs(tmp_path, capsys):
    pytest.importorskip("nncf")
    extractor = TimmFeatureExtractor.from_backbone(LITE0_BACKBONE, (8, 16), 32, weights="random")
    pipeline = without_denoiser(extractor)
    pipeline.calibrate(textures(24), false_alarm_rate=0.2)
    pipeline.save_pretrained(tmp_path / "model")
    data = write_mvtec(tmp_path / "data", {"tile": 24})
    export(str(tmp_path / "model"), tmp_path / "int8.onnx", precision="int8", data=str(data / "tile"))
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"Of 5 good images .* raised an alarm in float32, .* in 8 bits\. Maps differ by \d+%", said)
    found = re.search(r"Image AUROC of the 7 test images: ([\d.]+)% in float32, ([\d.]+)% in 8 bits", said)
    test = load_anomaly_dataset(data, "test")
    expected = [image_auroc(one, test) for one in (pipeline, Runtime(tmp_path / "int8.onnx"))]
    assert [f"{value:.1%}" for value in expected] == [f"{value}%" for value in found.groups()]
    good = write_folder(tmp_path / "good", 24)  # of good images alone there is nothing to rank
    export(str(tmp_path / "model"), tmp_path / "int8.onnx", precision="int8", data=str(good))
    assert "AUROC" not in capsys.readouterr().err


def test_int8_counts_copies_once(tmp_path):
    without = without_denoiser()
    without.calibrate(textures(24), false_alarm_rate=0.2)
    without.save_pretrained(tmp_path / "model")
    good = write_folder(tmp_path / "good", 12)
    for path in list(good.iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem} - Copy.png"))
    with (
        pytest.warns(UserWarning, match="Left out 12 good images"),
        pytest.raises(ValueError, match="holds 12 good images, and int8 takes at least 20"),
    ):
        export(str(tmp_path / "model"), tmp_path / "int8.onnx", precision="int8", data=str(good))


def test_a_region_of_interest_and_a_smallest_area_are_inside(tmp_path):
    pipeline = without_denoiser()
    region = np.zeros((32, 32), dtype=bool)
    region[4:, 8:] = True
    images = [np.asarray(Image.fromarray(one).resize((24, 24))) for one in IMAGES]
    good = [np.asarray(Image.fromarray(one).resize((24, 24))) for one in textures(12)]
    for smallest_area in (0.0, 0.02):
        pipeline.calibrate(good, false_alarm_rate=0.2, roi=region, smallest_area=smallest_area)
        runtime = Runtime(pipeline.export(tmp_path / "model.onnx"))
        for size in (24, 40):
            pictures = [np.asarray(Image.fromarray(one).resize((size, size))) for one in images]
            expected = pipeline(pictures)
            assert expected.is_anomalous.any()
            assert (expected.anomaly_map[:, : size // 10] == 0.0).all()
            actual = runtime(pictures)
            assert_equal(actual, {name: getattr(expected, name) for name in OUTPUTS})


def test_a_smallest_area_is_inside_without_thresholds(tmp_path):
    pipeline = without_denoiser()
    good = [np.asarray(Image.fromarray(one).resize((24, 24))) for one in textures(2)]
    region = np.zeros((32, 32), dtype=bool)
    region[4:, 8:] = True
    pipeline.calibrate(good, leave_one_out=True, roi=region, smallest_area=0.1)
    assert not pipeline.has_thresholds
    images = [np.asarray(Image.fromarray(one).resize((24, 24))) for one in IMAGES]
    expected, actual = pipeline(images), Runtime(pipeline.export(tmp_path / "model.onnx"))(images)
    assert actual.is_anomalous is None
    for name in ("anomaly_map", "anomaly_score"):
        assert np.allclose(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_a_graph_of_uint8_takes_a_cameras_pixels(models, tmp_path):
    pipeline, path = models("features")
    runtime = Runtime(pipeline.export(tmp_path / "camera.onnx", input_type="uint8"))
    images = [np.asarray(Image.fromarray(one).resize((24, 24))) for one in IMAGES]
    expected = Runtime(path)(images)
    assert_equal(runtime(images), {name: getattr(expected, name) for name in OUTPUTS})
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "camera.onnx")
    scores = session.run(["anomaly_score"], {"image": np.stack(images)})[0]
    assert np.allclose(scores, expected.anomaly_score, rtol=1e-5)


@pytest.mark.parametrize("name", ["denoiser", "features"])
def test_another_false_alarm_rate_needs_no_other_file(models, name):
    pipeline, path = models(name)
    noises = [torch.Generator().manual_seed(0) for _ in IMAGES]
    output = pipeline(IMAGES, generator=noises)
    for rate in (0.1, 0.5):
        image_threshold, pixel_threshold = pipeline.calibration.thresholds_at(0, rate)
        actual = Runtime(path, false_alarm_rate=rate)(IMAGES)
        assert np.array_equal(actual.is_anomalous, output.anomaly_score > image_threshold)
        mask = (output.anomaly_map > pixel_threshold) & actual.is_anomalous[:, None, None]
        assert np.array_equal(actual.anomaly_mask, mask)
        assert np.allclose(actual.p_value, output.p_value)
    with pytest.raises(ValueError, match="`false_alarm_rate`"):
        Runtime(path, false_alarm_rate=1.0)


def test_tiles_are_refused_with_what_to_do(tmp_path):
    pipeline = without_denoiser()
    pipeline.register_to_config(tile_size=24)
    with pytest.raises(ValueError, match=r"looks at tiles.*--tile_size none"):
        pipeline.export(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.bin", {}, r"The output must end in .onnx .*, but is .*model.bin\.$"),
        ("model.onnx", {"format": "openvino"}, "The output must end in .*, but is .*model.onnx and openvino"),
        ("model.onnx", {"precision": "int4"}, "`precision` must be fp32, fp16 or int8"),
        ("model.onnx", {"input_type": "int16"}, "`input_type` must be float32 or uint8"),
        ("model.onnx", {"precision": "int8"}, "int8 takes `images`, good ones"),
        ("model.onnx", {"images": textures(8)}, "int8 takes `images`, good ones"),
        ("model.onnx", {"precision": "int8", "images": textures(3)}, "holds 3 good images"),
    ],
)
def test_wrong_arguments_are_named(models, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        models("features")[0].export(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "folder"), [("m.onnx", "m.onnx"), ("m.xml", "m.xml"), ("m.xml", "m.bin")])
def test_a_folder_in_the_files_place_is_named_before_any_work(models, tmp_path, name, folder):
    (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=rf"The output must be a file, but .*{folder} is a folder. Give another name"):
        models("features")[0].export(tmp_path / name)
    assert [one.name for one in tmp_path.rglob("*")] == [folder]


def test_a_file_above_it_is_named_before_any_work(models, tmp_path):
    (tmp_path / "report.txt").touch()
    with pytest.raises(ValueError, match=r"goes into a folder, but .*report\.txt is a file\. Give another one"):
        models("features")[0].export(tmp_path / "report.txt" / "new" / "model.onnx")
    assert [one.name for one in tmp_path.rglob("*")] == ["report.txt"]


def test_a_file_of_another_format_is_refused_and_one_of_another_version_read(models, tmp_path, caplog):
    model = onnx.load(models("features")[1])
    text = {one.key: one.value for one in model.metadata_props}["diffad"]

    def with_text(text: str | None, name: str) -> Path:
        del model.metadata_props[:]
        if text is not None:
            onnx.helper.set_model_props(model, {"diffad": text})
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"exported by diffad .* in format 1,.*Export the model again"):
        Runtime(with_text(text.replace('"format": 2', '"format": 1'), "new.onnx"))
    with pytest.raises(ValueError, match=r"no graph of diffad's"):
        Runtime(with_text(None, "other.onnx"))
    Runtime(with_text(text.replace('"version": "', '"version": "7.'), "old.onnx"))
    earlier = {name: value for name, value in json.loads(text).items() if name != "contrast"}  # as files were before it
    assert Runtime(with_text(json.dumps(earlier), "earlier.onnx")).metadata.contrast == 0.0
    assert "old.onnx was exported by diffad 7." in caplog.text
    with pytest.raises(FileNotFoundError, match=r"no file at .*nowhere\.onnx"):
        Runtime(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("said", ["{", "[]", '{"format": 2}', '{"format": 2, "version": "0.1.0"}'])
def test_a_file_whose_metadata_are_damaged_is_named(models, tmp_path, said):
    model = onnx.load(models("features")[1])
    onnx.helper.set_model_props(model, {"diffad": said})
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(
        ValueError, match=r"damaged\.onnx is damaged, as nobody can read what it says of itself: export"
    ):
        Runtime(tmp_path / "damaged.onnx")


def test_a_file_that_has_changed_since_it_was_exported_warns(models, tmp_path, caplog):
    _, path = models("features")
    Runtime(path)
    assert "not as it was exported" not in caplog.text
    content = bytearray(path.read_bytes())
    weight = max(onnx.load(path).graph.initializer, key=lambda one: len(one.raw_data)).raw_data
    content[content.index(weight) + len(weight) // 2] ^= 1  # the last bits of a number
    (tmp_path / "changed.onnx").write_bytes(content)
    Runtime(tmp_path / "changed.onnx")
    assert "changed.onnx is not as it was exported: another program has changed it, or it is damaged" in caplog.text


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_file_runs_in_its_calibration_s_precision_or_warns(tmp_path, caplog, suffix):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    pipeline = without_denoiser().to(torch.bfloat16)
    pipeline.calibrate(textures(12), false_alarm_rate=0.2)
    path = pipeline.to(torch.float32).export(tmp_path / f"model{suffix}")
    assert ("in bfloat16, and this file computes in float32" in caplog.text) == (suffix == ".onnx")
    caplog.clear()
    runtime = Runtime(path)
    assert runtime.metadata.calibrated_in == "bfloat16"
    assert (f"{path} was calibrated in bfloat16 and runs in float32" in caplog.text) == (runtime.precision == "float32")
    assert runtime.precision == "float32" or suffix == ".xml"
    if suffix == ".xml":
        assert Runtime(path, precision="float32").precision == "float32"
        assert f"{path} was calibrated in bfloat16 and runs in float32" in caplog.text


def test_a_precision_that_the_device_lacks_is_refused(models, tmp_path):
    openvino = pytest.importorskip("openvino")
    _, path = models("features")
    write_graph(onnx.load(path), Runtime(path).metadata, tmp_path / "model.xml")
    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, name in (("bfloat16", "BF16"), ("float16", "FP16")):
        if name in has:
            assert Runtime(tmp_path / "model.xml", precision=precision).precision == precision
        else:
            with pytest.raises(ValueError, match=f"`precision` {precision} is not there: OpenVINO's cpu takes"):
                Runtime(tmp_path / "model.xml", precision=precision)


def test_a_graph_alone_takes_what_fits(models):
    runtime = Runtime(models("features")[1])
    for shape in ((1, 20, 24, 3), (24, 24, 3), (0, 24, 24, 3)):
        with pytest.raises(ValueError, match=r"`pixels` must be \(N, 24, 24, 3\), but its shape is"):
            runtime.run(np.zeros(shape, np.float32))
    pixels = np.zeros((1, 24, 24, 3), np.float32)
    assert runtime.run(pixels.tolist()).anomaly_score == runtime.run(pixels).anomaly_score
    with pytest.raises(ValueError, match=r"`category` 3 is unknown"):
        runtime.run(np.zeros((1, 24, 24, 3), np.float32), 3)


def test_the_runtimes_agree_on_images_that_were_not_calibrated_on(models, tmp_path):
    pytest.importorskip("openvino")
    for name in ("denoiser", "features"):
        pipeline, path = models(name)
        write_graph(onnx.load(path), Runtime(path).metadata, tmp_path / f"{name}.xml")
        runtimes = {"onnx": Runtime(path), "openvino": Runtime(tmp_path / f"{name}.xml")}
        good = [(image, 0) for image in textures(30, first_seed=600)]
        results = compare(pipeline, runtimes, good + [(texture(700 + i, defect=True), 1) for i in range(10)])
        for found in results.values():
            assert found["images"] == 40
            assert found["largest_relative_map_error"] < 1e-3
            assert found["verdicts_that_differ"] == 0
            assert found["image_auroc"] == pytest.approx(results["torch"]["image_auroc"], abs=1e-3)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """docs/inspect.cpp, built against the libraries that OpenVINO's wheel brings."""
    openvino = pytest.importorskip("openvino")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    built = tmp_path_factory.mktemp("program") / "inspect"
    package = Path(openvino.__file__).parent
    library = next(package.glob("libs/libopenvino.so*"))
    source = Path(__file__).parents[2] / "docs" / "inspect.cpp"
    command = ["g++", "-std=c++17", source, f"-I{package / 'include'}", library, f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", built], check=True)
    return built


def test_the_program_of_the_docs_inspects_an_image(models, program, tmp_path):
    _, path = models("features")
    write_graph(onnx.load(path), Runtime(path).metadata, tmp_path / "model.xml")
    for image in (IMAGES[0], IMAGES[-1]):
        picture = Image.fromarray(image).resize((24, 24))
        picture.save(tmp_path / "part.ppm")
        expected = Runtime(path)(picture)
        command = [program, tmp_path / "model.xml", tmp_path / "part.ppm"]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == (3 if expected.is_anomalous[0] else 0)
        found = dict(line.split(" ", 1) for line in done.stdout.decode().splitlines())
        assert float(found["score"]) == pytest.approx(float(expected.anomaly_score[0]), rel=1e-4)
        assert float(found["p_value"]) == pytest.approx(float(expected.p_value[0]), rel=1e-4)
    refused = {"size": (IMAGES[0], r"must have the size that the model takes, 24 x 24"), "file": (None, "is no PPM")}
    for image, message in refused.values():
        if image is None:
            (tmp_path / "part.ppm").write_bytes(b"P6 24 24 255\n")
        else:
            Image.fromarray(image).resize((20, 24)).save(tmp_path / "part.ppm")
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
    done = subprocess.run([command[0], tmp_path / "nowhere.xml", command[2]], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere.xml" in done.stderr


@pytest.mark.parametrize("kind", ["unified", "uint8", "uncalibrated"])
def test_the_program_of_the_docs_takes_every_kind_of_file(models, program, tmp_path, kind):
    pipeline, path = models("features" if kind == "uint8" else kind)
    file, part = tmp_path / "model.xml", tmp_path / "part.ppm"
    if kind == "uint8":
        pipeline.export(file, input_type="uint8")
    else:
        write_graph(onnx.load(path), Runtime(path).metadata, file)
    picture = Image.fromarray(IMAGES[-1]).resize((pipeline.input_resolution,) * 2)
    picture.save(part)
    expected = Runtime(file)(picture, "b" if kind == "unified" else None)
    done = subprocess.run([program, file, part, *(["1"] if kind == "unified" else [])], capture_output=True, text=True)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert float(found["score"]) == pytest.approx(float(expected.anomaly_score[0]), rel=1e-4)
    assert [*found] == (["score"] if kind == "uncalibrated" else ["score", "p_value", "alarm"])
    if kind == "unified":
        for given in ([], ["2"], ["-1"], ["1x"]):
            done = subprocess.run([program, file, part, *given], capture_output=True, text=True)
            assert done.returncode == 1
            assert "CATEGORY must be an index below 2" in done.stderr
