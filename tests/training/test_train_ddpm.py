"""Training from folders to a calibrated pipeline, and the loss."""

# ruff: noqa: F811 (tests take the imported fixtures by their names)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    generator,
    texture,
    textures,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
    write_folder,
    write_mvtec,
    write_png,
)
from ddpm_runs import flags, good, load, tiny, train  # noqa: F401 (fixtures)
from PIL import Image
from test_pipeline_diad import make_pipeline

from diffad import AnomalyDenoisePipeline, TimmFeatureExtractor
from diffad.images import images_to_tensors
from diffad.precision import resolve_precision
from diffad.training import train_ddpm
from diffad.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# -- end to end --------------------------------------------------------------------------------------------------


def test_a_folder_of_good_images_becomes_a_calibrated_pipeline(good, tmp_path):
    score = "--alpha 0.3 --contrast 0.2 --timesteps 5 20 --kl_sigma 1"
    train(good, tmp_path, *score.split())
    pipeline = load(tmp_path)
    assert type(pipeline) is AnomalyDenoisePipeline
    assert pipeline.categories == ["part"]
    assert pipeline.config.timesteps == [5, 20]
    assert pipeline.config.alpha == 0.3
    assert pipeline.config.contrast == 0.2
    assert pipeline.processing_resolution == 16
    assert pipeline.unet.config.num_class_embeds is None
    assert pipeline.unet.config.feature_channels == pipeline.feature_extractor.num_channels == 64
    assert (pipeline.feature_extractor.channel_std != 1).all()  # standardised on these images
    assert pipeline.calibration.config.false_alarm_rate == 0.4
    assert pipeline.calibration.normal_scores.shape == (1, 2)
    assert (pipeline.calibration.image_threshold < float("inf")).all()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 2
    assert record["categories"] == ["part"]
    assert record["arguments"]["train_batch_size"] == 4


def test_two_categories_of_an_mvtec_tree_become_one_class_conditional_model(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 14, "cable": 7})
    train(data, tmp_path / "run", "--validation_steps", 2, "--false_alarm_rate", 0.5)
    pipeline = load(tmp_path / "run")
    assert pipeline.categories == ["cable", "tile"]
    assert pipeline.unet.config.num_class_embeds == 2
    # 15% of each is held out: 1 of 7, 2 of 14
    assert (~pipeline.calibration.normal_scores.isnan()).sum(dim=1).tolist() == [1, 2]
    assert (pipeline.calibration.image_threshold < float("inf")).all()
    maps = [pipeline(texture(0), category=name, generator=generator()).anomaly_map for name in ("cable", "tile")]
    assert not np.array_equal(*maps)
    # asked for one of them, it is a model of one
    train(data, tmp_path / "one", "--category", "tile")
    assert load(tmp_path / "one").categories == ["tile"]


def test_a_trained_model_keeps_its_categories_and_their_labels(tmp_path, monkeypatch):
    data = write_mvtec(tmp_path / "data", {"bottle": 3, "cable": 3, "tile": 3, "zip": 3})
    tiny_pipeline(categories=["tile", "bottle", "cable"]).save_pretrained(start := tmp_path / "start")
    seen = set()
    loss = train_ddpm.denoising_loss

    def looking(unet, scheduler, clean, features, class_labels, *more):
        seen.update(class_labels.tolist())
        return loss(unet, scheduler, clean, features, class_labels, *more)

    monkeypatch.setattr(train_ddpm, "denoising_loss", looking)
    masks = write_png(tmp_path / "masks" / "tile.png", np.full((16, 16), 255, dtype=np.uint8)).parent
    few = ("--false_alarm_rate", 0.5)
    for categories, labels, more in ((["cable", "tile"], {0, 2}, ()), (["tile"], {0}, ("--roi", masks))):
        seen.clear()
        output = tmp_path / "-".join(categories)
        train(data, output, "--category", *categories, *more, *few, start=start)
        assert seen == labels
        pipeline = AnomalyDenoisePipeline.from_pretrained(output)
        assert pipeline.categories == ["tile", "bottle", "cable"]
        assert sorted(pipeline.calibration.calibrated_categories) == sorted(labels)
        assert 0.0 < pipeline(texture(99), category="tile").p_value[0] <= 1.0
    with pytest.raises(ValueError, match=r"--pretrained_model_name_or_path: .*start does not know zip: it knows tile"):
        train(data, tmp_path / "run", "--category", "tile", "zip", start=start)
    with pytest.raises(ValueError, match=r"--choose takes images of all categories.*have only tile\."):
        train(data, tmp_path / "run", "--category", "tile", "--choose", start=start)


def test_a_trained_model_of_one_category_is_not_made_one_of_several(tiny, tmp_path):
    data = write_mvtec(tmp_path / "data", {"cable": 3, "tile": 3})
    with pytest.raises(
        ValueError, match=r"is a model of one category, and the data have cable, tile\. Choose one with"
    ):
        train(data, tmp_path / "run", start=tiny)


def test_a_class_conditional_denoiser_has_a_name_for_each_label():
    components = tiny_pipeline(categories=["a", "b", "c"]).components
    for names in (["a", "b"], None):
        with pytest.raises(ValueError, match=r"`unet` was built for 3 categories, but `categories` names"):
            AnomalyDenoisePipeline(**components, categories=names)


def test_strides_that_are_not_there_are_told_before_training(good, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"`score_strides` must be taken from \[2, 4\]"):
        train(good, tmp_path, "--score_strides", 3, start=tiny)
    assert list_checkpoints(tmp_path) == []


def test_training_learns(good, tiny, tmp_path):
    train(good, tmp_path, "--learning_rate", 3e-3, "--use_ema", "--ema_decay", 0.9, start=tiny, steps=60)

    def losses(folder: Path) -> dict[str, float]:
        pipeline = AnomalyDenoisePipeline.from_pretrained(folder)
        clean = torch.stack(images_to_tensors(textures(16, first_seed=300))) * 2.0 - 1.0
        with torch.no_grad():
            features = pipeline.feature_extractor(clean, (8, 8))
            arguments = (clean, features, None, generator(7), 1.0)
            parts = train_ddpm.denoising_loss(pipeline.unet, pipeline.scheduler, *arguments)
        return {name: float(value) for name, value in parts.items()}

    before, after = losses(tiny), losses(tmp_path)
    assert after["noise"] < 0.8 * before["noise"]
    assert after["feature"] < 0.8 * before["feature"]


def test_curves_pictures_and_checkpoints_are_written(good, tiny, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--report_to", "tensorboard", "--validation_steps", 5, "--checkpointing_steps", 4)
    train(good, tmp_path, *more, "--checkpoints_total_limit", 2, start=tiny, steps=11)

    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "diffad"}
    log = event_accumulator.EventAccumulator(str(events))
    log.Reload()
    assert {"noise", "variance", "feature", "lr", "images_per_s"} <= set(log.Tags()["scalars"])
    points = log.Scalars("noise")
    assert [point.step for point in points] == [10, 11]
    assert all(0.0 < point.value < 10.0 for point in points)

    pictures = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert pictures == ["step-10.png", "step-5.png"]
    with Image.open(tmp_path / "validation" / "step-5.png") as sheet:
        width, height = sheet.size
    assert width > 5 * 160  # five columns
    assert height > 2 * 160  # both held-out images

    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == ["checkpoint-11", "checkpoint-8"]


def test_the_record_says_which_precision_auto_was(good, tiny, tmp_path):
    (config := tmp_path / "config.yaml").write_text("mixed_precision: auto\n")
    train(good, tmp_path / "auto", "--config", config, start=tiny)
    arguments = json.loads((tmp_path / "auto" / "training.json").read_text())["arguments"]
    assert arguments["mixed_precision"] == resolve_precision("auto")


@pytest.mark.parametrize("more", [("--mixed_precision", "bf16"), ("--gradient_checkpointing", "--random_flip")])
def test_other_ways_to_run(good, tiny, tmp_path, more):
    train(good, tmp_path, *more, start=tiny)
    pipeline = load(tmp_path)
    assert pipeline.unet.dtype == torch.float32
    start = AnomalyDenoisePipeline.from_pretrained(tiny).unet.state_dict()
    moved = [name for name, value in pipeline.unet.state_dict().items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.9 * len(start)


def test_without_steps_a_trained_model_is_calibrated_for_other_noise_levels(good, tiny, tmp_path):
    train(good, tmp_path, "--timesteps", 100, "--use_ema", start=tiny, steps=0)
    pipeline, start = load(tmp_path), AnomalyDenoisePipeline.from_pretrained(tiny)
    assert pipeline.config.timesteps == [100]
    assert pipeline.calibration.config.map_shape[0] == 2  # the KL at one level, and the feature error
    state = pipeline.unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in start.unet.state_dict().items())


def test_the_extractor_may_look_closer(good, tmp_path):
    train(good, tmp_path, "--feature_image_size", 32, "--feature_resolution", 8, "--validation_steps", 1)
    pipeline = load(tmp_path)
    assert pipeline.feature_extractor.config.image_size == 32
    assert pipeline.unet.config.feature_resolution == 8
    assert tuple(pipeline.calibration.config.residual_shape) == (64, 8, 8)


def test_the_sizes_of_the_features_follow_from_the_images(good, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ddpm, "DEFAULT_SIDE", 28)
    train(good, tmp_path / "two", "--feature_image_size", "auto")
    assert load(tmp_path / "two").feature_extractor.image_sizes == [16, 64]
    train(good, tmp_path / "tiles", "--feature_image_size", "auto", "--tile_size", 12)
    assert load(tmp_path / "tiles").feature_extractor.image_sizes == [28]


def test_long_images_keep_their_ratio(tmp_path):
    for i, pixels in enumerate(textures(8, (48, 24))):
        write_png(tmp_path / "good" / f"{i}.png", pixels)
    arguments = flags(tmp_path / "good", tmp_path / "run", "--feature_image_size", 32, "--rotation_degrees", 5)
    at = arguments.index("--resolution")
    train_ddpm.main([*arguments[:at], *arguments[at + 2 :], "--validation_steps", "1"])
    pipeline = load(tmp_path / "run")
    assert pipeline.processing_resolution == (88, 48)  # 48 x 24 in about 64 x 64 pixels, the denoiser's multiples of 8
    assert pipeline.feature_extractor.image_sizes == [(48, 16)]
    bad = texture(9, (48, 24), defect=True)
    assert pipeline(bad, match_input_resolution=False).anomaly_map.shape == (1, 88, 48)
    assert pipeline.denoise(bad, timestep=20, num_inference_steps=2).reconstruction.shape == (1, 48, 24, 3)
    pipeline.fit_gaussian(textures(3, (48, 24)), num_channels=8)
    assert pipeline.reconstruct(bad, num_iterations=2).reconstruction.shape == (1, 48, 24, 3)
    pipeline.save_pretrained(tmp_path / "saved")
    assert np.array_equal(
        load(tmp_path / "saved")(bad, generator=generator()).anomaly_map,
        pipeline(bad, generator=generator()).anomaly_map,
    )


def test_tiles_are_trained_on_as_well(tmp_path, monkeypatch):
    for i, pixels in enumerate(textures(9, (72, 56))):
        write_png(tmp_path / "good" / f"{i}.png", pixels)
    seen = []
    loss = train_ddpm.denoising_loss

    def looking(unet, scheduler, clean, *more):
        seen.append(clean)
        return loss(unet, scheduler, clean, *more)

    monkeypatch.setattr(train_ddpm, "denoising_loss", looking)
    train(tmp_path / "good", tmp_path / "run", "--tile_size", 24, "--cache_features", "--rotation_degrees", 0, steps=20)
    pipeline = load(tmp_path / "run")
    assert pipeline.tile_size == (24, 24)
    assert pipeline.tile_calibration is not None
    deviations = torch.cat(seen).std(dim=(1, 2, 3))
    assert deviations.max() > 1.05 * deviations.min()  # stripes of the whole image are averaged away
    assert pipeline(texture(30, (72, 56))).anomaly_map.shape == (1, 72, 56)


def test_the_extractor_may_look_twice(good, tmp_path):
    train(good, tmp_path, "--feature_image_size", 16, 32, "--score_strides", 4)
    pipeline = load(tmp_path)
    assert pipeline.feature_extractor.image_sizes == [16, 32]
    assert pipeline.unet.config.feature_channels == 128
    assert pipeline.scored_layers == [1, 3]
    assert pipeline.calibration.config.residual_shape[0] == 64
    # the networks still work for a Gaussian of one size
    pipeline.fit_gaussian(textures(3), num_channels=8)
    assert pipeline.gaussian.config.image_size == 32


def test_features_are_cached_for_each_flip(good, tmp_path, monkeypatch):
    calls = []
    forward = TimmFeatureExtractor.forward

    def counted(self, pixel_values, size):
        calls.append(len(pixel_values))
        return forward(self, pixel_values, size)

    monkeypatch.setattr(TimmFeatureExtractor, "forward", counted)
    flips = ("--rotation_degrees", 0, "--random_flip", "--mixed_precision", "no")
    totals = []
    for name, more in (("each time", flips), ("once", (*flips, "--cache_features"))):
        calls.clear()
        train(good, tmp_path / name, *more, steps=12)
        totals.append(sum(calls))
        load(tmp_path / name)
    # 13 images: standardisation, 12 steps of 4, and calibration; cached, each image and its flip instead of the steps
    assert totals[0] - totals[1] == 12 * 4 - 13 * 2


# -- images ------------------------------------------------------------------------------------------------------


def test_a_corrupt_image_stops_the_run_or_is_skipped(tiny, tmp_path):
    data = write_folder(tmp_path / "part", 6)
    (data / "003.png").write_bytes((data / "003.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"(?s)`on_bad_image` 'skip'.*003\.png"):
        train(data, tmp_path / "run", start=tiny)
    assert not (tmp_path / "run" / "model_index.json").exists()
    with pytest.warns(UserWarning, match=r"(?s)Skipped 1 images.*003\.png"):
        train(data, tmp_path / "run", "--on_bad_image", "skip", "--false_alarm_rate", 0.5, start=tiny)
    assert load(tmp_path / "run").calibration.normal_scores.shape == (1, 1)


def test_no_images_too_few_images_no_folder(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is empty: expected \.png"):
        train(tmp_path / "empty", tmp_path / "run", start=tiny)
    with pytest.raises(FileNotFoundError, match="no_such"):
        train(tmp_path / "no_such", tmp_path / "run", start=tiny)
    with pytest.raises(ValueError, match=r"'part'.*has 2 good images: too few.*It takes 3"):
        train(write_folder(tmp_path / "part", 2), tmp_path / "run", start=tiny)
    with pytest.raises(ValueError, match=r"`category`.*\['tile'\]"):
        train(write_mvtec(tmp_path / "tree"), tmp_path / "run", "--category", "bolt", start=tiny)


@pytest.mark.parametrize("repo_id", ["a/b/c", "bad name!", "alice/parts"])  # the last: there is no network
def test_a_repository_that_cannot_be_had_is_told_before_the_training(good, tiny, tmp_path, repo_id):
    with pytest.raises(RuntimeError, match=rf"--push_to_hub: no repository '{repo_id}'.*Mend --hub_model_id, log in"):
        train(good, tmp_path / "run", "--push_to_hub", "--hub_model_id", repo_id, start=tiny)
    assert list_checkpoints(tmp_path / "run") == []


def test_what_is_no_pipeline_to_start_from_is_told_with_its_flag(good, tiny, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "diad")
    flag = "--pretrained_model_name_or_path"
    with pytest.raises(ValueError, match=rf"{flag}: .*diad holds .* DiADPipeline, which train_diad.py trains"):
        train(good, tmp_path / "run", start=tmp_path / "diad")
    with pytest.raises(FileNotFoundError, match=rf"{flag}: there is no folder .*daid. Did you mean .*diad\?"):
        train(good, tmp_path / "run", start=tmp_path / "daid")
    with pytest.raises(FileNotFoundError, match=rf"{flag}: .*part holds no pipeline \(no model_index.json there"):
        train(good, tmp_path / "run", start=good)


def test_rates_that_the_schedule_cannot_take_are_told_with_their_flags(good, tiny, tmp_path):
    more = ("--lr_scheduler", "polynomial", "--learning_rate", 1e-8)
    with pytest.raises(ValueError, match=r"--lr_scheduler polynomial, --learning_rate 1e-08: lr_end"):
        train(good, tmp_path, *more, start=tiny)


def test_three_images_are_enough(tiny, tmp_path):
    train(write_folder(tmp_path / "part", 3), tmp_path / "run", "--false_alarm_rate", 0.5, start=tiny)
    assert load(tmp_path / "run").calibration.normal_scores.shape == (1, 1)


# -- loss --------------------------------------------------------------------------------------------------------


def test_the_bound_trains_the_variance_alone():
    """Equations 5 to 8: the gradient of the mean is stopped in the variational bound."""
    unet = tiny_unet()
    clean = torch.rand(4, 3, 16, 16, generator=generator()) * 2.0 - 1.0
    features = torch.randn(4, 64, 8, 8, generator=generator())
    gradients = {}
    for name in ("noise", "variance", "feature"):
        unet.zero_grad()
        losses = train_ddpm.denoising_loss(unet, tiny_scheduler(), clean, features, None, generator(), 1.0)
        losses[name].backward()
        gradients[name] = unet.conv_out.bias.grad
    assert (gradients["noise"][:3] != 0).all()
    assert (gradients["noise"][3:] == 0).all()
    assert (gradients["variance"][:3] == 0).all()
    assert (gradients["variance"][3:] != 0).all()
    assert gradients["feature"] is None or (gradients["feature"] == 0).all()


def test_a_larger_exponent_draws_smaller_timesteps():
    drawn = []
    unet = tiny_unet()
    unet.register_forward_pre_hook(lambda module, args: drawn.append(args[1]))
    clean, features = torch.zeros(256, 3, 16, 16), torch.zeros(256, 64, 8, 8)
    with torch.no_grad():
        for exponent in (1.0, 3.0):
            train_ddpm.denoising_loss(unet, tiny_scheduler(), clean, features, None, generator(), exponent)
    assert all(((t >= 0) & (t <= 999)).all() for t in drawn)
    assert 450 < drawn[0].float().mean() < 550  # uniform
    assert 200 < drawn[1].float().mean() < 300  # the mean of u^3 is a quarter
