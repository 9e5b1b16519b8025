"""Every example of the README runs, on a tiny model under the names that the README uses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import textures, tiny_pipeline, write_folder, write_mvtec, write_png
from typer.testing import CliRunner

from diffad.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Each command line of the shell blocks, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&") if part.strip()]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder with what the README's reader has: a model, parts, a data set."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    for name in ("runs/demo", "runs/parts"):
        pipeline.save_pretrained(name)
    write_png(tmp_path / "part.png", textures(1)[0])
    write_folder(tmp_path / "good_parts", 12)
    write_folder(tmp_path / "new_parts", 3)
    write_mvtec(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, workplace):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "diffad" and c[1] != "demo"], ids=" ".join)
def test_diffad_examples_run(words, workplace):
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "accelerate"], ids=lambda c: c[2])
def test_training_examples_run(words, workplace, fresh_accelerate):
    """The arguments as they stand, cut short: two steps of two images, with an untrained miniature backbone."""
    import importlib

    assert (ROOT / words[2]).is_file()
    main = importlib.import_module(f"diffad.{words[2].removesuffix('.py').replace('/', '.')}").main
    short = {
        "training/train_ddpm.py": ["--max_train_steps", "2", "--train_batch_size", "2", "--feature_image_size", "64"],
        "training/train_diad.py": ["--max_train_steps", "2", "--train_batch_size", "2"],
        "training/train_autoencoder.py": ["--max_train_steps", "2", "--train_batch_size", "2"],
    }
    main([*words[3:], *short.get(words[2], [])])


def test_the_two_set_up_commands_stand_in_the_readme():
    lines = "".join(blocks("bash")).splitlines()
    assert 'pip install -e ".[demo]" && diffad demo' in lines
    assert 'pip install -e ".[demo,test]" && pytest' in lines


def test_every_file_that_the_readme_links_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
