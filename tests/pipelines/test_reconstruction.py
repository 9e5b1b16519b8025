"""Normal images out of defective ones: gradient denoising, and the plain DDPM that it is compared with.

Long, as both are tried on one fitted pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from PIL import Image

from diffad import AnomalyDenoisePipeline, DDPMReconstructionPipeline
from diffad.images import images_to_pixel_values, images_to_tensors
from diffad.pipelines.pipeline_ddpm_reconstruction import total_inference_steps
from diffad.pipelines.pipeline_gradient_denoising import GradientDenoisingPipeline, noise_timesteps
from diffad.warn_once import warn_once

GAUSSIAN = {"num_channels": 16, "feature_size": 8}
FAST = {"num_iterations": 7, "denoise_every": 3}


def fitted(count: int = 60, **config) -> AnomalyDenoisePipeline:
    return tiny_pipeline(**config).fit_gaussian(textures(count), generator=generator(), **GAUSSIAN)


@pytest.fixture(scope="module")
def pipe() -> AnomalyDenoisePipeline:
    """Not changed by any test."""
    return fitted()


@pytest.fixture(scope="module")
def plain() -> AnomalyDenoisePipeline:
    return tiny_pipeline()


def defective(count: int = 3, size: int = 16) -> list[np.ndarray]:
    return [texture(700 + i, size, defect=True) for i in range(count)]


def pixel_values(images: Sequence[np.ndarray] | np.ndarray, size: int = 16) -> torch.Tensor:
    return images_to_pixel_values(images_to_tensors(list(images)), (size, size))


class Watch:
    """The timesteps of each pass of the denoiser."""

    def __init__(self, pipe: AnomalyDenoisePipeline):
        self.passes: list[torch.Tensor] = []
        self.hook = pipe.unet.register_forward_pre_hook(lambda module, args: self.passes.append(args[1]))

    def __enter__(self) -> list[torch.Tensor]:
        return self.passes

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()


# -- the Gaussian ------------------------------------------------------------------------------------------------


def test_without_a_gaussian_it_says_how_to_get_one(plain):
    with pytest.raises(ValueError, match=r"no `gaussian`.*fit_gaussian\.py.*pipe\.fit_gaussian\(images\)"):
        plain.reconstruct(texture(0))


def test_the_gaussian_sees_good_images_and_what_denoising_makes_of_them(pipe):
    assert pipe.gaussian.num_images.tolist() == [60]
    seen = []
    fresh = tiny_pipeline()
    with Watch(fresh) as passes:
        fresh.unet.register_forward_hook(lambda module, args, output: seen.append(len(output.sample)))
        fresh.fit_gaussian(textures(10), batch_size=4, generator=generator(), **GAUSSIAN)
    assert seen == [4, 4, 2]
    # the noise that five gradient steps of 0.02 would add, were they independent
    expected = (1.0 - fresh.scheduler.alphas_cumprod - (1.0 - (1.0 - 0.02**2) ** 5)).abs().argmin()
    assert {int(t) for timesteps in passes for t in timesteps} == {int(expected)}


def test_fitting_is_repeatable_and_does_not_depend_on_the_batch_size():
    images = textures(12)
    first = tiny_pipeline().fit_gaussian(images, generator=generator(3), batch_size=5, **GAUSSIAN).gaussian
    again = tiny_pipeline().fit_gaussian(images, generator=generator(3), batch_size=5, **GAUSSIAN).gaussian
    other = tiny_pipeline().fit_gaussian(images, generator=generator(3), batch_size=12, **GAUSSIAN).gaussian
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.whitening, again.whitening)
    torch.testing.assert_close(other.mean, first.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.whitening, first.whitening, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_is_too_few_to_fit(plain, count):
    with pytest.raises(ValueError, match=rf"`images` holds {count} images.*at least 2 good images"):
        plain.fit_gaussian(textures(count), **GAUSSIAN)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": "good_parts"}, "`images` must be a sequence.*find_images"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"generator": 3}, "`generator`"),
        ({"num_chanels": 3}, "`num_chanels` is no option of the Gaussian, which has .*num_channels"),
        ({"feature_size": 0}, "`feature_size`"),
        ({"sigma": -1.0}, "`sigma`"),
        ({"learning_rate": "a"}, "`learning_rate`"),
    ],
)
def test_wrong_arguments_of_a_fit_are_named(plain, arguments, words):
    with pytest.raises(ValueError, match=words):
        plain.fit_gaussian(**{"images": textures(3), **arguments})


# -- gradient denoising ------------------------------------------------------------------------------------------


def test_batched_equals_one_by_one(pipe):
    images = [*defective(4), *textures(3)]
    whole = pipe.reconstruct(images, **FAST)
    for batch_size in (1, 3):
        parts = pipe.reconstruct(images, batch_size=batch_size, **FAST)
        np.testing.assert_allclose(parts.reconstruction, whole.reconstruction, atol=2e-3)
        np.testing.assert_allclose(parts.anomaly_map, whole.anomaly_map, atol=2e-3)
    alone = pipe.reconstruct(images[2], **FAST)
    np.testing.assert_allclose(alone.reconstruction[0], whole.reconstruction[2], atol=2e-3)


def test_the_same_call_gives_the_same_bits_without_a_generator(pipe):
    torch.manual_seed(0)
    first = pipe.reconstruct(defective(), **FAST)
    with torch.inference_mode():
        assert np.array_equal(pipe.reconstruct(defective(), **FAST).reconstruction, first.reconstruction)
    torch.manual_seed(1)
    again = pipe.reconstruct(defective(), **FAST)
    assert np.array_equal(first.reconstruction, again.reconstruction)
    assert np.array_equal(first.anomaly_map, again.anomaly_map)


def test_shapes_ranges_and_types(pipe):
    images = [texture(i, (20, 28), defect=True) for i in range(2)]
    output = pipe.reconstruct(images, return_trajectory=True, **FAST)
    assert output.reconstruction.shape == (2, 20, 28, 3)
    assert output.reconstruction.dtype == np.float32
    assert output.anomaly_map.shape == (2, 20, 28)
    assert output.anomaly_score.shape == (2,)
    assert output.trajectory.shape == (2, 4, 20, 28, 3)  # the input, and after steps 3, 6 and 7
    for values in (output.reconstruction, output.anomaly_map, output.trajectory):
        assert values.min() >= 0.0
        assert values.max() <= 1.0
    assert output.anomaly_mask is output.is_anomalous is output.p_value is None
    assert np.array_equal(output.trajectory[:, -1], output.reconstruction)
    # at the processing resolution the first state is the image as the denoiser sees it
    small = pipe.reconstruct(images, return_trajectory=True, match_input_resolution=False, output_type="pt", **FAST)
    assert small.trajectory.shape == (2, 4, 3, 16, 16)
    torch.testing.assert_close(small.trajectory[:, 0], pixel_values(images) / 2.0 + 0.5)
    difference = (small.reconstruction - small.trajectory[:, 0]).abs().mean(dim=1)
    assert 0.5 < float(small.anomaly_map.mean() / difference.mean()) < 2.0  # it is that difference, smoothed


def test_output_types_hold_the_same_values(pipe):
    outputs = {
        kind: pipe.reconstruct(defective(2), output_type=kind, return_trajectory=True, **FAST)
        for kind in ("np", "pt", "pil")
    }
    array, tensor, pil = outputs["np"], outputs["pt"], outputs["pil"]
    assert tensor.reconstruction.shape == (2, 3, 16, 16)
    assert tensor.trajectory.shape == (2, 4, 3, 16, 16)
    assert np.array_equal(tensor.reconstruction.permute(0, 2, 3, 1), array.reconstruction)
    assert np.array_equal(tensor.trajectory.permute(0, 1, 3, 4, 2), array.trajectory)
    assert np.array_equal(tensor.anomaly_map, array.anomaly_map)
    assert [len(frames) for frames in pil.trajectory] == [4, 4]
    assert all(isinstance(frame, Image.Image) for frames in pil.trajectory for frame in frames)
    rounded = np.stack([np.stack([np.asarray(frame) for frame in frames]) for frames in pil.trajectory])
    assert np.array_equal(rounded, (array.trajectory * 255.0).round().astype(np.uint8))
    assert np.array_equal(np.asarray(pil.reconstruction[1]), rounded[1, -1])
    assert pipe.reconstruct(defective(1), **FAST).trajectory is None


def test_a_tuple_has_the_fields_in_their_order(pipe):
    output = pipe.reconstruct(defective(1), return_trajectory=True, **FAST)
    values = pipe.reconstruct(defective(1), return_trajectory=True, return_dict=False, **FAST)
    assert isinstance(values, tuple)
    assert len(values) == 7
    assert np.array_equal(values[0], output.anomaly_map)
    assert np.array_equal(values[2], output.reconstruction)
    assert np.array_equal(values[6], output.trajectory)


def test_the_mahalanobis_energy_falls(pipe):
    images = defective(6)
    output = pipe.reconstruct(images, num_iterations=30, match_input_resolution=False, output_type="pt")
    before = pipe.gaussian.squared_distance(pixel_values(images)).mean(dim=(1, 2))
    after = pipe.gaussian.squared_distance(output.reconstruction * 2.0 - 1.0).mean(dim=(1, 2))
    assert (after < 0.5 * before).all()


def test_the_first_step_is_equation_13(pipe):
    """One gradient step without denoising, written out."""
    clean = pixel_values(defective(2))
    gradient = pipe.gaussian.energy_gradient(clean)
    scaled = torch.stack([one / one.std() for one in gradient])
    expected = (1.0 - 0.1**2) ** 0.5 * clean - 0.1 * scaled
    output = pipe.reconstruct(
        defective(2), num_iterations=1, learning_rate=0.1, denoise_every=None, match_input_resolution=False
    )
    expected = (expected / 2.0 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1)
    np.testing.assert_allclose(output.reconstruction, expected, atol=1e-5)


def test_denoising_comes_as_often_as_asked_and_at_the_noise_that_was_added(pipe):
    seen = []

    def watch(pipe, iteration, timesteps, tensors):
        seen.append((iteration, timesteps.clone()))
        return tensors

    with Watch(pipe) as passes:
        pipe.reconstruct(defective(2), callback_on_step_end=watch, **FAST)
    assert len(passes) == 3  # after steps 3, 6 and 7
    for timesteps, iteration in zip(passes, (2, 5, 6), strict=True):
        assert torch.equal(timesteps, seen[iteration][1])
    # three gradient steps add more noise than one
    assert (seen[2][1] > seen[0][1]).all()
    assert (seen[2][1] > seen[3][1]).all()
    with Watch(pipe) as passes:
        pipe.reconstruct(defective(1), num_iterations=4, denoise_every=None)
    assert passes == []


def test_denoising_makes_a_difference(pipe):
    with_it, without = (
        pipe.reconstruct(defective(2), num_iterations=10, denoise_every=every).reconstruction for every in (5, None)
    )
    assert np.abs(with_it - without).mean() > 1e-3
    trajectory = pipe.reconstruct(defective(2), denoise_every=None, num_iterations=4, return_trajectory=True).trajectory
    assert trajectory.shape[1] == 2  # the image as it began and as it ended


def test_noise_has_its_timestep():
    scheduler = tiny_pipeline().scheduler
    variance = 1.0 - scheduler.alphas_cumprod[[0, 7, 500, 999]]
    assert noise_timesteps(scheduler, variance).tolist() == [0, 7, 500, 999]
    assert noise_timesteps(scheduler, torch.tensor([0.0, 2.0])).tolist() == [0, 999]


def test_no_argument_is_changed(pipe):
    array, tensor = texture(0) / 255.0, torch.from_numpy(texture(1) / 255.0).permute(2, 0, 1)
    kept = array.copy(), tensor.clone()
    pipe.reconstruct([array, tensor], return_trajectory=True, **FAST)
    assert np.array_equal(array, kept[0])
    assert torch.equal(tensor, kept[1])


# -- callback and progress ---------------------------------------------------------------------------------------


def test_a_callback_sees_every_iteration_of_every_batch(pipe):
    calls = []

    def watch(pipe, iteration, timesteps, tensors):
        assert isinstance(pipe, GradientDenoisingPipeline)
        calls.append((iteration, tuple(tensors["sample"].shape), tuple(timesteps.shape)))
        return {}  # nothing to replace

    watched = pipe.reconstruct(defective(3), num_iterations=4, batch_size=2, callback_on_step_end=watch)
    assert calls == [(i, (n, 3, 16, 16), (n,)) for n in (2, 1) for i in range(4)]
    expected = pipe.reconstruct(defective(3), num_iterations=4, batch_size=2)
    assert np.array_equal(watched.reconstruction, expected.reconstruction)


def test_a_callback_replaces_the_sample(pipe):
    def grey_at(which: int):
        def replace(pipe, iteration, timesteps, tensors):
            return {"sample": torch.zeros_like(tensors["sample"])} if iteration == which else tensors

        return replace

    last = pipe.reconstruct(defective(2), num_iterations=4, callback_on_step_end=grey_at(3))
    np.testing.assert_allclose(last.reconstruction, 0.5)
    # what it returns in the middle is gone on with: both images are the same from there on, and no longer grey
    middle = pipe.reconstruct(defective(2), num_iterations=6, denoise_every=2, callback_on_step_end=grey_at(1))
    np.testing.assert_allclose(middle.reconstruction[0], middle.reconstruction[1], atol=1e-4)
    assert np.abs(middle.reconstruction - 0.5).max() > 1e-2


def test_the_progress_bar_counts_iterations_of_all_batches(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    try:
        pipe.reconstruct(defective(3), num_iterations=4, batch_size=2)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "8/8" in capsys.readouterr().err


# -- drawn denoising steps ---------------------------------------------------------------------------------------


def test_a_generator_draws_the_denoising_steps_repeatably(pipe):
    expected = pipe.reconstruct(defective(), **FAST).reconstruction
    first = pipe.reconstruct(defective(), generator=generator(1), **FAST).reconstruction
    again = pipe.reconstruct(defective(), generator=generator(1), **FAST).reconstruction
    other = pipe.reconstruct(defective(), generator=generator(2), **FAST).reconstruction
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 0.0 < np.abs(first - expected).mean() < 0.1


def test_a_drawn_step_passes_every_timestep_once(pipe):
    with Watch(pipe) as passes:
        pipe.reconstruct(defective(2), num_iterations=1, learning_rate=0.05, generator=generator())
    (begin,) = {int(timesteps.max()) for timesteps in passes[:1]}
    assert begin > 1
    assert [int(timesteps[0]) for timesteps in passes] == list(range(begin, -1, -1))
    assert [len(timesteps) for timesteps in passes[-1:]] == [2]


def test_an_image_without_a_generator_among_others_has_the_models_noise(pipe):
    options = {"num_iterations": 2, "denoise_every": 1}
    first, second = (
        pipe.reconstruct(textures(2), generator=[generator(), None], **options).reconstruction for _ in range(2)
    )
    alone = pipe.reconstruct(texture(1), generator=[torch.Generator().manual_seed(0)], **options).reconstruction
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first[1], alone[0], atol=1e-4)


def test_the_drawn_noise_of_an_image_does_not_depend_on_its_batch(pipe):
    images, step = defective(4), {"num_iterations": 1, "learning_rate": 0.05}
    together = pipe.reconstruct(images, generator=generator(5), **step).reconstruction
    for batch_size in (1, 3):
        parts = pipe.reconstruct(images, batch_size=batch_size, generator=generator(5), **step).reconstruction
        np.testing.assert_allclose(parts, together, atol=1e-4)
    fewer = pipe.reconstruct(images[:2], generator=generator(5), **step).reconstruction
    np.testing.assert_allclose(fewer, together[:2], atol=1e-4)
    listed = pipe.reconstruct(images, generator=[generator(i) for i in range(4)], **step).reconstruction
    alone = pipe.reconstruct(images[2], generator=[generator(2)], **step).reconstruction
    np.testing.assert_allclose(alone[0], listed[2], atol=1e-4)


# -- precision, resolution, categories, saving ---------------------------------------------------------------------


def test_half_precision_leaves_the_gradients_in_float32_and_stays_close(tmp_path):
    pipe = fitted()
    expected = pipe.reconstruct(defective(), **FAST)
    whitening = pipe.gaussian.whitening.clone()
    half = pipe.to(dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    assert half.gaussian.whitening.dtype == torch.float32
    assert torch.equal(half.gaussian.whitening, whitening)
    kinds = []

    def watch(pipe, iteration, timesteps, tensors):
        kinds.append((tensors["sample"].dtype, pipe.gaussian.energy_gradient(tensors["sample"]).dtype))
        return tensors

    output = half.reconstruct(defective(), callback_on_step_end=watch, **FAST)
    assert set(kinds) == {(torch.float32, torch.float32)}
    assert output.reconstruction.dtype == np.float32
    assert np.abs(output.reconstruction - expected.reconstruction).mean() < 0.01
    drawn = half.reconstruct(defective(), generator=generator(), **FAST)
    assert np.isfinite(drawn.reconstruction).all()


def test_under_autocast_it_stays_close(pipe):
    expected = pipe.reconstruct(defective(), **FAST)
    with torch.autocast("cpu", torch.bfloat16):
        output = pipe.reconstruct(defective(), **FAST)
    assert output.reconstruction.dtype == np.float32
    assert np.abs(output.reconstruction - expected.reconstruction).mean() < 0.01


def test_another_resolution_and_an_extractor_that_looks_closer():
    pipe = fitted(20, image_size=24)
    assert pipe.gaussian.config.image_size == 24
    output = pipe.reconstruct(defective(2, 40), processing_resolution=32, **FAST)
    assert output.reconstruction.shape == (2, 40, 40, 3)
    assert np.isfinite(output.reconstruction).all()


def test_each_category_descends_to_its_own_normal():
    pipe = tiny_pipeline(categories=["bright", "dark"])
    pipe.fit_gaussian(textures(30), category="bright", generator=generator(), **GAUSSIAN)
    images = textures(2, first_seed=900)
    with pytest.raises(ValueError, match=r"Category 1 is not fitted"):
        pipe.reconstruct(images, category="dark", **FAST)
    dark = [image // 3 for image in textures(30)]
    pipe.fit_gaussian(dark, category="dark", generator=generator(), **GAUSSIAN)
    assert pipe.gaussian.num_images.tolist() == [30, 30]

    options = {"num_iterations": 20, "learning_rate": 0.05}
    as_bright = pipe.reconstruct(images, category="bright", **options).reconstruction
    as_dark = pipe.reconstruct(images, category="dark", **options).reconstruction
    mixed = pipe.reconstruct(images, category=["bright", 1], **options).reconstruction
    assert as_dark.mean() < as_bright.mean()
    np.testing.assert_allclose(mixed[0], as_bright[0], atol=2e-3)
    np.testing.assert_allclose(mixed[1], as_dark[1], atol=2e-3)
    for category in ("grey", 2, ["bright"]):
        with pytest.raises(ValueError, match="`category`"):
            pipe.reconstruct(images, category=category)
    with pytest.raises(ValueError, match=r"`category` is needed.*bright, dark"):
        pipe.reconstruct(images)


@pytest.mark.parametrize("loader", [AnomalyDenoisePipeline, DiffusionPipeline])
def test_saved_and_loaded_with_its_gaussian_to_the_bit(pipe, tmp_path, loader):
    pipe.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is AnomalyDenoisePipeline
    expected = pipe.reconstruct(defective(), return_trajectory=True, **FAST)
    output = loaded.reconstruct(defective(), return_trajectory=True, **FAST)
    assert np.array_equal(output.trajectory, expected.trajectory)
    assert np.array_equal(output.anomaly_map, expected.anomaly_map)


def test_detection_does_not_change_with_a_gaussian(pipe, plain, caplog):
    with caplog.at_level(logging.ERROR):
        expected = plain(texture(0), generator=generator()).anomaly_map
        assert np.array_equal(pipe(texture(0), generator=generator()).anomaly_map, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": []}, "`image` is an empty list"),
        ({"image": np.full((16, 16), np.nan)}, "`image` holds NaN"),
        ({"image": [texture(0, 16), texture(1, 20)]}, r"`image`.*16x16, 20x20.*match_input_resolution=False"),
        ({"num_iterations": 0}, "`num_iterations` must be a positive integer"),
        ({"num_iterations": 2.5}, "`num_iterations`"),
        ({"learning_rate": 0.0}, r"`learning_rate` must lie in \(0, 1\)"),
        ({"learning_rate": 1.0}, "`learning_rate`"),
        ({"denoise_every": 0}, "`denoise_every` must be a positive integer, or None"),
        ({"denoise_every": 1.5}, "`denoise_every`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"processing_resolution": 15}, r"`processing_resolution`.*multiple of 2"),
        ({"output_type": "latent"}, "`output_type`"),
        ({"generator": 5}, "`generator`"),
        ({"generator": [generator(), generator()]}, "`generator`.*each of the 1 images"),
        ({"category": "bottle"}, "`category` 'bottle' is unknown"),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        pipe.reconstruct(**{"image": texture(0), **arguments})


@pytest.mark.parametrize(
    "call", [lambda pipe: pipe.reconstruct(texture(0)), lambda pipe: pipe.fit_gaussian(textures(3), **GAUSSIAN)]
)
def test_a_scheduler_that_noises_otherwise_is_refused(call):
    swapped = fitted(count=4)
    swapped.scheduler = EulerDiscreteScheduler.from_config(swapped.scheduler.config)
    with pytest.raises(ValueError, match=r"`scheduler` is a EulerDiscreteScheduler.*use DDPMScheduler"):
        call(swapped)


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe.reconstruct(texture(0), num_iterations=np.int64(2)),
        lambda pipe: pipe.denoise(texture(0), timestep=np.int64(20), num_inference_steps=np.int64(2)),
    ],
)
def test_counts_may_be_numpys_and_nan_is_no_verdict(call):
    damaged = fitted(count=4)
    assert np.isfinite(call(damaged).anomaly_score).all()
    with torch.no_grad():
        next(damaged.unet.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="are NaN, which is no verdict"):
        call(damaged)
    for fit in (damaged.calibrate, damaged.fit_gaussian):
        with pytest.raises(ValueError, match="of a good image holds NaN or infinity"):
            fit(textures(6))


def test_the_range_of_twelve_bits_stays(caplog):
    deep = [(image * 16.0).astype(np.uint16) for image in textures(40)]  # uint8 x 16
    pipe = tiny_pipeline().calibrate(deep, false_alarm_rate=0.25).fit_gaussian(deep, generator=generator(), **GAUSSIAN)
    assert pipe.value_range == 4095
    dark = deep[0] // 16
    for other, call in (
        (GradientDenoisingPipeline, pipe.reconstruct),
        (DDPMReconstructionPipeline, lambda image: pipe.denoise(image, timestep=20, num_inference_steps=2)),
    ):
        options = {} if other is GradientDenoisingPipeline else {"timestep": 20, "num_inference_steps": 2}
        of_pipe = other.from_pipe(pipe, dtype=pipe.dtype)
        assert np.array_equal(of_pipe(dark, **options).reconstruction, call(dark).reconstruction)
    warn_once.cache_clear()
    tiny_pipeline().fit_gaussian(deep, generator=generator(), **GAUSSIAN)
    assert "taken to lie in [0, 4095]" in caplog.text


def test_a_missing_file_is_named(pipe):
    with pytest.raises(FileNotFoundError, match=r"`image`.*no_such\.png"):
        pipe.reconstruct("no_such.png")


# -- the plain DDPM ----------------------------------------------------------------------------------------------

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm-solver": DPMSolverMultistepScheduler}


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_every_scheduler_noises_so_far_and_takes_so_many_steps(plain, name):
    scheduler = SCHEDULERS[name].from_config(plain.scheduler.config) if name else None
    kept = {} if scheduler is None else dict(scheduler.config)
    with Watch(plain) as passes:
        output = plain.denoise(
            textures(2, (20, 28)), timestep=200, num_inference_steps=10, scheduler=scheduler, generator=generator()
        )
    assert len(passes) == 10
    timesteps = [int(t) for t in passes]
    assert timesteps == sorted(timesteps, reverse=True)
    assert 200 - 20 <= timesteps[0] <= 200  # one spacing below at most
    assert timesteps[-1] < 25
    assert output.reconstruction.shape == (2, 20, 28, 3)
    assert output.anomaly_map.shape == (2, 20, 28)
    assert output.anomaly_score.shape == (2,)
    assert np.isfinite(output.reconstruction).all()
    assert output.reconstruction.min() >= 0.0
    assert output.reconstruction.max() <= 1.0
    assert output.anomaly_mask is output.is_anomalous is output.p_value is None
    if scheduler is not None:
        assert dict(scheduler.config) == kept
        again = plain.denoise(
            textures(2, (20, 28)), timestep=200, num_inference_steps=10, scheduler=scheduler, generator=generator()
        )
        assert np.array_equal(again.reconstruction, output.reconstruction)  # it was left as it had been


@pytest.mark.parametrize(
    ("timestep", "steps", "begin"),
    [
        *((250, 50, 245), (300, 50, 294), (700, 88, 696), (310, 50, 294), (1000, 30, 957), (1000, 3, 666)),
        *((250, 2, 250), (250, 3, 250), (250, 5, 248), (250, 10, 243)),
    ],
)
def test_as_many_steps_as_asked_begin_as_near_as_whole_timesteps_allow(plain, timestep, steps, begin):
    with Watch(plain) as passes:
        plain.denoise(texture(0), timestep=timestep, num_inference_steps=steps)
    assert len(passes) == steps
    assert int(passes[0]) == begin


@pytest.mark.parametrize(
    ("timestep", "steps", "nearest"), [(999, 400, 450), (500, 300, 251), (250, 150, 126), (250, 1, 2)]
)
def test_steps_that_no_spacing_has_are_named_with_the_nearest_that_one_has(plain, timestep, steps, nearest):
    with pytest.raises(
        ValueError, match=rf"`num_inference_steps`.*no {steps} .*`timestep` {timestep}.* is {nearest}\."
    ):
        plain.denoise(texture(0), timestep=timestep, num_inference_steps=steps)
    assert total_inference_steps(plain.scheduler, timestep, nearest) >= nearest


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (PNDMScheduler(), 10, "`scheduler` takes Runge-Kutta steps first.*`skip_prk_steps=True`"),
        (LCMScheduler(), 100, "`num_inference_steps`: the LCMScheduler has no 100 .* is 12"),
    ],
)
def test_a_scheduler_that_has_no_such_steps_is_told_by_its_name(plain, scheduler, steps, message):
    with pytest.raises(ValueError, match=message):
        plain.denoise(texture(0), timestep=250, num_inference_steps=steps, scheduler=scheduler)


def test_ddim_written_out(plain):
    image, noise = pixel_values([texture(0)]), torch.randn(1, 3, 16, 16, generator=generator(4))
    scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    scheduler.set_timesteps(16)
    timesteps = scheduler.timesteps[-5:]  # five steps of sixteen: from t = 248
    sample = scheduler.add_noise(image, noise, timesteps[:1])
    with torch.no_grad():
        for t in timesteps:
            sample = scheduler.step(plain.unet(sample, t).sample[:, :3], t, sample).prev_sample
    output = plain.denoise(
        texture(0),
        timestep=250,
        num_inference_steps=5,
        scheduler=DDIMScheduler.from_config(plain.scheduler.config),
        generator=[generator(4)],
        output_type="pt",
    )
    torch.testing.assert_close(output.reconstruction, (sample / 2.0 + 0.5).clamp(0.0, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_of_an_image_does_not_depend_on_its_batch(plain, name):
    options = {
        "timestep": 100,
        "num_inference_steps": 4,
        "scheduler": SCHEDULERS[name].from_config(plain.scheduler.config),
    }
    images = textures(5)
    whole = plain.denoise(images, generator=generator(2), **options).reconstruction
    for batch_size in (1, 2):
        parts = plain.denoise(images, batch_size=batch_size, generator=generator(2), **options).reconstruction
        np.testing.assert_allclose(parts, whole, atol=1e-3)
    fewer = plain.denoise(images[:3], generator=generator(2), **options).reconstruction
    np.testing.assert_allclose(fewer, whole[:3], atol=1e-3)
    listed = plain.denoise(images[:2], generator=[generator(0), generator(1)], **options).reconstruction
    alone = plain.denoise(images[1], generator=[generator(1)], **options).reconstruction
    np.testing.assert_allclose(alone[0], listed[1], atol=1e-3)
    assert np.abs(plain.denoise(images, generator=generator(3), **options).reconstruction - whole).mean() > 1e-3


def test_more_noise_changes_more(plain):
    changes = [
        plain.denoise(textures(4), timestep=t, num_inference_steps=5, generator=generator()).anomaly_map.mean()
        for t in (5, 50, 600)
    ]
    assert changes[0] < 0.02
    assert changes[0] < changes[1] < changes[2]


def test_the_baseline_takes_categories_and_half_precision():
    pipe = tiny_pipeline(categories=["a", "b"])
    options = {"timestep": 50, "num_inference_steps": 3}
    a, b = (pipe.denoise(texture(0), category=c, generator=generator(), **options).reconstruction for c in "ab")
    assert not np.array_equal(a, b)
    half = pipe.to(dtype=torch.bfloat16).denoise(texture(0), category="a", generator=generator(), **options)
    assert half.reconstruction.dtype == np.float32
    assert np.abs(half.reconstruction - a).mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"timestep": 0}, r"`timestep` must be an integer in \[1, 1000\]"),
        ({"timestep": 1001}, "`timestep`"),
        ({"timestep": 10.0}, "`timestep`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"timestep": 20, "num_inference_steps": 21}, r"`num_inference_steps`.*\[1, 20\], the latter being `timestep`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"generator": 5}, "`generator`"),
        ({"output_type": "latent"}, "`output_type`"),
        ({"category": "bottle"}, "`category` 'bottle' is unknown"),
        ({"image": []}, "`image` is an empty list"),
        ({"scheduler": "ddim"}, "`scheduler` must be one of diffusers"),
    ],
)
def test_wrong_arguments_of_the_baseline_are_named(plain, arguments, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        plain.denoise(**{"image": texture(0), **arguments})
