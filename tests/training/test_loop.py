"""The loop that every training script runs: stopped and resumed, diverging, and on two processes."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import toy_training
from accelerate import Accelerator
from launching import launch, launch_command

from diffad.training.arguments import add_shared_arguments, parse_arguments
from diffad.training.checkpoints import list_checkpoints
from diffad.training.early_stopping import PATIENCE
from diffad.training.loop import create_accelerator, create_optimizer
from diffad.training.stop_signals import catch_stop_signals

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = Path(toy_training.__file__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """What the run ended with, the same in every process."""
    all_processes = [torch.load(path, weights_only=True) for path in output.glob("weights-*.pt")]
    assert all(torch.equal(one[name], all_processes[0][name]) for one in all_processes for name in one)
    return all_processes[0]


def assert_same_weights(output: Path, expected: Path) -> None:
    found = weights(output)
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in weights(expected).items()
    }


def checkpoints(output: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output)]


def at_batch(number: int, action):
    return lambda batch, model: action() if batch == number else None


# -- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("batch", [4, 5])  # the first of a step's two, in the middle of it, and the second
def test_a_signal_is_looked_at_between_steps_and_resuming_is_exact(tmp_path, capsys, number, batch):
    handlers = [signal.getsignal(one) for one in SIGNALS]
    toy_training.run(tmp_path / "whole")
    assert checkpoints(tmp_path / "whole") == ["checkpoint-6"]
    with pytest.raises(SystemExit) as stopped:
        toy_training.run(tmp_path / "cut", on_batch=at_batch(batch, lambda: signal.raise_signal(number)))
    assert stopped.value.code == 128 + number
    assert "Stopped at step 3. Add --resume_from_checkpoint latest to go on." in capsys.readouterr().out
    assert checkpoints(tmp_path / "cut") == ["checkpoint-3"]
    assert [signal.getsignal(one) for one in SIGNALS] == handlers

    record = toy_training.run(tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert record["steps"] == 6
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("loader_knows_its_epoch", [True, False])
def test_resuming_in_the_middle_of_a_later_epoch_is_exact(tmp_path, monkeypatch, loader_knows_its_epoch):
    if not loader_knows_its_epoch:  # as one that skips is before accelerate 1.15
        skip = Accelerator.skip_first_batches

        def as_of_the_first_epoch(self, *args):
            loader = skip(self, *args)
            loader.iteration = 0
            return loader

        monkeypatch.setattr(Accelerator, "skip_first_batches", as_of_the_first_epoch)
    toy_training.run(tmp_path / "whole")
    with pytest.raises(SystemExit):
        toy_training.run(tmp_path / "cut", on_batch=at_batch(7, lambda: signal.raise_signal(signal.SIGTERM)))
    assert checkpoints(tmp_path / "cut") == ["checkpoint-4"]  # after eight batches of three an epoch
    toy_training.run(tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_second_interrupt_stops_at_once(tmp_path):
    handlers = [signal.getsignal(one) for one in SIGNALS]

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_training.run(tmp_path, on_batch=at_batch(4, interrupt_twice))
    assert checkpoints(tmp_path) == []
    assert [signal.getsignal(one) for one in SIGNALS] == handlers


def test_launchers_may_send_sigterm_twice(tmp_path):
    def terminate_twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        toy_training.run(tmp_path, on_batch=at_batch(4, terminate_twice))
    assert stopped.value.code == 143
    assert checkpoints(tmp_path) == ["checkpoint-3"]


def test_a_signal_that_comes_too_late_is_not_lost():
    held_back = []

    def receive_and_end() -> None:
        with catch_stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
            held_back.extend(received)

    with pytest.raises(KeyboardInterrupt):
        receive_and_end()
    assert held_back == [signal.SIGINT]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
        assert received == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_caught(tmp_path):
    handlers = [signal.getsignal(one) for one in SIGNALS]
    during = []
    thread = threading.Thread(
        target=toy_training.run,
        args=(tmp_path,),
        kwargs={"on_batch": lambda batch, model: during.append([signal.getsignal(one) for one in SIGNALS])},
    )
    thread.start()
    thread.join()
    assert checkpoints(tmp_path) == ["checkpoint-6"]
    assert during == [handlers] * 12


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_stops_also_where_workers_read_its_data(tmp_path, number):
    """The signal goes to all of its group, as a terminal's Ctrl-C does, so the workers receive it too."""
    command = [sys.executable, SCRIPT, tmp_path / "cut", "5", "0", str(int(number)), "--dataloader_num_workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=300)
    assert done.returncode == 128 + number, done.stderr[-4000:]
    assert "Stopped at step 3." in done.stdout
    assert "Traceback" not in done.stderr
    toy_training.run(tmp_path / "cut", "--resume_from_checkpoint", "latest")
    toy_training.run(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


# -- diverging ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    def nan(batch: int, model: torch.nn.Module) -> torch.Tensor | None:
        return toy_training.not_a_number(model) if batch == 5 else None  # in step 3

    with pytest.raises(RuntimeError) as diverged:
        toy_training.run(tmp_path, "--checkpointing_steps", 2, on_batch=nan)
    message = str(diverged.value)
    assert "at step 4" in message  # the next one that would have been saved
    assert "lower --learning_rate than 0.1" in message
    assert "checkpoint-2 is the last good checkpoint" in message
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert not list(tmp_path.glob("unfinished-*"))


def test_it_is_looked_for_every_ten_steps(tmp_path):
    def nan(batch: int, model: torch.nn.Module) -> torch.Tensor | None:
        return toy_training.not_a_number(model) if batch == 5 else None

    with pytest.raises(RuntimeError, match=r"at step 10,.*error is nan.*there is no earlier checkpoint"):
        toy_training.run(tmp_path, "--max_train_steps", 30, on_batch=nan)
    assert checkpoints(tmp_path) == []


def test_a_gradient_that_is_not_finite_is_not_saved_under_a_loss_that_is(tmp_path):
    def broken(batch: int, model: torch.nn.Module) -> torch.Tensor | None:
        # zero, with a gradient of zero times infinity
        return (0.0 * model.weight).sqrt().sum() if batch == 6 else None

    with pytest.raises(RuntimeError, match="at step 4, gradient's norm is nan"):
        toy_training.run(tmp_path, "--checkpointing_steps", 2, on_batch=broken)
    assert checkpoints(tmp_path) == ["checkpoint-2"]


# -- two processes -----------------------------------------------------------------------------------------------


def test_two_processes_stop_at_the_same_step_where_one_receives_a_signal(tmp_path):
    number = signal.SIGINT
    command = launch_command(SCRIPT, tmp_path / "cut", 4, 1, int(number), processes=2)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode != 0
    assert f"exitcode  : {128 + number}" in done.stderr, done.stderr[-4000:]
    assert done.stdout.count("Stopped at step 3.") == 1
    assert checkpoints(tmp_path / "cut") == ["checkpoint-3"]
    never = (99, 0, "nan")
    launch(SCRIPT, tmp_path / "cut", *never, "--resume_from_checkpoint", "latest", processes=2, cwd=tmp_path)
    launch(SCRIPT, tmp_path / "whole", *never, processes=2, cwd=tmp_path)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_all_processes_see_that_the_loss_of_one_is_not_finite(tmp_path):
    command = launch_command(SCRIPT, tmp_path / "run", 5, 1, "nan", "--checkpointing_steps", 2, processes=2)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: Training has diverged: at step 4") == 2, done.stderr[-4000:]
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]


def test_the_learning_rate_follows_the_steps_where_another_number_of_processes_goes_on(tmp_path):
    def rates(folder: Path) -> list[float]:
        states = (torch.load(folder / f"checkpoint-{step}" / "scheduler.bin") for step in (2, 4, 6))
        return [state["_last_lr"][0] for state in states]

    every = ("--checkpointing_steps", 2, "--checkpoints_total_limit", 3)
    more = ("--resume_from_checkpoint", "latest")
    toy_training.run(tmp_path / "one", *every)
    launch(SCRIPT, tmp_path / "two", 99, 0, "nan", *every, processes=2, cwd=tmp_path)
    assert rates(tmp_path / "one") == pytest.approx(rates(tmp_path / "two"))
    assert rates(tmp_path / "one")[2] == pytest.approx(0.0)
    for began, goes_on in (("one", "two"), ("two", "one")):
        shutil.copytree(tmp_path / began / "checkpoint-2", tmp_path / f"then_{goes_on}" / "checkpoint-2")
    toy_training.run(tmp_path / "then_one", *every, *more)
    launch(SCRIPT, tmp_path / "then_two", 99, 0, "nan", *every, *more, processes=2, cwd=tmp_path)
    for goes_on in ("one", "two"):
        assert rates(tmp_path / f"then_{goes_on}") == pytest.approx(rates(tmp_path / "one"))


# -- length and optimizer, as in diffusers' examples -------------------------------------------------------------


def test_epochs_are_passes_over_the_images(tmp_path):
    """Three batches an epoch and two a step: three epochs are nine batches, the last of them in a step of its own."""
    assert toy_training.run(tmp_path, "--num_train_epochs", 2)["steps"] == 3
    assert toy_training.run(tmp_path, "--num_train_epochs", 3)["steps"] == 5
    assert toy_training.run(tmp_path, "--num_train_epochs", 3, "--max_train_steps", 2)["steps"] == 2  # the later one


def test_epochs_are_as_long_for_two_processes(tmp_path):
    """Of three batches an epoch each process has one, and the third is nobody's: four epochs are two steps of two."""
    launch(SCRIPT, tmp_path, 99, 0, "nan", "--num_train_epochs", 4, processes=2, cwd=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def optimizer_of(tmp_path, *flags):
    parser = argparse.ArgumentParser()
    add_shared_arguments(parser)
    args = parse_arguments(
        parser, [*toy_training.FLAGS, "--output_dir", str(tmp_path), "--learning_rate", "0.1", *flags]
    )
    return create_optimizer([torch.nn.Parameter(torch.zeros(2))], args, create_accelerator(args), 8)[0]


def test_the_learning_rate_is_that_of_an_image_where_it_is_scaled(tmp_path):
    assert optimizer_of(tmp_path).defaults["lr"] == pytest.approx(0.1)
    assert optimizer_of(tmp_path, "--scale_lr").defaults["lr"] == pytest.approx(0.8)  # eight images a step


def test_a_warm_up_as_long_as_the_run_is_told(tmp_path, capsys):
    toy_training.run(tmp_path / "long", "--lr_warmup_steps", 6)
    words = "--lr_warmup_steps 6 are no fewer than the 6 steps of this run: the learning rate never comes to 0.1."
    assert words in capsys.readouterr().out
    toy_training.run(tmp_path / "short", "--lr_warmup_steps", 5)
    toy_training.run(tmp_path / "without", "--lr_warmup_steps", 6, "--lr_scheduler", "constant")
    assert "--lr_warmup_steps" not in capsys.readouterr().out


def test_8_bits_take_bitsandbytes(tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ModuleNotFoundError, match="--use_8bit_adam takes bitsandbytes: pip install bitsandbytes"):
            optimizer_of(tmp_path, "--use_8bit_adam")
    else:
        assert type(optimizer_of(tmp_path, "--use_8bit_adam")).__name__ == "AdamW8bit"


# -- stopped early -----------------------------------------------------------------------------------------------


def rising_after(number: int):
    """A held-out loss that falls for so many measures, and then rises; and the weights that each measure saw."""
    seen = []

    def loss(model: torch.nn.Module) -> torch.Tensor:
        seen.append({name: values.clone() for name, values in model.state_dict().items()})
        return torch.tensor(float(abs(len(seen) - number)))

    return loss, seen


def test_a_run_ends_where_the_held_out_loss_no_longer_falls(tmp_path, capsys):
    loss, seen = rising_after(3)
    record = toy_training.run(tmp_path, "--max_train_steps", 40, held_out_loss=loss)  # measured every other step
    assert record["steps"] == 2 * (3 + PATIENCE) == checkpoint_steps(tmp_path)[-1]
    assert list(record["held_out_loss"].values()) == [2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert "stopped after 16 steps" in capsys.readouterr().out
    # it is measured of the averaged weights, which are those that the run ends with
    assert all(torch.equal(seen[-1][name], values) for name, values in weights(tmp_path).items())


def test_a_held_out_loss_that_falls_leaves_the_run_as_it_is(tmp_path):
    toy_training.run(tmp_path / "without")
    record = toy_training.run(tmp_path / "with", held_out_loss=rising_after(100)[0])
    assert record["steps"] == 6 == len(record["held_out_loss"])
    assert_same_weights(tmp_path / "with", tmp_path / "without")


def test_a_run_that_goes_on_knows_the_held_out_losses_so_far(tmp_path):
    flags = ("--max_train_steps", 40, "--checkpointing_steps", 2)
    toy_training.run(tmp_path / "whole", *flags, held_out_loss=rising_after(3)[0])
    loss, seen = rising_after(3)
    interrupt = at_batch(19, lambda: signal.raise_signal(signal.SIGINT))  # in the tenth step, after five measures
    with pytest.raises(SystemExit):
        toy_training.run(tmp_path / "stopped", *flags, on_batch=interrupt, held_out_loss=loss)
    assert len(seen) == 5
    checkpoint = tmp_path / "stopped" / checkpoints(tmp_path / "stopped")[-1]
    for folder, which in (("elsewhere", checkpoint), ("stopped", "latest")):
        loss, seen = rising_after(3)
        seen.extend([None] * 5)
        more = ("--resume_from_checkpoint", which)
        assert toy_training.run(tmp_path / folder, *flags, *more, held_out_loss=loss)["steps"] == 16
        assert_same_weights(tmp_path / folder, tmp_path / "whole")


def test_a_run_that_has_ended_early_takes_no_further_step(tmp_path):
    flags = ("--max_train_steps", 40)
    toy_training.run(tmp_path, *flags, held_out_loss=rising_after(3)[0])
    expected = weights(tmp_path)
    more = ("--resume_from_checkpoint", "latest")
    assert toy_training.run(tmp_path, *flags, *more, held_out_loss=rising_after(3)[0])["steps"] == 16
    assert all(torch.equal(values, expected[name]) for name, values in weights(tmp_path).items())


def checkpoint_steps(output: Path) -> list[int]:
    return [int(name.removeprefix("checkpoint-")) for name in checkpoints(output)]
