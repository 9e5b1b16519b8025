"""A detector without a denoiser: features and their Gaussian alone, from any number of good images."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BACKBONE,
    texture,
    textures,
    tiny_extractor,
    tiny_pipeline,
    tiny_scheduler,
    write_folder,
    write_mvtec,
    write_png,
)
from diffusers import DiffusionPipeline
from launching import launch
from PIL import Image
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.calibration.feature_gaussian import (
    EPSILON,
    feature_gaussian,
    feature_grid,
    leave_one_out_of_features,
)
from diffad.cli import app
from diffad.cli import main as diffad
from diffad.evaluation.detectors import promise
from diffad.files import locked_folder
from diffad.model_card import render_model_card
from diffad.model_folder import MODEL_LOCK_NAME
from diffad.models.gaussian_feature_model import GaussianFeatureModel
from diffad.moments import FeatureMoments
from diffad.predict import find_images, predict_files
from diffad.training import fit as fit_script
from diffad.training.data import hold_out, read_good_images
from diffad.training.feature_sizes import choose_feature_sizes, extractor_image_size, side_multiple

pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.filterwarnings("ignore:.*cannot vouch")]

SMALL = ("--backbone", BACKBONE, "--backbone_weights", "random", "--feature_strides", 2, 4, "--resolution", 32)


def fit(data: Path, output: Path, *more: object) -> AnomalyDenoisePipeline:
    arguments = ("--train_data_dir", data, "--output_dir", output, *SMALL, *more)
    fit_script.main([str(argument) for argument in arguments])
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_denoiser(**config) -> AnomalyDenoisePipeline:
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), position_trust=0.0, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_defect_is_found_and_outlined(tmp_path, capsys):
    pipeline = fit(write_folder(tmp_path / "good", 30, size=32), tmp_path / "model", "--false_alarm_rate", 0.2)
    assert pipeline.unet is None
    assert pipeline.scheduler is None
    defective = texture(500, 32, defect=True)
    output = pipeline([defective, texture(501, 32)])
    assert output.anomaly_score[0] > output.anomaly_score[1]
    assert output.is_anomalous[0]
    is_black = (defective == 0).all(axis=2)
    assert output.anomaly_map[0][is_black].mean() > output.anomaly_map[0][~is_black].mean()
    said = capsys.readouterr().out
    assert "good: 30 good images, each left out in turn for the thresholds; about 20% of new good parts" in said
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["arguments"]["backbone"] == BACKBONE
    assert (tmp_path / "model" / "good-1.png").exists()


def test_distances_are_those_of_the_gaussian_feature_model():
    """PaDiM at each position: mean, covariance and regularisation."""
    pipeline = without_denoiser(feature_resolution=8)
    images = torch.stack([torch.from_numpy(pixels) for pixels in textures(40, 32)]).permute(0, 3, 1, 2) / 127.5 - 1.0
    gaussian = GaussianFeatureModel.from_extractor(pipeline.feature_extractor, feature_size=8)
    gaussian.fit([images])
    moments = FeatureMoments(64, 64)
    moments.update(gaussian.features(images))
    mean, whitening = feature_gaussian(moments)
    torch.testing.assert_close(mean.float(), gaussian.mean[0], rtol=1e-5, atol=1e-5)
    lower = torch.ones(64, 64).tril().bool()
    torch.testing.assert_close(whitening.float(), gaussian.whitening[0][:, lower], rtol=1e-4, atol=1e-4)
    pipeline.calibrate(textures(10, 32, first_seed=90), textures(40, 32), false_alarm_rate=0.2)
    category = torch.zeros(4, dtype=torch.long)
    measured = pipeline.measure_images([(image + 1.0) / 2.0 for image in images[:4]], category, [None] * 4)
    seen = pipeline.calibration.gaussian_map(measured.features, category, (8, 8))[:, 0]
    expected = (gaussian.squared_distance(images[:4]) / 64).log()
    torch.testing.assert_close(seen, expected, rtol=0.0, atol=5e-3)  # the whitening is kept in half precision


def test_images_held_out_have_no_part_in_the_scale_of_channels(tmp_path):
    folder, flags = write_folder(tmp_path / "good", 12, size=32), ("--calibration_fraction", 0.3)
    before = fit(folder, tmp_path / "before", *flags)
    args = fit_script.parse_args(["--train_data_dir", str(folder), *map(str, flags)])
    _, held_out, _ = hold_out(read_good_images(args), args)
    for path in held_out["path"]:
        Image.fromarray(255 - np.asarray(Image.open(folder / path))).save(folder / path)
    after = fit(folder, tmp_path / "after", *flags)
    assert torch.equal(after.feature_extractor.channel_std, before.feature_extractor.channel_std)
    assert not torch.equal(after.calibration.normal_scores, before.calibration.normal_scores)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_copies_of_good_images_count_once(tmp_path, suffix):
    """Left out in turn, an image would be scored by its copy."""
    folder = write_folder(tmp_path / "good", 10, size=32)
    alone = fit(folder, tmp_path / "alone")
    for path in [*folder.iterdir()][:5]:
        Image.open(path).save(path.with_name(f"{path.stem} - Copy{suffix}"), compress_level=1)  # other bytes
    with pytest.warns(UserWarning, match="Left out 5 good images that are copies of others: .* - Copy"):
        copied = fit(folder, tmp_path / "copied")
    assert torch.equal(copied.calibration.normal_scores, alone.calibration.normal_scores)


def test_copies_of_two_images_are_two_images(tmp_path):
    """With thresholds from the copies every new part would raise an alarm."""
    folder = write_folder(tmp_path / "good", 2, size=32)
    for i in range(2, 20):
        shutil.copy(folder / f"{i % 2:03}.png", folder / f"{i:03}.png")
    with pytest.warns(UserWarning, match="Left out 18 good images that are copies of others"):
        pipeline = fit(folder, tmp_path / "model")
    assert not pipeline.has_thresholds
    assert pipeline([texture(500, 32)]).is_anomalous is None


def test_a_folder_of_images_is_of_the_category_that_is_named(tmp_path):
    for name in ("bottle", "capsule"):
        write_folder(tmp_path / "data" / name / "train" / "good", 5, size=32)
    fit(tmp_path / "data", tmp_path / "model")
    new = write_folder(tmp_path / "new", 6, size=32, first_seed=50)
    flags = ["calibrate", str(tmp_path / "model"), "--data", str(new), "--category"]
    CliRunner().invoke(app, [*flags, "capsule"], catch_exceptions=False)
    pipeline = AnomalyDenoisePipeline.from_pretrained(tmp_path / "model")
    assert [pipeline.calibration.num_good_images(i) for i in range(2)] == [5, 6]
    with pytest.raises(ValueError, match="'cap' is unknown: this model knows bottle, capsule"):
        CliRunner().invoke(app, [*flags, "cap"], catch_exceptions=False)
    for data in ("data", "data/bottle"):  # which say themselves what they are of
        flags[3] = str(tmp_path / data)
        with pytest.raises(ValueError, match=r"must be among .*'bottle'.*, but is 'cap'"):
            CliRunner().invoke(app, [*flags, "cap"], catch_exceptions=False)


def test_pictures_of_an_earlier_model_do_not_stay(tmp_path):
    fit(write_folder(tmp_path / "part", 6), tmp_path / "model", "--num_example_images", 3)
    shutil.copy(tmp_path / "model" / "good-3.png", tmp_path / "model" / "good-side.png")  # somebody else's
    fit(write_folder(tmp_path / "other", 6, first_seed=50), tmp_path / "model", "--num_example_images", 1)
    assert sorted(path.name for path in (tmp_path / "model").glob("*.png")) == ["good-1.png", "good-side.png"]


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path):
    write_folder(tmp_path / "good", 5, size=32)
    (tmp_path / "model").mkdir()
    with locked_folder(tmp_path / "model", MODEL_LOCK_NAME), pytest.raises(RuntimeError, match="is being written to"):
        fit(tmp_path / "good", tmp_path / "model")


@pytest.mark.parametrize("count", [3, 12])
def test_few_images_are_left_out_in_turn(tmp_path, capsys, count):
    pipeline = fit(write_folder(tmp_path / "good", count, size=32), tmp_path / "model")
    assert pipeline.calibration.num_good_images(0) == count
    said = capsys.readouterr().out
    assert f"{count} good images, each left out in turn for the thresholds; about {100 / (count + 1):.3g}% of" in said
    output = pipeline([texture(500, 32, defect=True), texture(501, 32)])
    assert output.anomaly_score[0] > output.anomaly_score[1]
    assert ((output.p_value >= 1 / (count + 1) - 1e-6) & (output.p_value <= 1.0)).all()


def test_a_share_is_held_out_where_asked_and_of_very_many_images(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "good", 30, size=32)
    fit(folder, tmp_path / "asked", "--calibration_fraction", 0.2)
    monkeypatch.setattr("diffad.pipelines.detection.MOST_LEFT_OUT", 29)
    fit(folder, tmp_path / "many", "--seed", 1)
    said = capsys.readouterr().out
    assert said.count("good: 24 good images, and 6 held out for the thresholds; at most 14.3% of new good parts") == 2


def test_a_model_says_whether_its_images_were_left_out(tmp_path):
    """In its card and the report, whose rates are then near the true ones only."""
    left_out = without_denoiser().calibrate(textures(6, 32), leave_one_out=True, false_alarm_rate=0.2)
    held_out = without_denoiser().calibrate(textures(6, 32), false_alarm_rate=0.3)
    for pipeline, is_exact in ((left_out, False), (held_out, True)):
        pipeline.save_pretrained(tmp_path)
        loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
        assert promise(loaded, "part")["allowed_is_exact"] == is_exact
        assert ("each scored by the statistics of the others" in str(render_model_card(loaded))) != is_exact
        assert loaded.calibration.describe_rate(0).startswith("at most" if is_exact else "about")


def test_a_unified_model_whose_images_were_left_out_of_one_category_promises_nothing_exact():
    pipeline = without_denoiser(categories=["a", "b"])
    for number, (category, leave_one_out) in enumerate((("a", True), ("b", False))):
        images = textures(6, 32, first_seed=10 * number)
        pipeline.calibrate(images, leave_one_out=leave_one_out, category=category, false_alarm_rate=0.3)
    assert pipeline.calibration.config.leave_one_out


def test_deviations_at_a_position_let_many_images_be_left_out_no_more():
    """They know the image's own outliers: of 100 such images, a stated 2% were 8%."""
    assert without_denoiser().leaves_each_out(1000)
    assert not without_denoiser().leaves_each_out(1001)
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32))
    assert pipeline.config.position_trust == 1.0
    assert pipeline.leaves_each_out(19)
    assert not pipeline.leaves_each_out(20)
    assert not tiny_pipeline().leaves_each_out(3)


def test_leaving_an_image_out_is_a_gaussian_of_the_others():
    """By the formula as by fitting the others anew, their scatter divided, and their ridge weighted, as that of all."""
    count, channels = 7, 12
    features = torch.randn(count, channels, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def moments_of(images: torch.Tensor) -> FeatureMoments:
        moments = FeatureMoments(5, channels)
        moments.update(images)
        return moments

    def distances(images: torch.Tensor, mean: torch.Tensor, whitening: torch.Tensor) -> torch.Tensor:
        dense = torch.zeros(5, channels, channels, dtype=torch.float64)
        dense[:, torch.ones(channels, channels).tril().bool()] = whitening
        offset = images.permute(2, 1, 0) - mean[:, :, None]  # (P, C, N)
        return (dense @ offset).square().mean(dim=1).mT  # (N, P)

    everyone = moments_of(features)
    found = leave_one_out_of_features(distances(features, *feature_gaussian(everyone)), channels, count)
    for i in range(count):
        others = moments_of(torch.cat([features[:i], features[i + 1 :]]))
        epsilon = EPSILON * float(everyone.variance().mean() / others.variance().mean())
        epsilon, divisor = epsilon * (count - 1) / (count - 2), (count - 1) / (count - 2)
        expected = divisor * distances(features[i : i + 1], *feature_gaussian(others, epsilon))
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-9, atol=0.0)


def test_thresholds_of_images_left_out_hold_their_rate():
    """Of models of ten images each, whose threshold is the largest score: at most one new good part in eleven alarms.

    Fewer do: the Gaussian of ten is closer to a new part than that of nine to the tenth.
    """
    alarms = []
    for seed in range(12):
        pipeline = without_denoiser(feature_resolution=4)
        pipeline.calibrate(textures(10, 32, first_seed=100 * seed), leave_one_out=True, false_alarm_rate=0.05)
        alarms += pipeline(textures(8, 32, first_seed=100 * seed + 50)).is_anomalous.tolist()
    assert len(alarms) == 96
    assert np.mean(alarms) < 0.15  # 1/11, and twice the deviation of such a mean


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images_vouch_for_nothing(tmp_path, capsys, count):
    pipeline = fit(write_folder(tmp_path / "good", count, size=32), tmp_path / "model")
    assert "so few vouch for no false-alarm rate" in capsys.readouterr().out
    output = pipeline([texture(500, 32, defect=True), texture(501, 32)])
    assert np.isfinite(output.anomaly_map).all()
    assert output.anomaly_score[0] > output.anomaly_score[1]
    assert (output.anomaly_mask, output.is_anomalous, output.p_value) == (None, None, None)
    paths = find_images([write_folder(tmp_path / "new", 2, size=32)])
    assert predict_files(pipeline, paths, tmp_path / "out")["scored"] == 2


def test_images_that_do_not_vary_give_finite_maps():
    for images in ([np.zeros((32, 32, 3), np.uint8)] * 5, [texture(0, 32)] * 5, [texture(0, 32)] * 2):
        pipeline = without_denoiser().calibrate(images, leave_one_out=True, false_alarm_rate=0.2)
        output = pipeline([images[0], texture(500, 32, defect=True)])
        assert np.isfinite(output.anomaly_map).all()
        assert output.anomaly_score[1] > output.anomaly_score[0]


def test_photographs_of_a_part_are_held_out_together_also_of_few_images(tmp_path, capsys):
    folder = write_folder(tmp_path / "good", 12, size=32)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"part{i // 3}-view{i % 3}.png")
    fit(folder, tmp_path / "model", "--part_pattern", r"part(\d+)", "--calibration_fraction", 0.3)
    assert "9 good images, and 3 held out for the thresholds" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--part_pattern 'lot' finds no part in the path"):
        fit(folder, tmp_path / "model", "--part_pattern", "lot")


def test_calibrating_again_leaves_out_in_turn_as_well(tmp_path):
    fit(write_folder(tmp_path / "good", 12, size=32), tmp_path / "model")
    new = write_folder(tmp_path / "new", 8, size=32, first_seed=60)
    arguments = ["calibrate", tmp_path / "model", "--data", new, "--false-alarm-rate", 0.2]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert AnomalyDenoisePipeline.from_pretrained(tmp_path / "model").calibration.num_good_images(0) == 8


def test_two_processes_fit_what_one_does(tmp_path):
    data = write_folder(tmp_path / "good", 30, size=32)
    fit(data, tmp_path / "one")
    arguments = ["--train_data_dir", data, "--output_dir", tmp_path / "two", *SMALL]
    launch(Path(fit_script.__file__), *arguments, processes=2, cwd=tmp_path)
    one, two = (AnomalyDenoisePipeline.from_pretrained(tmp_path / name).calibration for name in ("one", "two"))
    for name, values in one.named_buffers():
        torch.testing.assert_close(dict(two.named_buffers())[name].float(), values.float(), rtol=2e-3, atol=1e-4)


def test_categories_of_one_model(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 24, "cable": 5}, size=32)
    pipeline = fit(data, tmp_path / "model")
    assert pipeline.categories == ["cable", "tile"]
    assert [pipeline.calibration.num_good_images(i) for i in range(2)] == [5, 24]
    assert pipeline(texture(0, 32), category="tile").p_value is not None
    few = write_mvtec(tmp_path / "few", {"tile": 24, "cable": 2}, size=32)
    with pytest.raises(ValueError, match="2 good images of 'cable': in a model of several categories each takes at"):
        fit(few, tmp_path / "other")


def test_it_goes_where_other_pipelines_go(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 12}, size=32)
    pipeline = fit(data, tmp_path / "model")
    pipeline.save_pretrained(tmp_path / "again")
    again = AnomalyDenoisePipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again.calibration.feature_whitening, pipeline.calibration.feature_whitening)
    images = textures(2, 32, first_seed=40)
    assert np.array_equal(again(images).anomaly_map, pipeline(images).anomaly_map)
    card = str(render_model_card(pipeline, json.loads((tmp_path / "model" / "training.json").read_text())))
    assert "PaDiM" in card
    assert "Nothing was trained" in card
    for method in ("reconstruct", "denoise", "fit_gaussian"):
        with pytest.raises(ValueError, match=f"`{method}` takes a denoiser, and this pipeline has none"):
            getattr(pipeline, method)(images)


def test_the_command(tmp_path, monkeypatch, capsys):
    from diffad.training import fit as module

    data, seen = write_folder(tmp_path / "good", 3, size=32), []
    monkeypatch.setattr(module, "main", seen.append)
    monkeypatch.setattr("sys.argv", ["diffad", "fit", str(data), "--output", str(tmp_path / "m"), "--seed", "3"])
    with pytest.raises(SystemExit) as stopped:
        diffad()
    assert stopped.value.code == 0
    args = fit_script.parse_args(seen[0])
    assert (args.train_data_dir, args.output_dir, args.seed) == (str(data), str(tmp_path / "m"), 3)
    assert args.feature_strides == [2, 4, 8, 16]
    assert args.resolution is None


@pytest.mark.parametrize("command", ["fit", "train"])
@pytest.mark.parametrize(("given", "expected"), [(["64"], 64), (["96", "64"], [96, 64])])
def test_commands_take_a_side_or_height_and_width(tmp_path, monkeypatch, command, given, expected):
    from diffad.training import fit, train_ddpm

    data, seen = write_folder(tmp_path / "good", 3), []
    script = {"fit": fit, "train": train_ddpm}[command]
    monkeypatch.setattr(script, "main", seen.append)
    arguments = [command, "--resolution", *given, str(data), "--output", str(tmp_path / "m")]
    assert CliRunner().invoke(app, [*arguments, "--tile_size", *given]).exit_code == 0
    args = script.parse_args(seen[0])
    assert (args.resolution, args.tile_size) == (expected, expected)
    assert CliRunner().invoke(app, [*arguments, "--tile-size", "none"]).exit_code == 0
    assert script.parse_args(seen[1]).tile_size is None
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert script.parse_args(seen[2]).tile_size == "auto"


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`unet` and `scheduler` go together"):
        AnomalyDenoisePipeline(None, tiny_scheduler(), tiny_extractor(image_size=32))
    with pytest.raises(ValueError, match="`feature_extractor` needs an `image_size`"):
        AnomalyDenoisePipeline(None, None, tiny_extractor())
    with pytest.raises(ValueError, match="`position_trust` must lie in"):
        AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), position_trust=1.5)
    with pytest.raises(ValueError, match="`images` holds 0 good images"):
        without_denoiser().calibrate([], leave_one_out=True)
    with pytest.raises(ValueError, match="`leave_one_out` takes a pipeline without a denoiser"):
        tiny_pipeline().calibrate(textures(5), leave_one_out=True)


def test_the_covariances_size_is_bounded():
    assert feature_grid((56, 56), 192) == (49, 49)
    assert feature_grid((56, 56), 64) == (56, 56)
    assert feature_grid((88, 36), 192) == (77, 31)
    for size in ((56, 56), (88, 36)):
        assert 2 * math.prod(feature_grid(size, 192)) * 192 * 193 // 2 <= 90_000_000


def test_maps_come_at_the_images_size_or_the_extractors():
    pipeline = without_denoiser().calibrate(textures(4, 32), leave_one_out=True)
    image = Image.fromarray(texture(7, (50, 70)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pipeline(image).anomaly_map.shape == (1, 50, 70)
        assert pipeline(image, match_input_resolution=False).anomaly_map.shape == (1, 32, 32)


def write_long(folder: Path, count: int, size: tuple[int, int] = (64, 24)) -> Path:
    for i, pixels in enumerate(textures(count, size)):
        write_png(folder / f"{i:03}.png", pixels)
    return folder


def fit_as_they_are(data: Path, output: Path, *more: object) -> AnomalyDenoisePipeline:
    without_size = SMALL[: SMALL.index("--resolution")]
    arguments = ("--train_data_dir", data, "--output_dir", output, *without_size, *more)
    fit_script.main([str(argument) for argument in arguments])
    return AnomalyDenoisePipeline.from_pretrained(output)


def test_long_images_keep_their_ratio(tmp_path):
    pipeline = fit_as_they_are(write_long(tmp_path / "good", 5), tmp_path / "model")
    size = (368, 144)  # 64 x 24 in about 224 x 224 pixels, of multiples of the coarsest stride
    assert pipeline.processing_resolution == pipeline.input_resolution == size
    assert pipeline.feature_extractor.image_sizes == [size]
    good, bad = texture(90, (64, 24)), texture(90, (64, 24), defect=True)
    assert pipeline(bad, match_input_resolution=False).anomaly_map.shape == (1, *size)
    assert pipeline(bad).anomaly_score > pipeline(good).anomaly_score
    counts = predict_files(pipeline, [write_png(tmp_path / "new" / "bad.png", bad)], tmp_path / "out")
    assert counts["anomalous"] == 1
    assert Image.open(tmp_path / "out" / "maps" / "bad.png").size == (24, 64)


@pytest.mark.parametrize(("given", "side"), [((32,), 32), ((48, 32), (48, 32)), ((32, 32), 32)])
def test_a_resolution_is_a_side_or_height_and_width(tmp_path, given, side):
    data = write_folder(tmp_path / "good", 3)
    pipeline = fit_as_they_are(data, tmp_path / "model", "--resolution", *given)
    assert pipeline.processing_resolution == pipeline.input_resolution == side


def test_the_backbone_may_look_twice(tmp_path):
    data = write_long(tmp_path / "good", 5)
    sizes = ("--resolution", 48, 16, "--feature_image_size", 16, 48)
    pipeline = fit_as_they_are(data, tmp_path / "model", *sizes)
    assert pipeline.processing_resolution == (48, 16)
    assert pipeline.feature_extractor.image_sizes == [(32, 16), (80, 32)]  # as many pixels as squares have
    assert pipeline.input_resolution == (80, 32)
    assert pipeline.calibration.config.feature_shape[0] == 128  # the channels of both
    good, bad = texture(90, (64, 24)), texture(90, (64, 24), defect=True)
    assert pipeline(bad).anomaly_score > pipeline(good).anomaly_score
    assert pipeline(bad, match_input_resolution=False).anomaly_map.shape == (1, 48, 16)


@pytest.mark.parametrize(
    ("size", "count", "tile_size", "resolution", "expected"),
    [
        ((700, 500), 30, "auto", 224, [128, 448]),
        ((700, 700), 30, "auto", 224, None),  # more than three times 224 a side
        ((700, 700), 5, "auto", 224, [128, 448]),  # too few for tiles
        ((700, 700), 30, None, 224, [128, 448]),
        ((300, 300), 30, (100, 100), 224, None),
        ((700, 700), 30, "auto", 448, [256, 896]),  # no fewer pixels than without them
    ],
)
def test_the_sizes_of_the_features_follow_from_the_images(size, count, tile_size, resolution, expected):
    args = argparse.Namespace(tile_size=tile_size)
    assert choose_feature_sizes(args, [size] * count, resolution, ["part"] * count, 16) == expected
    assert (args.tile_size is None) == (expected is not None)


def test_a_transformers_sizes_are_multiples_of_its_patch():
    multiple = side_multiple("vit_tiny_patch16_224.augreg_in21k_ft_in1k", (16,), (3, 7))
    assert multiple == 16
    assert side_multiple(BACKBONE, (2, 4), None) == 16
    args = argparse.Namespace(tile_size=None)
    assert choose_feature_sizes(args, [(64, 64)], 224, ["part"], 14) == [126, 448]
    assert extractor_image_size([126, 448], (196, 252), 14) == [(112, 140), (392, 504)]


def test_sizes_that_become_one_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--feature_image_size 100 104: .* two of them are the same"):
        extractor_image_size([100, 104], (352, 144), 16)


def test_the_command_takes_two_sizes(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(fit_script, "main", given.append)
    result = CliRunner().invoke(app, ["fit", "parts", "--output", str(tmp_path), "--multi-scale"])
    assert result.exit_code == 0, result.output
    args = fit_script.parse_args(given[0])
    assert args.feature_image_size == "auto"


def test_two_sizes_are_updated_and_exported(tmp_path, capsys):
    first, second, every = (tmp_path / name for name in ("first", "second", "every"))
    for i, pixels in enumerate(textures(24, 32)):
        for folder in (every, first if i < 16 else second):
            write_png(folder / f"{i}.png", pixels)
    more = ("--feature_image_size", "auto", "--kept_images", 8, "--false_alarm_rate", 0.25)
    fit_as_they_are(first, tmp_path / "updated", "--resolution", 28, *more)
    assert "The backbone sees images at 16 x 16 and 64 x 64 px." in capsys.readouterr().out
    whole = fit_as_they_are(every, tmp_path / "whole", "--resolution", 28, *more)
    assert (whole.feature_extractor.image_sizes, whole.processing_resolution) == ([16, 64], 28)
    result = CliRunner().invoke(app, ["update", str(tmp_path / "updated"), "--data", str(second)])
    assert result.exit_code == 0, result.output
    updated = AnomalyDenoisePipeline.from_pretrained(tmp_path / "updated")
    images = [texture(90), texture(91, defect=True)]
    expected = whole(images)
    np.testing.assert_allclose(updated(images).anomaly_score, expected.anomaly_score, rtol=1e-4)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from diffad.deployment import Runtime

    whole.export(tmp_path / "model.onnx")
    np.testing.assert_allclose(
        Runtime(tmp_path / "model.onnx")(images).anomaly_score, expected.anomaly_score, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["448", "128"], "must increase, but is 448 128"),
        (["auto", "64"], "must be a whole number"),
        (["4"], "must be at least 8"),
    ],
)
def test_wrong_sizes_of_the_features_are_an_error(given, said, capsys):
    with pytest.raises(SystemExit):
        fit_script.parse_args(["--train_data_dir", "parts", "--feature_image_size", *given])
    assert f"--feature_image_size {said}" in capsys.readouterr().err


def test_images_of_several_ratios_become_squares(tmp_path):
    good = write_long(tmp_path / "good", 3)
    write_png(good / "other.png", texture(9, (40, 24)))
    assert fit_as_they_are(good, tmp_path / "model").processing_resolution == 224


def test_large_images_are_looked_at_in_tiles_unless_told_otherwise(tmp_path, capsys):
    good = write_long(tmp_path / "good", 20, (72, 56))
    size = ("--resolution", 16)
    pipeline = fit_as_they_are(good, tmp_path / "model", *size, "--false_alarm_rate", 0.25)
    assert pipeline.tile_size == (16, 16)
    assert pipeline.config.contrast == 0.0  # of which most is no surroundings of a defect
    assert "The images are large: tiles of 16 x 16 px, and the whole." in capsys.readouterr().out
    bad = texture(90, (72, 56))
    bad[40:43, 30:33] = 0
    assert pipeline(bad).is_anomalous[0]
    whole = fit_as_they_are(good, tmp_path / "whole", *size, "--tile_size", "none")
    assert (whole.tile_size, whole.config.contrast) == (None, 0.2)
    chosen = fit_as_they_are(good, tmp_path / "own", *size, "--tile_size", 24, 20, "--tile_overlap", 0.5)
    assert (chosen.tile_size, chosen.config.tile_overlap) == ((24, 20), 0.5)
    with pytest.raises(ValueError, match="--tile_size must be smaller than the images, but is 100000 x"):
        fit_as_they_are(good, tmp_path / "larger", *size, "--tile_size", 100_000)


def test_of_few_images_given_tiles_a_fifth_sets_the_thresholds(tmp_path):
    good = write_long(tmp_path / "good", 6, (72, 56))
    assert fit_as_they_are(good, tmp_path / "auto", "--resolution", 16).tile_size is None
    pipeline = fit_as_they_are(good, tmp_path / "model", "--resolution", 16, "--tile_size", 16)
    assert np.isfinite(pipeline.calibration.normal_scores.numpy()).sum() == 1


def test_two_processes_fit_the_tiles_that_one_does(tmp_path):
    good = write_long(tmp_path / "good", 20, (48, 40))
    arguments = ("--train_data_dir", good, *SMALL[:-2], "--resolution", 16, "--tile_size", 16)
    for count in (1, 2):
        launch("diffad.training.fit", *arguments, "--output_dir", tmp_path / str(count), processes=count, cwd=tmp_path)
    one, two = (AnomalyDenoisePipeline.from_pretrained(tmp_path / str(count)) for count in (1, 2))
    for name in ("calibration", "tile_calibration"):
        for key, values in getattr(one, name).state_dict().items():
            assert torch.allclose(getattr(two, name).state_dict()[key], values, rtol=1e-3, atol=1e-3, equal_nan=True), (
                key
            )


@pytest.mark.parametrize("pattern", ["", "(a", "a*"])
def test_a_wrong_part_pattern_is_told_before_anything_is_read(tmp_path, pattern, capsys):
    with pytest.raises(SystemExit):
        fit(tmp_path / "nowhere", tmp_path / "model", f"--part_pattern={pattern}")
    assert "--part_pattern" in capsys.readouterr().err.splitlines()[-1]
