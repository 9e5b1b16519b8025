"""DiAD trained with weights that are sharded over processes, by accelerate's FSDP and the configuration that ships."""

# ruff: noqa: F811 (tests take the imported fixtures by their names)

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from diad_runs import SG_NETWORK, UNET, flags, good, load, moved, tiny  # noqa: F401 (fixtures)
from launching import launch, launch_command
from safetensors.torch import load_file

from diffad.training import train_diad
from diffad.training.checkpoints import list_checkpoints

CONFIGURATION = Path(train_diad.__file__).parent / "configs" / "accelerate" / "fsdp.yaml"

# Of itself accelerate shards on GPUs alone, and copies the weights to each process on a CPU. Told that these are
# sharded, it does on a CPU, by gloo, what it does there.
SCRIPT = """
import sys
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from diffad.training import SCRIPT

state = Accelerator().state
PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
state.fsdp_plugin = FullyShardedDataParallelPlugin()
SCRIPT.main(sys.argv[1:])
"""


def train_sharded(folder: Path, arguments: list[str], script: str = "train_diad") -> subprocess.CompletedProcess:
    """Two processes, which exchange by gloo."""
    (file := folder / "sharded.py").write_text(SCRIPT.replace("SCRIPT", script))
    command = launch_command(file, *arguments, processes=2)
    command[command.index("--multi_gpu")] = f"--config_file={CONFIGURATION}"
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {f"{file} {name}": one for file in (UNET, SG_NETWORK) for name, one in load_file(output / file).items()}


def test_sharded_it_comes_to_the_weights_of_whole_ones_and_resumes(good, tiny, tmp_path):
    """The decoder and the guidance are trained, so that a wrapped module holds frozen and trained weights."""
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    for steps, more in ((2, ()), (4, ("--resume_from_checkpoint", "latest"))):
        done = train_sharded(tmp_path, flags(good, sharded, tiny, *more, steps=steps))
        assert done.returncode == 0, done.stdout[-4000:]
    assert "checkpoint-2, step 2" in done.stdout
    assert [path.name for path in list_checkpoints(sharded)] == ["checkpoint-2", "checkpoint-4"]
    # both processes have written of the weights: there is none in one file
    assert len(list((sharded / "checkpoint-4" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2

    launch("diffad.training.train_diad", *flags(good, whole, tiny, steps=4), processes=2, cwd=tmp_path)
    found, expected = weights(sharded), weights(whole)
    assert len(moved(weights(tiny), found)) > 20
    for name, values in expected.items():
        # AdamW divides by the gradient's size: where that is nearly 0, another order of sums moves a weight by more
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(
        load(sharded).calibration.map_mean, load(whole).calibration.map_mean, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("script", "more", "words"),
    [
        ("train_diad", ("--use_ema",), "--use_ema: no process has all weights here"),
        ("train_autoencoder", (), "Only train_diad.py shards weights"),
    ],
)
def test_what_needs_whole_weights_is_refused(good, tiny, tmp_path, script, more, words):
    arguments = flags(good, tmp_path / "run", tiny, *more)
    if script != "train_diad":
        arguments = ["--train_data_dir", str(good), "--output_dir", str(tmp_path / "run"), "--preset", "cpu-128"]
    done = train_sharded(tmp_path, arguments, script)
    assert done.returncode != 0
    assert words in done.stdout
