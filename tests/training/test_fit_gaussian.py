"""The script that adds a Gaussian to a saved pipeline: in place, elsewhere, on two processes, interrupted."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error, texture, tiny_pipeline, write_folder, write_mvtec
from launching import launch
from test_pipeline_diad import make_pipeline

from diffad import AnomalyDenoisePipeline, GaussianFeatureModel
from diffad.training import fit_gaussian

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SMALL = ("--feature_size", 8, "--num_channels", 8)


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_pipeline().save_pretrained(folder := tmp_path / "model")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "part", 11)


def fit(model: Path, data: Path, *more: object) -> None:
    arguments = ("--model", model, "--train_data_dir", data, *SMALL, *more)
    fit_gaussian.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder: Path, category: str | None = None) -> AnomalyDenoisePipeline:
    """A saved pipeline, checked to reconstruct."""
    pipeline = AnomalyDenoisePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline.reconstruct(texture(99, defect=True), num_iterations=2, category=category)
    assert np.isfinite(output.reconstruction).all()
    return pipeline


def test_it_adds_to_the_folder_in_place(saved, good, capsys):
    (saved / "README.md").write_text("A card.")
    before = contents(saved)
    fit(saved, good, "--epsilon", 0.02)
    printed = capsys.readouterr().out
    assert "11 good images" in printed
    assert f"Saved to {saved}" in printed
    after = contents(saved)
    new = {"gaussian/config.json", "gaussian/diffusion_pytorch_model.safetensors"}
    assert after.keys() - before.keys() == new
    changed = {name for name, content in before.items() if after[name] != content}
    assert changed == {"model_index.json"}
    index, old = json.loads(after["model_index.json"]), json.loads(before["model_index.json"])
    assert index.pop("gaussian")[1] == "GaussianFeatureModel"
    old.pop("gaussian")
    assert index == old
    gaussian = load(saved).gaussian
    assert gaussian.num_images.tolist() == [11]
    assert gaussian.config.feature_size == 8
    assert len(gaussian.channels) == 8
    assert gaussian.config.epsilon == 0.02
    # once more, with other settings, replaces it
    fit(saved, good, "--num_channels", 4)
    assert len(load(saved).gaussian.channels) == 4


def test_it_saves_the_whole_pipeline_elsewhere(saved, good, tmp_path):
    before = contents(saved)
    fit(saved, good, "--output_dir", tmp_path / "out")
    assert contents(saved) == before
    assert load(tmp_path / "out").gaussian.num_images.tolist() == [11]
    assert AnomalyDenoisePipeline.from_pretrained(saved).gaussian is None


def test_the_seed_decides(saved, good, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(saved, good, "--output_dir", tmp_path / name, "--seed", seed)
    a, b, c = (load(tmp_path / name).gaussian.mean for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_unified_tree_fits_each_category_from_its_own_good_images(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 7, "cable": 4})
    model = tmp_path / "model"
    tiny_pipeline(categories=["cable", "tile"]).save_pretrained(model)
    fit(model, data)
    gaussian = load(model, "tile").gaussian
    assert gaussian.num_images.tolist() == [4, 7]  # none of the test images
    assert relative_error(gaussian.mean[0], gaussian.mean[1]) > 0.01
    # one category anew leaves the other as it is
    kept = gaussian.mean[0].clone(), gaussian.whitening[0].clone()
    fit(model, data, "--category", "tile", "--seed", 5)
    again = load(model, "cable").gaussian
    assert torch.equal(again.mean[0], kept[0])
    assert torch.equal(again.whitening[0], kept[1])
    assert not torch.equal(again.mean[1], gaussian.mean[1])


def test_categories_meet_in_either_unicode_form(tmp_path):
    data = write_mvtec(tmp_path / "data", {unicodedata.normalize("NFD", "Stäbe"): 4, "cable": 4})
    tiny_pipeline(categories=["Stäbe", "cable"]).save_pretrained(tmp_path / "model")
    fit(tmp_path / "model", data)
    assert load(tmp_path / "model", "cable").gaussian.num_images.tolist() == [4, 4]


def test_a_pipeline_of_one_category_takes_it_under_any_name(tmp_path, good):
    model = tmp_path / "model"
    tiny_pipeline(categories=["tile"]).save_pretrained(model)
    fit(model, good)
    assert load(model).gaussian.num_images.tolist() == [11]


def test_wrong_categories_are_named(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 4, "cable": 4, "screw": 4})
    model = tmp_path / "model"
    tiny_pipeline(categories=["cable", "tile"]).save_pretrained(model)
    before = contents(model)
    with pytest.raises(ValueError, match=r"holds screw.*does not know.*cable, tile.*--category"):
        fit(model, data)
    with pytest.raises(ValueError, match=r"`category`.*'bolt'"):
        fit(model, data, "--category", "bolt")
    assert contents(model) == before


def test_wrong_arguments_end_in_one_clear_line(saved, good, tmp_path, capsys):
    for arguments, words in (
        (("--model", saved), "give one of --train_data_dir and --dataset_name"),
        (("--model", saved, "--train_data_dir", good, "--dataset_name", "a/b"), "give one of --train_data_dir"),
        (("--model", "org/name", "--train_data_dir", good), "--model: no folder at org/name; .*--output_dir"),
        (("--train_data_dir", good), "--model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            fit_gaussian.parse_args([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        assert words.split(".*")[0] in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no_such"):
        fit(saved, tmp_path / "no_such")
    make_pipeline().save_pretrained(tmp_path / "diad")
    with pytest.raises(ValueError, match=r"--model: .*diad holds .* DiADPipeline, which .*Give one of the class Ano"):
        fit(tmp_path / "diad", good)


def test_an_interrupted_write_leaves_the_old_one(saved, good, monkeypatch):
    fit(saved, good)
    before = contents(saved)

    def stopped(model, folder, *args, **kwargs):
        Path(folder).mkdir()
        Path(folder, "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GaussianFeatureModel, "save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(saved, good, "--seed", 5)
    left = contents(saved)
    assert {name: left[name] for name in before} == before
    mean = load(saved).gaussian.mean
    # the next run clears up
    fit(saved, good, "--seed", 5)
    assert contents(saved).keys() == before.keys()
    assert not torch.equal(load(saved).gaussian.mean, mean)


def test_two_processes_give_the_numbers_of_one(saved, good, tmp_path):
    fit(saved, good, "--output_dir", tmp_path / "one", "--batch_size", 4)
    arguments = ("--model", saved, "--train_data_dir", good, *SMALL, "--output_dir", tmp_path / "two")
    output = launch(Path(fit_gaussian.__file__), *arguments, "--batch_size", 4, processes=2, cwd=tmp_path)
    assert output.count("Saved to") == 1
    one, two = load(tmp_path / "one").gaussian, load(tmp_path / "two").gaussian
    assert one.num_images.tolist() == two.num_images.tolist() == [11]
    assert relative_error(two.mean, one.mean) < 1e-5
    assert relative_error(two.whitening, one.whitening) < 1e-3
