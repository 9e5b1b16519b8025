"""A small part of `tests/benchmarks/benchmark_faults.py`: odd files, and processes that are killed."""

from __future__ import annotations

import sys

import pytest
from benchmarks.benchmark_faults import FORMATS, JOBS, run_kills, run_mutations

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of metadata that is broken


def test_changed_files_stand_in_the_scores_and_unchanged_ones_are_read(tmp_path):
    result = run_mutations(tmp_path, 10 * len(FORMATS))
    assert result["rows"] == result["files"]
    assert result["unchanged files that are unreadable"] == 0
    assert 0 < result["changed files that are unreadable"] < 0.9 * result["files"]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("title", JOBS)
def test_a_killed_process_loses_and_mixes_nothing(tmp_path, title):
    make, survives = JOBS[title]
    outcomes = run_kills(*make(tmp_path), tmp_path, kills=2, survives=survives)
    assert outcomes["equal"] == outcomes["killed"] > 0
    assert not {"DIFFERENT", "MIXED"} & outcomes.keys()
