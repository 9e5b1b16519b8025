"""DiAD (He et al., "A Diffusion-based Framework for Multi-class Anomaly Detection", AAAI 2024).

This file is long so that a call stands in one place: from the image over the reverse process to maps and scores.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

from diffad.calibration.feature_gaussian import feature_grid
from diffad.calibration.recorded_settings import SCHEDULER
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.exporting import is_exporting
from diffad.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageInput,
    ImageSequence,
    Side,
    denormalize_images,
    images_to_pixel_values,
    normalize_images,
    resize_images,
)
from diffad.latents import decode_latents, encode_latents, latent_factor
from diffad.models.autoencoder_taef2 import AutoencoderTAEF2
from diffad.models.feature_extractor import TimmFeatureExtractor, concatenate_layers
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.models.semantic_guided_network import SemanticGuidedNetwork
from diffad.pipelines.base import category_names, register_categories
from diffad.pipelines.checks import (
    category_indices,
    check_calibrated_categories,
    check_calibration,
    check_call,
    check_callback_inputs,
    check_map_settings,
    check_resolution,
    check_tiled_call,
    check_tiles,
    check_value_range,
    scored_layers,
    shares,
)
from diffad.pipelines.detection import DetectionPipeline, scheduler_record
from diffad.pipelines.diad_checks import (
    check_colour_statistics,
    check_components,
    check_latent_channels,
    check_latent_statistics,
    check_latents,
    check_pixel_values,
    check_scheduler,
    check_settings,
    check_tiled_reverse_process,
    reconstruction_weights,
    skipped_steps,
    square_side,
)
from diffad.pipelines.feature_maps import feature_maps, measure_features, outlined
from diffad.pipelines.large_images import detect_large, grid_of
from diffad.pipelines.output import AnomalyOutput, convert_output, threshold_output
from diffad.region_of_interest import hide_outside, inside_region
from diffad.scoring import (
    Measurement,
    cosine_distance_map,
    feature_error,
    gaussian_smooth,
    max_score,
    resize_maps,
)
from diffad.seeding import draw_noise, noise_generators
from diffad.tiling import CELL

StepCallback = Callable[["DiADPipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class DiADPipeline(DetectionPipeline):
    r"""Finds defects by comparing an image with its reconstruction as a good one.

    The reverse process starts from noise. At each step the semantic-guided network sees the input image and tells the
    denoiser what it shows, but not where a defect is: what it tells is too coarse. The input's and the
    reconstruction's pretrained features are compared (eqs. 9-10). One model serves many categories and is not told
    which it sees.

    ```python
    pipe = DiADPipeline.from_pretrained("runs/diad")
    out = pipe("part.png")
    out.anomaly_map, out.reconstruction
    ```

    Args:
        vae: the autoencoder between images and latents.
        unet: the denoiser, conditioned on the empty prompt.
        prompt_embedding: the empty prompt's embedding, in the place of a text encoder.
        scheduler: of the reverse process; any of diffusers' for what the denoiser predicts.
        sg_network: guides the denoiser by the input image; None leaves a plain latent diffusion model.
        feature_extractor: pretrained features to compare; the paper's are ResNet-50's at strides 4, 8 and 16. Without
            it `denoise` and `decode` work, and a call does not.
        calibration: statistics of good images; None until `calibrate`.
        num_inference_steps: steps of the reverse process.
        strength: in (0, 1]; 1 starts from noise alone, less from the encoded image, noised that far.
        distance: "cosine", the paper's, or "mahalanobis": the squared difference of the features, once calibrated by
            mean and covariance of good images' differences at each place. Then it sees smaller defects.
        weights: of the maps, `{"reconstruction": , "gaussian": , "nearest": }`, the first above 0; one that is left out
            is 0, and they are divided by their sum. The first is the paper's. The others are the features' own, over
            all strides, as of [`AnomalyDenoisePipeline`]: they need no further pass of a network, and count once
            calibrated. Their channels count alike where the extractor is standardised (`fit_standardization`), as
            `train_diad.py` leaves it. None takes the reconstruction alone. Calibrate again after a change.
        score_strides: which of the feature extractor's strides are compared; None for all.
        sigma: smoothing of the map, in pixels at the processing resolution.
        pooling_size: side of the window of the average pooling before the map's maximum is the image's score.
        pooling_rounds: how often it is pooled. Each round takes `pooling_size - 1` pixels off the map's sides.
        contrast: not negative: the share of how far it stands below its peak by which each calibrated map is lowered,
            see `diffad.scoring.heighten_contrast`. Scores and thresholds do not know of it.
        position_trust: in [0, 1]: how far the mean and the variance that good images' maps have at a position are
            trusted, against those over all positions. Calibrate again after a change.
        processing_resolution: side in pixels to which images are resized.
        categories: names of the categories of a unified model. They choose the statistics, not the networks' output.
        value_range: the largest value that images of more than 8 bits can have, such as 4095 of a camera of 12 bits, as
            found in the training images; None takes, in each call, the smallest of 8, 10, 12, 14 and 16 bits that holds
            all of its images.
        image_mean, image_std: of the images' colours in [0, 1], by which the networks take them normalised; None takes
            ImageNet's, as the paper does.
        latents_mean, latents_std: of each channel of the latents, which are normalised by them; None takes the
            autoencoder's own shift and scale. For autoencoders that have none.
        tile_calibration: statistics of good images' tiles; None until `calibrate`, and without a `tile_size`.
        tile_size: side in pixels of the tiles in which images are looked at, at their own pixels, beside the whole
            image (`diffad.pipelines.large_images`), or height and width; None looks at whole images alone. Each is
            resized to what the networks see. These were trained on whole images, unless you trained them on tiles.
        tile_overlap: share of a tile's sides by which neighbours overlap at least, in [0, 0.75].
    """

    # The semantic-guided network stays out of the sequence: it and the denoiser take turns at every step, so each
    # would be moved away for the other.
    model_cpu_offload_seq = "unet->vae->feature_extractor"
    _optional_components = ["sg_network", "feature_extractor", "calibration", "tile_calibration"]  # noqa: RUF012 (diffusers' form)
    _exclude_from_cpu_offload = ["prompt_embedding", "calibration", "tile_calibration"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderTAEF2,
        unet: UNet2DConditionModel,
        prompt_embedding: PromptEmbedding,
        scheduler: DDIMScheduler,
        sg_network: SemanticGuidedNetwork | None = None,
        feature_extractor: TimmFeatureExtractor | None = None,
        calibration: ScoreCalibration | None = None,
        num_inference_steps: int = 10,
        strength: float = 1.0,
        distance: str = "cosine",
        weights: dict[str, float] | None = None,
        score_strides: list[int] | None = None,
        sigma: float = 5.0,
        pooling_size: int = 8,
        pooling_rounds: int = 8,
        contrast: float = 0.0,
        position_trust: float = 1.0,
        processing_resolution: int = 256,
        categories: list[str] | dict[str, str] | None = None,
        value_range: float | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        tile_calibration: ScoreCalibration | None = None,
        tile_size: Side | None = None,
        tile_overlap: float = 0.25,
    ):
        super().__init__()
        check_value_range(value_range)
        check_tiles(tile_size, tile_overlap)
        check_components(vae, unet, prompt_embedding, scheduler, sg_network)
        check_resolution(processing_resolution, latent_factor(vae))
        check_latent_statistics(vae, latents_mean, latents_std)
        colour_mean = IMAGENET_MEAN if image_mean is None else image_mean
        colour_std = IMAGENET_STD if image_std is None else image_std
        check_colour_statistics(colour_mean, colour_std)
        check_settings(distance, sigma, pooling_size, pooling_rounds)
        if feature_extractor is not None:
            scored_layers(score_strides, feature_extractor)
        reconstruction_weights(weights)
        check_map_settings(position_trust, contrast)
        skipped_steps(num_inference_steps, strength)
        named = register_categories(categories)
        check_calibrated_categories(calibration, category_names(named))
        self.register_modules(
            vae=vae,
            unet=unet,
            prompt_embedding=prompt_embedding,
            scheduler=scheduler,
            sg_network=sg_network,
            feature_extractor=feature_extractor,
            calibration=calibration,
            tile_calibration=tile_calibration,
        )
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            strength=strength,
            distance=distance,
            weights=weights,
            score_strides=None if score_strides is None else sorted(score_strides),
            sigma=sigma,
            pooling_size=pooling_size,
            pooling_rounds=pooling_rounds,
            contrast=contrast,
            position_trust=position_trust,
            processing_resolution=square_side(processing_resolution),
            categories=named,
            value_range=value_range,
            image_mean=list(colour_mean),
            image_std=list(colour_std),
            latents_mean=None if latents_mean is None else list(latents_mean),
            latents_std=None if latents_std is None else list(latents_std),
            tile_size=tile_size,
            tile_overlap=tile_overlap,
        )
        self.size_multiple = latent_factor(vae)  # how many times smaller latents are than images

    @property
    def processing_resolution(self) -> int:
        """Side in pixels at which the networks see images, unless a call says otherwise."""
        return self.config.processing_resolution

    @property
    def input_resolution(self) -> int:
        """The networks' own: a closer look at the input would find detail that no reconstruction can have."""
        return self.processing_resolution

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """The scheduler's class and configuration, which say where its steps lead."""
        return {SCHEDULER: {"class": type(self.scheduler).__name__, **scheduler_record(self.scheduler)}}

    @property
    def num_timesteps(self) -> int:
        """Steps of the last reverse process."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `pipe._interrupt = True` ends the call, which returns the batches so far."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        category: str | int | Sequence[str | int] | None = None,
        num_inference_steps: int | None = None,
        strength: float | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = 8,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AnomalyOutput | tuple:
        """Maps, scores and reconstructions of one image or many.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), tensor ([C,] H, W) or (N, C, H, W), or a list of
                these. Floats lie in [0, 1].
            category: of a calibrated model of many, its name or index, one for all images or one each; None takes that
                which an image's features are nearest to (`recognise`).
            num_inference_steps: steps of the reverse process; None takes the pipeline's own, as for the other
                arguments that the pipeline has.
            strength: in (0, 1], as in the class.
            latents: the noise to start from, (N, latent channels, R / f, R / f), f the autoencoder's factor; None
                draws it with `generator`.
            batch_size: images in one pass of the networks.
            processing_resolution: side in pixels at which the networks see the images.
            match_input_resolution: whether maps and reconstructions come at the images' own size, which then must be
                one; else at the processing resolution, or, where images are looked at in tiles, as they were blended: a
                pixel for each 4 x 4 of what the networks see, all of the first image's size.
            generator: of the noise, one for all images or one each. The noise of an image depends neither on the batch
                size nor on the images after it. None gives every image the model's own, as a calibration and an
                exported graph do, so that calls repeat. (A scheduler that draws noise at each step needs
                a list, one for each image.)
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.
            callback_on_step_end: called after each step of each batch as `callback(pipeline, step, timestep, tensors)`.
                What it returns under "latents" is gone on with.
            callback_on_step_end_tensor_inputs: which tensors it gets: "latents", (B, latent channels, R / f, R / f).

        Returns:
            [`AnomalyOutput`]; `reconstruction` is None where images are looked at in tiles.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        # 1. Check the inputs: N images (3, H_i, W_i) in [0, 1], a category (N,), a generator and noise for each
        images = ImageSequence(image, self.value_range)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        check_call(images, batch_size, resolution, self.size_multiple, match_input_resolution, generator, output_type)
        resolution = square_side(resolution)
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        device, calibration = self._execution_device, self.calibration
        if category is None and calibration is None:  # nothing is chosen by it
            category = 0
        if category is None and len(self.categories) > 1:
            category = self.recognise(images, batch_size)
        categories = category_indices(category, self.categories, len(images)).to(device)
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * len(images)
        latents = check_latents(latents, self.vae, (len(images), resolution, resolution))
        num_inference_steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        strength = self.config.strength if strength is None else strength
        steps = num_inference_steps - skipped_steps(num_inference_steps, strength)
        size = images.sizes[0] if match_input_resolution else (resolution, resolution)
        if self.tile_size is not None:
            check_tiled_call(self, resolution)
            check_tiled_reverse_process(self.config, num_inference_steps, strength, latents, callback_on_step_end)
            size = size if match_input_resolution else grid_of(self, images.sizes[0])[:2]
        statistics = (self.config.image_mean, self.config.image_std)
        own_noise = latents is None and all(one is None for one in generators)
        settings = {
            **self.config,
            **self.scheduler_settings,
            "processing_resolution": resolution,
            "num_inference_steps": num_inference_steps,
            "strength": strength,
        }
        check_calibration(calibration, categories, self.categories, self.precision, settings, own_noise)

        anomaly_maps, anomaly_scores, reconstructions = [], [], []
        with self.progress_bar(total=math.ceil(len(images) / batch_size) * steps) as progress:
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                if self.tile_size is not None:
                    of_tiles = detect_large(self, images[batch], categories[batch], generators[batch], batch_size, size)
                    anomaly_maps.append(of_tiles[0])
                    anomaly_scores.append(of_tiles[1])
                    progress.update(steps)
                    continue

                # 2. Pixels: (B, 3, R, R) in [-1, 1]
                pixel_values = images_to_pixel_values(images[batch], (resolution, resolution)).to(device)
                inside = inside_region(self.region, categories[batch], (resolution, resolution))
                pixel_values = hide_outside(pixel_values, inside)

                # 3. The reverse process from noise, guided by the images (eqs. 6-8): latents (B, C, R / f, R / f)
                restored = self.denoise(
                    normalize_images(pixel_values, *statistics),
                    None if latents is None else latents[batch],
                    num_inference_steps,
                    strength,
                    generators[batch],
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    progress.update,
                )

                # 4. The parts as they should be: (B, 3, R, R), about [-1, 1]
                reconstruction = denormalize_images(self.decode(restored), *statistics)

                # 5. Both in the features' eyes: cosine maps (B, L, R, R) of eq. 9, or the residual (B, 1, C, h, w)
                measurement = self.compare(pixel_values, reconstruction)

                # 6. Smoothed maps, a residual's by what good images show: (B, S, R, R)
                maps = self.score_maps(measurement, categories[batch], calibration)

                # 7. In standard deviations above good images, and joined (eq. 10): (B, R, R)
                anomaly_map = self.join_maps(maps, categories[batch], calibration)

                # 8. The image's score, of its region of interest: (B,)
                anomaly_map, scores = self.score_inside(anomaly_map, categories[batch])
                anomaly_scores.append(scores.cpu())

                # 9. At the images' own size: (B, H, W) and (B, 3, H, W) in [0, 1]
                anomaly_maps.append(self.at_size(anomaly_map, size, categories[batch]).cpu())
                reconstructions.append(resize_images((reconstruction / 2.0 + 0.5).clamp(0.0, 1.0), size).cpu())
                if self.interrupt:
                    break
        self.maybe_free_model_hooks()

        # 10. Alarms, masks and p-values, where thresholds are
        pictures = torch.cat(reconstructions) if reconstructions else None
        output = AnomalyOutput(torch.cat(anomaly_maps), torch.cat(anomaly_scores), pictures)
        output = threshold_output(output, categories[: len(output.anomaly_score)].cpu(), calibration)

        # 11. As arrays or pictures
        return convert_output(output, output_type, return_dict)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents of images.

        Args:
            pixel_values: (N, 3, H, W), normalised with `image_mean` and `image_std`; H and W multiples of the
                autoencoder's factor f.

        Returns:
            (N, latent channels, H / f, W / f) float32: the mode of the encoder's Gaussian, scaled to unit variance.
        """
        check_pixel_values(pixel_values, self.vae)
        statistics = (self.config.latents_mean, self.config.latents_std)
        return encode_latents(self.vae, pixel_values.to(self._execution_device), *statistics)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, normalised as `encode`'s and not clamped.

        Args:
            latents: (N, latent channels, h, w).

        Returns:
            (N, 3, f h, f w) float32, f the autoencoder's factor.

        Raises:
            ValueError: `latents` have another shape.
        """
        check_latent_channels(latents, self.vae)
        statistics = (self.config.latents_mean, self.config.latents_std)
        return decode_latents(self.vae, latents.to(self._execution_device), *statistics)

    @torch.no_grad()
    def denoise(
        self,
        pixel_values: torch.Tensor,
        latents: torch.Tensor | None = None,
        num_inference_steps: int = 10,
        strength: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator | None] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        report_step: Callable[[], Any] = lambda: None,
    ) -> torch.Tensor:
        """The reverse process, guided by images: one pass of the denoiser and one of the semantic-guided network a
        step. There is no guidance by a prompt, as both prompts would be empty.

        Args:
            pixel_values: (N, 3, H, W), normalised with `image_mean` and `image_std`; H and W multiples of the
                autoencoder's factor f.
            latents: the noise to start from, (N, latent channels, H / f, W / f); None draws it with `generator`.
            num_inference_steps: steps from noise; `strength` below 1 leaves the first ones out.
            strength: in (0, 1]; 1 starts from `latents` alone, less from the encoded images with `latents` for noise.
            generator: one, or one for each image; None gives every image the model's own noise.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in a call.
            report_step: called after each step, for a bar.

        Returns:
            (N, latent channels, H / f, W / f) float32.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        # a. Check the inputs
        height, width = check_pixel_values(pixel_values, self.vae)
        count, device = pixel_values.shape[0], self._execution_device  # `len` would fix a graph's batch
        latents = check_latents(latents, self.vae, (count, height, width))
        skipped = skipped_steps(num_inference_steps, strength)
        generators: list[torch.Generator] = []
        if not is_exporting():  # a graph has its noise, and its batch no number
            given = generator if isinstance(generator, Sequence) else [generator] * count
            if len(given) != count:
                raise ValueError(
                    f"`generator` lists {len(given)} generators for {count} images. Pass one, or one each."
                )
            generators = noise_generators(given)

        # b. Timesteps, and x_T or the noised image: (N, C, h, w)
        timesteps = self._traced_timesteps if is_exporting() else self.set_timesteps(num_inference_steps, skipped)
        self._num_timesteps, self._interrupt = len(timesteps), False
        if latents is None:
            factor = self.size_multiple
            latents = draw_noise(
                (self.vae.config.latent_channels, height // factor, width // factor), generators, device
            )
        latents = latents.to(device, torch.float32)
        if skipped:
            latents = self.scheduler.add_noise(self.encode(pixel_values), latents, torch.as_tensor(timesteps[:1]))
        else:
            latents = latents * self.scheduler.init_noise_sigma

        # c. What no step changes: the prompt's embedding (N, L, D), and the image's (N, D', h, w) (eq. 7)
        prompt_embeds = self.prompt_embedding().to(device, self.unet.dtype).expand(count, -1, -1)
        condition = None
        if self.sg_network is not None:
            condition = self.sg_network.embed_condition(pixel_values.to(device, self.sg_network.dtype))

        # d. Reverse process: x_{t-1} of x_t
        options = {}
        takes_generators = "generator" in inspect.signature(self.scheduler.step).parameters
        if takes_generators and generators:
            options["generator"] = generators
        for step, timestep in enumerate(timesteps):
            if self.interrupt:
                continue
            sample = self.scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
            residuals = {}
            if self.sg_network is not None:
                down, middle = self.sg_network(
                    sample, timestep, prompt_embeds, conditioning_embedding=condition, return_dict=False
                )
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            prediction = self.unet(sample, timestep, prompt_embeds, return_dict=False, **residuals)[0]
            latents = self.scheduler.step(prediction.float(), timestep, latents, return_dict=False, **options)[0]
            if callback_on_step_end is not None:
                tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, tensors) or {}).pop("latents", latents)
            if (step + 1) % self.scheduler.order == 0:
                report_step()
        return latents

    def set_timesteps(self, num_inference_steps: int, skipped: int) -> torch.Tensor:
        """The scheduler's timesteps without the first `skipped` steps, at which it then begins."""
        check_scheduler(self.scheduler, skipped)  # it may have been replaced
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped * self.scheduler.order)
        return self.scheduler.timesteps[skipped * self.scheduler.order :]

    def reset_schedule(self) -> None:
        """The pipeline's own schedule, whose timesteps are numbers in a graph: no trace gets them out of a tensor."""
        steps, strength = self.config.num_inference_steps, self.config.strength
        self._traced_timesteps = self.set_timesteps(steps, skipped_steps(steps, strength)).tolist()

    def reconstruct(
        self,
        pixel_values: torch.Tensor,
        generators: Sequence[torch.Generator | None] | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The parts as they should be, both (N, 3, R, R) in [-1, 1]; the result is not clamped. Steps 3 and 4.

        The noise to start from is drawn by `generators`, one for each image, or given, (N, *noise_shape), or
        the model's own.
        """
        statistics = (self.config.image_mean, self.config.image_std)
        latents = self.denoise(
            normalize_images(pixel_values, *statistics),
            noise,
            num_inference_steps=self.config.num_inference_steps,
            strength=self.config.strength,
            generator=generators,
        )
        return denormalize_images(self.decode(latents), *statistics)

    @property
    def weights(self) -> dict[str, float]:
        """Of the maps by their names, all three."""
        return reconstruction_weights(self.config.weights)

    @property
    def finest_grid(self) -> tuple[int, int]:
        """Rows and columns of the features at a quarter of the networks' size."""
        return (max(1, self.processing_resolution // 4),) * 2

    @property
    def feature_resolution(self) -> tuple[int, int]:
        """Rows and columns of the features that have a Gaussian."""
        return feature_grid(self.finest_grid, self.feature_extractor.num_channels)

    def compare(self, pixel_values: torch.Tensor, reconstruction: torch.Tensor, of_tiles: bool = False) -> Measurement:
        """Images and their reconstructions, each (N, 3, R, R) in [-1, 1], in the features' eyes.

        Cosine maps (N, L, R, R) of the L scored strides, or the residual (N, 1, C, h, w) of their features; and the
        images' own features and patches, where they count. Those of tiles have the finest grid, as its positions share
        a Gaussian.
        """
        extractor = self.feature_extractor
        if extractor is None:
            raise ValueError(
                "`feature_extractor` is None: this pipeline denoises, but has no features to score with. Give it the "
                "paper's: pipe.register_modules(feature_extractor="
                "TimmFeatureExtractor.from_backbone('resnet50', (4, 8, 16)).to(pipe.device))"
            )
        both = torch.cat([pixel_values, reconstruction]).to(extractor.dtype)  # (2N, 3, R, R), one pass
        every = extractor.layers(both)
        layers = [every[i].float() for i in scored_layers(self.config.score_strides, extractor)]
        count, size = pixel_values.shape[0], (pixel_values.shape[2], pixel_values.shape[3])
        grid = self.finest_grid if of_tiles else self.feature_resolution
        own = measure_features(extractor, [layer[:count] for layer in every], self.weights, grid)
        if self.config.distance == "cosine":
            maps = [cosine_distance_map([layer[:count]], [layer[count:]], size) for layer in layers]
            return Measurement(torch.stack(maps, dim=1), None, *own)
        features = concatenate_layers(layers, max(layer.shape[-2:] for layer in layers))  # (2N, C, h, w)
        no_maps = pixel_values.new_zeros(count, 0, *size)
        return Measurement(no_maps, (features[:count] - features[count:])[:, None], *own)

    @property
    def measuring_networks(self) -> tuple[Any, ...]:
        """What `reconstruct` and `compare` run."""
        return self.vae, self.unet, self.sg_network, self.feature_extractor

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise from which an image's reverse process starts: (C, h, w) of its latents."""
        side = self.processing_resolution // self.size_multiple
        return self.vae.config.latent_channels, side, side

    def measure_pixels(
        self,
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        generators: Sequence[torch.Generator | None],
        of_tiles: bool = False,
    ) -> Measurement:
        """Steps 3 to 5 of a call; tiles are rebuilt as whole images are."""
        return self.compare(pixel_values, self.reconstruct(pixel_values, generators), of_tiles)

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """Smoothed maps (N, S, H, W), one for each scored layer (S = L), and calibrated, the features' own.

        Of a calibrated residual, the one or two maps of its log Mahalanobis distance. `num_seen` is
        `ScoreCalibration.log_distances`'.
        """
        maps, residual = measurement.maps, measurement.residual
        size = maps.shape[-2], maps.shape[-1]
        if calibration is not None:
            calibration.check_measurement(measurement)
        if residual is not None and calibration is not None:
            maps = calibration.distance_maps(residual.mean(dim=1), category, size, num_seen)
        elif residual is not None:
            layers = scored_layers(self.config.score_strides, self.feature_extractor)
            layer_channels = [self.feature_extractor.layer_channels[i] for i in layers]
            maps = resize_maps(feature_error(residual, layer_channels), size)
        if calibration is None:
            maps = maps * maps.shape[1]  # the paper's sum over layers (eq. 10), where `join_maps` takes the mean
        inside = None if calibration is None else calibration.inside(category, size)
        maps = gaussian_smooth(maps, self.config.sigma, inside)
        if calibration is None:
            return maps
        own = feature_maps(measurement, category, calibration, size, self.config.sigma, num_seen)
        return torch.cat([maps, *own], dim=1)

    def join_maps(
        self, maps: torch.Tensor, category: torch.Tensor, calibration: ScoreCalibration | None
    ) -> torch.Tensor:
        """Eq. 10: maps (N, S, H, W) to the anomaly map (N, H, W), normalised where there is a calibration."""
        if calibration is None:
            return maps.mean(dim=1)
        named = calibration.named_maps(calibration.normalize(maps, category), "layers", "reconstruction")
        weights, layers = shares(self.weights), named["layers"]
        # the mean over all layers, or the residual's distance (N, H, W) of cells, and of positions if they differ
        errors = [layers.mean(dim=1)] if layers.shape[1] else named["reconstruction"].unbind(dim=1)
        rest: Any = sum(weights[name] * named[name][:, 0] for name in ("gaussian", "nearest") if named[name].shape[1])
        joined = [rest + weights["reconstruction"] * error for error in errors]
        return outlined(joined, calibration, category)

    def image_scores(self, anomaly_map: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H, W) to (N,): the maximum after rounds of average pooling (section 4.1), of the pixels that count.

        Where images are looked at in tiles, a map's pixel is a cell of several, and windows are of as many pixels.
        """
        side = self.config.pooling_size if self.tile_size is None else -(-self.config.pooling_size // CELL)
        return max_score(anomaly_map, side, self.config.pooling_rounds, inside)
