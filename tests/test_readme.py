"""Every example of the README runs, on a tiny model under the names that the README uses."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKBONE, textures, tiny_pipeline, write_folder, write_mvtec, write_png
from diffusers import AutoencoderKL
from hub_server import running_hub
from test_pipeline_diad import make_pipeline
from typer.testing import CliRunner

from diffad.cli import app
from diffad.training.train_autoencoder import AUTOENCODER_PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Each command line of the shell blocks, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&") if part.strip()]


@pytest.fixture
def workplace(tmp_path, monkeypatch, stable_diffusion) -> Path:
    """A folder with what the README's reader has by then: models, parts, a data set, the training scripts."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.fit_gaussian(textures(12), image_size=16, feature_size=4)
    for name in ("runs/demo", "runs/parts"):
        pipeline.save_pretrained(name)
    make_pipeline().calibrate(textures(12), false_alarm_rate=0.25).save_pretrained("runs/diad")
    AutoencoderKL(**AUTOENCODER_PRESETS["cpu-128"]).save_pretrained("runs/autoencoder")
    AutoencoderKL.from_pretrained(stable_diffusion / "vae").save_pretrained("runs/autoencoder-sd")
    (tmp_path / "training").symlink_to(ROOT / "training")
    (tmp_path / "stable-diffusion-v1-5").mkdir()
    (tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5").symlink_to(stable_diffusion)
    write_png(tmp_path / "part.png", textures(1)[0])
    write_folder(tmp_path / "good_parts", 12)
    write_folder(tmp_path / "new_parts", 3)
    write_mvtec(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, workplace):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "words", [c for c in commands() if c[0] == "diffad" and c[1] not in ("demo", "push")], ids=" ".join
)
def test_diffad_examples_run(words, workplace):
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", [c for c in commands() if c[:2] == ["diffad", "push"]], ids=" ".join)
def test_push_examples_run(words, workplace):
    with running_hub({"hf_org": "org"}) as hub:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(workplace / "home"), "HF_TOKEN": "hf_org"}
        command = [sys.executable, "-m", "diffad.cli", *words[1:]]
        subprocess.run(command, env={**inherited, **settings, "HF_HUB_DISABLE_XET": "1"}, check=True)
        assert "org/parts" in hub.repositories


# what makes an example short: one step of two images, an untrained miniature backbone
SHORT = ["--max_train_steps", "1", "--train_batch_size", "2", "--mixed_precision", "no"]
MINIATURE = ["--backbone", BACKBONE, "--backbone_weights", "random", "--feature_strides", "2", "4"]


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "accelerate"], ids=" ".join)
def test_accelerate_examples_run(words, workplace, fresh_accelerate):
    """The arguments as they stand, cut short."""
    script, arguments = words[2], words[3:]
    assert (ROOT / script).is_file()
    main = importlib.import_module(f"diffad.{script.removesuffix('.py').replace('/', '.')}").main
    if script == "training/train_ddpm.py":
        arguments += [*SHORT, "--feature_image_size", "64"]
    elif "--config" in arguments:
        arguments += [*SHORT, *MINIATURE, "--train_data_dir", "good_parts"]
    elif "--pretrained_model_name_or_path" in arguments:
        arguments += [*SHORT, *MINIATURE, "--resolution", "32", "--gradient_accumulation_steps", "1"]
    elif script == "training/fit_gaussian.py":
        arguments += ["--image_size", "16", "--feature_size", "4"]
    main(arguments)


def test_the_two_set_up_commands_stand_in_the_readme():
    lines = "".join(blocks("bash")).splitlines()
    assert 'pip install -e ".[demo]" && diffad demo' in lines
    assert 'pip install -e ".[demo,test]" && pytest' in lines


def test_every_file_that_the_readme_links_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


PARTS = {"mono": "elpv-mono", "poly": "elpv-poly", "magnetic_tile": "magnetic-tile"}
# each row of the README's table: where its parts' metrics stand
RECORDS = {
    "AnomalyDenoise": ("anomaly-denoise-{}/report.json", "results"),
    "AnomalyDenoise, one model for all three": ("anomaly-denoise-three-categories/report.json", "results"),
    "DiAD": ("diad-{}/report.json", "results"),
    "DiAD, one model for both kinds of cells": ("diad-elpv-mono-poly/report.json", "results"),
    "PaDiM, ours, all 176 channels": ("anomaly-denoise-{}/report-float32.json", "baselines", "padim"),
    "PaDiM, anomalib's, 100 channels": ("anomaly-denoise-{}/anomalib.json", "results", "padim"),
    "PatchCore, anomalib's, 1%": ("anomaly-denoise-{}/anomalib.json", "results", "patchcore"),
}


def recorded(title: str, part: str, metrics: list[str]) -> str:
    """A cell of the README's tables as the shipped record has it; empty where the model does not know the part."""
    path, *keys = RECORDS[title]
    results = json.loads((ROOT / "model_cards" / path.format(PARTS[part])).read_text())
    for key in keys:
        results = results[key]
    return " / ".join(f"{100 * results[part][name]:.1f}" for name in metrics) if part in results else ""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables() -> list[list[list[str]]]:
    """The two tables under "What it reaches", each a list of rows, the header first."""
    section = README.split("## What it reaches")[1].split("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return [[cells(line) for line in table.splitlines() if "---" not in line] for table in found]


def test_the_tables_say_what_the_records_say():
    of_images, of_pixels = tables()
    assert of_images[0] == ["method", "mono cells", "poly cells", "magnetic tiles"]
    metrics = ["image_auroc", "image_ap", "image_f1max"]
    assert of_images[1:] == [[title, *(recorded(title, part, metrics) for part in PARTS)] for title in RECORDS]

    metrics = ["pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_pro"]
    methods = [
        "AnomalyDenoise",
        "one model for all three",
        "DiAD",
        "PaDiM, ours",
        "PaDiM, anomalib's",
        "PatchCore, anomalib's",
    ]
    values = [recorded(title, "magnetic_tile", metrics) for title in RECORDS]
    assert of_pixels == [methods, [value for value in values if value]]
