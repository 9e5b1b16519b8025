"""Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization" (ICCV 2023)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.utils.data import Subset

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import ImageInput, images_to_pixel_values, images_to_tensors, resize_images
from diffad.likelihood import kl_divergence_map, predicted_clean_sample, predicted_mean_log_variance
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.models.gaussian_feature_model import GaussianFeatureModel
from diffad.moments import PRIOR_IMAGES
from diffad.pipelines.base import AnomalyPipeline, Measurement, check_map_settings, check_score_strides
from diffad.pipelines.output import AnomalyOutput, convert_output
from diffad.scoring import gaussian_smooth, joint_map, max_score, top_fraction_score
from diffad.seeding import image_generators, image_seeds


@dataclass
class ReconstructionOutput(AnomalyOutput):
    """
    What `AnomalyDenoisePipeline.reconstruct` returns: `AnomalyOutput`, and how it came about.

    Args:
        trajectory: (N, K, H, W, 3) in [0, 1] ((N, K, 3, H, W) as tensors; a list of PIL images for each image): the
            image as the process began, and after each denoising step; None unless asked for.
    """

    trajectory: np.ndarray | torch.Tensor | list[list[Image.Image]] | None = None


class AnomalyDenoisePipeline(AnomalyPipeline):
    r"""Finds defects as what a denoiser of good images does not expect.

    The image is noised to a few small timesteps. At each, the per-pixel KL divergence between the true and the
    predicted posterior (eq. 8) is one map, the error of the predicted pretrained features (eq. 10) another; both are
    normalised by what good images show, joined (eq. 11) and averaged.

    `reconstruct` turns a defective image into a normal one by gradient denoising (eqs. 12-13). `denoise` is what the
    paper compares itself with: a plain DDPM, whose map is the error of the reconstruction's colours.

    Args:
        unet: the denoiser, with learned variance and a feature head.
        scheduler: the forward process; `variance_type` "learned_range".
        feature_extractor: the frozen network whose features the denoiser predicts.
        calibration: statistics of good images; None until `calibrate`.
        gaussian: distribution of good images' features, for `reconstruct`; None until `fit_gaussian`.
        timesteps: noise levels T; None takes the paper's 5, 50 and 100.
        alpha: weight of the KL in eq. 11, in [0, 1].
        kl_sigma: smoothing of the KL maps, in pixels at the processing resolution.
        feature_sigma: smoothing of the feature error, in pixels at the processing resolution.
        score_fraction: the image's score is the mean of this share of the map's highest pixels; 0 for the maximum.
        suppression: in [0, 1): the share of how far its peak stands above its mean that is taken off each calibrated
            map, see `diffad.scoring.suppress_surroundings`. Scores move with it: calibrate again after a change.
        position_prior_images: where a place of the residual's covariance holds several positions, how many images the
            average over all positions counts for in their map's deviation, from 0 (`MomentSums.standard_deviation`).
            Good images vary more along a part's edges, so that defects there would end too early; the more images, the
            less so. Calibrate again after a change.
        score_strides: which of the feature extractor's strides the feature error looks at; None for all.
        processing_resolution: side in pixels to which images are resized; None takes the network's `sample_size`.
        categories: names of the categories of a unified model, in the order of its class labels.
    """

    model_cpu_offload_seq = "feature_extractor->unet"
    _optional_components = ["calibration", "gaussian"]  # noqa: RUF012 (diffusers' own form)
    # the Gaussian and the denoiser take turns: each would be moved away for the other
    _exclude_from_cpu_offload = ["calibration", "gaussian"]  # noqa: RUF012

    def __init__(
        self,
        unet: DenoisingUNet2DModel,
        scheduler: DDPMScheduler,
        feature_extractor: TimmFeatureExtractor,
        calibration: ScoreCalibration | None = None,
        gaussian: GaussianFeatureModel | None = None,
        timesteps: list[int] | None = None,
        alpha: float = 0.5,
        kl_sigma: float = 2.0,
        feature_sigma: float = 4.0,
        score_fraction: float = 0.0,
        suppression: float = 0.0,
        position_prior_images: float = PRIOR_IMAGES,
        score_strides: list[int] | None = None,
        processing_resolution: int | None = None,
        categories: list[str] | None = None,
    ):
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"`alpha` must lie in [0, 1], but is {alpha}.")
        check_map_settings(suppression, position_prior_images)
        timesteps = [5, 50, 100] if timesteps is None else list(timesteps)
        last = scheduler.config.num_train_timesteps - 1
        if not timesteps or any(not 0 <= t <= last for t in timesteps):
            raise ValueError(f"`timesteps` must list integers in [0, {last}], but is {timesteps}.")
        if score_strides is not None:
            check_score_strides(score_strides, feature_extractor)
        self.register_modules(
            # channels last: half-precision convolutions take two thirds of the time, on CPUs as on tensor cores
            unet=unet.eval().to(memory_format=torch.channels_last),
            scheduler=scheduler,
            feature_extractor=feature_extractor.to(memory_format=torch.channels_last),
            calibration=calibration,
            gaussian=gaussian,
        )
        self.register_to_config(
            timesteps=timesteps,
            alpha=alpha,
            kl_sigma=kl_sigma,
            feature_sigma=feature_sigma,
            score_fraction=score_fraction,
            suppression=suppression,
            position_prior_images=position_prior_images,
            score_strides=None if score_strides is None else sorted(score_strides),
            processing_resolution=processing_resolution or unet.config.sample_size,
            categories=list(categories) if categories else None,
        )

    @property
    def processing_resolution(self) -> int:
        """Side in pixels at which the denoiser sees images, unless a call says otherwise."""
        return self.config.processing_resolution

    @property
    def size_multiple(self) -> int:
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple:
        """Maps and scores of one image or many.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), tensor ([C,] H, W) or (N, C, H, W), or a list of
                these. Floats lie in [0, 1].
            category: of a unified model, its name or index, one for all images or one each.
            batch_size: images in one pass of the network; each counts `len(timesteps)` samples.
            processing_resolution: side in pixels at which the network sees the images; None takes the pipeline's own,
                at which it was calibrated.
            match_input_resolution: whether maps come at the images' own size, which then must be one; else at the
                processing resolution.
            generator: makes the call repeatable. The noise of an image depends neither on the batch size nor on the
                images after it.
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.

        Returns:
            [`AnomalyOutput`]; `reconstruction` is None.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        # 1. Check inputs
        images = images_to_tensors(image)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        self.check_call(images, batch_size, resolution, match_input_resolution, generator, output_type)
        indices = self.category_index(category, len(images))
        # 2. Measure, score and put the output together
        return self.detect(
            images,
            indices,
            batch_size,
            resolution,
            match_input_resolution,
            generator,
            output_type,
            return_dict,
        )

    def measure(
        self,
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        resolution: int,
        generator: Sequence[torch.Generator | None],
    ) -> Measurement:
        """KL maps (N, T, H, W) and feature residuals (N, T, C, h, w) of the scored strides."""
        noise_levels = list(self.config.timesteps)
        return self.select(self.measure_at(noise_levels, pixel_values, category, resolution, generator), noise_levels)

    def measure_at(
        self,
        noise_levels: Sequence[int],
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        resolution: int,
        generator: Sequence[torch.Generator | None],
    ) -> Measurement:
        """As `measure`, at T timesteps and of all strides: one pass of the networks for all images and noise levels."""
        device, count, levels = pixel_values.device, len(pixel_values), len(noise_levels)
        clean = resize_images(pixel_values, (resolution, resolution))  # (N, 3, H, W)

        # 1. Noise every image to every timestep
        noise = torch.stack(
            [randn_tensor((levels, *clean.shape[1:]), generator=g, device=device) for g in generator]
        )  # (N, T, 3, H, W)
        timesteps = torch.tensor(list(noise_levels), device=device).repeat(count)  # (N * T,)
        clean = clean.repeat_interleave(levels, dim=0)  # (N * T, 3, H, W)
        noisy = self.scheduler.add_noise(clean, noise.flatten(0, 1), timesteps)

        # 2. One pass of the denoiser
        class_labels = category.repeat_interleave(levels) if self.unet.config.num_class_embeds else None
        prediction = self.unet(noisy.to(self.unet.dtype), timesteps, class_labels=class_labels)

        # 3. KL divergence of the posteriors, averaged over the colour channels
        kl = kl_divergence_map(self.scheduler, prediction.sample, noisy, clean, timesteps)  # (N * T, 3, H, W)
        kl = kl.mean(dim=1).unflatten(0, (count, levels))  # (N, T, H, W)

        # 4. Error of the predicted features of the clean image
        predicted = prediction.features.float()  # (N * T, C, h, w)
        extractor_dtype = self.feature_extractor.dtype
        features = self.feature_extractor(pixel_values.to(extractor_dtype), predicted.shape[-2:]).float()
        residual = features[:, None] - predicted.unflatten(0, (count, levels))  # (N, T, C, h, w)
        return Measurement(maps=kl, residual=residual)

    def select(self, measurement: Measurement, noise_levels: Sequence[int]) -> Measurement:
        """What this pipeline scores of a measurement at `noise_levels` and of all strides."""
        maps, residual = measurement.maps, measurement.residual
        if list(noise_levels) != list(self.config.timesteps):
            chosen = [list(noise_levels).index(timestep) for timestep in self.config.timesteps]
            maps, residual = maps[:, chosen], residual[:, chosen]
        if self.config.score_strides is not None:
            layers = residual.split(self.feature_extractor.layer_channels, dim=2)
            residual = torch.cat([layers[i] for i in self.scored_layers], dim=2)
        return Measurement(maps=maps, residual=residual)

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor | None,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """(N, T + E, H, W): the smoothed KL at each of T noise levels, then the E maps of `feature_error_maps`."""
        errors = self.feature_error_maps(measurement, category, calibration, num_seen)
        return torch.cat(
            [
                gaussian_smooth(measurement.maps, self.config.kl_sigma),
                gaussian_smooth(errors, self.config.feature_sigma),
            ],
            dim=1,
        )

    def join_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Eq. 11: (N, T + E, H, W) to (N, H, W)."""
        levels = len(self.config.timesteps)
        return joint_map(maps[:, :levels], maps[:, levels:], self.config.alpha)

    def image_scores(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """(N, H, W) to (N,): the map's maximum, or the mean of its highest pixels."""
        if self.config.score_fraction:
            return top_fraction_score(anomaly_map, self.config.score_fraction)
        return max_score(anomaly_map)

    # -- normal images out of defective ones -----------------------------------------------------------------------

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
    ) -> AnomalyDenoisePipeline:
        """Fits the Gaussian that `reconstruct` needs to good images, in one pass over them and constant memory.

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
            learning_rate: as it will be in `reconstruct`.
            denoise_every: as it will be in `reconstruct`.
            config: of a new [`GaussianFeatureModel`], other than backbone and strides, which are the pipeline's own
                extractor's. By default images are seen at the extractor's size, the largest of several, the grid is a
                quarter of that, and 100 channels are drawn.

        Returns:
            The pipeline, with `gaussian`.

        Raises:
            ValueError: fewer than two images, a wrong argument, or a configuration that is not that of the categories
                fitted before.
        """
        index = int(self.category_index(category, 1)[0])
        if not isinstance(denoise_every, int) or denoise_every < 1:
            raise ValueError(f"`denoise_every` must be a positive integer, but is {denoise_every!r}.")
        num_categories = len(self.config.categories or ["default"])
        resolution = self.processing_resolution
        config.setdefault("image_size", self.input_resolution(resolution))
        config.setdefault("feature_size", max(1, config["image_size"] // 4))
        config.setdefault("num_channels", 100)  # all of them would make the file three times as large
        gaussian = self.gaussian
        if gaussian is not None and num_categories > 1:
            changed = [name for name, value in config.items() if gaussian.config[name] != value]
            others = gaussian.num_images.clone()
            others[index] = 0
            if changed and others.any():
                raise ValueError(
                    f"`{changed[0]}` is not that of the other categories' Gaussians. Leave it out, or start anew with "
                    "`pipe.register_modules(gaussian=None)`."
                )
        if gaussian is None or num_categories == 1 or any(gaussian.config[k] != v for k, v in config.items()):
            gaussian = GaussianFeatureModel.from_extractor(
                self.feature_extractor, num_categories=num_categories, **config
            ).to(self._execution_device)
        indices = list(range(len(images)))
        if accelerator is not None:
            with accelerator.split_between_processes(indices) as mine:
                indices = list(mine)
        seeds = image_seeds(generator, len(images))  # of all images, so that processes share them out too
        noise_variance = torch.tensor([1.0 - (1.0 - learning_rate**2) ** denoise_every])

        def batches() -> Iterator[torch.Tensor]:
            clean_images = self._clean_images(Subset(images, indices), batch_size, resolution)
            for number, clean in enumerate(clean_images):
                yield clean
                batch = indices[number * batch_size : (number + 1) * batch_size]
                generators = [torch.Generator().manual_seed(seeds[i]) for i in batch]
                noise = randn_tensor(clean.shape, generators, clean.device)
                timesteps = noise_timesteps(self.scheduler, noise_variance).expand(len(clean)).to(clean.device)
                noisy = self.scheduler.add_noise(clean, noise, timesteps)
                yield self._predict_clean(noisy, timesteps, torch.full_like(timesteps, index)).clamp(-1.0, 1.0)

        gaussian.fit(batches(), index, accelerator)
        self.maybe_free_model_hooks()
        self.register_modules(gaussian=gaussian)
        return self

    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageInput,
        num_iterations: int = 50,
        learning_rate: float = 0.02,
        denoise_every: int | None = 5,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
        | None = None,
        return_trajectory: bool = False,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> ReconstructionOutput | tuple:
        """Turns defective images into normal ones by gradient denoising (Lu et al., section 3.4, algorithm 1).

        Each iteration descends the gradient of -log p of the image's features under `gaussian` (eq. 12), scaled to unit
        variance, and decays the image (eq. 13): x <- sqrt(1 - s^2) x - s g. To a diffusion model that is a step of the
        forward process with beta = s^2, whose noise the gradient is. So, every few iterations, the denoiser predicts
        the clean image: of what the gradients have added it leaves what belongs to an image. Its timestep is that of
        the noise which they have added, as measured: less than independent noise would come to, as successive
        gradients partly undo each other, so assuming independence would blur the image.

        Args:
            image: as in a call of the pipeline.
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
                {"sample": x})`, with x (B, 3, R, R) in about [-1, 1] and the timesteps (B,) of the noise in it. What it
                returns under "sample" is gone on with.
            return_trajectory: whether to return the image after each denoising step too.
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.

        Returns:
            [`ReconstructionOutput`]. The map is the difference of the two images, its absolute value averaged over the
            colours, in [0, 1], and smoothed as the KL map is. Calibration is not about it, so `anomaly_mask`,
            `is_anomalous` and `p_value` are None.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong, or the pipeline has no `gaussian`; the message says
                what to do.
        """
        # 1. Check inputs
        if self.gaussian is None:
            raise ValueError(
                "This pipeline has no `gaussian`, whose gradient `reconstruct` descends. Fit one to good images with "
                "`training/fit_gaussian.py --model DIR --train_data_dir DIR`, or with `pipe.fit_gaussian(images)`."
            )
        images = images_to_tensors(image)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        self.check_call(images, batch_size, resolution, match_input_resolution, generator, output_type)
        indices = self.category_index(category, len(images)).to(self._execution_device)
        if not isinstance(num_iterations, int) or num_iterations < 1:
            raise ValueError(f"`num_iterations` must be a positive integer, but is {num_iterations!r}.")
        if not 0.0 < learning_rate < 1.0:
            raise ValueError(f"`learning_rate` must lie in (0, 1), but is {learning_rate!r}.")
        if denoise_every is not None and (not isinstance(denoise_every, int) or denoise_every < 1):
            raise ValueError(f"`denoise_every` must be a positive integer, or None, but is {denoise_every!r}.")
        generators = None if generator is None else image_generators(generator, len(images))

        # 2. Gradient denoising, batch by batch
        size = tuple(images[0].shape[-2:]) if match_input_resolution else (resolution, resolution)
        results, trajectories = [], []
        num_batches = math.ceil(len(images) / batch_size)
        with self.progress_bar(total=num_batches * num_iterations) as progress:
            for number, clean in enumerate(self._clean_images(images, batch_size, resolution)):
                batch = slice(number * batch_size, (number + 1) * batch_size)
                category_of = indices[batch]
                sample, previous, steps, states = clean, clean, 0, [clean]
                for i in range(num_iterations):
                    # 3. Descend: eqs. 12-13
                    gradient = self.gaussian.energy_gradient(sample, category_of)  # (B, 3, R, R)
                    gradient = gradient / gradient.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
                    sample = math.sqrt(1.0 - learning_rate**2) * sample - learning_rate * gradient

                    # 4. Take out the noise that has come in since the last time
                    steps += 1
                    decay = (1.0 - learning_rate**2) ** (steps / 2.0)
                    noise_variance = (sample - decay * previous).square().mean(dim=(1, 2, 3))  # (B,)
                    timesteps = noise_timesteps(self.scheduler, noise_variance)
                    denoises = denoise_every is not None and (steps == denoise_every or i == num_iterations - 1)
                    if denoises and generators is None:
                        sample = self._predict_clean(sample, timesteps, category_of)
                    elif denoises:
                        sample = self._draw_clean(sample, timesteps, category_of, generators[batch])
                    if callback_on_step_end is not None:
                        sample = callback_on_step_end(self, i, timesteps, {"sample": sample}).get("sample", sample)
                    if denoises:
                        previous, steps = sample, 0
                    if return_trajectory and (denoises or i == num_iterations - 1):
                        states.append(sample)
                    progress.update()
                results.append(self._compare(clean, sample, size))
                if return_trajectory:
                    frames = [resize_images(state / 2.0 + 0.5, size).clamp(0.0, 1.0).cpu() for state in states]
                    trajectories.append(torch.stack(frames, dim=1))  # (B, K, 3, H, W)
        self.maybe_free_model_hooks()

        # 5. Put the output together
        output = self._comparison_output(results, output_type)
        trajectory = _convert_trajectory(torch.cat(trajectories), output_type) if return_trajectory else None
        output = ReconstructionOutput(**output, trajectory=trajectory)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    @torch.no_grad()
    def denoise(
        self,
        image: ImageInput,
        timestep: int = 250,
        num_inference_steps: int = 50,
        scheduler: SchedulerMixin | None = None,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple:
        """The plain DDPM that both papers compare with: noise the image, denoise it, and look at what has changed.

        Args:
            image: as in a call of the pipeline.
            timestep: how far to noise. More noise hides larger defects, and more of the good parts.
            num_inference_steps: passes of the denoiser; at most `timestep`. It begins at that step of the scheduler's
                own spacing from which so many are left, which is at most one spacing below `timestep`.
            scheduler: any of diffusers' for a network that predicts epsilon; None takes the pipeline's. Make one with
                `DDIMScheduler.from_config(pipe.scheduler.config)`.
            category: of a unified model, its name or index, one for all images or one each.
            batch_size: images in one pass of the network.
            processing_resolution: side in pixels at which the network sees the images; None takes the pipeline's own.
            match_input_resolution: whether images and maps come at the input's own size, which then must be one for
                all; else at the processing resolution.
            generator: makes the call repeatable. The noise of an image depends neither on the batch size nor on the
                images after it.
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.

        Returns:
            [`AnomalyOutput`] with the `reconstruction`. The map is the difference of the two images as in
            `reconstruct`; `anomaly_mask`, `is_anomalous` and `p_value` are None.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        # 1. Check inputs
        images = images_to_tensors(image)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        self.check_call(images, batch_size, resolution, match_input_resolution, generator, output_type)
        device = self._execution_device
        indices = self.category_index(category, len(images)).to(device)
        scheduler = copy.deepcopy(self.scheduler if scheduler is None else scheduler)  # it keeps the state of a run
        last = scheduler.config.num_train_timesteps
        if not isinstance(timestep, int) or not 1 <= timestep <= last:
            raise ValueError(f"`timestep` must be an integer in [1, {last}], but is {timestep!r}.")
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= timestep:
            raise ValueError(
                f"`num_inference_steps` must be an integer in [1, {timestep}], the latter being `timestep`, but is "
                f"{num_inference_steps!r}."
            )
        total_steps = round(num_inference_steps * last / timestep)  # of which the last few are taken
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        takes_variance = isinstance(scheduler, DDPMScheduler) and "learned" in scheduler.config.variance_type
        generators = image_generators(generator, len(images))

        # 2. Batch by batch
        size = tuple(images[0].shape[-2:]) if match_input_resolution else (resolution, resolution)
        results = []
        num_batches = math.ceil(len(images) / batch_size)
        with self.progress_bar(total=num_batches * num_inference_steps) as progress:
            for number, clean in enumerate(self._clean_images(images, batch_size, resolution)):
                batch = slice(number * batch_size, (number + 1) * batch_size)
                scheduler.set_timesteps(total_steps, device=device)
                begin = (total_steps - num_inference_steps) * scheduler.order
                timesteps = scheduler.timesteps[begin:]
                if hasattr(scheduler, "set_begin_index"):
                    scheduler.set_begin_index(begin)

                # 3. Noise
                noise = randn_tensor(clean.shape, generator=generators[batch], device=device)
                sample = scheduler.add_noise(clean, noise, timesteps[:1].expand(len(clean)))

                # 4. Denoise
                options = {"generator": generators[batch]} if takes_generator else {}
                class_labels = indices[batch] if self.unet.config.num_class_embeds else None
                for t in timesteps:
                    model_input = scheduler.scale_model_input(sample, t).to(self.unet.dtype)
                    prediction = self.unet(model_input, t, class_labels=class_labels).sample.float()
                    if not takes_variance:
                        prediction = prediction[:, : sample.shape[1]]
                    sample = scheduler.step(prediction, t, sample, **options).prev_sample
                    progress.update(1.0 / scheduler.order)
                results.append(self._compare(clean, sample, size))
        self.maybe_free_model_hooks()
        output = self._comparison_output(results, output_type)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    def _clean_images(self, images: Sequence[Any], batch_size: int, resolution: int) -> Iterator[torch.Tensor]:
        """Batches (B, 3, R, R) in [-1, 1] as the denoiser sees them; resized as in a call, by way of the extractor."""
        side = self.input_resolution(resolution)
        for start in range(0, len(images), batch_size):
            batch = images_to_tensors([images[i] for i in range(start, min(start + batch_size, len(images)))])
            pixel_values = images_to_pixel_values(batch, (side, side)).to(self._execution_device)
            yield resize_images(pixel_values, (resolution, resolution))

    def _predict_clean(self, noisy: torch.Tensor, timesteps: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """The clean images from noised ones, (B, 3, R, R) float32; timesteps and categories (B,)."""
        class_labels = category if self.unet.config.num_class_embeds else None
        prediction = self.unet(noisy.to(self.unet.dtype), timesteps, class_labels=class_labels).sample
        return predicted_clean_sample(self.scheduler, prediction[:, : noisy.shape[1]], noisy, timesteps)

    def _draw_clean(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        category: torch.Tensor,
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:
        """Clean images drawn by DDPM's reverse process, as `_predict_clean` otherwise; a generator for each."""
        sample = noisy.clone()
        for t in range(int(timesteps.max()), -1, -1):
            joined = (timesteps >= t).nonzero()[:, 0]  # an image joins in at its own timestep
            part, timestep = sample[joined], torch.full_like(joined, t)
            class_labels = category[joined] if self.unet.config.num_class_embeds else None
            prediction = self.unet(part.to(self.unet.dtype), timestep, class_labels=class_labels).sample
            mean, log_variance = predicted_mean_log_variance(self.scheduler, prediction, part, timestep)
            if t > 0:  # at t = 0 the mean is the clean image
                noise = randn_tensor(part.shape, [generators[i] for i in joined.tolist()], part.device)
                mean = mean + torch.exp(0.5 * log_variance) * noise
            sample[joined] = mean
        return sample

    def _compare(
        self, clean: torch.Tensor, result: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map (B, *size), score (B,) and reconstruction (B, 3, *size) in [0, 1] of a batch, on the CPU."""
        result = result.clamp(-1.0, 1.0)
        difference = (result - clean).abs().mean(dim=1) / 2.0  # (B, R, R), in [0, 1]
        anomaly_map = gaussian_smooth(difference, self.config.kl_sigma)
        resized = resize_images(anomaly_map[:, None], size)[:, 0]
        reconstruction = resize_images(result / 2.0 + 0.5, size).clamp(0.0, 1.0)
        return resized.cpu(), self.image_scores(anomaly_map).cpu(), reconstruction.cpu()

    def _comparison_output(
        self, results: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], output_type: str
    ) -> AnomalyOutput:
        maps, scores, reconstructions = (torch.cat(parts) for parts in zip(*results, strict=True))
        return convert_output(AnomalyOutput(maps, scores, reconstructions), output_type)


def noise_timesteps(scheduler: SchedulerMixin, variance: torch.Tensor) -> torch.Tensor:
    """The timesteps whose noise, 1 - alpha_bar_t, has the given variances, (N,) to (N,)."""
    noise = 1.0 - scheduler.alphas_cumprod.to(variance.device)  # (num_train_timesteps,)
    return (noise - variance[:, None]).abs().argmin(dim=1)


def _convert_trajectory(
    trajectory: torch.Tensor, output_type: str
) -> np.ndarray | torch.Tensor | list[list[Image.Image]]:
    if output_type == "pt":
        return trajectory
    array = trajectory.permute(0, 1, 3, 4, 2).numpy()  # (N, K, H, W, 3)
    if output_type == "np":
        return array
    return [[Image.fromarray(frame) for frame in frames] for frames in (array * 255.0).round().astype(np.uint8)]
