"""Tables of the papers: their rows, what rows share, and that sharing changes no number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import BACKBONE, STRIDES, texture, textures, tiny_pipeline, write_mvtec, write_png
from diffusers import DPMSolverMultistepScheduler
from launching import launch
from PIL import Image
from test_pipeline_diad import make_pipeline
from torch import nn

from diffad import AnomalyDenoisePipeline, DiADPipeline, TimmFeatureExtractor
from diffad.training import make_table

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = write_mvtec(tmp_path_factory.mktemp("data"), {"tile": 2})
    for i in range(6):
        write_png(root / "tile" / "train" / "good" / f"{100 + i}.png", texture(100 + i))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tiny_pipeline().save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


def write_table(path: Path, rows: list[dict], method: str = "AnomalyDenoise") -> Path:
    path.write_text(yaml.safe_dump({"title": "A table", "source": "a paper", "method": method, "rows": rows}))
    return path


def run(table: Path | str, model: Path | None, data: Path, output: Path, *more: object) -> dict[str, dict]:
    """Mean results by row name."""
    arguments = ["--table", table, "--data", data, "--output", output, "--resolution", 32, *more]
    make_table.main([str(a) for a in [*arguments, *(["--model", model] if model else [])]])
    report = json.loads(output.read_text())
    return {row["name"]: row["results"]["mean"] for row in report["rows"]}


@pytest.mark.parametrize("name", sorted(p.name.removesuffix(".yaml") for p in make_table.TABLES.iterdir()))
def test_every_table_reads(name):
    table = make_table.load_table(name)
    names = [row["name"] for row in table["rows"]]
    assert len(set(names)) == len(names) > 1
    script = make_table.SCRIPTS[table["method"]]
    for row in table["rows"]:
        flags = [f"--{flag}" for flag in row.get("train", {})]
        module = __import__(f"diffad.training.{script}", fromlist=["parse_args"])
        known = Path(module.__file__).read_text() + Path(module.__file__).with_name("arguments.py").read_text()
        assert all(f'"{flag}"' in known for flag in flags), row


def test_rows_of_one_pass_equal_rows_of_their_own(model, data, tmp_path, capsys):
    rows = [
        {"name": "features", "alpha": 0.0},  # which need no KL, and stand first
        {"name": "KL", "alpha": 1.0},
        {"name": "raw", "calibrated": False},
        {"name": "one stride", "score_strides": [4], "alpha": 0.0},
    ]
    together = run(write_table(tmp_path / "all.yaml", rows), model, data, tmp_path / "all.json")
    assert list(together) == [*(row["name"] for row in rows), "PaDiM"]
    for i, row in enumerate(rows):
        alone = run(write_table(tmp_path / "one.yaml", [row]), model, data, tmp_path / f"{i}.json")
        expected = {k: v for k, v in together[row["name"]].items() if not k.startswith(("seconds", "images_per"))}
        assert {name: alone[row["name"]][name] for name in expected} == expected
    assert len({str(result["pixel_auroc"]) for result in together.values()}) > 2  # rows are not one and the same
    printed = capsys.readouterr().out
    assert "| features | " in printed
    assert (tmp_path / "all.md").read_text() in printed


def test_two_processes_make_the_table_that_one_does(model, data, tmp_path):
    table = write_table(tmp_path / "table.yaml", [{"name": "joined"}, {"name": "features", "alpha": 0.0}])
    results = []
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        flags = ["--table", table, "--model", model, "--data", data, "--resolution", 32, "--output", output]
        launch("diffad.training.make_table", *flags, "--batch_size", 2, processes=count, cwd=tmp_path)
        results.append([row["results"]["mean"] for row in json.loads(output.read_text())["rows"]])
    for one, two in zip(*results, strict=True):
        assert two == pytest.approx(one, rel=1e-6, nan_ok=True)


def test_alphas_share_one_pass_of_the_network(model, data, tmp_path, monkeypatch):
    calls = []
    measure = make_table.AnomalyDenoisePipeline.measure
    monkeypatch.setattr(
        make_table.AnomalyDenoisePipeline,
        "measure",
        lambda self, pixel_values, *rest, **more: (
            calls.append(len(pixel_values)) or measure(self, pixel_values, *rest, **more)
        ),
    )
    run("alpha", model, data, tmp_path / "alpha.json")
    assert sum(calls) == 8 + 7  # every good training image once, every test image once, for eleven rows


def test_noise_levels_are_measured_together(model, data, tmp_path):
    rows = [{"name": "few", "timesteps": [5]}, {"name": "many", "timesteps": [5, 400]}]
    results = run(write_table(tmp_path / "t.yaml", rows), model, data, tmp_path / "t.json")
    assert results["few"] != results["many"]


def test_the_plain_ddpm_has_a_row(model, data, tmp_path):
    rows = [{"name": "ddpm", "baseline": "ddpm"}, {"name": "ours"}]
    results = run(write_table(tmp_path / "t.yaml", rows), model, data, tmp_path / "t.json")
    assert 0.0 <= results["ddpm"]["image_auroc"] <= 1.0


def test_a_backbone_sweep_reconstructs_each_image_once(data, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "diad")
    passes = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            passes.append(len(args[0])) if type(module).__name__ == "UNet2DConditionModel" else None
        )
    )
    rows = [
        {"name": "lite0", "calibrated": False},
        {"name": "resnet", "backbone": "resnet18", "backbone_weights": "random", "score_strides": [4, 8]},
        {"name": "finest", "score_strides": [2]},
        {"name": "whitened", "distance": "mahalanobis"},
    ]
    try:
        table = write_table(tmp_path / "t.yaml", rows, "DiAD")
        results = run(table, tmp_path / "diad", data, tmp_path / "t.json")
    finally:
        hook.remove()
    steps = make_pipeline().config.num_inference_steps
    # test images, and training images: each once, for all rows
    assert sum(passes) == steps * (7 + 8)
    assert len({str(results[row["name"]]["pixel_auroc"]) for row in rows}) > 2


def test_rows_that_train_their_own_model(data, tmp_path):
    flags = {"preset": "cpu-64", "resolution": 16, "backbone": BACKBONE, "backbone_weights": "random"}
    flags |= {"feature_strides": [2, 4], "max_train_steps": 2, "train_batch_size": 2, "calibration_fraction": 0.3}
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({**flags, "false_alarm_rate": 0.4}))
    rows = [{"name": "2 x 2", "train": {"feature_resolution": 2}}, {"name": "own", "each_category": True, "train": {}}]
    table = write_table(tmp_path / "t.yaml", rows)
    results = run(table, None, data, tmp_path / "t.json", "--train_config", config)
    assert set(results) == {"2 x 2", "own", "PaDiM"}
    weights = tmp_path / "t" / "own-tile" / "unet" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert run(table, None, data, tmp_path / "t.json") == results  # nothing is trained again
    assert weights.stat().st_mtime_ns == written
    # nor is a model taken that was trained with other flags
    other = write_mvtec(tmp_path / "other", {"tile": 2})
    config.write_text(yaml.safe_dump({**flags, "false_alarm_rate": 0.5}))
    same_name = [{"name": "2 x 2", "train": {"feature_resolution": 4}}, rows[1]]
    for wanted, of, more, words in (
        (table, data, ("--seed", 1), r"another --seed \(0, not 1\)"),
        (table, other, (), r"another --data \(.*, not .*other\"\)"),
        (table, data, ("--train_config", config), "another --train_config"),
        (write_table(tmp_path / "s.yaml", same_name), data, (), r"another `train` of its row"),
    ):
        with pytest.raises(ValueError, match=rf"--output: .*2-x-2 was trained with {words}.*choose another --output"):
            run(wanted, None, of, tmp_path / "t.json", *more)
    assert weights.stat().st_mtime_ns == written
    (tmp_path / "t" / "2-x-2" / "row.json").unlink()  # as in a folder of an earlier version
    with pytest.raises(ValueError, match=r"another --seed \(0, not 1\)"):
        run(table, None, data, tmp_path / "t.json", "--seed", 1)


def test_padim_has_a_row_over_the_features_of_each_model(model, data, tmp_path):
    torch.manual_seed(7)
    features = TimmFeatureExtractor.from_backbone(BACKBONE, STRIDES, weights="random")
    other = AnomalyDenoisePipeline(**{**tiny_pipeline().components, "feature_extractor": features})
    other.save_pretrained(tmp_path / "t" / "own")  # where the row's own model would be trained
    rows = [{"name": "given", "baseline": "padim"}, {"name": "own", "baseline": "padim", "train": {}}]
    results = run(write_table(tmp_path / "t.yaml", rows), model, data, tmp_path / "t.json")
    assert results["given"]["image_auroc"] >= 0.0
    assert results["own"]["pixel_pro"] >= 0.0
    assert results["own"] != results["given"]
    assert results["PaDiM"] == results["given"]


def test_a_row_may_have_another_scheduler(data, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "diad")
    rows = [
        {"name": "DDIM", "num_inference_steps": 3},
        {"name": "DPM-Solver++", "num_inference_steps": 3, "scheduler": "DPMSolverMultistepScheduler"},
    ]
    results = run(write_table(tmp_path / "t.yaml", rows, "DiAD"), tmp_path / "diad", data, tmp_path / "t.json")
    assert results["DDIM"]["pixel_auroc"] != results["DPM-Solver++"]["pixel_auroc"]
    model = DiADPipeline.from_pretrained(tmp_path / "diad")
    model.register_modules(scheduler=DPMSolverMultistepScheduler.from_config(model.scheduler.config))
    model.save_pretrained(tmp_path / "other")
    rows = [{"name": "as it is", "num_inference_steps": 3}]
    own = run(write_table(tmp_path / "o.yaml", rows, "DiAD"), tmp_path / "other", data, tmp_path / "o.json")
    assert own["as it is"]["pixel_auroc"] == results["DPM-Solver++"]["pixel_auroc"]
    with pytest.raises(ValueError, match="asks for a scheduler that is none of diffusers'"):
        run(write_table(tmp_path / "w.yaml", [{"name": "a", "scheduler": "UNet2DModel"}], "DiAD"), "x", data, "y")


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"name": "a", "alfa": 1}], (), "unknown \\['alfa'\\]"),
        ([{"alpha": 1.0}], (), "no name"),
        ([{"name": "a", "train": {}}], (), "--train_config"),
        ([{"name": "a", "score_strides": [3]}], (), "score_strides"),
        ([{"name": "at 5", "train": {}}, {"name": "At 5 %", "train": {}}], (), "into one folder, at-5"),
    ],
)
def test_wrong_tables_say_what_is_wrong(rows, more, message, model, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(write_table(tmp_path / "t.yaml", rows), model, data, tmp_path / "t.json", *more)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.json", '{"results": {}}', "t.json is no table of make_table.py"),
        ("t.json", "notes", "t.json is no table of make_table.py"),
        ("t.md", "notes", "t.md would be replaced, and is of no table"),
    ],
)
def test_only_a_table_is_replaced(name, content, words, model, data, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"--output: .*{words}.*Give another file"):
        run("noise_levels", model, data, tmp_path / "t.json")
    assert (tmp_path / name).read_text() == content


def test_a_table_takes_the_place_of_an_earlier_one(model, data, tmp_path):
    table = write_table(tmp_path / "t.yaml", [{"name": "a", "calibrated": False}])
    assert run(table, model, data, tmp_path / "t.json") == run(table, model, data, tmp_path / "t.json")


def test_a_category_of_good_images_alone_is_told(model, tmp_path, capsys):
    data = write_mvtec(tmp_path / "data", {"cup": 2, "tile": 2})
    for folder in (data / "cup" / "test").iterdir():
        if folder.name != "good":
            shutil.rmtree(folder)
    table = write_table(tmp_path / "t.yaml", [{"name": "a", "calibrated": False}])
    run(table, model, data, tmp_path / "t.json")
    words = "All images of cup are good: what compares both kinds (AUROC, AP, F1-max, PRO) stays empty, and so it does"
    assert f"{words} in the mean: choose the others with --category." in capsys.readouterr().out
    assert run(table, model, data, tmp_path / "t.json", "--category", "tile")["a"]["image_auroc"] >= 0.0


def test_a_table_of_diad_compares_reconstructions_unless_its_rows_weigh_more():
    model = make_pipeline()
    model.register_to_config(weights={"reconstruction": 1.0, "gaussian": 1.0})
    own = {"reconstruction": 1.0, "nearest": 1.0}
    rows = [{"name": "plain"}, {"name": "joined", "weights": own}]
    plain, joined = (make_table.row_pipeline(model, row, torch.device("cpu")) for row in rows)
    assert plain.config.weights is None
    assert joined.config.weights == own


def test_a_table_that_is_not_there_lists_those_that_are(model, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="alpha, backbones"):
        run("alhpa", model, data, tmp_path / "t.json")
    with pytest.raises(ValueError, match="about DiAD"):
        run("pooling", model, data, tmp_path / "t.json")


def test_a_model_without_features_to_score_with_is_refused(data, tmp_path):
    pipeline = make_pipeline()
    pipeline.register_modules(feature_extractor=None)
    pipeline.save_pretrained(tmp_path / "diad")
    with pytest.raises(ValueError, match=r"--model.*no feature extractor"):
        run("pooling", tmp_path / "diad", data, tmp_path / "t.json")


def test_a_model_with_a_region_of_interest_is_refused(data, tmp_path):
    left = torch.zeros(16, 16, dtype=torch.uint8)
    left[:, :8] = 255
    write_png(tmp_path / "left.png", left.numpy())
    pipeline = tiny_pipeline().calibrate(textures(9), false_alarm_rate=0.4, roi=tmp_path / "left.png")
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"--model: .*model has a region of interest.*without --roi"):
        run("alpha", tmp_path / "model", data, tmp_path / "t.json")


def test_a_model_that_looks_at_tiles_is_refused(data, tmp_path):
    tiny_pipeline(tile_size=12).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"--model: .*model looks at images in tiles.*--tile_size none"):
        run("alpha", tmp_path / "model", data, tmp_path / "t.json")
    table = write_table(tmp_path / "t.yaml", [{"name": "a", "tile_size": 12}])
    with pytest.raises(ValueError, match=r"unknown \['tile_size'\]"):
        run(table, tmp_path / "model", data, tmp_path / "t.json")


def test_rows_that_score_the_same_maps_share_a_calibration(model, data):
    rows = [{"name": "0", "alpha": 0.0}, {"name": "1", "alpha": 1.0}, {"name": "one level", "timesteps": [50]}]
    device = torch.device("cpu")
    pipelines = [make_table.row_pipeline(AnomalyDenoisePipeline.from_pretrained(model), row, device) for row in rows]
    for pipeline in pipelines[1:]:
        pipeline.register_modules(feature_extractor=pipelines[0].feature_extractor)
    good = [{"image": Image.fromarray(texture(i))} for i in range(6)]
    make_table.calibrate_rows(pipelines, good, 0, Accelerator(), 4, 0)
    first, second, third = (pipeline.calibration for pipeline in pipelines)
    assert first is second
    assert first.config.map_shape[0] == 4
    assert third.config.map_shape[0] == 2


def test_statistics_do_not_reach_the_model(model, data, tmp_path):
    before = {p.name: p.read_bytes() for p in model.rglob("*.safetensors")}
    run(write_table(tmp_path / "t.yaml", [{"name": "a"}]), model, data, tmp_path / "t.json")
    assert {p.name: p.read_bytes() for p in model.rglob("*.safetensors")} == before
    assert torch.is_grad_enabled()
