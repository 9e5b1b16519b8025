"""Gradient denoising (Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization", ICCV 2023, 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from diffad.images import (
    ImageInput,
    ImageSequence,
    Side,
    as_side,
    as_size,
    common_value_range,
    images_to_pixel_values,
    resize_images,
)
from diffad.likelihood import predicted_clean_sample, predicted_mean_log_variance
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.models.gaussian_feature_model import GaussianFeatureModel
from diffad.pipelines.base import AnomalyPipeline, register_categories
from diffad.pipelines.checks import (
    category_indices,
    check_batch_size,
    check_call,
    check_callback_inputs,
    check_forward_process,
    check_generator,
    check_good_images,
    check_value_range,
)
from diffad.pipelines.output import ReconstructionOutput, check_scores, convert_output
from diffad.process_share import process_share
from diffad.reading.grey_depth import warn_of_found_range
from diffad.scoring import difference_map, max_score, top_fraction_score
from diffad.seeding import draw_noise, image_generators, image_seeds, noise_generators

GAUSSIAN_OPTIONS = ("image_size", "feature_size", "num_channels", "epsilon", "sigma", "seed")  # of `fit_gaussian`


class GradientDenoisingPipeline(AnomalyPipeline):
    r"""Turns defective images into normal ones (Lu et al., section 3.4, algorithm 1).

    Each iteration descends the gradient of -log p of the image's features under `gaussian` (eq. 12), scaled to unit
    variance, and decays the image (eq. 13): x <- sqrt(1 - s^2) x - s g. To a diffusion model that is a step of the
    forward process with beta = s^2, whose noise the gradient is. So, every few iterations, the denoiser predicts
    the clean image: of what the gradients have added it leaves what belongs to an image. Its timestep is that of
    the noise which they have added, as measured: less than independent noise would come to, as successive
    gradients partly undo each other, so assuming independence would blur the image.

    ```python
    pipe = AnomalyDenoisePipeline.from_pretrained("runs/parts")
    normal = GradientDenoisingPipeline.from_pipe(pipe, dtype=pipe.dtype)("part.png").reconstruction
    ```

    Args:
        unet: the denoiser, with learned variance.
        scheduler: its forward process.
        feature_extractor: tells the size at which images are read, which is a detector's with the same networks.
        gaussian: distribution of good images' features; None until `fit_gaussian`.
        kl_sigma: smoothing of the map, in pixels at the processing resolution.
        score_fraction: the image's score is the mean of this share of the map's highest pixels; 0 for the maximum.
        processing_resolution: side in pixels to which images are resized, or height and width; None takes the network's
            `sample_size`.
        categories: names of the categories of a unified model, in the order of its class labels.
        value_range: the largest value that images of more than 8 bits can have, such as 4095 of a camera of 12 bits, as
            found in the training images; None takes, in each call, the smallest of 8, 10, 12, 14 and 16 bits that holds
            all of its images.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["gaussian"]  # noqa: RUF012 (diffusers' own form)
    # the Gaussian and the denoiser take turns: each would be moved away for the other
    _exclude_from_cpu_offload = ["gaussian"]  # noqa: RUF012
    _callback_tensor_inputs = ["sample", "timesteps"]  # noqa: RUF012

    def __init__(
        self,
        unet: DenoisingUNet2DModel,
        scheduler: DDPMScheduler,
        feature_extractor: TimmFeatureExtractor,
        gaussian: GaussianFeatureModel | None = None,
        kl_sigma: float = 2.0,
        score_fraction: float = 0.0,
        processing_resolution: Side | None = None,
        categories: list[str] | dict[str, str] | None = None,
        value_range: float | None = None,
    ):
        super().__init__()
        check_value_range(value_range)
        if unet is None:
            raise ValueError(
                "`unet` is None: this pipeline takes a denoiser, and `diffad fit` makes models without one."
            )
        self.register_modules(unet=unet, scheduler=scheduler, feature_extractor=feature_extractor, gaussian=gaussian)
        self.register_to_config(
            kl_sigma=kl_sigma,
            score_fraction=score_fraction,
            processing_resolution=processing_resolution or unet.config.sample_size,
            categories=register_categories(categories),
            value_range=value_range,
        )
        self.size_multiple = 2 ** (len(unet.config.block_out_channels) - 1)  # the denoiser halves so often

    @property
    def num_timesteps(self) -> int:
        """Gradient steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `pipe._interrupt = True` ends the call, which returns the batches so far."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        num_iterations: int = 50,
        learning_rate: float = 0.02,
        denoise_every: int | None = 5,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        processing_resolution: Side | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
        return_trajectory: bool = False,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> ReconstructionOutput | tuple:
        """Turns one image or many into normal ones.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), tensor ([C,] H, W) or (N, C, H, W), or a list of
                these. Floats lie in [0, 1].
            num_iterations: gradient steps.
            learning_rate: s, in (0, 1).
            denoise_every: N_d, gradient steps between denoising steps; the last step is always followed by one. None
                leaves denoising out, for comparison: the images then take on adversarial noise.
            category: of a unified model, its name or index, one for all images or one each.
            batch_size: images in one pass.
            processing_resolution: side in pixels at which the networks see the images; None takes the pipeline's own,
                at which the Gaussian was fitted.
            match_input_resolution: whether images and maps come at the input's own size, which then must be one for
                all; else at the processing resolution.
            generator: draws each denoising step: p(x_{t-1} | x_t) with the learned variance, timestep by timestep down
                to the clean image (DDPM, algorithm 2), in as many passes of the denoiser. None, which is repeatable
                too, takes the clean image that one pass expects. The noise of an image does not depend on the batch.
            callback_on_step_end: called after each iteration of each batch as `callback(pipe, iteration, timesteps,
                tensors)`, with the timesteps (B,) of the noise in the images. What it returns under "sample" is gone on
                with.
            callback_on_step_end_tensor_inputs: which tensors it gets: "sample", x (B, 3, R, R) in about [-1, 1], and
                "timesteps".
            return_trajectory: whether to return the image after each denoising step too.
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.

        Returns:
            [`ReconstructionOutput`]. The map is the difference of the two images, its absolute value averaged over the
            colours, in [0, 1], and smoothed. Calibration is not about it, so `anomaly_mask`, `is_anomalous` and
            `p_value` are None.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong, or the pipeline has no `gaussian`; the message says
                what to do.
        """
        # 1. Check the inputs: N images (3, H_i, W_i) in [0, 1], a category (N,) for each
        images = ImageSequence(image, self.value_range)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        check_call(images, batch_size, resolution, self.size_multiple, match_input_resolution, generator, output_type)
        self._check_iterations(num_iterations, learning_rate, denoise_every)
        check_forward_process(self.scheduler, [0])
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        categories = category_indices(category, self.categories, len(images)).to(self._execution_device)
        generators = None
        if generator is not None:
            generators = noise_generators(image_generators(generator, len(images)))
        resolution = as_size(resolution)
        size = images.sizes[0] if match_input_resolution else resolution
        self._num_timesteps, self._interrupt = num_iterations, False

        maps, scores, reconstructions, trajectories = [], [], [], []
        decay = math.sqrt(1.0 - learning_rate**2)
        with self.progress_bar(total=math.ceil(len(images) / batch_size) * num_iterations) as progress:
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                category_of, draws = categories[batch], None if generators is None else generators[batch]

                # 2. x_0 as the networks see it: (B, 3, R, R) in [-1, 1]
                clean = self.prepare_images(images[batch], resolution)
                sample, previous, steps, states = clean, clean, 0, [clean]
                for i in range(num_iterations):
                    if self.interrupt:
                        continue
                    # 3. g, the gradient of -log p(f(x)) (eq. 12), of unit variance
                    gradient = self.gaussian.energy_gradient(sample, category_of)  # (B, 3, R, R)
                    gradient = gradient / gradient.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)

                    # 4. x <- sqrt(1 - s^2) x - s g (eq. 13)
                    sample = decay * sample - learning_rate * gradient
                    steps += 1

                    # 5. Every N_d steps: t, whose noise is what has come in since the last time, and x_0 of x = x_t
                    noise_variance = (sample - decay**steps * previous).square().mean(dim=(1, 2, 3))  # (B,)
                    timesteps = noise_timesteps(self.scheduler, noise_variance)  # (B,)
                    denoises = denoise_every is not None and (steps == denoise_every or i == num_iterations - 1)
                    if denoises:
                        sample = clean_samples(self.unet, self.scheduler, sample, timesteps, category_of, draws)

                    # 6. Callback
                    if callback_on_step_end is not None:
                        tensors = {"sample": sample, "timesteps": timesteps}
                        tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        sample = (callback_on_step_end(self, i, timesteps, tensors) or {}).get("sample", sample)
                    if denoises:
                        previous, steps = sample, 0
                    if return_trajectory and (denoises or i == num_iterations - 1):
                        states.append(sample)
                    progress.update()

                # 7. What has changed: map (B, R, R), score (B,); all at the images' own size
                normal = sample.clamp(-1.0, 1.0)
                changed = difference_map(normal, clean, self.config.kl_sigma)
                fraction = self.config.score_fraction
                scores.append((top_fraction_score(changed, fraction) if fraction else max_score(changed)).cpu())
                maps.append(resize_images(changed[:, None], size)[:, 0].cpu())
                reconstructions.append(resize_images(normal / 2.0 + 0.5, size).clamp(0.0, 1.0).cpu())
                if return_trajectory:
                    frames = [resize_images(state / 2.0 + 0.5, size).clamp(0.0, 1.0).cpu() for state in states]
                    trajectories.append(torch.stack(frames, dim=1))  # (B, K, 3, H, W)
                if self.interrupt:
                    break
        self.maybe_free_model_hooks()

        # 8. As arrays or pictures
        check_scores(torch.cat(scores))
        output = ReconstructionOutput(torch.cat(maps), torch.cat(scores), torch.cat(reconstructions))
        if return_trajectory:  # of batches that an interruption cut short, the last image stays
            longest = max(states.shape[1] for states in trajectories)
            output.trajectory = torch.cat(
                [torch.cat([s, s[:, -1:].expand(-1, longest - s.shape[1], -1, -1, -1)], dim=1) for s in trajectories]
            )
        return convert_output(output, output_type, return_dict)

    @torch.no_grad()
    def fit_gaussian(
        self,
        images: Sequence[Any],
        category: str | int | None = None,
        batch_size: int = 32,
        accelerator: Accelerator | None = None,
        generator: torch.Generator | None = None,
        learning_rate: float = 0.02,
        denoise_every: int = 5,
        **config: Any,
    ) -> GradientDenoisingPipeline:
        """Fits the Gaussian to good images, in one pass over them and constant memory.

        It sees each image twice: as the denoiser sees it, and as the denoiser returns it, noised as far as the gradient
        steps between two denoising steps would. What denoising itself does to an image is then no defect. Otherwise it
        would be: where good images hardly vary, in colour for instance, their features tell a trace of it.

        Args:
            images: good images; those of training may serve. PIL images, paths, arrays, or a column of a
                `datasets.Dataset`.
            category: which category the images are of, in a unified model; the others keep what they have.
            batch_size: images in a batch.
            accelerator: shares the images among its processes; each ends with the same Gaussian.
            generator: makes the noise, and so the result, repeatable.
            learning_rate: as it will be in a call.
            denoise_every: as it will be in a call.
            config: of a new [`GaussianFeatureModel`], of `GAUSSIAN_OPTIONS`; backbone and layers are those of the
                pipeline's own extractor. By default images are seen at the extractor's size, the largest of several,
                the grid is a quarter of that, and 100 channels are drawn.

        Returns:
            The pipeline, with `gaussian`.

        Raises:
            ValueError: fewer than two images, a wrong argument, or a configuration that is not that of the categories
                fitted before.
        """
        index = self.category_index(category)
        check_good_images("images", images)
        if len(images) < 2:
            raise ValueError(
                f"`images` holds {len(images)} images: a covariance takes at least 2 good images, and deserves 100."
            )
        check_batch_size(batch_size)
        check_generator(generator)
        check_forward_process(self.scheduler, [0])
        _check_learning_rate(learning_rate)
        if not isinstance(denoise_every, (int, np.integer)) or denoise_every < 1:
            raise ValueError(f"`denoise_every` must be a positive integer, but is {denoise_every!r}.")
        unknown = sorted({*config} - {*GAUSSIAN_OPTIONS})
        if unknown:
            raise ValueError(f"`{unknown[0]}` is no option of the Gaussian, which has {', '.join(GAUSSIAN_OPTIONS)}.")
        gaussian = self._unfitted_gaussian(index, config)
        mine = process_share(len(images), accelerator)
        seeds = image_seeds(generator, len(images))  # of all images, so that processes share them out too
        noise_variance = torch.tensor([1.0 - (1.0 - learning_rate**2) ** denoise_every])

        value_range = self.value_range or common_value_range(images)
        if self.value_range is None and value_range is not None:
            warn_of_found_range(value_range)

        def batches() -> Iterator[torch.Tensor]:
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                pictures = ImageSequence.of_rows(images, batch, value_range)
                clean = self.prepare_images(pictures, self.processing_resolution)
                yield clean
                noise = draw_noise(
                    clean.shape[1:], [torch.Generator().manual_seed(seeds[i]) for i in batch], clean.device
                )
                timesteps = noise_timesteps(self.scheduler, noise_variance).expand(len(clean)).to(clean.device)
                noisy = self.scheduler.add_noise(clean, noise, timesteps)
                category_of = torch.full_like(timesteps, index)
                yield clean_samples(self.unet, self.scheduler, noisy, timesteps, category_of).clamp(-1.0, 1.0)

        gaussian.fit(batches(), index, accelerator)
        gaussian.num_images[index] = len(images)  # each of which it has seen twice
        self.maybe_free_model_hooks()
        self.register_modules(gaussian=gaussian)
        return self

    @property
    def processing_resolution(self) -> int | tuple[int, int]:
        """Side in pixels at which the networks see images, unless a call says otherwise."""
        return as_side(self.config.processing_resolution)

    def prepare_images(self, images: Sequence[torch.Tensor] | ImageSequence, resolution: Side) -> torch.Tensor:
        """Images (3, H_i, W_i) in [0, 1] as a detector's denoiser sees them, (B, 3, R, R) in [-1, 1].

        They are resized by way of the feature extractor's size, as there.
        """
        seen = as_size(self.feature_extractor.input_resolution(resolution))
        pixel_values = images_to_pixel_values(images, seen).to(self._execution_device)
        return resize_images(pixel_values, as_size(resolution))

    def _check_iterations(self, num_iterations: int, learning_rate: float, denoise_every: int | None) -> None:
        if self.gaussian is None:
            raise ValueError(
                "This pipeline has no `gaussian`, whose gradient `reconstruct` descends. Fit one to good images with "
                "`training/fit_gaussian.py --model DIR --train_data_dir DIR`, or with `pipe.fit_gaussian(images)`."
            )
        if not isinstance(num_iterations, (int, np.integer)) or num_iterations < 1:
            raise ValueError(f"`num_iterations` must be a positive integer, but is {num_iterations!r}.")
        _check_learning_rate(learning_rate)
        if denoise_every is not None and (not isinstance(denoise_every, (int, np.integer)) or denoise_every < 1):
            raise ValueError(f"`denoise_every` must be a positive integer, or None, but is {denoise_every!r}.")

    def _unfitted_gaussian(self, index: int, config: dict[str, Any]) -> GaussianFeatureModel:
        """The Gaussian to fit one category of: this pipeline's, if it is of `config` and has others, or a new one."""
        num_categories = max(1, len(self.categories))
        config.setdefault("image_size", self.feature_extractor.input_resolution(self.processing_resolution))
        sides = as_size(config["image_size"])
        stride = max(4, max(sides) // 64)  # covariances of more positions would take hundreds of MB
        config.setdefault("feature_size", as_side([max(1, side // stride) for side in sides]))
        config.setdefault("num_channels", 100)  # all of them would make the file three times as large
        changed = [name for name, value in config.items() if self.gaussian and self.gaussian.config[name] != value]
        if self.gaussian is None or num_categories == 1 or changed:
            others = [] if self.gaussian is None or num_categories == 1 else self.gaussian.num_images.tolist()
            if any(count for i, count in enumerate(others) if i != index):
                raise ValueError(
                    f"`{changed[0]}` is not that of the other categories' Gaussians. Leave it out, or start anew with "
                    "`pipe.register_modules(gaussian=None)`."
                )
            gaussian = GaussianFeatureModel.from_extractor(
                self.feature_extractor, num_categories=num_categories, **config
            )
            return gaussian.to(self._execution_device)
        return self.gaussian


def _check_learning_rate(learning_rate: float) -> None:
    if not isinstance(learning_rate, Real) or not 0.0 < learning_rate < 1.0:
        raise ValueError(f"`learning_rate` must lie in (0, 1), but is {learning_rate!r}.")


def noise_timesteps(scheduler: SchedulerMixin, variance: torch.Tensor) -> torch.Tensor:
    """The timesteps whose noise, 1 - alpha_bar_t, has the given variances, (N,) to (N,)."""
    noise = 1.0 - scheduler.alphas_cumprod.to(variance.device)  # (num_train_timesteps,)
    return (noise - variance[:, None]).abs().argmin(dim=1)


def clean_samples(
    unet: DenoisingUNet2DModel,
    scheduler: SchedulerMixin,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    category: torch.Tensor,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """The clean images x_0 of noised ones, (B, 3, R, R) float32.

    Without generators it is what one pass of the denoiser expects; with them, what DDPM's reverse process draws
    (Ho et al., algorithm 2) with the learned variance, timestep by timestep.

    Args:
        unet: the denoiser.
        scheduler: its forward process.
        noisy: x_t, (B, 3, R, R).
        timesteps: t, (B,).
        category: class labels of a unified model, (B,).
        generators: one for each image, or None.
    """
    if generators is None:
        class_labels = category if unet.config.num_class_embeds else None
        prediction = unet(noisy.to(unet.dtype), timesteps, class_labels=class_labels).sample
        return predicted_clean_sample(scheduler, prediction[:, : noisy.shape[1]], noisy, timesteps)
    sample = noisy.clone()
    for t in range(int(timesteps.max()), -1, -1):
        joined = (timesteps >= t).nonzero()[:, 0]  # an image joins in at its own timestep
        part, timestep = sample[joined], torch.full_like(joined, t)
        class_labels = category[joined] if unet.config.num_class_embeds else None
        prediction = unet(part.to(unet.dtype), timestep, class_labels=class_labels).sample
        mean, log_variance = predicted_mean_log_variance(scheduler, prediction, part, timestep)
        if t > 0:  # at t = 0 the mean is the clean image
            noise = randn_tensor(part.shape, [generators[i] for i in joined.tolist()], part.device, part.dtype)
            mean = mean + torch.exp(0.5 * log_variance) * noise
        sample[joined] = mean
    return sample
