"""Checkpoints that cannot be gone on from say what is wrong with them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffad.training.checkpoints import list_checkpoints, resume, save_checkpoint


@pytest.fixture
def run(tmp_path, fresh_accelerate):
    """An accelerator with a model and its moving average, and the flags; two checkpoints are there."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.register_for_checkpointing(EMAModel(model.parameters()))
    args = Namespace(output_dir=str(tmp_path), checkpoints_total_limit=2, resume_from_checkpoint="latest", use_ema=True)
    for step in (1, 2, 3):
        save_checkpoint(accelerator, args, step)
    return accelerator, args


def test_a_checkpoint_is_gone_on_from(run):
    accelerator, args = run
    assert [path.name for path in list_checkpoints(args.output_dir)] == ["checkpoint-2", "checkpoint-3"]
    assert resume(accelerator, args) == 3
    args.resume_from_checkpoint = str(Path(args.output_dir, "checkpoint-2"))
    assert resume(accelerator, args) == 2


def test_a_new_training_beside_checkpoints_of_an_earlier_one_says_so(run, capsys):
    accelerator, args = run
    args.resume_from_checkpoint = None
    assert resume(accelerator, args) == 0
    assert "holds checkpoints of an earlier training, checkpoint-3 last" in capsys.readouterr().out


def test_settings_that_the_weights_depend_on_stay(run):
    accelerator, args = run
    save_checkpoint(accelerator, args, 4, {"beta_schedule": "linear", "feature_strides": (2, 4), "preset": None})
    same = {"beta_schedule": "linear", "feature_strides": [2, 4], "preset": None}
    assert resume(accelerator, args, {**same, "of_a_later_version": 1}) == 4
    for change, words in (
        ({"feature_strides": [2]}, "--feature_strides is 2, but .*checkpoint-4 was trained with 2 4. Give that, or"),
        ({"preset": "cpu-64"}, "--preset is cpu-64, but .* was trained with not given"),
    ):
        with pytest.raises(ValueError, match=words):
            resume(accelerator, args, {**same, **change})
    args.resume_from_checkpoint = str(Path(args.output_dir, "checkpoint-3"))  # an earlier version's does not tell
    assert resume(accelerator, args, same) == 3


def test_a_renamed_checkpoint(run):
    accelerator, args = run
    renamed = Path(args.output_dir, "checkpoint-3").rename(Path(args.output_dir, "best"))
    args.resume_from_checkpoint = str(renamed)
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint: .*best is not named checkpoint-STEP"):
        resume(accelerator, args)


def test_a_damaged_checkpoint(run):
    accelerator, args = run
    weights = next(Path(args.output_dir, "checkpoint-3").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:3])
    with pytest.raises(
        RuntimeError, match=r"checkpoint-3 cannot be loaded: it is damaged.*Give another one \(checkpoint-2"
    ):
        resume(accelerator, args)


def test_a_moving_average_that_comes_or_goes(run):
    accelerator, args = run
    args.use_ema = False
    with pytest.raises(ValueError, match=r"--use_ema: .*checkpoint-3 was saved with a moving average.*Add --use_ema"):
        resume(accelerator, args)
    args.use_ema = True
    for file in Path(args.output_dir, "checkpoint-3").glob("custom_checkpoint_*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"saved without a moving average.*Leave out --use_ema"):
        resume(accelerator, args)
