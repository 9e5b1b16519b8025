"""The package's parts come from one checkout."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffad

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("part", ["", "model_cards", "pipelines", "training"])
def test_every_part_is_of_the_tests_own_checkout(part):
    module = importlib.import_module(f"diffad.{part}" if part else "diffad")
    assert Path(module.__file__).resolve().parent == CHECKOUT / (part or "diffad")


def test_parts_of_two_checkouts_are_refused(tmp_path):
    """As in the root of one checkout where another is installed: Python takes `diffad/` from there."""
    shutil.copytree(Path(diffad.__file__).parent, tmp_path / "diffad")
    done = subprocess.run([sys.executable, "-c", "import diffad"], cwd=tmp_path, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: diffad comes from {tmp_path.resolve() / 'diffad'}, but diffad.model_cards")
    assert str(CHECKOUT / "model_cards") in error
    assert f"pip install -e {tmp_path.resolve()}" in error
