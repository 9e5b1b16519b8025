"""Learning new good images without the old files ends where a fit to both ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONE, texture, textures, tiny_extractor, tiny_pipeline, write_folder, write_mvtec, write_png
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.calibration.good_images import GoodImages, from_kept_pixels, to_kept_pixels
from diffad.cli import app
from diffad.files import locked_folder
from diffad.model_folder import MODEL_LOCK_NAME
from diffad.moments import FeatureMoments
from diffad.pipelines.updating import learn_good_images, load_good_images, save_updatable
from diffad.training import fit as fit_script

pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.filterwarnings("ignore:.*cannot vouch")]

SMALL = ("--backbone", BACKBONE, "--backbone_weights", "random", "--feature_strides", 2, 4, "--resolution", 32)
NEW = [texture(500, 32, defect=True), *textures(5, 32, first_seed=501)]


def fit(data: Path, output: Path, *more: object) -> Path:
    arguments = ("--train_data_dir", data, "--output_dir", output, *SMALL, "--false_alarm_rate", 0.2, *more)
    fit_script.main([str(argument) for argument in arguments])
    return output


def update(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["update", *map(str, arguments)], catch_exceptions=code == 0)
    assert result.exit_code == code, result.output
    return result.output


def load(folder: Path) -> AnomalyDenoisePipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_equal_results(first: Path, second: Path) -> None:
    """Maps, scores, thresholds and p-values."""
    one, other = load(first), load(second)
    for name in ("normal_scores", "normal_maxima", "image_threshold", "pixel_threshold", "map_mean", "map_std"):
        found, expected = getattr(one.calibration, name), getattr(other.calibration, name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(one.calibration.coreset, other.calibration.coreset)
    found, expected = one(NEW), other(NEW)
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.anomaly_score, expected.anomaly_score, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.p_value, expected.p_value, rtol=0.0, atol=1e-5)
    assert len(set(expected.p_value.tolist())) > 1


@pytest.fixture
def portions(tmp_path) -> tuple[Path, Path, Path]:
    """Good images in two portions, the second brighter, and both together under other names."""
    first = write_folder(tmp_path / "first", 40, size=32)
    for i in range(30):
        write_png(tmp_path / "second" / f"{i:03}.png", np.minimum(texture(200 + i, 32), 225) + np.uint8(30))
    for folder in (tmp_path / "second", first):  # in another order than they came
        for path in folder.iterdir():
            (tmp_path / "both").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "both" / f"{folder.name[::-1]}-{path.name}")
    return first, tmp_path / "second", tmp_path / "both"


@pytest.mark.parametrize("num_kept", [100, 8])
def test_update_equals_a_fit_to_both(portions, tmp_path, num_kept):
    """Where every image is kept, and where a hash chooses a few."""
    first, second, both = portions
    updated = fit(first, tmp_path / "updated", "--kept_images", num_kept)
    before = load(updated)(NEW)
    said = update(updated, "--data", second)
    together = fit(both, tmp_path / "together", "--kept_images", num_kept)
    assert_equal_results(updated, together)
    assert np.abs(before.anomaly_map - load(updated)(NEW).anomaly_map).max() > 0.1  # it did learn
    kept = load_good_images(load(updated), updated)
    assert max(len(kept.for_statistics), len(kept.for_thresholds)) <= num_kept
    assert f"Learned 30 good images, and saved to {updated}: {kept.num_seen} are in the statistics" in said
    assert len(list(updated.glob("good_images-*"))) == 1
    assert not list(updated.glob("training*.md"))


def test_three_portions_end_where_one_does(portions, tmp_path):
    """And so does a region of interest, whose outside counts in none of them."""
    first, second, both = portions
    inside = np.zeros((32, 32), np.uint8)
    inside[4:24, 8:] = 255
    roi = write_png(tmp_path / "roi.png", inside)
    updated = fit(first, tmp_path / "updated", "--kept_images", 8, "--roi", roi)
    images = sorted(second.iterdir())
    for part, numbers in (("a", range(11)), ("b", range(11, 30))):
        (tmp_path / part).mkdir()
        for i in numbers:
            shutil.copy(images[i], tmp_path / part)
        update(updated, "--data", tmp_path / part)
    together = fit(both, tmp_path / "together", "--kept_images", 8, "--roi", roi)
    assert_equal_results(updated, together)
    assert (load(updated)(NEW).anomaly_map[:, inside == 0] == 0.0).all()


def test_what_raised_an_alarm_is_told_and_learned(portions, tmp_path):
    first, _, _ = portions
    model = fit(first, tmp_path / "model", "--kept_images", 100)
    defect = write_png(tmp_path / "new" / "defect.png", NEW[0])
    for i in range(5):
        write_png(tmp_path / "new" / f"{i}.png", texture(300 + i, 32))
    before = load(model)(NEW[0]).anomaly_score
    said = update(model, "--data", tmp_path / "new", "--output", tmp_path / "other")
    assert "new images raised an alarm before" in said
    assert str(defect) in said
    assert load(tmp_path / "other")(NEW[0]).anomaly_score < before
    assert load(model)(NEW[0]).anomaly_score == before  # the old model is as it was, and can learn without the defect
    defect.unlink()
    update(model, "--data", tmp_path / "new")


@pytest.mark.parametrize("num_kept", [100, 8])
def test_images_that_are_known_are_told_and_count_once(portions, tmp_path, num_kept):
    model = fit(portions[0], tmp_path / "model", "--kept_images", num_kept)
    shutil.copytree(model, tmp_path / "again")
    with pytest.warns(UserWarning, match="40 of the 40 images are known already, and left out"):
        said = update(tmp_path / "again", "--data", portions[0])
    assert "Learned 0 good images" in said
    assert_equal_results(tmp_path / "again", model)


def test_a_model_that_knows_the_kept_images_alone_can_learn(portions, tmp_path):
    """As earlier versions saved it."""
    model = fit(portions[0], tmp_path / "model", "--kept_images", 8)
    [path] = model.glob("good_images-*.safetensors")
    with safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert len(tensors.pop("seen_keys")) == 40
    shutil.copytree(model, tmp_path / "former")
    save_file(tensors, tmp_path / "former" / path.name, metadata)
    for folder in (model, tmp_path / "former"):
        update(folder, "--data", portions[1])
    assert_equal_results(tmp_path / "former", model)


def test_what_cannot_be_learned_from_is_named(portions, tmp_path):
    model = fit(portions[0], tmp_path / "model", "--kept_images", 8)
    pipeline = load(model)
    good_images = load_good_images(pipeline, model)
    with pytest.raises(ValueError, match="`images` must be a sequence of good images"):
        pipeline.update(str(portions[1]), good_images)
    with pytest.raises(ValueError, match="`batch_size`"):
        pipeline.update([texture(900, 32)], good_images, batch_size=0)
    with pytest.raises(ValueError, match=r"`images\[0\]` is a batch"):
        pipeline.update([np.stack([texture(900, 32), texture(901, 32)])], good_images)
    half = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`pipeline` is in torch.bfloat16: load it in float32"):
        load_good_images(half, model)


def test_copies_among_new_images_count_once(portions, tmp_path):
    model = fit(portions[0], tmp_path / "model", "--kept_images", 8)
    shutil.copytree(portions[1], tmp_path / "twice")
    for path in sorted(portions[1].iterdir()):
        shutil.copy(path, tmp_path / "twice" / f"again-{path.name}")
    with pytest.warns(UserWarning, match="Left out 30 good images that are copies of others"):
        said = update(model, "--data", tmp_path / "twice", "--output", tmp_path / "updated")
    assert "Learned 30 good images" in said
    update(model, "--data", portions[1])
    assert_equal_results(tmp_path / "updated", model)


def test_a_failed_save_leaves_a_model_that_can_learn(portions, tmp_path, monkeypatch):
    model = fit(portions[0], tmp_path / "model", "--kept_images", 8)
    pipeline = load(model)
    good_images = load_good_images(pipeline, model)
    pipeline.update([str(path) for path in sorted(portions[1].iterdir())], good_images)
    (model / ".unfinished-model").write_text("a file where the new model's folder must go")
    with pytest.raises(OSError, match="unfinished-model"):
        save_updatable(pipeline, good_images, model)
    (model / ".unfinished-model").unlink()
    update(model, "--data", portions[1])
    assert_equal_results(model, fit(portions[2], tmp_path / "together", "--kept_images", 8))


def test_two_do_not_learn_into_one_model_at_once(portions, tmp_path):
    """Each would begin with the old one, and the later one lose what the other has learned."""
    model = fit(portions[0], tmp_path / "model", "--kept_images", 8)
    kept = [path.name for path in model.glob("good_images-*")]
    with locked_folder(model, MODEL_LOCK_NAME), pytest.raises(RuntimeError, match="being written to by process"):
        update(model, "--data", portions[1], code=1)
    assert [path.name for path in model.glob("good_images-*")] == kept
    update(model, "--data", portions[1])


def test_who_cannot_learn_is_told_why(portions, tmp_path):
    def error(*arguments: object) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            CliRunner().invoke(app, ["update", *map(str, arguments)], catch_exceptions=False)
        return str(caught.value)

    first, second, _ = portions
    plain = fit(first, tmp_path / "plain")
    assert "has kept no good images to learn from" in error(plain, "--data", second)
    assert "--kept-images 200" in error(plain, "--data", second)
    model = fit(first, tmp_path / "model", "--kept_images", 8)
    arguments = ["calibrate", str(model), "--data", str(second), "--false-alarm-rate", "0.2"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    of_two = write_mvtec(tmp_path / "two", {"tile": 20, "wood": 20}, size=32)
    growing = fit(first, tmp_path / "growing", "--kept_images", 8)
    assert "`category` is needed" in error(growing, "--data", of_two)
    assert "holds images" in error(growing, "--data", second, "--output", second)
    assert "was calibrated anew since it kept good images" in error(model, "--data", second)
    fit(first, model)
    assert not list(model.glob("good_images-*"))  # what another fit leaves behind would be of no use
    denoiser = tiny_pipeline()
    denoiser.calibrate(textures(12), false_alarm_rate=0.25)
    denoiser.save_pretrained(tmp_path / "denoiser")
    assert "Only a model of `diffad fit` learns more" in error(tmp_path / "denoiser", "--data", second)
    write_png(tmp_path / "deep" / "0.png", np.arange(1024, dtype=np.uint16).reshape(32, 32))
    assert "have more than 8 bits" in error(growing, "--data", tmp_path / "deep")
    assert "must be a folder" in error("somebody/model", "--data", second)


def test_a_fit_that_could_not_be_updated_is_refused(tmp_path, capsys):
    of_two = write_mvtec(tmp_path / "two", {"tile": 20, "wood": 20}, size=32)
    with pytest.raises(ValueError, match="Fit one for each category"):
        fit(of_two, tmp_path / "model", "--kept_images", 8)
    few = write_folder(tmp_path / "few", 3, size=32)
    with pytest.raises(ValueError, match="give 20 different ones at least"):
        fit(few, tmp_path / "model", "--kept_images", 8)
    with pytest.raises(SystemExit):
        fit(few, tmp_path / "model", "--kept_images", 2)
    assert "--kept_images must be 0 or at least 3, but is 2" in capsys.readouterr().err
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_the_share_that_is_held_out_follows_from_the_content():
    good_images = GoodImages(1000, 0.25)
    pixels = np.random.default_rng(0).integers(0, 65536, (400, 3, 2, 2), dtype=np.uint16)
    is_held_out = [good_images.keep(one)[0] for one in pixels]
    assert 70 <= sum(is_held_out) <= 130
    assert [good_images.keep(one) for one in pixels[::-1]] == [(held_out, True) for held_out in is_held_out[::-1]]


def test_kept_pixels_are_as_fine_as_what_the_networks_saw():
    pixel_values = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    pixels = to_kept_pixels(pixel_values)
    assert pixels.dtype == np.uint16
    torch.testing.assert_close(from_kept_pixels(pixels), pixel_values, rtol=0.0, atol=2e-5)
    assert np.array_equal(to_kept_pixels(from_kept_pixels(pixels)), pixels)


def test_rescaled_moments_are_those_of_rescaled_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 6, 300, generator=generator, dtype=torch.float64) + 3.0
    factor, offset = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    moments, expected = FeatureMoments(300, 6), FeatureMoments(300, 6)
    moments.update(features)
    moments.rescale(factor, offset)
    expected.update(factor[:, None] * features + offset[:, None])
    torch.testing.assert_close(moments.mean(), expected.mean())
    torch.testing.assert_close(moments.covariance(), expected.covariance())
    mean, variance = moments.over_positions()
    of_all = (factor[:, None] * features + offset[:, None]).movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, of_all.mean(dim=1))
    torch.testing.assert_close(variance, of_all.var(dim=1, correction=0))


def test_pipelines_learn_without_a_folder():
    """By the function alone, from arrays in memory, in any portions."""

    def model() -> AnomalyDenoisePipeline:
        weights = {"gaussian": 0.75, "nearest": 0.25}
        return AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), position_trust=0.0, weights=weights)

    images = textures(40, 32)
    first, second = model(), model()
    assert learn_good_images(first, images, GoodImages(20), 0.2) == []
    kept = GoodImages(20)
    learn_good_images(second, images[:25], kept, 0.2)
    second.update(images[25:], kept)
    np.testing.assert_allclose(first(NEW).anomaly_map, second(NEW).anomaly_map, rtol=1e-5, atol=1e-5)
