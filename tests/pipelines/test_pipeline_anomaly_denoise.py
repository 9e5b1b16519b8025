"""The pipeline as a user calls it: every input, every output, calibrated and not, saved and loaded.

Long, as one small pipeline serves all of it.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import generator, texture, textures, tiny_extractor, tiny_pipeline, tiny_scheduler, tiny_unet, write_png
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import CLIPImageProcessor

from diffad import AnomalyDenoisePipeline, AnomalyOutput
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import images_to_pixel_values, images_to_tensors
from diffad.likelihood import kl_divergence_map
from diffad.pipelines import detection
from diffad.warn_once import warn_once

FIELDS = ("anomaly_map", "anomaly_score", "reconstruction", "anomaly_mask", "is_anomalous", "p_value")


@pytest.fixture
def pipe() -> AnomalyDenoisePipeline:
    return tiny_pipeline()


@pytest.fixture
def calibrated(pipe) -> AnomalyDenoisePipeline:
    return pipe.calibrate(textures(30), false_alarm_rate=0.1, generator=generator())


def assert_same(output: AnomalyOutput, expected: AnomalyOutput) -> None:
    """Equal to the bit in every field."""
    for name in FIELDS:
        actual, wanted = getattr(output, name), getattr(expected, name)
        assert (actual is None) == (wanted is None), name
        assert wanted is None or np.array_equal(actual, wanted), name


# -- inputs ------------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_map(calibrated, tmp_path):
    array = texture(3, (20, 24))
    path = write_png(tmp_path / "part.png", array)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = calibrated(array, generator=generator())
    assert expected.anomaly_map.shape == (1, 20, 24)
    for image in (Image.fromarray(array), path, str(path), tensor, tensor[None], tensor / 255.0, [array], array[None]):
        assert_same(calibrated(image, generator=generator()), expected)


@pytest.mark.parametrize("calibrate", [False, True])
def test_shapes_types_and_ranges(pipe, calibrate):
    if calibrate:
        pipe.calibrate(textures(30), false_alarm_rate=0.1)
    output = pipe(textures(3, (20, 28)))
    assert output.anomaly_map.shape == (3, 20, 28)
    assert output.anomaly_map.dtype == np.float32
    assert np.isfinite(output.anomaly_map).all()
    assert output.anomaly_score.shape == (3,)
    assert output.anomaly_score.dtype == np.float32
    assert output.reconstruction is None
    if not calibrate:
        assert output.anomaly_mask is output.is_anomalous is output.p_value is None
        return
    assert output.anomaly_mask.shape == (3, 20, 28)
    assert output.anomaly_mask.dtype == output.is_anomalous.dtype == bool
    assert output.is_anomalous.shape == output.p_value.shape == (3,)
    assert output.p_value.dtype == np.float32
    assert (output.p_value > 0).all()
    assert (output.p_value <= 1).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 5000), (33, 17), (64, 64)])
def test_maps_come_at_any_size(pipe, size):
    output = pipe(np.full((*size, 3), 0.5))
    assert output.anomaly_map.shape == (1, *size)
    assert np.isfinite(output.anomaly_map).all()


def test_maps_at_the_processing_resolution(pipe):
    images = [texture(0, (20, 28)), texture(1, 9), texture(2, (50, 3))]
    output = pipe(images, match_input_resolution=False)
    assert output.anomaly_map.shape == (3, 16, 16)
    larger = pipe(images, match_input_resolution=False, processing_resolution=32)
    assert larger.anomaly_map.shape == (3, 32, 32)


def test_a_calibrated_pipeline_takes_another_resolution(calibrated):
    output = calibrated(textures(4, 32), processing_resolution=32)
    assert output.anomaly_map.shape == (4, 32, 32)
    assert np.isfinite(output.anomaly_map).all()


def test_the_extractor_may_look_closer_than_the_denoiser():
    pipe = tiny_pipeline(image_size=48)
    seen = []
    pipe.feature_extractor.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    assert pipe.calibrate(textures(9, 64), false_alarm_rate=0.3)(texture(0, 64)).anomaly_map.shape == (1, 64, 64)
    assert set(seen) == {48}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": [texture(0, 16), texture(1, 20)]}, r"`image`.*16x16, 20x20.*match_input_resolution=False"),
        ({"image": []}, "`image` is an empty list"),
        ({"image": np.full((16, 16), np.nan)}, "`image` holds NaN"),
        ({"image": [texture(0), np.full((16, 16), np.nan)]}, r"`image\[1\]` holds NaN"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"batch_size": 2.5}, "`batch_size`"),
        ({"processing_resolution": 15}, r"`processing_resolution`.*multiple of 2.*Try 1[46]"),
        ({"processing_resolution": 1}, "`processing_resolution` must be at least 2"),
        ({"processing_resolution": 0}, "`processing_resolution`"),
        ({"processing_resolution": 16.0}, "`processing_resolution`"),
        ({"output_type": "latent"}, '`output_type`.*"np", "pt" or "pil"'),
        ({"generator": 5}, "`generator`"),
        ({"generator": [generator(), generator()]}, "`generator`.*each of the 1 images"),
        ({"category": "bottle"}, "`category` 'bottle' is unknown.*default"),
        ({"category": 1}, "`category` 1 is unknown"),
        ({"category": 0.0}, "`category` 0.0 is unknown"),
        ({"category": False}, "`category` False is unknown"),
        ({"category": [0, 0]}, "`category` lists 2 names for 1 images"),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        pipe(**{"image": texture(0), **arguments})


def test_a_missing_file_is_named(pipe):
    with pytest.raises(FileNotFoundError, match=r"`image`.*no_such\.png"):
        pipe("no_such.png")


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"alpha": -0.1},
        {"timesteps": []},
        {"timesteps": [5, 1000]},
        {"contrast": -0.1},
        {"contrast": float("nan")},
        {"categories": "bottle"},
        {"categories": ["bottle", "bottle"]},
        {"categories": ["bottle", ""]},
        {"categories": [1, 2]},
        {"value_range": "4095"},
        {"tile_size": 16, "tile_overlap": "0.25"},
        {"contrast": "x"},
        {"weights": {"kl": "a"}},
        {"weights": 0.5},
        {"timesteps": 5},
        {"score_strides": 3},
        {"processing_resolution": 15},
        {"processing_resolution": [16]},
        {"processing_resolution": [16, 16, 16]},
        {"feature_resolution": -1},
        {"feature_resolution": 1000},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}`"):
        tiny_pipeline(**options)


def test_a_resolution_may_be_numpys(tmp_path):
    pipe = tiny_pipeline(processing_resolution=np.int64(32))
    pipe.save_pretrained(tmp_path)
    assert AnomalyDenoisePipeline.from_pretrained(tmp_path).processing_resolution == 32
    assert pipe(texture(0), processing_resolution=np.int64(16)).anomaly_map.shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_extractor": None}, "`feature_extractor` is None"),
        ({"scheduler": EulerDiscreteScheduler()}, "`scheduler` is a EulerDiscreteScheduler.*use DDPMScheduler"),
        ({"scheduler": DPMSolverMultistepScheduler()}, "`scheduler` is a DPMSolverMultistepScheduler"),
        ({"unet": tiny_unet(feature_channels=32)}, "`unet` predicts features of 32 channels.* gives 64"),
        ({"unet": UNet2DModel(16)}, "`unet` is a UNet2DModel, which predicts no features"),
        ({"feature_extractor": CLIPImageProcessor()}, "`feature_extractor` is a CLIPImageProcessor"),
    ],
)
def test_components_that_do_not_go_together_are_named(pipe, change, words):
    with pytest.raises(ValueError, match=words):
        AnomalyDenoisePipeline(**{**pipe.components, **change})


# -- outputs -----------------------------------------------------------------------------------------------------


def test_output_types_hold_the_same_values(calibrated):
    images = textures(2, (20, 28))
    outputs = {kind: calibrated(images, generator=generator(), output_type=kind) for kind in ("np", "pt", "pil")}
    for name in FIELDS:
        array, tensor = getattr(outputs["np"], name), getattr(outputs["pt"], name)
        if array is None:
            assert tensor is None
            continue
        assert isinstance(array, np.ndarray)
        assert isinstance(tensor, torch.Tensor)
        assert np.array_equal(tensor.numpy(), array), name
    pil = outputs["pil"]
    assert [image.mode for image in pil.anomaly_map] == ["F", "F"]
    assert [image.size for image in pil.anomaly_map] == [(28, 20), (28, 20)]
    assert np.array_equal(np.stack([np.asarray(image) for image in pil.anomaly_map]), outputs["np"].anomaly_map)
    assert np.array_equal(np.stack([np.asarray(mask) for mask in pil.anomaly_mask]), outputs["np"].anomaly_mask)


def test_a_tuple_has_the_fields_in_their_order(calibrated):
    output = calibrated(texture(0), generator=generator())
    values = calibrated(texture(0), generator=generator(), return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == len(FIELDS)
    assert_same(AnomalyOutput(*values), output)


def test_masks_alarms_and_scores_follow_their_thresholds(calibrated):
    output = calibrated(textures(20, first_seed=100), generator=generator())
    calibration = calibrated.calibration
    assert np.array_equal(output.anomaly_mask, output.anomaly_map > calibration.pixel_threshold.numpy())
    assert np.array_equal(output.is_anomalous, output.anomaly_score > calibration.image_threshold.numpy())
    assert np.array_equal(output.is_anomalous, output.p_value <= 0.1)
    np.testing.assert_allclose(output.anomaly_score, output.anomaly_map.max(axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_score_that_is_no_number_is_no_verdict(calibrate):
    """As half precision makes of large values: below every threshold, it would pass for good."""
    pipeline = tiny_pipeline()
    if calibrate:
        pipeline.calibrate(textures(6), false_alarm_rate=0.3)
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"scores of images \[0, 1\] of this call are NaN.*float32"):
        pipeline(textures(2))


def test_the_score_may_be_a_mean_of_the_highest_pixels():
    output = tiny_pipeline(score_fraction=0.1)(textures(2), generator=generator())
    highest = np.sort(output.anomaly_map.reshape(2, -1), axis=1)[:, -26:]  # a tenth of 256
    np.testing.assert_allclose(output.anomaly_score, highest.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("how", ["whole", "region", "smallest area", "fraction", "one category of two"])
def test_contrast_changes_outlines_and_no_verdict(how):
    images = [*textures(4, first_seed=100), *(texture(2000 + i, defect=True) for i in range(4))]
    settings: dict = {"score_fraction": 0.1} if how == "fraction" else {}
    options: dict = {"smallest area": {"smallest_area": 0.03}}.get(how, {})
    if how == "region":
        options["roi"] = np.pad(np.ones((14, 14), bool), 1)
    if how == "one category of two":
        settings["categories"], options["category"] = ["a", "b"], "b"
    pipes = [
        tiny_pipeline(contrast=c, **settings).calibrate(
            textures(60), false_alarm_rate=0.1, generator=generator(), **options
        )
        for c in (0.0, 0.5)
    ]
    category = {"category": options["category"]} if "category" in options else {}
    plain, heightened = (pipe(images, generator=generator(), **category) for pipe in pipes)
    for name in ("anomaly_score", "p_value", "is_anomalous"):
        assert np.array_equal(getattr(heightened, name), getattr(plain, name))  # to the bit
    assert plain.is_anomalous.any()
    assert np.array_equal(heightened.anomaly_mask.any(axis=(1, 2)), plain.anomaly_mask.any(axis=(1, 2)))
    assert (plain.anomaly_mask | ~heightened.anomaly_mask).all()
    assert 0 < heightened.anomaly_mask.sum() < plain.anomaly_mask.sum()


def test_uncalibrated_maps_have_no_contrast():
    raw = [tiny_pipeline(contrast=c)(textures(2), generator=generator()).anomaly_map for c in (0.0, 0.5)]
    assert np.array_equal(*raw)


def test_cells_of_several_positions_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("diffad.calibration.residual_gaussian.COVARIANCE_NUMBERS", 16 * 64 * 65 // 2)
    pipe = tiny_pipeline().calibrate(textures(20), false_alarm_rate=0.1)
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    assert loaded.calibration.num_distances == 2
    assert_same(loaded(texture(0), generator=generator()), pipe(texture(0), generator=generator()))


@pytest.mark.parametrize(("value", "warns"), [(0.0, False), (0.4, True)])
def test_a_calibration_by_a_setting_that_is_gone_is_named(value, warns, caplog):
    pipe = tiny_pipeline().calibrate(textures(20), false_alarm_rate=0.1)
    pipe.calibration.register_to_config(settings={**pipe.calibration.config.settings, "suppression": value})
    warn_once.cache_clear()
    pipe(texture(0))
    assert ("other settings (suppression)" in caplog.text) == warns


def test_places_say_how_high_the_map_goes_and_positions_outline_the_defect(monkeypatch):
    # one category's, at 4 x 4 places
    monkeypatch.setattr("diffad.calibration.residual_gaussian.COVARIANCE_NUMBERS", 16 * 64 * 65 // 2)
    pipe = tiny_pipeline(alpha=0.0, feature_sigma=0.0).calibrate(textures(90), false_alarm_rate=0.1)
    assert pipe.calibration.num_distances == 2
    images = [texture(2000 + i, defect=True) for i in range(20)]
    output = pipe(images, generator=generator())
    indices = torch.zeros(20, dtype=torch.long)
    with torch.no_grad():
        measurement = pipe.measure_images(images_to_tensors(images), indices, [generator()] * 20)
        maps = pipe.calibration.normalize(pipe.score_maps(measurement, indices, pipe.calibration), indices)
    peak, own_peak = (m.amax(dim=(1, 2), keepdim=True) for m in maps[:, -2:].unbind(dim=1))
    np.testing.assert_allclose(output.anomaly_map, maps[:, -1] + (peak - own_peak), atol=1e-3)
    np.testing.assert_allclose(output.anomaly_score, peak[:, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("change", ["timesteps", "score_strides"])
def test_a_calibration_of_other_scores_is_refused(calibrated, change):
    fewer = list(calibrated.config.timesteps if change == "timesteps" else calibrated.feature_extractor.config.strides)[
        1:
    ]
    other = AnomalyDenoisePipeline(**calibrated.components, **{change: fewer})
    with pytest.raises(ValueError, match="`calibration` was made for other scores"):
        other(texture(0))


def test_an_uncalibrated_pipeline_warns_once(pipe, caplog):
    warn_once.cache_clear()  # "once" is once a process
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pipe(texture(0))
    messages = [r.getMessage() for r in caplog.records if "not calibrated" in r.getMessage()]
    assert len(messages) == 1
    assert "calibrate(good_images)" in messages[0]


# -- the method --------------------------------------------------------------------------------------------------


def measured(pipe: AnomalyDenoisePipeline, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """KL (T, 16, 16) and mean square feature error (T, 8, 8) of one texture, written out image by image."""
    (image,) = images_to_tensors(texture(0))
    clean = images_to_pixel_values([image], (16, 16))
    noise = torch.randn(3, 3, 16, 16, generator=generator(seed))
    kl, errors = [], []
    with torch.no_grad():
        for level, t in enumerate((5, 50, 100)):
            timestep = torch.tensor([t])
            noisy = pipe.scheduler.add_noise(clean, noise[level : level + 1], timestep)
            prediction = pipe.unet(noisy, timestep)
            kl.append(kl_divergence_map(pipe.scheduler, prediction.sample, noisy, clean, timestep).mean(dim=1)[0])
            features = pipe.feature_extractor(clean, (8, 8))
            errors.append((features - prediction.features).square().mean(dim=1)[0])
    return torch.stack(kl), torch.stack(errors)


def test_the_denoiser_ends_with_the_features_where_no_kl_counts():
    """And maps are those of a KL that counts for nothing."""
    outputs, ran = [], []
    for alpha in (1e-12, 0.0):
        pipe = tiny_pipeline(alpha=alpha).calibrate(textures(20), false_alarm_rate=0.1, generator=generator())
        pipe.unet.conv_out.register_forward_hook(lambda *_, alpha=alpha: ran.append(alpha))
        outputs.append(pipe([texture(40), texture(41, defect=True)], generator=generator()))
    assert set(ran) == {1e-12}
    np.testing.assert_allclose(outputs[1].anomaly_map, outputs[0].anomaly_map, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(outputs[1].p_value, outputs[0].p_value)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_raw_map_is_equation_11(alpha):
    pipe = tiny_pipeline(alpha=alpha, kl_sigma=0.0, feature_sigma=0.0)
    kl, errors = measured(pipe, seed=4)
    errors = torch.nn.functional.interpolate(errors[None], (16, 16), mode="bilinear")[0]
    expected = (alpha * kl + (1.0 - alpha) * errors).mean(dim=0)
    actual = pipe(texture(0), generator=generator(4)).anomaly_map[0]
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_one_pass_of_the_network_for_all_noise_levels_of_a_batch(pipe):
    passes, looks = [], []
    pipe(textures(1))  # which makes the network that runs
    pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    extractor = pipe.feature_extractor.running_network()
    extractor.register_forward_pre_hook(lambda module, args: looks.append(len(args[0])))
    pipe(textures(10), batch_size=4)
    assert passes == [12, 12, 6]  # three noise levels an image
    assert looks == [4, 4, 2]  # the clean image's features once, not once a noise level


def test_the_batch_size_changes_only_rounding(calibrated):
    images = textures(7)
    outputs = [calibrated(images, batch_size=size, generator=generator(1)) for size in (1, 3, 7, 16)]
    for output in outputs[1:]:
        np.testing.assert_allclose(output.anomaly_map, outputs[0].anomaly_map, atol=1e-3, rtol=1e-4)
        np.testing.assert_allclose(output.anomaly_score, outputs[0].anomaly_score, atol=1e-3, rtol=1e-4)


def test_the_noise_of_an_image_depends_on_nothing_after_it(pipe):
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    draws = []
    for count, batch_size in ((7, 1), (7, 3), (5, 16)):
        seen.clear()
        pipe(textures(count), batch_size=batch_size, generator=generator(1))
        draws.append(torch.cat(seen)[: 5 * 3])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_a_generator_makes_a_call_repeatable_to_the_bit(calibrated):
    images = textures(5)
    first = calibrated(images, generator=generator(3))
    assert_same(calibrated(images, generator=generator(3)), first)
    assert not np.array_equal(calibrated(images, generator=generator(4)).anomaly_map, first.anomaly_map)


def test_a_call_without_a_generator_repeats_whatever_else_is_in_it(pipe):
    pipe.calibrate(textures(12), false_alarm_rate=0.3)
    together = pipe(textures(4))
    turned, alone = pipe(textures(4)[::-1], batch_size=3), pipe(texture(2))
    np.testing.assert_allclose(turned.anomaly_map[::-1], together.anomaly_map, atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(alone.anomaly_map[0], together.anomaly_map[2], atol=1e-3, rtol=1e-4)


def test_noise_that_the_statistics_do_not_know_warns_once(pipe, caplog):
    warn_once.cache_clear()
    pipe.calibrate(textures(12), false_alarm_rate=0.3)
    pipe(texture(0))
    assert "calibrated with its own noise" not in caplog.text
    pipe(textures(2), generator=[generator(), None])
    pipe(texture(0), generator=generator())
    assert caplog.text.count("calibrated with its own noise") == 1
    warn_once.cache_clear()
    caplog.clear()
    pipe.calibrate(textures(12), false_alarm_rate=0.3, generator=generator())
    pipe(texture(0), generator=generator())
    assert not caplog.text
    pipe(texture(0))
    pipe.explain(texture(0))
    assert caplog.text.count("calibrated with other noise than its own") == 1


@pytest.mark.parametrize(
    "change", [{"beta_schedule": "squaredcos_cap_v2"}, {"clip_sample": False}, {"trained_betas": [1e-3] * 1000}]
)
def test_another_scheduler_than_the_calibrations_warns(pipe, tmp_path, caplog, change):
    warn_once.cache_clear()
    pipe.calibrate(textures(8), false_alarm_rate=0.3).save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    loaded(texture(0))
    assert "other settings" not in caplog.text
    loaded.scheduler = tiny_scheduler(**change)
    loaded(texture(0))
    assert "calibrated with other settings (scheduler)" in caplog.text


@pytest.mark.parametrize(
    "scheduler_class",
    [
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        DDIMInverseScheduler,
    ],
)
def test_a_scheduler_that_noises_in_another_way_is_refused_where_it_was_swapped(calibrated, tmp_path, scheduler_class):
    scheduler = scheduler_class.from_config(calibrated.scheduler.config)
    calibrated.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`scheduler` is a {scheduler_class.__name__}.*use DDPMScheduler"):
        AnomalyDenoisePipeline.from_pretrained(tmp_path, scheduler=scheduler)
    calibrated.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`scheduler` is a {scheduler_class.__name__}.*use DDPMScheduler"):
        calibrated(texture(0))


def test_a_scheduler_that_does_not_say_whether_it_clips_is_refused_where_it_was_swapped(calibrated):
    calibrated.scheduler = PNDMScheduler()
    with pytest.raises(ValueError, match=r"`scheduler` is a PNDMScheduler.*use DDPMScheduler"):
        calibrated(texture(0))
    calibrated.scheduler = DDPMScheduler(50)
    with pytest.raises(ValueError, match=r"`scheduler` has 50 timesteps.*`timesteps` go to 100"):
        calibrated(texture(0))


def test_a_call_does_not_depend_on_the_default_precision(calibrated):
    expected = calibrated(texture(0))
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(calibrated(texture(0)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_scheduler_that_noises_alike_gives_the_same(calibrated):
    expected = calibrated(texture(0))
    calibrated.scheduler = DDIMScheduler.from_config(calibrated.scheduler.config)
    assert_same(calibrated(texture(0)), expected)


@pytest.mark.parametrize(
    "make_batch", [list, np.stack, lambda images: torch.from_numpy(np.stack(images)).movedim(3, 1)]
)
def test_batches_are_no_images_to_calibrate_with(pipe, make_batch):
    batches = [make_batch(textures(6)), make_batch(textures(6, first_seed=50))]
    with pytest.raises(ValueError, match=r"`images\[\d\]` is a batch: make a list of single images"):
        pipe.calibrate(batches, false_alarm_rate=0.3)


def test_columns_of_pandas_are_named(pipe):
    column = pd.Series(textures(12))[2:]
    with pytest.raises(ValueError, match=r"`images` is a column of pandas: pass `list\(images\)`"):
        pipe.calibrate(column, false_alarm_rate=0.3)
    pipe.calibrate(list(column), false_alarm_rate=0.3)


def test_numbers_of_numpy_are_saved(tmp_path):
    pipe = tiny_pipeline(
        kl_sigma=np.float32(1.5),
        timesteps=np.array([5, 50]),
        weights={"kl": np.float32(1.0), "feature_error": Fraction(1, 2)},
        score_strides=np.array([2]),
        value_range=np.uint16(255),
    )
    pipe.calibrate(textures(12), false_alarm_rate=np.float32(0.25), smallest_area=np.float64(0.01))
    pipe.save_pretrained(tmp_path)
    assert_same(AnomalyDenoisePipeline.from_pretrained(tmp_path)(texture(0)), pipe(texture(0)))


def test_more_categories_than_were_calibrated_are_told(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path)
    names = ["bottle", "cable"]
    with pytest.raises(ValueError, match=r"`calibration` is of 1 category, but `categories` names 2.*calibration=None"):
        AnomalyDenoisePipeline.from_pretrained(tmp_path, categories=names)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path, categories=names, calibration=None)
    for name in names:
        loaded.calibrate(textures(12), false_alarm_rate=0.25, category=name)
    assert loaded(texture(0), category="cable").p_value is not None


def test_a_generator_an_image_makes_images_independent(calibrated):
    images = textures(4)
    together = calibrated(images, generator=[generator(i) for i in range(4)])
    turned = calibrated(images[::-1], generator=[generator(i) for i in (3, 2, 1, 0)])
    alone = calibrated(images[2], generator=[generator(2)])
    np.testing.assert_allclose(turned.anomaly_map[::-1], together.anomaly_map, atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(alone.anomaly_map[0], together.anomaly_map[2], atol=1e-3, rtol=1e-4)


def test_no_argument_is_changed(calibrated):
    array, tensor = texture(0) / 255.0, torch.from_numpy(texture(1) / 255.0).permute(2, 0, 1)
    kept = array.copy(), tensor.clone()
    output = calibrated([array, tensor])
    output.anomaly_map[:] = -1.0
    assert np.array_equal(array, kept[0])
    assert torch.equal(tensor, kept[1])


# -- calibration -------------------------------------------------------------------------------------------------


def test_good_images_are_zero_on_average_with_deviation_one():
    pipe = tiny_pipeline().calibrate(textures(120), false_alarm_rate=0.1, generator=generator())
    new = pipe(textures(40, first_seed=500), generator=generator(1))
    # joined from six maps that vary together in part: the mean stays, the deviation can only shrink
    assert abs(float(new.anomaly_map.mean())) < 0.15
    assert 0.2 < float(new.anomaly_map.std(axis=0).mean()) < 1.2


def test_new_good_images_seldom_raise_an_alarm_and_defects_do():
    pipe = tiny_pipeline().calibrate(textures(150), false_alarm_rate=0.1, generator=generator())
    good = pipe(textures(60, first_seed=1000), generator=generator(1))
    defective = pipe([texture(2000 + i, defect=True) for i in range(20)], generator=generator(2))
    assert good.is_anomalous.mean() < 0.25  # 0.1, and the noise of 50 calibration and 60 test images
    assert good.anomaly_mask.any(axis=(1, 2)).mean() < 0.25
    assert defective.is_anomalous.all()
    assert defective.p_value.max() <= 0.04
    assert defective.anomaly_score.min() > good.anomaly_score.max()


def test_the_map_is_higher_on_the_defect():
    pipe = tiny_pipeline().calibrate(textures(90), false_alarm_rate=0.1, generator=generator())
    images = [texture(2000 + i, defect=True) for i in range(20)]
    output = pipe(images, generator=generator(2))
    ratios = []
    for image, anomaly_map in zip(images, output.anomaly_map, strict=True):
        defect = (image == 0).all(axis=2)
        ratios.append(anomaly_map[defect].mean() / anomaly_map[~defect].mean())
    # an untrained network of 16 px sees the defect from everywhere, but most of it where it is
    assert min(ratios) > 1.0
    assert np.mean(ratios) > 1.3


@pytest.mark.parametrize("statistics", [False, True])
def test_each_good_image_is_read_once_and_never_all_at_once(pipe, statistics):
    """One pass and constant memory: a batch is learned from while the next is measured, and then is gone."""
    read, alive, references = [], [], []

    class Images:
        def __init__(self, first: int, count: int):
            self.first, self.count = first, count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, i: int) -> np.ndarray:
            read.append(self.first + i)
            return texture(self.first + i)

    measure = pipe.measure

    def watched(*args, **kwargs):
        alive.append(sum(reference() is not None for reference in references))
        measurement = measure(*args, **kwargs)
        references.extend([weakref.ref(measurement.maps), weakref.ref(measurement.residual)])
        return measurement

    pipe.measure = watched
    good = Images(0, 64)
    pipe.calibrate(good, statistics_images=Images(64, 32) if statistics else None, false_alarm_rate=0.1, batch_size=4)
    firsts = [0, 64] if statistics else [0, 0]  # looked at before: have they more than 8 bits?
    assert sorted(read) == sorted([*range(96 if statistics else 64), *firsts])
    assert len(alive) >= 16
    assert max(alive) <= 4  # of two batches: that which is learned from, and that which has just been


def test_statistics_images_leave_all_others_for_the_thresholds(pipe):
    pipe.calibrate(textures(20), statistics_images=textures(10, first_seed=50), false_alarm_rate=0.1)
    assert pipe.calibration.normal_scores.shape == (1, 20)
    pipe.calibrate(textures(21), false_alarm_rate=0.2)
    assert pipe.calibration.normal_scores.shape == (1, 11)
    assert (pipe.calibration.normal_scores.diff() >= 0).all()
    assert pipe.calibration.config.false_alarm_rate == 0.2


def test_maps_of_new_good_images_are_what_calibration_expects(pipe):
    # the residual's covariance has seen the images that the maps' statistics come from, and must not flatter them
    pipe.calibrate(textures(3), statistics_images=textures(40, first_seed=10), false_alarm_rate=0.3)
    residual_map = pipe.calibration.map_mean[0, -1].mean()
    indices = torch.zeros(40, dtype=torch.long)
    with torch.no_grad():
        measurement = pipe.measure_images(images_to_tensors(textures(40, first_seed=100)), indices, [None] * 40)
        new = pipe.score_maps(measurement, indices, pipe.calibration)[:, -1].mean()
    assert abs(float(residual_map - new)) < 0.1  # of logarithms; without the others' covariance it would be 1 too low


@pytest.mark.parametrize("count", [2, 4])
def test_few_images_give_finite_sane_maps(pipe, count):
    pipe.calibrate(textures(count), false_alarm_rate=0.5)
    output = pipe(textures(10, first_seed=50), generator=generator())
    assert np.isfinite(output.anomaly_map).all()
    assert np.abs(output.anomaly_map).max() < 50.0  # not a thousand deviations because two images looked alike
    assert pipe.calibration.normal_scores.shape == (1, count // 2)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_are_too_few(pipe, count):
    with pytest.raises(ValueError, match=f"`images` holds {count} good images and `statistics_images`.*takes 1"):
        pipe.calibrate(textures(count))
    assert pipe.calibration is None


def test_too_few_statistics_images(pipe):
    with pytest.raises(ValueError, match="`statistics_images`"):
        pipe.calibrate(textures(5), statistics_images=[], false_alarm_rate=0.3)


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0])
def test_a_wrong_rate_is_refused(pipe, rate):
    with pytest.raises(ValueError, match="`false_alarm_rate`"):
        pipe.calibrate(textures(3), false_alarm_rate=rate)


@pytest.mark.parametrize(
    "arguments",
    [
        {"images": "good_parts"},
        {"images": Path("good_parts")},
        {"images": iter(textures(3))},
        {"images": None},
        {"statistics_images": "good_parts"},
        {"false_alarm_rate": "0.1"},
        {"smallest_area": "0.1"},
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": 2.5},
        {"generator": 0},
    ],
)
def test_wrong_arguments_of_a_calibration_are_named(pipe, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"`{name}`.*{'find_images' if 'good_parts' in str(arguments) else ''}"):
        pipe.calibrate(**{"images": textures(4), "false_alarm_rate": 0.3, **arguments})
    assert pipe.calibration is None


@pytest.mark.parametrize(
    "setting",
    [
        {"score_fraction": 2.0},
        {"score_fraction": -0.5},
        {"kl_sigma": -1.0},
        {"feature_sigma": float("nan")},
        {"timesteps": [5.5]},
        {"alpha": "x"},
    ],
)
def test_wrong_settings_are_named_before_any_work(setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` must"):
        tiny_pipeline(**setting)


def test_a_rate_that_the_images_cannot_vouch_for_is_told(pipe):
    with pytest.warns(UserWarning, match="at least 99 such images") as caught:
        pipe.calibrate(textures(6), false_alarm_rate=0.01)
    assert len([w for w in caught if "such images" in str(w.message)]) == 1


def test_constant_images_give_no_nan(pipe):
    black = [np.zeros((16, 16, 3), np.uint8)] * 9
    pipe.calibrate(black, false_alarm_rate=0.3)
    for image in (black[0], texture(0), np.full((16, 16, 3), 255, np.uint8)):
        output = pipe(image)
        assert np.isfinite(output.anomaly_map).all()
        assert np.isfinite(output.anomaly_score).all()


def test_a_network_that_says_the_same_everywhere_gives_no_nan():
    pipe = tiny_pipeline()
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    for buffer in pipe.feature_extractor.network.parameters():
        buffer.data.zero_()
    pipe.calibrate([np.zeros((16, 16, 3), np.uint8)] * 9, false_alarm_rate=0.3, generator=generator())
    assert np.isfinite(pipe(texture(0)).anomaly_map).all()


def test_calibration_is_repeatable_to_the_bit(pipe):
    pipe.calibrate(textures(12), false_alarm_rate=0.3, generator=generator(5))
    first = {name: buffer.clone() for name, buffer in pipe.calibration.named_buffers()}
    pipe.calibrate(textures(12), false_alarm_rate=0.3, generator=generator(5))
    for name, buffer in pipe.calibration.named_buffers():
        assert torch.equal(buffer, first[name]), name


def test_what_waits_while_calibrating_is_bounded(pipe, monkeypatch):
    monkeypatch.setattr(detection, "MAX_STATISTICS_IMAGES", 4)
    pipe.calibrate(textures(15), false_alarm_rate=0.3, generator=generator())
    assert pipe.calibration.num_good_images(0) == 11  # what is too much for the statistics is left for the thresholds
    statistics = [texture(100 + i) for i in range(9)]
    pipe.calibrate(textures(5), statistics, false_alarm_rate=0.3, generator=generator())
    few = pipe.calibration.map_mean.clone()
    pipe.calibrate(textures(5), [statistics[i] for i in (0, 2, 4, 6)], false_alarm_rate=0.3, generator=generator())
    assert torch.equal(few, pipe.calibration.map_mean)  # evenly spread
    assert [detection.spread(range(1, n, 2), 512)[-1] for n in (2, 9, 1024)] == [1, 7, 1023]


def test_calibration_takes_paths_and_columns(pipe, tmp_path):
    from datasets import Dataset

    paths = [str(write_png(tmp_path / f"{i}.png", pixels)) for i, pixels in enumerate(textures(9))]
    expected = pipe.calibrate(textures(9), false_alarm_rate=0.3, generator=generator()).calibration
    column = Dataset.from_dict({"image": [Image.open(path) for path in paths]})["image"]
    for images in (paths, column, np.stack(textures(9))):
        actual = pipe.calibrate(images, false_alarm_rate=0.3, generator=generator()).calibration
        assert torch.equal(actual.map_mean, expected.map_mean)
        assert torch.equal(actual.normal_scores, expected.normal_scores)


# -- categories --------------------------------------------------------------------------------------------------


@pytest.fixture
def unified() -> AnomalyDenoisePipeline:
    return tiny_pipeline(categories=["bottle", "cable", "screw"])


def test_wrong_categories_list_the_right_ones(unified):
    for category in ("nut", 3, -1, ["bottle", "nut"]):
        images = textures(2) if isinstance(category, list) else texture(0)
        with pytest.raises(ValueError, match=r"`category`.*bottle, cable, screw"):
            unified(images, category=category)
    with pytest.raises(ValueError, match=r"`category` is needed.*bottle, cable, screw"):
        unified(texture(0))
    with pytest.raises(ValueError, match="`category` lists 1 names for 2 images"):
        unified(textures(2), category=["bottle"])
    with pytest.raises(ValueError, match=r"`category` is needed.*bottle, cable, screw"):
        unified.calibrate(textures(3))


def test_a_category_is_a_name_or_an_index_for_all_or_each(unified):
    images = textures(3)
    draws = {
        name: unified(images, category=category, generator=generator()).anomaly_map
        for name, category in {
            "name": "cable",
            "index": 1,
            "tensor": torch.tensor(1),
            "array": np.array(["cable"] * 3),
            "each": ["cable"] * 3,
            "mixed": ["bottle", 1, "screw"],
            "other": "bottle",
        }.items()
    }
    assert np.array_equal(draws["name"], draws["index"])
    for same in ("each", "tensor", "array"):
        assert np.array_equal(draws["name"], draws[same])
    np.testing.assert_allclose(draws["mixed"][1], draws["name"][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(draws["mixed"][0], draws["other"][0], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(draws["name"], draws["other"])


def test_each_category_keeps_its_calibration(unified):
    unified.calibrate(textures(9), false_alarm_rate=0.3, category="bottle", batch_size=1)
    bottle = {name: buffer[0].clone() for name, buffer in unified.calibration.named_buffers()}
    before = unified(textures(2), category="bottle")
    unified.calibrate([image[::-1] // 2 for image in textures(21)], false_alarm_rate=0.3, category=2, batch_size=1)
    assert unified.calibration.normal_scores.shape == (3, 11)
    for name, buffer in unified.calibration.named_buffers():
        of_images = name in ("normal_scores", "normal_maxima")
        kept = buffer[0, ..., :5] if of_images else buffer[0]
        assert torch.equal(kept, bottle[name]), name
        if not of_images:
            assert not torch.equal(buffer[0], buffer[2]), name
    assert_same(unified(textures(2), category="bottle"), before)
    # fewer images than before leave nothing of the earlier ones
    unified.calibrate(textures(9), false_alarm_rate=0.3, category="screw")
    assert int((~unified.calibration.normal_scores[2].isnan()).sum()) == 5
    assert (unified.calibration.image_threshold[1] == float("inf")).all()  # cable was never calibrated


def test_one_category_is_not_calibrated_otherwise_than_the_others(unified):
    unified.calibrate(textures(9), false_alarm_rate=0.3, category="bottle")
    with pytest.raises(ValueError, match=r"other categories were calibrated with other settings \(generator\)"):
        unified.calibrate(textures(9), false_alarm_rate=0.3, category="cable", generator=generator())
    other = AnomalyDenoisePipeline(**unified.components, categories=["bottle", "cable", "screw"], timesteps=[5])
    with pytest.raises(ValueError, match="`calibration` holds other categories' statistics"):
        other.calibrate(textures(9), false_alarm_rate=0.3, category="cable")


def test_another_false_alarm_rate_is_that_of_all_categories(unified):
    good = textures(21)
    unified.calibrate(good, category="bottle")
    assert unified.calibration.config.false_alarm_rate == 0.01
    unified.calibrate(good, false_alarm_rate=0.4, category="bottle")
    expected = [getattr(unified.calibration, name)[0].clone() for name in ("image_threshold", "pixel_threshold")]
    unified.calibrate(good, false_alarm_rate=0.2, category="bottle")
    assert unified.calibration.image_threshold[0] > expected[0]
    unified.calibrate(textures(9), false_alarm_rate=0.4, category="cable")
    assert unified.calibration.config.false_alarm_rate == 0.4
    for name, value in zip(("image_threshold", "pixel_threshold"), expected, strict=True):
        assert getattr(unified.calibration, name)[0] == value, name
    unified.calibrate(textures(9), category="screw")  # as they are
    assert unified.calibration.config.false_alarm_rate == 0.4
    assert unified.calibration.image_threshold[0] == expected[0]


def test_an_earlier_calibration_that_kept_no_maxima_is_refused_another_rate():
    unified = tiny_pipeline(categories=["bottle", "cable"], score_fraction=0.1)
    known = unified.calibrate(textures(9), false_alarm_rate=0.3, category="bottle").calibration
    config = {name: value for name, value in known.config.items() if not name.startswith("_")}
    earlier = ScoreCalibration(**{**config, "keeps_maxima": False})
    earlier.load_state_dict({name: value for name, value in known.state_dict().items() if name != "normal_maxima"})
    unified.register_modules(calibration=earlier.eval())
    with pytest.raises(ValueError, match=r"`false_alarm_rate` is 0.4, and category 0 was calibrated at 0.3"):
        unified.calibrate(textures(9), false_alarm_rate=0.4, category="cable")
    assert unified.calibrate(textures(9), category="cable").calibration.false_alarm_rate == 0.3


# -- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [AnomalyDenoisePipeline, DiffusionPipeline])
@pytest.mark.parametrize("calibrate", [False, True])
def test_saved_and_loaded_to_the_bit(pipe, tmp_path, loader, calibrate):
    if calibrate:
        pipe.calibrate(textures(9), false_alarm_rate=0.3, generator=generator())
    pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is AnomalyDenoisePipeline
    images = textures(3, (20, 28))
    assert_same(loaded(images, generator=generator()), pipe(images, generator=generator()))


def test_options_survive_saving(tmp_path):
    pipe = tiny_pipeline(
        categories=["a", "b"], timesteps=[3, 30], alpha=0.2, kl_sigma=0.5, feature_sigma=1.5, score_fraction=0.1
    )
    pipe.calibrate(textures(9), false_alarm_rate=0.3, category="b")
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    for name in ("timesteps", "alpha", "kl_sigma", "feature_sigma", "score_fraction", "processing_resolution"):
        assert getattr(loaded.config, name) == getattr(pipe.config, name), name
    assert loaded.categories == ["a", "b"]
    assert loaded.processing_resolution == 16
    assert_same(
        loaded(texture(0), category="b", generator=generator()), pipe(texture(0), category="b", generator=generator())
    )


def test_weights_and_statistics_are_safetensors(calibrated, tmp_path: Path):
    calibrated.save_pretrained(tmp_path)
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    weights = [name for name in files if Path(name).suffix not in (".json", ".py", ".md")]
    parts = ("unet", "feature_extractor", "calibration")
    assert sorted(weights) == sorted(f"{part}/diffusion_pytorch_model.safetensors" for part in parts)
    assert json.loads((tmp_path / "model_index.json").read_text())["calibration"][1] == "ScoreCalibration"


def test_components_can_be_exchanged(calibrated):
    again = AnomalyDenoisePipeline(**calibrated.components)
    assert again.calibration is calibrated.calibration
    raw = AnomalyDenoisePipeline(tiny_unet(), tiny_scheduler(), tiny_extractor())
    assert raw.calibration is None


# -- precision and compilation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_maps_close_to_full(calibrated, dtype):
    images = textures(4)
    expected = calibrated(images, generator=generator())
    thresholds = calibrated.calibration.image_threshold.clone()
    half = calibrated.to(dtype=dtype)
    assert half.unet.dtype == half.feature_extractor.dtype == dtype
    output = half(images, generator=generator())
    assert output.anomaly_map.dtype == np.float32
    assert np.isfinite(output.anomaly_map).all()
    # in deviations of good images
    assert np.abs(output.anomaly_map - expected.anomaly_map).mean() < 0.2
    assert torch.equal(half.calibration.image_threshold, thresholds)


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated")
@pytest.mark.parametrize(("keyword", "dtype"), [("dtype", torch.bfloat16), ("torch_dtype", torch.float16)])
def test_loaded_in_half_precision(calibrated, tmp_path, keyword, dtype):
    calibrated.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **{keyword: dtype})
    assert loaded.unet.dtype == dtype
    for name, buffer in loaded.calibration.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, getattr(calibrated.calibration, name)), name
    images = textures(4)
    expected = calibrated(images, generator=generator())
    loaded.set_progress_bar_config(disable=True)
    output = loaded(images, generator=generator())
    assert np.abs(output.anomaly_map - expected.anomaly_map).mean() < 0.2


@pytest.mark.parametrize("calibrate", [False, True])
def test_under_autocast_maps_are_float32(pipe, calibrate):
    if calibrate:
        pipe.calibrate(textures(30), false_alarm_rate=0.1, generator=generator())
    expected = pipe(textures(4), generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        output = pipe(textures(4), generator=generator())
    assert output.anomaly_map.dtype == np.float32
    assert np.abs(output.anomaly_map - expected.anomaly_map).mean() < 0.2 * expected.anomaly_map.std()


def test_half_precision_with_an_extractor_of_another_size():
    pipe = tiny_pipeline(sample_size=32, image_size=24).to(dtype=torch.bfloat16)
    assert np.isfinite(pipe(texture(0, 40)).anomaly_map).all()


def test_a_compiled_denoiser_gives_the_same_maps(calibrated):
    images = textures(3)
    expected = calibrated(images, generator=generator())
    calibrated.unet = torch.compile(calibrated.unet, backend="eager")
    output = calibrated(images, generator=generator())
    np.testing.assert_allclose(output.anomaly_map, expected.anomaly_map, atol=1e-3, rtol=1e-4)


def test_an_alpha_that_does_not_count_is_told(caplog):
    with caplog.at_level("WARNING", "diffad"):
        tiny_pipeline(weights={"kl": 1.0})
        assert not caplog.records
        tiny_pipeline(weights={"kl": 1.0}, alpha=0.3)
    assert "`alpha` of 0.3 does not count where there are `weights`" in caplog.text
