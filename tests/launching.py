"""Processes as `accelerate launch` starts them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch

LIMIT = 600.0  # seconds
# what the processes of `launch` fork from has imported these, which takes longer than most of them run
FORKS_FROM = ["diffad.cli", "diffad.predict", "diffad.training.evaluate", "diffad.training.train_diad"]


def free_port() -> int:
    with socket.socket() as free:  # two tests may launch at the same time
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_command(script: str | Path, *arguments: object, processes: int = 1) -> list[str]:
    """`accelerate launch` of a file, or of a module by its dotted name.

    With `--cpu`, accelerate starts one process whatever is asked for. Two come from `--multi_gpu`; the environment's
    `ACCELERATE_USE_CPU` makes them two processes on the CPU, which exchange by gloo.
    """
    module = [] if isinstance(script, Path) else ["-m"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu" if processes == 1 else "--multi_gpu"]
    command += ["--num_processes", processes, "--num_machines", 1, "--main_process_port", free_port()]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [str(part) for part in (*command, *module, script, *arguments)]


def read_until_serving(process: subprocess.Popen) -> str:
    """What a command that runs until Ctrl-C says on standard error, up to where it says that."""
    told = ""
    while "Ctrl-C ends it" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    return told


def launch(script: str | Path, *arguments: object, processes: int = 1, cwd: Path) -> str:
    """Runs a file or a module to its end and returns what it printed; anything but success fails the test.

    Its processes have the environment that `launch_command` gives them, without the launcher's own process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKS_FROM)
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    group = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    with tempfile.NamedTemporaryFile("r", errors="replace") as printed:
        started = []
        for rank in range(processes):
            of_rank = {**group, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            own = environment | {name: str(value) for name, value in of_rank.items()}
            words = [str(one) for one in arguments]
            started.append(context.Process(target=run_script, args=(script, words, own, str(cwd), printed.name)))
            started[-1].start()
        ended = time.monotonic() + LIMIT
        # asked once for each wait: one that ended in between would leave nothing to wait for
        while running := [one.sentinel for one in started if one.exitcode is None]:
            if any(one.exitcode for one in started) or not wait(running, ended - time.monotonic()):
                break
        for one in started:  # of two of which one has failed, the other waits for it
            if one.exitcode is None:
                one.kill()
            one.join()
        said = printed.read()
    assert [one.exitcode for one in started] == [0] * processes, said[-4000:]
    return said


def run_script(script: str | Path, arguments: list[str], environment: dict[str, str], cwd: str, printed: str) -> None:
    """What a process of `launch` does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [str(script), *arguments]
    if isinstance(script, Path):
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
