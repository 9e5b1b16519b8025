"""Training from folders to a calibrated pipeline: in one process, killed and resumed, and on two."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import (
    BACKBONE,
    generator,
    launch,
    launch_command,
    texture,
    textures,
    tiny_extractor,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
    write_folder,
    write_mvtec,
)
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffad import AnomalyDenoisePipeline, TimmFeatureExtractor
from diffad.images import images_to_tensors
from diffad.precision import resolve_precision
from diffad.seeding import step_generator
from diffad.training import train_ddpm
from diffad.training.cached_encodings import CachedEncodings, choose_flips
from diffad.training.data import BalancedSampler, ResizedImages, augment, create_data_loader, load_good_images
from diffad.training.checkpoints import list_checkpoints
from diffad.training.loop import create_accelerator, training_batches

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = Path(train_ddpm.__file__)
MODULE = "diffad.training.train_ddpm"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A pipeline of a few thousand parameters to start from."""
    tiny_pipeline().save_pretrained(folder := tmp_path_factory.mktemp("tiny"))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Fifteen good images: 13 to train on, which are three batches of four, and 2 held out."""
    return write_folder(tmp_path_factory.mktemp("data") / "part", 15)


def flags(data: Path, output: Path, *more: object, start: Path | None = None, steps: int = 2) -> list[str]:
    arguments = ["--train_data_dir", data, "--output_dir", output, "--max_train_steps", steps]
    arguments += ["--train_batch_size", 4, "--lr_warmup_steps", 1, "--false_alarm_rate", 0.4]
    if start is None:  # a preset, made as small as it goes
        arguments += ["--preset", "cpu-64", "--resolution", 16, "--backbone", BACKBONE, "--backbone_weights", "random"]
        arguments += ["--feature_strides", 2, 4]
    else:
        arguments += ["--pretrained_model_name_or_path", start]
    return [str(argument) for argument in (*arguments, *more)]


def train(*args, **kwargs) -> None:
    train_ddpm.main(flags(*args, **kwargs))


def load(output: Path) -> AnomalyDenoisePipeline:
    """A finished run's pipeline, checked to be calibrated and to work."""
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    category = pipeline.config.categories[0] if len(pipeline.config.categories) > 1 else None
    result = pipeline(texture(99), category=category)
    assert np.isfinite(result.anomaly_map).all()
    assert 0.0 < result.p_value[0] <= 1.0
    return pipeline


# -- end to end --------------------------------------------------------------------------------------------------


def test_a_folder_of_good_images_becomes_a_calibrated_pipeline(good, tmp_path):
    score = "--alpha 0.3 --suppression 0.2 --position_prior_images 30 --timesteps 5 20 --kl_sigma 1"
    train(good, tmp_path, *score.split())
    pipeline = load(tmp_path)
    assert type(pipeline) is AnomalyDenoisePipeline
    assert pipeline.config.categories == ["part"]
    assert pipeline.config.timesteps == [5, 20]
    assert pipeline.config.alpha == 0.3
    assert pipeline.config.suppression == 0.2
    assert pipeline.config.position_prior_images == 30.0
    assert pipeline.processing_resolution == 16
    assert pipeline.unet.config.num_class_embeds is None
    assert pipeline.unet.config.feature_channels == pipeline.feature_extractor.num_channels == 64
    assert (pipeline.feature_extractor.channel_std != 1).all()  # standardised on these images
    assert pipeline.calibration.config.false_alarm_rate == 0.4
    assert pipeline.calibration.normal_scores.shape == (1, 2)
    assert (pipeline.calibration.image_threshold < float("inf")).all()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 2
    assert record["categories"] == ["part"]
    assert record["arguments"]["train_batch_size"] == 4


def test_two_categories_of_an_mvtec_tree_become_one_class_conditional_model(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 14, "cable": 7})
    train(data, tmp_path / "run", "--validation_steps", 2, "--false_alarm_rate", 0.5)
    pipeline = load(tmp_path / "run")
    assert pipeline.config.categories == ["cable", "tile"]
    assert pipeline.unet.config.num_class_embeds == 2
    # 15% of each is held out: 1 of 7, 2 of 14
    assert (~pipeline.calibration.normal_scores.isnan()).sum(dim=1).tolist() == [1, 2]
    assert (pipeline.calibration.image_threshold < float("inf")).all()
    maps = [pipeline(texture(0), category=name, generator=generator()).anomaly_map for name in ("cable", "tile")]
    assert not np.array_equal(*maps)
    # asked for one of them, it is a model of one
    train(data, tmp_path / "one", "--category", "tile")
    assert load(tmp_path / "one").config.categories == ["tile"]


def test_training_learns(good, tiny, tmp_path):
    train(good, tmp_path, "--learning_rate", 3e-3, "--use_ema", "--ema_decay", 0.9, start=tiny, steps=60)

    def losses(folder: Path) -> dict[str, float]:
        pipeline = AnomalyDenoisePipeline.from_pretrained(folder)
        clean = torch.stack(images_to_tensors(textures(16, first_seed=300))) * 2.0 - 1.0
        with torch.no_grad():
            features = pipeline.feature_extractor(clean, (8, 8))
            arguments = (clean, features, None, generator(7), 1.0)
            parts = train_ddpm.denoising_loss(pipeline.unet, pipeline.scheduler, *arguments)
        return {name: float(value) for name, value in parts.items()}

    before, after = losses(tiny), losses(tmp_path)
    assert after["noise"] < 0.8 * before["noise"]
    assert after["feature"] < 0.8 * before["feature"]


def test_curves_pictures_and_checkpoints_are_written(good, tiny, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--report_to", "tensorboard", "--validation_steps", 5, "--checkpointing_steps", 4)
    train(good, tmp_path, *more, "--checkpoints_total_limit", 2, start=tiny, steps=11)

    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "diffad"}
    log = event_accumulator.EventAccumulator(str(events))
    log.Reload()
    assert {"noise", "variance", "feature", "lr", "images_per_s"} <= set(log.Tags()["scalars"])
    points = log.Scalars("noise")
    assert [point.step for point in points] == [10, 11]
    assert all(0.0 < point.value < 10.0 for point in points)

    pictures = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert pictures == ["step-10.png", "step-5.png"]
    with Image.open(tmp_path / "validation" / "step-5.png") as sheet:
        width, height = sheet.size
    assert width > 5 * 160  # five columns
    assert height > 2 * 160  # both held-out images

    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == ["checkpoint-11", "checkpoint-8"]


def test_the_record_says_which_precision_auto_was(good, tiny, tmp_path):
    (config := tmp_path / "config.yaml").write_text("mixed_precision: auto\n")
    train(good, tmp_path / "auto", "--config", config, start=tiny)
    arguments = json.loads((tmp_path / "auto" / "training.json").read_text())["arguments"]
    assert arguments["mixed_precision"] == resolve_precision("auto")


def test_a_configuration_may_say_no_to_mixed_precision(tmp_path):
    (config := tmp_path / "config.yaml").write_text("mixed_precision: no\n")  # False, as YAML reads it
    assert train_ddpm.parse_args(["--config", str(config), *DATA]).mixed_precision == "no"


@pytest.mark.parametrize("more", [("--mixed_precision", "bf16"), ("--gradient_checkpointing", "--random_flip")])
def test_other_ways_to_run(good, tiny, tmp_path, more):
    train(good, tmp_path, *more, start=tiny)
    pipeline = load(tmp_path)
    assert pipeline.unet.dtype == torch.float32
    start = AnomalyDenoisePipeline.from_pretrained(tiny).unet.state_dict()
    moved = [name for name, value in pipeline.unet.state_dict().items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.9 * len(start)


def test_the_extractor_may_look_closer(good, tmp_path):
    train(good, tmp_path, "--feature_image_size", 32, "--feature_resolution", 8, "--validation_steps", 1)
    pipeline = load(tmp_path)
    assert pipeline.feature_extractor.config.image_size == 32
    assert pipeline.unet.config.feature_resolution == 8
    assert tuple(pipeline.calibration.config.residual_shape) == (64, 8, 8)


def test_the_extractor_may_look_twice(good, tmp_path):
    train(good, tmp_path, "--feature_image_size", 16, 32, "--score_strides", 4)
    pipeline = load(tmp_path)
    assert pipeline.feature_extractor.image_sizes == [16, 32]
    assert pipeline.unet.config.feature_channels == 128
    assert pipeline.scored_layers == [1, 3]
    assert pipeline.calibration.config.residual_shape[0] == 64
    # the networks still work for a Gaussian of one size
    pipeline.fit_gaussian(textures(3), num_channels=8)
    assert pipeline.gaussian.config.image_size == 32


def test_features_are_cached_for_each_flip(good, tmp_path, monkeypatch):
    calls = []
    forward = TimmFeatureExtractor.forward

    def counted(self, pixel_values, size):
        calls.append(len(pixel_values))
        return forward(self, pixel_values, size)

    monkeypatch.setattr(TimmFeatureExtractor, "forward", counted)
    flips = ("--rotation_degrees", 0, "--random_flip", "--mixed_precision", "no")
    totals = []
    for name, more in (("each time", flips), ("once", (*flips, "--cache_features"))):
        calls.clear()
        train(good, tmp_path / name, *more, steps=12)
        totals.append(sum(calls))
        load(tmp_path / name)
    # 13 images: standardisation, 12 steps of 4, and calibration; cached, each image and its flip instead of the steps
    assert totals[0] - totals[1] == 12 * 4 - 13 * 2


def test_cached_features_are_those_of_the_flipped_images(good, tmp_path):
    args = train_ddpm.parse_args(flags(good, tmp_path))
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)
    extractor = tiny_extractor(image_size=[16, 24])
    pairs = [(False, False), (True, False)]
    cached = CachedEncodings(images, lambda x: extractor(x, (8, 8)), pairs, (128, 8, 8), torch.float16)
    pixels, features = (torch.stack(column) for column in zip(*(cached[i][:2] for i in range(8)), strict=True))
    assert features.dtype == torch.float16
    flipped, chosen = choose_flips(pixels, features, torch.tensor(pairs), generator())
    torch.testing.assert_close(chosen.float(), extractor(flipped, (8, 8)), rtol=2e-3, atol=2e-3)


# -- killed and resumed ------------------------------------------------------------------------------------------


def test_killed_and_resumed_it_ends_with_the_same_weights_to_the_bit(good, tiny, tmp_path):
    """With accumulation over the ends of epochs (three batches in each, two a step), and EMA."""
    more = ("--gradient_accumulation_steps", 2, "--use_ema", "--checkpointing_steps", 4, "--random_flip")
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    command = launch_command(SCRIPT, *flags(good, killed, *more, start=tiny, steps=24))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 600
        while not list_checkpoints(killed):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.time() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it launched
        process.wait()
    assert not (killed / "model_index.json").exists()  # in mid-run
    assert list_checkpoints(killed)[-1].name != "checkpoint-24"
    # what a kill in the middle of a checkpoint leaves
    (killed / "unfinished-checkpoint-23").mkdir()
    (killed / "unfinished-checkpoint-23" / "model.safetensors").write_bytes(b"cut off")

    train(good, whole, *more, start=tiny, steps=24)
    train(good, killed, *more, "--resume_from_checkpoint", "latest", start=tiny, steps=24)

    assert json.loads((killed / "training.json").read_text())["steps"] == 24
    for name in ("checkpoint-24/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):  # raw, and averaged
        expected, resumed = load_file(whole / name), load_file(killed / name)
        assert expected.keys() == resumed.keys()
        assert [key for key in expected if not torch.equal(expected[key], resumed[key])] == []
    raw = load_file(whole / "checkpoint-24" / "model.safetensors")
    averaged = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(raw["conv_in.weight"], averaged["conv_in.weight"])
    averages = torch.load(killed / "checkpoint-24" / "custom_checkpoint_0.pkl", weights_only=False)
    assert averages["optimization_step"] == 24
    assert torch.equal(load(whole).calibration.normal_scores, load(killed).calibration.normal_scores)


def test_accumulation_makes_no_step_of_its_own_at_the_end_of_an_epoch(good, tiny, tmp_path):
    """Twelve batches, two a step: six steps, also where an epoch ends after the third batch."""
    train(good, tmp_path, "--gradient_accumulation_steps", 2, "--use_ema", start=tiny, steps=6)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 6
    optimizer = torch.load(tmp_path / "checkpoint-6" / "optimizer.bin", weights_only=False)
    assert {float(state["step"]) for state in optimizer["state"].values()} == {6.0}


def test_resuming_a_finished_run_trains_no_more(good, tiny, tmp_path, capsys):
    train(good, tmp_path, start=tiny)
    before = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    train(good, tmp_path, "--resume_from_checkpoint", "latest", start=tiny)
    assert "checkpoint-2, step 2" in capsys.readouterr().out
    after = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # and a longer run goes on from it, from the folder by its name
    train(good, tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-2", start=tiny, steps=3)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 3


def test_nothing_to_resume(good, tiny, tmp_path, capsys):
    train(good, tmp_path, "--resume_from_checkpoint", "latest", start=tiny)
    assert "No checkpoint" in capsys.readouterr().out
    load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--resume_from_checkpoint.*no_such.*'latest'"):
        train(good, tmp_path, "--resume_from_checkpoint", tmp_path / "no_such", start=tiny)


def test_the_seed_decides(good, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(good, tmp_path / name, "--seed", seed, start=tiny)
    weights = [load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in "abc"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["conv_in.weight"], weights[2]["conv_in.weight"])


def test_a_balanced_run_resumes_to_the_bit(tmp_path):
    """Of 12 and 4 images, in the middle of an epoch of five batches."""
    data = write_mvtec(tmp_path / "data", {"tile": 12, "cable": 4})
    tiny_pipeline(categories=["cable", "tile"]).save_pretrained(unified := tmp_path / "unified")
    more = (
        "--balance_categories",
        "--checkpointing_steps",
        3,
        "--checkpoints_total_limit",
        3,
        "--false_alarm_rate",
        0.5,
    )
    whole, resumed, drawn_freely = tmp_path / "whole", tmp_path / "resumed", tmp_path / "free"
    train(data, whole, *more, start=unified, steps=8)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train(data, resumed, *more, "--resume_from_checkpoint", "latest", start=unified, steps=8)
    train(data, drawn_freely, *more[1:], start=unified, steps=8)
    weights = "unet/diffusion_pytorch_model.safetensors"
    expected, actual, other = (load_file(folder / weights) for folder in (whole, resumed, drawn_freely))
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []
    assert not torch.equal(expected["conv_in.weight"], other["conv_in.weight"])
    assert json.loads((whole / "training.json").read_text())["arguments"]["balance_categories"] is True


# -- two processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_one_model(good, tiny, tmp_path):
    script = tmp_path / "both.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from accelerate import Accelerator\n"
        "from diffad.training import train_ddpm\n"
        "from diffad.training.loop import check_replicas\n"
        "accelerator = Accelerator()\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "torch.nn.init.constant_(layer.weight, float(accelerator.process_index))\n"
        "try:\n"
        "    check_replicas(layer, accelerator)\n"
        "except RuntimeError as error:\n"
        "    Path(f'refused-{accelerator.process_index}').write_text(str(error))\n"
        "train_ddpm.main(sys.argv[1:])\n"
    )
    arguments = flags(good, tmp_path / "run", "--gradient_accumulation_steps", 2, "--use_ema", start=tiny, steps=3)
    output = launch(script, *arguments, processes=2, cwd=tmp_path)
    for process in range(2):  # a file each: lines printed by two processes at once run into one another
        refused = (tmp_path / f"refused-{process}").read_text()
        assert refused.startswith("Processes ended with different weights")
    assert output.count("Saved a calibrated pipeline") == 1
    pipeline = load(tmp_path / "run")
    assert pipeline.calibration.normal_scores.shape == (1, 2)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 3
    assert {p.name for p in (tmp_path / "run" / "checkpoint-3").glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }


# -- arguments ---------------------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_configuration(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "train_data_dir: parts\nmax_train_steps: 7\nlearning_rate: 3e-4\nuse_ema: true\n"
        "timesteps: [1, 2]\npreset: cpu-64\nrandom_flip: false\n"
    )
    args = train_ddpm.parse_args(["--config", str(config), "--max_train_steps", "9", "--timesteps", "3"])
    assert args.max_train_steps == 9
    assert args.timesteps == [3]
    assert args.learning_rate == 3e-4  # YAML reads 3e-4 as text
    assert args.use_ema is True
    assert args.random_flip is False
    assert train_ddpm.parse_args(["--config", str(config), "--no-use_ema"]).use_ema is False
    assert args.preset == "cpu-64"
    assert args.train_batch_size == 8  # neither says: the default


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("demo", "elpv/mono"),
        ("elpv_cpu", "elpv/poly"),
        ("magnetic_tile_cpu", None),
        ("magnetic_tile_128_cpu", None),
        ("three_categories_cpu", None),
    ],
)
def test_the_shipped_configurations_are_valid(name, data):
    config = SCRIPT.parent / "configs" / f"{name}.yaml"
    more = [] if data else ["--train_data_dir", "tiles"]
    args = train_ddpm.parse_args(["--config", str(config), "--seed", "5", *more])
    assert args.train_data_dir == (data or "tiles")
    assert args.seed == 5
    assert args.mixed_precision == "auto"


DATA = ("--train_data_dir", "parts")


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        ((), None, "give one of --train_data_dir and --dataset_name"),
        ((*DATA, "--dataset_name", "org/name"), None, "give one of --train_data_dir and --dataset_name"),
        ((*DATA, "--calibration_fraction", "0"), None, r"--calibration_fraction must lie in \(0, 1\)"),
        ((*DATA, "--calibration_fraction", "1"), None, r"--calibration_fraction must lie in \(0, 1\)"),
        ((*DATA, "--suppression", "1"), None, r"--suppression must lie in \[0, 1\)"),
        ((*DATA, "--position_prior_images", "-1"), None, "--position_prior_images must be finite and not negative"),
        ((*DATA, "--part_pattern", ""), None, "--part_pattern must not match the empty text"),
        ((*DATA, "--part_pattern", "(a"), None, "--part_pattern is no regular expression: missing"),
        ((*DATA, "--false_alarm_rate", "0"), None, r"--false_alarm_rate must lie in \(0, 1\)"),
        ((*DATA, "--false_alarm_rate", "1.5"), None, r"--false_alarm_rate must lie in \(0, 1\)"),
        ((*DATA, "--alpha", "1.5"), None, r"--alpha must lie in \[0, 1\]"),
        ((*DATA, "--timesteps", "5", "1000"), None, r"--timesteps must lie in \[0, 999\]"),
        ((*DATA, "--train_batch_size", "0"), None, "--train_batch_size must be at least 1"),
        ((*DATA, "--gradient_accumulation_steps", "-1"), None, "--gradient_accumulation_steps must be at least 1"),
        ((*DATA, "--max_train_steps", "0"), None, "--max_train_steps must be at least 1"),
        ((*DATA, "--checkpointing_steps", "0"), None, "--checkpointing_steps must be at least 1"),
        ((*DATA, "--max_train_steps", "many"), None, "--max_train_steps.*'many'"),
        ((*DATA, "--preset", "gpu-9000"), None, "--preset.*'gpu-9000'.*cpu-64"),
        ((*DATA, "--on_bad_image", "ignore"), None, "--on_bad_image.*error.*skip"),
        ((*DATA, "--cache_features"), None, "--cache_features.*--rotation_degrees 0"),
        ((*DATA, "--no_such_flag"), None, "--no_such_flag"),
        ((*DATA, "--config", "no_such.yaml"), None, "--config: no file at no_such.yaml"),
        (DATA, "max_train_step: 5\nlearning_rates: 1\n", "sets unknown flags learning_rates, max_train_step"),
        (DATA, "preset: gpu-9000\n", "preset.*gpu-9000"),
        (DATA, "max_train_steps: many\n", "--max_train_steps.*'many'"),
        (DATA, "- max_train_steps\n", "--config"),
        (DATA, "a: [1\n", "--config"),
    ],
)
def test_wrong_arguments_end_in_one_clear_line(arguments, config, words, tmp_path, capsys):
    if config is not None:
        (tmp_path / "run.yaml").write_text(config)
        arguments = (*arguments, "--config", str(tmp_path / "run.yaml"))
    with pytest.raises(SystemExit) as stopped:
        train_ddpm.parse_args(arguments)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert re.search(f"error: .*{words}", last), last


# -- images ------------------------------------------------------------------------------------------------------


def test_a_corrupt_image_stops_the_run_or_is_skipped(tiny, tmp_path):
    data = write_folder(tmp_path / "part", 6)
    (data / "003.png").write_bytes((data / "003.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"(?s)on_bad_image='skip'.*003\.png"):
        train(data, tmp_path / "run", start=tiny)
    assert not (tmp_path / "run" / "model_index.json").exists()
    with pytest.warns(UserWarning, match=r"(?s)Skipped 1 images.*003\.png"):
        train(data, tmp_path / "run", "--on_bad_image", "skip", "--false_alarm_rate", 0.5, start=tiny)
    assert load(tmp_path / "run").calibration.normal_scores.shape == (1, 1)


def test_no_images_too_few_images_no_folder(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is empty: expected \.png"):
        train(tmp_path / "empty", tmp_path / "run", start=tiny)
    with pytest.raises(FileNotFoundError, match="no_such"):
        train(tmp_path / "no_such", tmp_path / "run", start=tiny)
    with pytest.raises(ValueError, match=r"'part'.*has 2 good images: too few.*It takes 3"):
        train(write_folder(tmp_path / "part", 2), tmp_path / "run", start=tiny)
    with pytest.raises(ValueError, match=r"`category`.*\['tile'\]"):
        train(write_mvtec(tmp_path / "tree"), tmp_path / "run", "--category", "bolt", start=tiny)


def test_three_images_are_enough(tiny, tmp_path):
    train(write_folder(tmp_path / "part", 3), tmp_path / "run", "--false_alarm_rate", 0.5, start=tiny)
    assert load(tmp_path / "run").calibration.normal_scores.shape == (1, 1)


def shared(**values) -> Namespace:
    return Namespace(**{**vars(train_ddpm.parse_args(["--train_data_dir", "x"])), **values})


def test_the_same_share_of_every_category_is_held_out_by_the_seed(tmp_path):
    data = write_mvtec(tmp_path, {"tile": 20, "cable": 10})
    args = shared(train_data_dir=str(data), calibration_fraction=0.3)
    training, held_out, categories = load_good_images(args)
    assert categories == ["cable", "tile"]
    assert sorted(held_out["category"]) == ["cable"] * 3 + ["tile"] * 6
    assert len(training) == 21
    assert not set(training["path"]) & set(held_out["path"])
    again = load_good_images(args)[1]
    other = load_good_images(shared(train_data_dir=str(data), calibration_fraction=0.3, seed=1))[1]
    assert again["path"] == held_out["path"]
    assert other["path"] != held_out["path"]


def test_all_photographs_of_a_part_are_held_out_or_none(tmp_path):
    folder = write_folder(tmp_path / "part", 24)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"serial{i % 8}-view{i // 8}.png")
    args = shared(train_data_dir=str(folder), calibration_fraction=0.25, part_pattern=r"(serial\d+)-")
    for seed in range(3):
        args.seed = seed
        training, held_out, _ = load_good_images(args)
        sides = [{Path(path).name.split("-")[0] for path in side["path"]} for side in (training, held_out)]
        assert [len(side) for side in sides] == [6, 2]
        assert not sides[0] & sides[1]
        assert (len(training), len(held_out)) == (18, 6)
    args.part_pattern = r"lot\d+"
    with pytest.raises(ValueError, match=r"--part_pattern 'lot.*' finds no part in the path '.*serial0-view0.png'"):
        load_good_images(args)
    args.part_pattern = "view"  # one part in all
    with pytest.raises(ValueError, match="has 24 good images, and of parts by --part_pattern 1: too few"):
        load_good_images(args)


def test_a_large_part_is_not_held_out_where_smaller_ones_will_do(tmp_path):
    folder = write_folder(tmp_path / "part", 24)
    for i, path in enumerate(sorted(folder.iterdir())):  # lot 1, serial 23 is not lot 12, serial 3
        name = ("lot1-serial23", "lot12-serial3")[i] if i < 2 else "lot1-serial4"
        path.rename(folder / f"{name}-view{i}.png")
    for seed in range(4):
        args = shared(train_data_dir=str(folder), part_pattern=r"lot(\d+)-serial(\d+)", seed=seed)
        args.calibration_fraction = 0.05  # one image
        held_out = load_good_images(args)[1]["path"]
        assert len(held_out) == 1
        assert "serial4" not in held_out[0]
    args.calibration_fraction = 0.15
    assert len(load_good_images(args)[1]) == 2


def test_a_stream_trains_as_the_data_set_does(tmp_path):
    data = str(write_mvtec(tmp_path, {"tile": 5, "cable": 4}))
    streamed = load_good_images(shared(train_data_dir=data, streaming=True))
    loaded = load_good_images(shared(train_data_dir=data))
    assert streamed[2] == loaded[2]
    for one, other in zip(streamed[:2], loaded[:2], strict=True):
        assert one["path"] == other["path"]
        assert all(np.array_equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
        assert one.cache_files  # on disk: memory does not grow with the images


def test_images_are_resized_once_and_read_from_disk(tmp_path):
    args = shared(train_data_dir=str(write_folder(tmp_path / "part", 8, size=20)))
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 20, categories)
    assert len(images) == 7
    pixels, index = images[2]
    assert pixels.dtype == torch.uint8
    assert index == 0
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(training[2]["image"]))
    assert images.table.cache_files  # memory-mapped: memory does not grow with the images
    assert ResizedImages(training, 8, categories)[0][0].shape == (3, 8, 8)


def batch(count: int = 4, size: int = 16) -> torch.Tensor:
    return torch.stack([torch.from_numpy(texture(i, size)).permute(2, 0, 1) for i in range(count)])


def test_augmentation_off_only_scales():
    args = shared(rotation_degrees=0.0)
    images = augment(batch(), args, generator())
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, batch().float() / 127.5 - 1.0)


def test_flips_are_exact_and_half_of_the_images():
    plain = batch(64).float() / 127.5 - 1.0
    for flag, dim in (("random_flip", 3), ("random_vertical_flip", 2)):
        images = augment(batch(64), shared(rotation_degrees=0.0, **{flag: True}), generator())
        kept = (images - plain).abs().amax(dim=(1, 2, 3)) < 1e-4
        flipped = (images - plain.flip(dim)).abs().amax(dim=(1, 2, 3)) < 1e-4
        assert (kept | flipped).all()
        assert 16 < int(flipped.sum()) < 48


def test_rotation_turns_by_no_more_than_asked_and_invents_no_values():
    ramp = torch.arange(64, dtype=torch.uint8).expand(32, 3, 64, 64)
    images = augment(ramp, shared(rotation_degrees=10.0), generator())
    assert images.min() >= -1.0
    assert images.max() <= 63 / 127.5 - 1.0 + 1e-5
    # the gradient of a ramp turns with the image
    inner = images[:, 0, 24:40, 24:40]
    dx, dy = inner.diff(dim=2)[:, :15].mean(dim=(1, 2)), inner.diff(dim=1)[:, :, :15].mean(dim=(1, 2))
    angles = torch.atan2(dy, dx).rad2deg()
    assert angles.abs().max() <= 10.1
    assert angles.abs().max() > 5.0
    assert angles.min() < 0 < angles.max()
    again = augment(ramp, shared(rotation_degrees=10.0), generator())
    assert torch.equal(images, again)


def test_batches_of_a_resumed_run_are_those_of_the_first(tmp_path):
    args = shared(train_data_dir=str(write_folder(tmp_path / "part", 15)), train_batch_size=4, output_dir=str(tmp_path))
    accelerator = create_accelerator(args)
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)

    def batches(first: int, last: int) -> list[tuple[int, torch.Tensor]]:
        loader = accelerator.prepare(create_data_loader(images, args))
        return [(n, pixels) for n, (pixels, _) in training_batches(loader, accelerator, first, last)]

    whole, resumed = batches(0, 11), batches(4, 11)  # three batches an epoch
    assert [number for number, _ in whole] == list(range(11))
    assert [number for number, _ in resumed] == list(range(4, 11))
    for (_, expected), (_, actual) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(whole[0][1], whole[3][1])  # epochs are shuffled anew
    draws = {step_generator(seed, n, accelerator).initial_seed() for seed in (0, 1) for n in range(50)}
    assert len(draws) == 100


# -- balanced categories -----------------------------------------------------------------------------------------


def test_every_category_comes_equally_often_and_no_image_more_often_than_another():
    of_image = np.array([0] * 5 + [1] * 2 + [2] * 3)
    sampler = BalancedSampler(of_image, seed=0)
    assert len(sampler) == 15
    seen = np.zeros(10, dtype=int)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == 15
        assert np.bincount(of_image[orders[-1]]).tolist() == [5, 5, 5]
        assert all(sorted(of_image[orders[-1][i : i + 3]]) == [0, 1, 2] for i in range(0, 15, 3))  # so is each batch
        seen += np.bincount(orders[-1], minlength=10)
        for category in range(3):
            counts = seen[of_image == category]
            assert counts.max() - counts.min() <= 1
    assert seen.tolist() == [6] * 5 + [15] * 2 + [10] * 3
    assert len({tuple(order) for order in orders}) == 6
    places = {tuple(of_image[order]) for order in orders}
    assert len(places) > 1  # the categories' order changes, too

    sampler.set_epoch(3)
    assert list(sampler) == orders[3]  # seed and epoch alone decide
    other = BalancedSampler(of_image, seed=1)
    other.set_epoch(3)
    assert list(other) != orders[3]


def test_balanced_batches_of_a_resumed_run_are_those_of_the_first(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 14, "cable": 4})
    args = shared(train_data_dir=str(data), train_batch_size=4, output_dir=str(tmp_path), balance_categories=True)
    accelerator = create_accelerator(args)
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)
    assert np.bincount(images.category_index).tolist() == [3, 12]

    def batches(first: int, last: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        loader = accelerator.prepare(create_data_loader(images, args))
        return [(n, *batch) for n, batch in training_batches(loader, accelerator, first, last)]

    whole, resumed = batches(0, 15), batches(8, 15)  # six batches an epoch
    assert [number for number, *_ in resumed] == list(range(8, 15))
    for (_, expected, classes), (_, actual, _) in zip(whole[8:], resumed, strict=True):
        assert torch.equal(actual, expected)
        assert sorted(classes.tolist()) == [0, 0, 1, 1]
    assert not torch.equal(whole[0][1], whole[6][1])  # epochs differ


def test_two_processes_share_the_batches_of_one():
    class Images(torch.utils.data.Dataset):
        category_index = np.array([0] * 12 + [1] * 3)

        def __len__(self) -> int:
            return 15

        def __getitem__(self, i: int) -> int:
            return i

    args = shared(train_batch_size=4, balance_categories=True)
    loader = create_data_loader(Images(), args)

    def batches(processes: int, index: int, epoch: int) -> list[list[int]]:
        options = {"num_processes": processes, "process_index": index, "use_seedable_sampler": True, "data_seed": 0}
        prepared = prepare_data_loader(loader, **options)
        prepared.set_epoch(epoch)
        return [batch.tolist() for batch in prepared]

    for epoch in (0, 3):
        one = batches(1, 0, epoch)
        assert len(one) == 6
        assert batches(2, 0, epoch) == one[::2]
        assert batches(2, 1, epoch) == one[1::2]
    assert batches(1, 0, 0) != batches(1, 0, 3)


# -- loss --------------------------------------------------------------------------------------------------------


def test_the_bound_trains_the_variance_alone():
    """Equations 5 to 8: the gradient of the mean is stopped in the variational bound."""
    unet = tiny_unet()
    clean = torch.rand(4, 3, 16, 16, generator=generator()) * 2.0 - 1.0
    features = torch.randn(4, 64, 8, 8, generator=generator())
    gradients = {}
    for name in ("noise", "variance", "feature"):
        unet.zero_grad()
        losses = train_ddpm.denoising_loss(unet, tiny_scheduler(), clean, features, None, generator(), 1.0)
        losses[name].backward()
        gradients[name] = unet.conv_out.bias.grad
    assert (gradients["noise"][:3] != 0).all()
    assert (gradients["noise"][3:] == 0).all()
    assert (gradients["variance"][:3] == 0).all()
    assert (gradients["variance"][3:] != 0).all()
    assert gradients["feature"] is None or (gradients["feature"] == 0).all()


def test_a_larger_exponent_draws_smaller_timesteps():
    drawn = []
    unet = tiny_unet()
    unet.register_forward_pre_hook(lambda module, args: drawn.append(args[1]))
    clean, features = torch.zeros(256, 3, 16, 16), torch.zeros(256, 64, 8, 8)
    with torch.no_grad():
        for exponent in (1.0, 3.0):
            train_ddpm.denoising_loss(unet, tiny_scheduler(), clean, features, None, generator(), exponent)
    assert all(((t >= 0) & (t <= 999)).all() for t in drawn)
    assert 450 < drawn[0].float().mean() < 550  # uniform
    assert 200 < drawn[1].float().mean() < 300  # the mean of u^3 is a quarter
