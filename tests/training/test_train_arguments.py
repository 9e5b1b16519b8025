"""Flags, configurations, and what is said of wrong ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from diffad.training import evaluate, fit_gaussian, make_table, train_autoencoder, train_ddpm, train_diad

SCRIPT = Path(train_ddpm.__file__)
DATA = ("--train_data_dir", "parts")


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


def test_a_name_of_digits_or_no_is_text_in_a_configuration(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("train_data_dir: 007\ncategory: 01\nbackbone: no\n")
    args = train_ddpm.parse_args(["--config", str(config)])
    assert (args.train_data_dir, args.category, args.backbone) == ("007", ["01"], "no")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("demo", "elpv/mono"),
        ("elpv_cpu", "elpv/poly"),
        ("magnetic_tile_cpu", None),
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


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        ((), None, "give one of --train_data_dir and --dataset_name"),
        ((*DATA, "--dataset_name", "org/name"), None, "give one of --train_data_dir and --dataset_name"),
        ((*DATA, "--calibration_fraction", "0"), None, r"--calibration_fraction must lie in \(0, 1\)"),
        ((*DATA, "--calibration_fraction", "1"), None, r"--calibration_fraction must lie in \(0, 1\)"),
        ((*DATA, "--part_pattern", ""), None, "--part_pattern must not match the empty text"),
        ((*DATA, "--part_pattern", "(a"), None, "--part_pattern is no regular expression: missing"),
        ((*DATA, "--false_alarm_rate", "0"), None, r"--false_alarm_rate must lie in \(0, 1\)"),
        ((*DATA, "--false_alarm_rate", "1.5"), None, r"--false_alarm_rate must lie in \(0, 1\)"),
        ((*DATA, "--alpha", "1.5"), None, r"--alpha must lie in \[0, 1\]"),
        ((*DATA, "--timesteps", "5", "1000"), None, r"--timesteps must lie in \[0, 999\]"),
        ((*DATA, "--train_batch_size", "0"), None, "--train_batch_size must be at least 1"),
        ((*DATA, "--gradient_accumulation_steps", "-1"), None, "--gradient_accumulation_steps must be at least 1"),
        ((*DATA, "--max_train_steps", "-1"), None, "--max_train_steps must be at least 0"),
        ((*DATA, "--max_train_steps", "0"), None, "--max_train_steps 0 trains nothing: give what was trained"),
        ((*DATA, "--checkpointing_steps", "0"), None, "--checkpointing_steps must be at least 1"),
        ((*DATA, "--max_train_steps", "many"), None, "--max_train_steps.*'many'"),
        ((*DATA, "--preset", "gpu-9000"), None, "--preset.*'gpu-9000'.*cpu-64"),
        ((*DATA, "--lr_scheduler", "foo"), None, "--lr_scheduler.*'foo'.*polynomial"),
        ((*DATA, "--lr_scheduler", "piecewise_constant"), None, "--lr_scheduler.*'piecewise_constant'.*constant"),
        ((*DATA, "--on_bad_image", "ignore"), None, "--on_bad_image.*error.*skip"),
        ((*DATA, "--preset", "cpu-64", "--cache_features"), None, "--cache_features.*--rotation_degrees 0"),
        ((*DATA, "--no_such_flag"), None, "--no_such_flag"),
        ((*DATA, "--config", "no_such.yaml"), None, "--config: no file at no_such.yaml"),
        (DATA, "max_train_step: 5\nlearning_rates: 1\n", "sets unknown flags learning_rates, max_train_step"),
        (DATA, "preset: gpu-9000\n", "preset.*gpu-9000"),
        (DATA, "max_train_steps: many\n", "--max_train_steps.*'many'"),
        (DATA, "use_ema: 1\n", "--config: .*run.yaml: use_ema must be true or false, but is 1"),
        (DATA, "use_ema: 'true'\n", "use_ema must be true or false"),
        ((*DATA, "--beta_schedule", "foo"), None, "--beta_schedule.*'foo'.*scaled_linear"),
        (DATA, "- max_train_steps\n", "--config"),
        (DATA, "a: [1\n", "--config"),
        (DATA, "category: größe\n".encode("latin-1"), "--config: .*run.yaml is not YAML"),
        (DATA, "1: 2\n", "sets unknown flags 1"),
        (DATA, "config: other.yaml\n", "sets unknown flags config"),
        (DATA, "seed: [1, 2]\n", r"--config: .*run.yaml: seed takes one value, but is \[1, 2\]"),
        ((*DATA, "--report_to", "tensorbord"), None, "--report_to.*'tensorbord'.*tensorboard"),
    ],
)
def test_wrong_arguments_end_in_one_clear_line(arguments, config, words, tmp_path, capsys):
    if config is not None:
        (tmp_path / "run.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
        arguments = (*arguments, "--config", str(tmp_path / "run.yaml"))
    with pytest.raises(SystemExit) as stopped:
        train_ddpm.parse_args(arguments)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert re.search(f"error: .*{words}", last), last


def test_values_are_no_flags():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_ddpm.parse_args([*DATA, "--output_dir", "./alpha"])


def test_flags_that_a_pretrained_pipeline_overrules_are_named():
    with pytest.warns(UserWarning, match="--backbone and --resolution do not count: the pipeline of --pretrained"):
        train_ddpm.parse_args([*DATA, "--pretrained_model_name_or_path", "m", "--backbone=a", "--resolution", "8"])


def test_flags_that_the_choice_overrules_are_named():
    given = ("--kl_sigma", "1", "--feature_sigma=2", "--contrast", "0.5", "--position_trust", "1", "--alpha", "0")
    words = "--kl_sigma and --feature_sigma and --contrast and --position_trust and --alpha do not count: --choose"
    with pytest.warns(UserWarning, match=words):  # of automatic.yaml
        train_ddpm.parse_args([*DATA, *given])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_ddpm.parse_args([*DATA, "--no-choose", *given])
        train_ddpm.parse_args([*DATA, "--timesteps", "50"])


def test_minutes_of_the_command_line_win_over_epochs_of_a_configuration(tmp_path):
    (config := tmp_path / "run.yaml").write_text("num_train_epochs: 3\n")
    args = train_ddpm.parse_args(["--config", str(config), *DATA, "--minutes", "2"])
    assert (args.minutes, args.num_train_epochs) == (2.0, None)
    args = train_ddpm.parse_args(["--config", str(config), *DATA])
    assert (args.minutes, args.num_train_epochs) == (None, 3)
    args = train_ddpm.parse_args([*DATA, "--num_train_epochs", "3"])  # over the minutes of automatic.yaml
    assert (args.minutes, args.num_train_epochs) == (None, 3)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_configuration_is_read_alike_in_every_locale(tmp_path, encoding):
    text = "category: [größe]\npart_pattern: '-(Größe)-'\n"  # a value may begin with a dash
    (config := tmp_path / "config.yaml").write_text(text, encoding=encoding)
    program = f"from diffad.training.train_ddpm import parse_args as p; a = p(['--config', {str(config)!r}, *{DATA!r}])"
    program += "; print(ascii((a.category, a.part_pattern)))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == ascii((["größe"], "-(Größe)-")), shown.stderr


def test_a_configuration_may_say_no_to_mixed_precision(tmp_path):
    (config := tmp_path / "config.yaml").write_text("mixed_precision: no\n")  # False, as YAML reads it
    assert train_ddpm.parse_args(["--config", str(config), *DATA]).mixed_precision == "no"


def test_a_configuration_may_say_no_to_a_tracker_and_a_region(tmp_path):
    (config := tmp_path / "config.yaml").write_text("report_to: no\nroi: false\n")  # False, as YAML reads it
    args = train_ddpm.parse_args(["--config", str(config), *DATA])
    assert (args.report_to, args.roi) == (None, None)
    assert train_ddpm.parse_args(["--config", str(config), *DATA, "--roi", "mask.png"]).roi == "mask.png"


@pytest.mark.parametrize(
    ("parser", "flags", "words"),
    [
        (
            train_ddpm.parse_args,
            (*DATA, "--checkpoints_total_limit", "0"),
            "--checkpoints_total_limit must be at least 1",
        ),
        (
            train_ddpm.parse_args,
            (*DATA, "--checkpoints_total_limit", "-1"),
            "--checkpoints_total_limit must be at least",
        ),
        (train_ddpm.parse_args, (*DATA, "--resolution", "4"), "--resolution must be at least 8, but is 4"),
        (train_ddpm.parse_args, (*DATA, "--resolution", "-64"), "--resolution must be at least 8"),
        (train_ddpm.parse_args, (*DATA, "--validation_steps", "-5"), "--validation_steps must be at least 0"),
        (train_ddpm.parse_args, (*DATA, "--learning_rate", "nan"), "--learning_rate must be finite and above 0"),
        (train_ddpm.parse_args, (*DATA, "--seed", "-1"), "--seed must be at least 0"),
        (train_ddpm.parse_args, (*DATA, "--output_dir", "./parts"), "--output_dir: ./parts holds the data"),
        (train_diad.parse_args, (*DATA, "--num_inference_steps", "0"), "--num_inference_steps must be at least 1"),
        (train_autoencoder.parse_args, (*DATA, "--kl_weight", "-1"), "--kl_weight must be finite and at least 0"),
        (fit_gaussian.parse_args, ("--model", "m", *DATA, "--batch_size", "0"), "--batch_size must be at least 1"),
        (fit_gaussian.parse_args, ("--model", "m", *DATA, "--roi", "r.png"), "unrecognized arguments: --roi"),
        (train_autoencoder.parse_args, (*DATA, "--preset", "cpu-128", "--roi", "r"), "unrecognized arguments: --roi"),
        (
            train_autoencoder.parse_args,
            (*DATA, "--preset", "cpu-128", "--false_alarm_rate", "0.05", "--num_example_images", "3"),
            "unrecognized arguments: --false_alarm_rate 0.05 --num_example_images 3",
        ),
        (evaluate.main, ("--model", "m", "--data", "d", "--resolution", "0"), "--resolution must be at least 8"),
        (evaluate.main, ("--model", "m", "--data", "d", "--pro_fpr_limit", "2"), "--pro_fpr_limit must lie in"),
        (make_table.main, ("--table", "t", "--data", "d", "--batch_size", "-2"), "--batch_size must be at least 1"),
    ],
)
def test_every_script_checks_its_flags_before_work_begins(parser, flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser(list(flags))
    assert stopped.value.code == 2
    assert f"error: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "resolution", "multiple"), [("cpu-64", 20, 8), ("paper-256", 40, 32)])
def test_a_resolution_that_the_network_cannot_halve_is_told(preset, resolution, multiple):
    args = train_ddpm.parse_args(
        [*DATA, "--preset", preset, "--resolution", str(resolution), "--backbone_weights", "random"]
    )
    with pytest.raises(ValueError, match=f"--resolution must be a multiple of {multiple} for --preset {preset}"):
        train_ddpm.create_components(args, ["part"])
