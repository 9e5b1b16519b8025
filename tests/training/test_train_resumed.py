"""Training stopped, killed and resumed, and on two processes."""

# ruff: noqa: F811 (tests take the imported fixtures by their names)

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import tiny_pipeline, write_mvtec
from ddpm_runs import flags, good, load, tiny, train  # noqa: F401 (fixtures)
from launching import launch, launch_command
from safetensors.torch import load_file

from diffad.training import train_ddpm
from diffad.training.checkpoints import FROZEN_NAME, list_checkpoints
from diffad.training.duration import FEWEST_STEPS, KEPT_NAME

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = Path(train_ddpm.__file__)


def start(command: list[str], output: Path, log: Path) -> subprocess.Popen:
    """Starts a process in a group of its own, and returns when it has written its first checkpoint."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=log.parent, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.time() + 600
        while not list_checkpoints(output):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.time() < deadline
            time.sleep(0.01)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process


# -- killed and resumed ------------------------------------------------------------------------------------------


def test_killed_and_resumed_it_ends_with_the_same_weights_to_the_bit(good, tiny, tmp_path):
    """With accumulation over the ends of epochs (three batches in each, two a step), and EMA."""
    more = ("--gradient_accumulation_steps", 2, "--use_ema", "--checkpointing_steps", 4, "--random_flip")
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    process = start(launch_command(SCRIPT, *flags(good, killed, *more, start=tiny, steps=24)), killed, tmp_path / "log")
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_saves_a_checkpoint_and_resumes_to_the_bit(good, tiny, tmp_path, number, code):
    """Wherever in a step of two batches the signal falls."""
    more = ("--gradient_accumulation_steps", 2, "--use_ema", "--checkpointing_steps", 4, "--random_flip")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = [sys.executable, str(SCRIPT), *flags(good, stopped, *more, start=tiny, steps=24)]
    process = start(command, stopped, tmp_path / "log")
    process.send_signal(number)
    assert process.wait(timeout=300) == code, (tmp_path / "log").read_text()[-4000:]
    last = list_checkpoints(stopped)[-1].name
    step = int(last.removeprefix("checkpoint-"))
    assert 4 <= step < 24
    log = (tmp_path / "log").read_text()
    assert f"Stopped at step {step}. Add --resume_from_checkpoint latest to go on." in log
    assert "Traceback" not in log
    assert not (stopped / "model_index.json").exists()

    train(good, whole, *more, start=tiny, steps=24)
    train(good, stopped, *more, "--resume_from_checkpoint", "latest", start=tiny, steps=24)
    for name in ("checkpoint-24/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):  # raw, and averaged
        expected, resumed = load_file(whole / name), load_file(stopped / name)
        assert [key for key in expected if not torch.equal(expected[key], resumed[key])] == []


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


@pytest.mark.parametrize(("flag", "value"), [("--learning_rate", 1e-6), ("--adam_weight_decay", 0.5)])
def test_a_resumed_run_takes_no_other_rates(good, tiny, tmp_path, flag, value):
    train(good, tmp_path, start=tiny)
    with pytest.raises(ValueError, match=rf"{flag} is {value:g}, but the checkpoint was trained with 0.0001, which a"):
        train(good, tmp_path, "--resume_from_checkpoint", "latest", flag, value, start=tiny, steps=4)
    train(good, tmp_path, "--resume_from_checkpoint", "latest", start=tiny, steps=4)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 4


def test_a_resumed_run_has_no_fewer_steps_than_its_checkpoint(good, tiny, tmp_path):
    train(good, tmp_path, start=tiny, steps=4)
    before = (tmp_path / "training.json").read_text()
    more = ("--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="--max_train_steps is 2, but the checkpoint has been trained for 4 steps"):
        train(good, tmp_path, *more, start=tiny, steps=2)
    with pytest.raises(ValueError, match="--num_train_epochs 1 makes 3, but the checkpoint has been trained for 4"):
        train(good, tmp_path, "--num_train_epochs", 1, *more, start=tiny)
    assert (tmp_path / "training.json").read_text() == before


def test_a_resumed_run_has_the_loss_and_the_networks_that_it_began_with(good, tiny, tmp_path):
    more = ("--resume_from_checkpoint", "latest")
    train(good, tmp_path / "new", "--use_ema")
    for flag, value in (
        ("--beta_schedule", "scaled_linear"),
        ("--timestep_exponent", 2.0),
        ("--feature_image_size", 32),
        ("--ema_decay", 0.5),
    ):
        with pytest.raises(ValueError, match=rf"{flag} is {value}, but .*checkpoint-2 was trained with .*Give that"):
            train(good, tmp_path / "new", "--use_ema", flag, value, *more, steps=3)
    train(good, tmp_path / "new", "--use_ema", *more, steps=3)
    # a pipeline that is trained further has its own networks, whatever the flags say of them
    train(good, tmp_path / "further", start=tiny)
    train(good, tmp_path / "further", "--beta_schedule", "scaled_linear", *more, start=tiny, steps=3)
    with pytest.raises(ValueError, match=r"--feature_loss_weight is 3.0, but .*checkpoint-3 was trained with 1.0"):
        train(good, tmp_path / "further", "--feature_loss_weight", 3, *more, start=tiny, steps=4)
    # and new networks do not go on with its denoiser, beside another backbone and under other noise
    with pytest.raises(ValueError, match=r"--pretrained_model.* noise schedule than .*checkpoint-3 was trained with"):
        train(good, tmp_path / "further", "--beta_schedule", "scaled_linear", *more, steps=4)
    # a checkpoint of an earlier version does not tell
    kept = tmp_path / "further" / "checkpoint-3" / "settings.json"
    settings = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: value for name, value in settings.items() if name != FROZEN_NAME}))
    train(good, tmp_path / "further", *more, start=tiny, steps=4)


def test_a_resumed_run_holds_out_the_images_that_it_began_with(good, tiny, tmp_path, monkeypatch):
    shutil.copytree(good, data := tmp_path / "data" / "part")
    more = ("--resume_from_checkpoint", "latest")
    train(data, output := tmp_path / "run", start=tiny)
    with pytest.raises(ValueError, match=r"checkpoint-2 has been trained with other images held out.*--seed"):
        train(data, output, *more, "--seed", 1, start=tiny, steps=3)
    with pytest.raises(ValueError, match="other images held out"):
        train(data, output, *more, "--calibration_fraction", 0.3, start=tiny, steps=3)
    # the folder may be named in another way, and be somewhere else
    monkeypatch.chdir(tmp_path)
    train(Path("data", "part"), output, *more, start=tiny, steps=3)
    train(data.rename(tmp_path / "part"), output, *more, start=tiny, steps=4)
    # a checkpoint of an earlier version does not tell
    (output / "checkpoint-4" / "held_out.json").unlink()
    train(tmp_path / "part", output, *more, "--seed", 1, start=tiny, steps=5)


def test_minutes_are_counted_anew_where_no_checkpoint_was_left(good, tiny, tmp_path, monkeypatch, capsys):
    arguments = flags(good, tmp_path, start=tiny)
    at = arguments.index("--max_train_steps")
    arguments = [*arguments[:at], *arguments[at + 2 :], "--resume_from_checkpoint", "latest", "--minutes"]
    asked = []

    def killed(model, batch_loss, data_loader, args, *more):
        asked.append((args.max_train_steps, args.minutes))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ddpm, "train", killed)
    for minutes in (0.001, 60):
        with pytest.raises(KeyboardInterrupt):
            train_ddpm.main([*arguments, str(minutes)])
    assert asked[0] == (FEWEST_STEPS, 0.001)
    assert asked[1][0] > FEWEST_STEPS
    assert f"60 minutes are {asked[1][0]} steps: --max_train_steps repeats it." in capsys.readouterr().out
    # with a checkpoint, the number that the run began with counts
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train_ddpm.main([*arguments, "0.001"])
    assert asked[2] == asked[1]
    words = f"It goes on with the {asked[1][0]} steps that it began with, of 60 minutes: --max_train_steps asks for"
    assert words in capsys.readouterr().out
    # also in another folder, and from there
    arguments[arguments.index("latest")] = str(tmp_path / "checkpoint-1")
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt):
        train_ddpm.main([*arguments, "0.001"])
    assert asked[3] == asked[1]
    assert (tmp_path / "elsewhere" / KEPT_NAME).read_text() == (tmp_path / KEPT_NAME).read_text()


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


def test_two_trainings_are_not_mixed_in_one_folder(good, tiny, tmp_path):
    """Of a training's processes the main one alone holds the folder, until they end."""
    output = tmp_path / "run"
    arguments = flags(good, output, "--checkpointing_steps", 1, start=tiny, steps=9999)
    process = start(launch_command(SCRIPT, *arguments, processes=2), output, tmp_path / "log")
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    try:
        with pytest.raises(RuntimeError, match=r"written to by process \d+ on .*give another --output_dir"):
            train(good, output, start=tiny)
    finally:
        for one in processes:  # what the launcher has launched is in a group of its own
            one.kill()
        psutil.wait_procs(processes)
    for _ in range(2):  # neither the dead nor the ended hold it
        train(good, output, start=tiny)
    load(output)


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
