"""Torch gets as many threads as a process may have cores."""

from __future__ import annotations

import os

import pytest
import torch

from diffad.cores import available_cores, limit_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_torch_takes_no_more_threads_than_cores(two_threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("diffad.cores.available_cores", lambda: 1)  # as in a container of one core
    limit_threads()
    assert torch.get_num_threads() == 1
    monkeypatch.setattr("diffad.cores.available_cores", lambda: 64)
    limit_threads()
    assert torch.get_num_threads() == 1  # nor more than before


def test_who_says_how_many_threads_gets_them(two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("diffad.cores.available_cores", lambda: 1)
    limit_threads()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("said", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_a_container_s_share_counts(tmp_path, said, cores):
    (tmp_path / "cpu.max").write_text(said + "\n")
    of_process = available_cores(tmp_path / "nowhere")
    assert available_cores(tmp_path / "cpu.max") == (cores or of_process)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_cores_are_those_of_the_process():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
