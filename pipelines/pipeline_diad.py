"""He et al., "A Diffusion-based Framework for Multi-class Anomaly Detection" (DiAD, AAAI 2024)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageInput,
    denormalize_images,
    images_to_tensors,
    normalize_images,
)
from diffad.models.feature_extractor import TimmFeatureExtractor, concatenate_layers
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.models.semantic_guided_network import SemanticGuidedNetwork
from diffad.moments import PRIOR_IMAGES
from diffad.pipelines.base import AnomalyPipeline, Measurement, check_map_settings, check_score_strides
from diffad.pipelines.output import AnomalyOutput
from diffad.scoring import cosine_distance_map, gaussian_smooth, max_score


class DiADPipeline(AnomalyPipeline):
    r"""Finds defects by comparing an image with its reconstruction as a good one.

    The reverse process starts from noise. At each step the semantic-guided network sees the input image and tells the
    denoiser what it shows, but not where a defect is: what it tells is too coarse. The input's and the
    reconstruction's pretrained features are compared (eqs. 9-10). One model serves many categories and is not told
    which it sees.

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
        score_strides: which of the feature extractor's strides are compared; None for all.
        sigma: smoothing of the map, in pixels at the processing resolution.
        pooling_size: side of the window of the average pooling before the map's maximum is the image's score.
        pooling_rounds: how often it is pooled. Each round takes `pooling_size - 1` pixels off the map's sides.
        suppression: in [0, 1): the share of how far its peak stands above its mean that is taken off each calibrated
            map, see `diffad.scoring.suppress_surroundings`. Scores move with it: calibrate again after a change.
        position_prior_images: where a place of the residual's covariance holds several positions, how many images the
            average over all positions counts for in their map's deviation, from 0 (`MomentSums.standard_deviation`).
            Good images vary more along a part's edges, so that defects there would end too early; the more images, the
            less so. Calibrate again after a change.
        processing_resolution: side in pixels to which images are resized.
        categories: names of the categories of a unified model. They choose the statistics, not the networks' output.
        image_mean, image_std: of the images' colours in [0, 1], by which the networks take them normalised; None takes
            ImageNet's, as the paper does.
    """

    # The semantic-guided network stays out of the sequence: it and the denoiser take turns at every step, so each
    # would be moved away for the other.
    model_cpu_offload_seq = "unet->vae->feature_extractor"
    _optional_components = ["sg_network", "feature_extractor", "calibration"]  # noqa: RUF012 (diffusers' own form)
    _exclude_from_cpu_offload = ["prompt_embedding", "calibration"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        prompt_embedding: PromptEmbedding,
        scheduler: DDIMScheduler,
        sg_network: SemanticGuidedNetwork | None = None,
        feature_extractor: TimmFeatureExtractor | None = None,
        calibration: ScoreCalibration | None = None,
        num_inference_steps: int = 10,
        strength: float = 1.0,
        distance: str = "cosine",
        score_strides: list[int] | None = None,
        sigma: float = 5.0,
        pooling_size: int = 8,
        pooling_rounds: int = 8,
        suppression: float = 0.0,
        position_prior_images: float = PRIOR_IMAGES,
        processing_resolution: int = 256,
        categories: list[str] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
    ):
        super().__init__()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"`unet` takes latents of {unet.config.in_channels} channels, but `vae` makes them with "
                f"{vae.config.latent_channels}. Use the autoencoder that the denoiser was trained with."
            )
        if unet.config.cross_attention_dim != prompt_embedding.config.width:
            raise ValueError(
                f"`prompt_embedding` is {prompt_embedding.config.width} wide, but `unet` attends to a prompt of "
                f"width {unet.config.cross_attention_dim}. Embed it with the denoiser's own text encoder."
            )
        if sg_network is not None:
            stack_factor = 2 ** (len(sg_network.config.conditioning_embedding_out_channels) - 1)
            if stack_factor != factor:
                raise ValueError(
                    f"`sg_network` makes the image {stack_factor} times smaller and `vae` {factor} times. Give the "
                    "network's `conditioning_embedding_out_channels` as many widths as the autoencoder has levels."
                )
        if distance not in ("cosine", "mahalanobis"):
            raise ValueError(f'`distance` must be "cosine" or "mahalanobis", but is {distance!r}.')
        if score_strides is not None and feature_extractor is not None:
            check_score_strides(score_strides, feature_extractor)
        if sigma < 0:
            raise ValueError(f"`sigma` must not be negative, but is {sigma}.")
        if pooling_size < 1 or pooling_rounds < 0:
            raise ValueError(
                "`pooling_size` must be at least 1 and `pooling_rounds` at least 0, but they are "
                f"{pooling_size} and {pooling_rounds}."
            )
        check_map_settings(suppression, position_prior_images)
        _skipped_steps(num_inference_steps, strength)
        self.register_modules(
            vae=vae.eval(),
            unet=unet.eval(),
            prompt_embedding=prompt_embedding,
            scheduler=scheduler,
            sg_network=None if sg_network is None else sg_network.eval(),
            feature_extractor=feature_extractor,
            calibration=calibration,
        )
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            strength=strength,
            distance=distance,
            score_strides=None if score_strides is None else sorted(score_strides),
            sigma=sigma,
            pooling_size=pooling_size,
            pooling_rounds=pooling_rounds,
            suppression=suppression,
            position_prior_images=position_prior_images,
            processing_resolution=processing_resolution,
            categories=list(categories) if categories else None,
            image_mean=list(image_mean or IMAGENET_MEAN),
            image_std=list(image_std or IMAGENET_STD),
        )

    @property
    def processing_resolution(self) -> int:
        """Side in pixels at which the networks see images, unless a call says otherwise."""
        return self.config.processing_resolution

    @property
    def size_multiple(self) -> int:
        """The autoencoder's factor: how many times smaller latents are than images."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def input_resolution(self, resolution: int) -> int:
        """The networks' own: a closer look at the input would find detail that no reconstruction can have."""
        return resolution

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
        callback_on_step_end: Callable[[DiADPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> AnomalyOutput | tuple:
        """Maps, scores and reconstructions of one image or many.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), tensor ([C,] H, W) or (N, C, H, W), or a list of
                these. Floats lie in [0, 1].
            category: of a calibrated model of many, its name or index, one for all images or one each.
            num_inference_steps: steps of the reverse process; None takes the pipeline's own, as for the other
                arguments that the pipeline has.
            strength: in (0, 1], as in the class.
            latents: the noise to start from, (N, latent channels, R / f, R / f), f the autoencoder's factor; None
                draws it with `generator`.
            batch_size: images in one pass of the networks.
            processing_resolution: side in pixels at which the networks see the images.
            match_input_resolution: whether maps and reconstructions come at the images' own size, which then must be
                one; else at the processing resolution.
            generator: makes the call repeatable. The noise of an image depends neither on the batch size nor on the
                images after it. (A scheduler that draws noise at each step needs a list, one for each image.)
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.
            callback_on_step_end: called after each step of each batch as `callback(pipeline, step, timestep,
                {"latents": latents})`; may return other latents in such a dict.

        Returns:
            [`AnomalyOutput`].

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        # 1. Check inputs
        images = images_to_tensors(image)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        self.check_call(images, batch_size, resolution, match_input_resolution, generator, output_type)
        if category is None and self.calibration is None:  # nothing is chosen by it
            category = 0
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
            num_inference_steps=num_inference_steps,
            strength=strength,
            latents=self._check_latents(latents, (len(images), resolution, resolution)),
            callback_on_step_end=callback_on_step_end,
        )

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents of images.

        Args:
            pixel_values: (N, 3, H, W), normalised with `image_mean` and `image_std`; H and W multiples of the
                autoencoder's factor f.

        Returns:
            (N, latent channels, H / f, W / f) float32: the mode of the encoder's Gaussian, scaled to unit variance.
        """
        self._check_pixel_values(pixel_values)
        return encode_latents(self.vae, pixel_values.to(self._execution_device))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, normalised as `encode`'s and not clamped.

        Args:
            latents: (N, latent channels, h, w).

        Returns:
            (N, 3, f h, f w) float32, f the autoencoder's factor.
        """
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self._execution_device, self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def denoise(
        self,
        pixel_values: torch.Tensor,
        latents: torch.Tensor | None = None,
        num_inference_steps: int = 10,
        strength: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator | None] | None = None,
        callback_on_step_end: Callable[[DiADPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> torch.Tensor:
        """The reverse process, guided by images: one pass of the denoiser and one of the semantic-guided network a
        step. There is no guidance by a prompt, as both prompts would be empty.

        Args:
            pixel_values: (N, 3, H, W), normalised with `image_mean` and `image_std`; H and W multiples of the
                autoencoder's factor f.
            latents: the noise to start from, (N, latent channels, H / f, W / f); None draws it.
            num_inference_steps: steps from noise; `strength` below 1 leaves the first ones out.
            strength: in (0, 1]; 1 starts from `latents` alone, less from the encoded images with `latents` for noise.
            generator: one, or one for each image.
            callback_on_step_end: as in a call.

        Returns:
            (N, latent channels, H / f, W / f) float32.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        # 1. Check inputs
        height, width = self._check_pixel_values(pixel_values)
        count, device = len(pixel_values), self._execution_device
        latents = self._check_latents(latents, (count, height, width))
        skipped = _skipped_steps(num_inference_steps, strength)
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * count
        if len(generators) != count:
            raise ValueError(
                f"`generator` lists {len(generators)} generators for {count} images. Pass one, or one each."
            )

        # 2. Timesteps, and the latents at the first of them
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps[skipped * self.scheduler.order :]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped * self.scheduler.order)
        if latents is None:
            shape = (self.vae.config.latent_channels, height // self.size_multiple, width // self.size_multiple)
            latents = torch.stack([randn_tensor(shape, generator=g, device=device) for g in generators])
        latents = latents.to(device, torch.float32)  # (N, C, h, w)
        if skipped:
            latents = self.scheduler.add_noise(self.encode(pixel_values), latents, timesteps[:1])
        else:
            latents = latents * self.scheduler.init_noise_sigma

        # 3. What no step changes: the prompt's embedding and the image's (eq. 7)
        prompt_embeds = self.prompt_embedding().to(device, self.unet.dtype).expand(count, -1, -1)
        condition = None
        if self.sg_network is not None:
            condition = self.sg_network.embed_condition(pixel_values.to(device, self.sg_network.dtype))

        # 4. Reverse process
        options = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters and None not in generators:
            options["generator"] = generators
        for step, timestep in enumerate(timesteps):
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
                latents = callback_on_step_end(self, step, timestep, {"latents": latents}).pop("latents", latents)
        return latents

    def measure(
        self,
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        resolution: int,
        generator: Sequence[torch.Generator | None],
        num_inference_steps: int | None = None,
        strength: float | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> Measurement:
        """What the features see between images and their reconstructions; arguments as in a call."""
        options = (num_inference_steps, strength, latents, callback_on_step_end)
        return self.compare(pixel_values, self.reconstruct(pixel_values, generator, *options))

    def reconstruct(
        self,
        pixel_values: torch.Tensor,
        generator: Sequence[torch.Generator | None],
        num_inference_steps: int | None = None,
        strength: float | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """Images as the model expects them to be, both (N, 3, R, R) in [-1, 1]; the result is not clamped."""
        statistics = (self.config.image_mean, self.config.image_std)
        latents = self.denoise(
            normalize_images(pixel_values, *statistics),
            latents,
            self.config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            self.config.strength if strength is None else strength,
            generator,
            callback_on_step_end,
        )
        return denormalize_images(self.decode(latents), *statistics)

    def compare(self, pixel_values: torch.Tensor, reconstruction: torch.Tensor) -> Measurement:
        """Images and their reconstructions, each (N, 3, R, R) in [-1, 1], in the features' eyes.

        Cosine maps (N, L, R, R) of the L scored strides, or the residual (N, 1, C, h, w) of their features.
        """
        if self.feature_extractor is None:
            raise ValueError(
                "`feature_extractor` is None: this pipeline denoises, but has no features to score with. Give it the "
                "paper's: pipe.register_modules(feature_extractor="
                "TimmFeatureExtractor.from_backbone('resnet50', (4, 8, 16)).to(pipe.device))"
            )
        both = torch.cat([pixel_values, reconstruction]).to(self.feature_extractor.dtype)  # (2N, 3, R, R), one pass
        layers = self.feature_extractor.layers(both)
        layers = [layers[i].float() for i in self.scored_layers]
        size = pixel_values.shape[-2:]
        restored = reconstruction / 2.0 + 0.5
        if self.config.distance == "cosine":
            maps = [cosine_distance_map([a], [b], size) for a, b in (layer.chunk(2) for layer in layers)]
            return Measurement(maps=torch.stack(maps, dim=1), reconstruction=restored)
        features = concatenate_layers(layers, max(layer.shape[-2:] for layer in layers))  # (2N, C, h, w)
        image, other = features.chunk(2)
        no_maps = pixel_values.new_zeros(len(pixel_values), 0, *size)
        return Measurement(maps=no_maps, residual=(image - other)[:, None], reconstruction=restored)

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor | None,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """(N, L, H, W): each scored layer's smoothed map; L = 1 or 2 for calibrated log distances."""
        maps = measurement.maps
        if measurement.residual is not None:
            maps = self.feature_error_maps(measurement, category, calibration, num_seen)
        if calibration is None:
            maps = maps * maps.shape[1]  # the paper's sum over layers, where `join_maps` takes the mean
        return gaussian_smooth(maps, self.config.sigma)

    def join_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, L, H, W) to (N, H, W): the mean, as normalised maps are of one scale."""
        return maps.mean(dim=1)

    def image_scores(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """(N, H, W) to (N,): the maximum after rounds of average pooling (section 4.1)."""
        return max_score(anomaly_map, self.config.pooling_size, self.config.pooling_rounds)

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Height and width of images that the networks take."""
        multiple = self.size_multiple
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.vae.config.in_channels:
            raise ValueError(
                f"`pixel_values` must have shape (N, {self.vae.config.in_channels}, H, W), but has "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"`pixel_values` of {height} x {width}: both sides must be multiples of {multiple}, the autoencoder's "
                "factor. Resize or pad the images."
            )
        return height, width

    def _check_latents(self, latents: torch.Tensor | None, sizes: tuple[int, int, int]) -> torch.Tensor | None:
        """`latents` as they are, if they fit images of `sizes` (N, H, W)."""
        count, height, width = sizes
        factor = self.size_multiple
        shape = (count, self.vae.config.latent_channels, height // factor, width // factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` must have shape {shape} for {count} images of {height} x {width}, but has "
                f"{tuple(latents.shape)}."
            )
        return latents


def _skipped_steps(num_inference_steps: int, strength: float) -> int:
    """How many of the first steps a strength leaves out; both are checked."""
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be a positive integer, but is {num_inference_steps!r}.")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"`strength` must lie in (0, 1], but is {strength}.")
    steps = round(num_inference_steps * strength)
    if steps == 0:
        raise ValueError(
            f"`strength` of {strength} leaves none of {num_inference_steps} steps. Use at least "
            f"{1.0 / num_inference_steps:.2g}, or more `num_inference_steps`."
        )
    return num_inference_steps - steps


def encode_latents(vae: AutoencoderKL | AutoencoderTiny, pixel_values: torch.Tensor) -> torch.Tensor:
    """Latents of about unit variance, (N, 3, H, W) to (N, C, H / f, W / f) float32; the mode of a Gaussian's."""
    encoded = vae.encode(pixel_values.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
