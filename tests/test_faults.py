"""A small part of `tests/benchmarks/benchmark_faults.py`: odd files, and processes that are killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from benchmarks.benchmark_faults import (
    FORMATS,
    JOBS,
    calibrated_pipeline,
    files_below,
    run_kills,
    run_mutations,
    run_quietly,
)
from conftest import write_folder

from diffad.predict import find_images, predict_files

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of metadata that is broken


def test_changed_files_stand_in_the_scores_and_unchanged_ones_are_read(tmp_path):
    result = run_mutations(tmp_path, 10 * len(FORMATS))
    assert result["rows"] == result["files"]
    assert result["unchanged files that are unreadable"] == 0
    assert 0 < result["changed files that are unreadable"] < 0.9 * result["files"]


def kill(title: str, folder: Path) -> Counter:
    make, survives = JOBS[title]
    return run_kills(*make(folder), folder, kills=2, survives=survives)


@pytest.fixture(scope="module")
def new_process() -> Iterator[ProcessPoolExecutor]:
    """Where no test has computed a gradient: torch refuses to compute any in what is forked after that."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("title", JOBS)
def test_a_killed_process_loses_and_mixes_nothing(tmp_path, title, new_process):
    outcomes = new_process.submit(kill, title, tmp_path).result()
    assert outcomes["equal"] == outcomes["killed"] > 0
    assert not {"DIFFERENT", "MIXED"} & outcomes.keys()


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_predict_killed_before_any_rename_or_removal_ends_as_if_nothing_had_been(tmp_path):
    pipeline, paths = calibrated_pipeline(0), find_images([write_folder(tmp_path / "parts", 2)])
    fork = multiprocessing.get_context("fork")

    def run(output, killed_before=None) -> int | None:
        def job(output):
            changes = itertools.count()

            def kill(event, _):
                if event in ("os.rename", "os.remove") and next(changes) == killed_before:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            predict_files(pipeline, paths, output)

        process = fork.Process(target=run_quietly, args=(job, output))
        process.start()
        process.join()
        return process.exitcode

    assert run(whole := tmp_path / "whole") == 0
    for number in itertools.count():
        ended = run(output := tmp_path / f"killed-{number}", number)
        assert run(output) == 0
        assert files_below(output) == files_below(whole), number
        if ended == 0:  # there are no more of them
            break
        assert ended == -signal.SIGKILL
    assert number > 10
