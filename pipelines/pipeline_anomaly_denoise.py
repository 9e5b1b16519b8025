"""AnomalyDenoise (Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization", ICCV 2023).

This file is long so that a call stands in one place: from the image over noise and networks to map and score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler

from diffad.calibration.coreset import patch_layers
from diffad.calibration.feature_gaussian import feature_grid
from diffad.calibration.recorded_settings import SCHEDULER
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import (
    ImageInput,
    ImageSequence,
    Side,
    as_side,
    as_size,
    images_to_pixel_values,
    resize_images,
)
from diffad.likelihood import kl_divergence_map
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.models.gaussian_feature_model import GaussianFeatureModel
from diffad.pipelines.base import category_names, register_categories
from diffad.pipelines.checks import (
    MAP_NAMES,
    category_indices,
    check_calibrated_categories,
    check_calibration,
    check_call,
    check_class_embeddings,
    check_denoiser,
    check_feature_resolution,
    check_forward_process,
    check_map_settings,
    check_required,
    check_resolution,
    check_share,
    check_smoothing,
    check_tiled_call,
    check_tiles,
    check_timesteps,
    check_value_range,
    map_weights,
    scored_layers,
    shares,
)
from diffad.pipelines.detection import DetectionPipeline, scheduler_record
from diffad.pipelines.feature_maps import feature_maps, measure_features, outlined
from diffad.pipelines.large_images import detect_large, grid_of
from diffad.pipelines.output import AnomalyOutput, ReconstructionOutput, convert_output, threshold_output
from diffad.pipelines.pipeline_ddpm_reconstruction import DDPMReconstructionPipeline
from diffad.pipelines.pipeline_gradient_denoising import GradientDenoisingPipeline
from diffad.region_of_interest import hide_outside, inside_region, values_inside
from diffad.scoring import (
    Measurement,
    feature_error,
    gaussian_smooth,
    joint_map,
    max_score,
    resize_maps,
    top_fraction_score,
)
from diffad.seeding import draw_noise
from diffad.warn_once import warn_once

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffad.calibration.good_images import GoodImages
    from diffad.pipelines.explaining import Explanation

DEFAULT_ALPHA = 0.5  # the paper's
SCHEDULER_SETTINGS = (  # of the forward process and its posterior, by which a calibration holds
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
    "trained_betas",
)


class AnomalyDenoisePipeline(DetectionPipeline):
    r"""Finds defects as what a denoiser of good images does not expect.

    The image is noised to a few small timesteps. At each, the per-pixel KL divergence between the true and the
    predicted posterior (eq. 8) is one map, the error of the predicted pretrained features (eq. 10) another; both are
    normalised by what good images show, joined (eq. 11) and averaged.

    ```python
    pipe = AnomalyDenoisePipeline.from_pretrained("runs/parts")
    out = pipe("part.png")
    out.anomaly_map, out.anomaly_score, out.p_value
    ```

    Two other pipelines share its networks: [`GradientDenoisingPipeline`] turns a defective image into a normal one, and
    [`DDPMReconstructionPipeline`] is the plain DDPM that the paper compares itself with.

    Two more maps may join them, of the features alone. How far they are from good images' at their position, by a
    Gaussian, is PaDiM's (Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
    Localization", 2021), how far from the nearest of any position PatchCore's (Roth et al., "Towards Total Recall in
    Industrial Anomaly Detection", 2022). They take no training, and need no denoiser: where the other maps' weights are
    0, or there is none, it does not run.

    Args:
        unet: the denoiser, with learned variance and a feature head; None for the features alone.
        scheduler: the forward process; `variance_type` "learned_range". It goes with the denoiser.
        feature_extractor: the frozen network whose features the denoiser predicts.
        calibration: statistics of good images; None until `calibrate`.
        gaussian: distribution of good images' features, for gradient denoising; None until `fit_gaussian`.
        timesteps: noise levels T; None takes the paper's 5, 50 and 100.
        alpha: weight of the KL in eq. 11, in [0, 1].
        weights: of the maps, `{"kl": , "feature_error": , "gaussian": , "nearest": }`, not negative; one that is left
            out is 0. They are divided by their sum. None takes alpha and 1 - alpha for the first two, and without a
            denoiser the Gaussian alone. Calibrate again after a change.
        kl_sigma: smoothing of the KL maps, in pixels at the processing resolution.
        feature_sigma: smoothing of the feature error, in pixels at the processing resolution.
        score_fraction: the image's score is the mean of this share of the map's highest pixels; 0 for the maximum.
        contrast: not negative: the share of how far it stands below its peak by which each calibrated map is lowered,
            see `diffad.scoring.heighten_contrast`. Scores and thresholds do not know of it.
        position_trust: in [0, 1]: how far the mean and the variance that good images' maps have at a position are
            trusted, against those over all positions. At 1 a defect counts by what is usual at its place. Where good
            images hardly vary, as on a plain background, that makes much of little.
        score_strides: which of the feature extractor's strides the feature error looks at; None for all.
        processing_resolution: side in pixels to which images are resized, or height and width; None takes the network's
            `sample_size`, or, without a denoiser, the feature extractor's `image_size`. Images of any ratio are
            resized to it, in training, calibration and calls alike: a place of the part is then the same place of the
            map, and there is no padding that a score could see.
        feature_resolution: rows and columns of the features that have a Gaussian, one number where they are equal; None
            takes a quarter of the feature extractor's `image_size`, or what `feature_grid` allows.
        categories: names of the categories of a unified model, in the order of its class labels.
        tile_calibration: statistics of good images' tiles; None until `calibrate`, and without a `tile_size`.
        tile_size: side in pixels of the tiles in which images are looked at, at their own pixels, beside the whole
            image (`diffad.pipelines.large_images`), or height and width; None looks at whole images alone. A tile is
            resized to what the networks see at once; where that is no square, a side means one of as many pixels.
        tile_overlap: share of a tile's sides by which neighbours overlap at least, in [0, 0.75].
        value_range: the largest value that images of more than 8 bits can have, such as 4095 of a camera of 12 bits, as
            found in the training images; None takes, in each call, the smallest of 8, 10, 12, 14 and 16 bits that holds
            all of its images.
    """

    model_cpu_offload_seq = "unet->feature_extractor"
    _optional_components = ["unet", "scheduler", "calibration", "tile_calibration", "gaussian"]  # noqa: RUF012 (diffusers' own form)
    # the Gaussian and the denoiser take turns: each would be moved away for the other
    _exclude_from_cpu_offload = ["calibration", "tile_calibration", "gaussian"]  # noqa: RUF012

    def __init__(
        self,
        unet: DenoisingUNet2DModel | None,
        scheduler: DDPMScheduler | None,
        feature_extractor: TimmFeatureExtractor,
        calibration: ScoreCalibration | None = None,
        gaussian: GaussianFeatureModel | None = None,
        timesteps: list[int] | None = None,
        alpha: float = DEFAULT_ALPHA,
        kl_sigma: float = 2.0,
        feature_sigma: float = 4.0,
        score_fraction: float = 0.0,
        contrast: float = 0.0,
        weights: dict[str, float] | None = None,
        position_trust: float = 1.0,
        score_strides: list[int] | None = None,
        processing_resolution: Side | None = None,
        feature_resolution: Side | None = None,
        categories: list[str] | dict[str, str] | None = None,
        value_range: float | None = None,
        tile_calibration: ScoreCalibration | None = None,
        tile_size: Side | None = None,
        tile_overlap: float = 0.25,
    ):
        super().__init__()
        check_value_range(value_range)
        check_tiles(tile_size, tile_overlap)
        check_share("alpha", alpha)
        check_share("score_fraction", score_fraction)
        check_smoothing(kl_sigma=kl_sigma, feature_sigma=feature_sigma)
        check_map_settings(position_trust, contrast)
        map_weights(weights, alpha, unet is not None)
        if weights is not None and alpha != DEFAULT_ALPHA:
            warn_once(f"`alpha` of {alpha} does not count where there are `weights`: give these instead.")
        check_required(feature_extractor=feature_extractor)
        check_denoiser(unet, scheduler, feature_extractor)
        timesteps = check_timesteps([5, 50, 100] if timesteps is None else timesteps, scheduler)
        if scheduler is not None:
            check_forward_process(scheduler, timesteps)
        if unet is None and not feature_extractor.image_sizes and processing_resolution is None:
            raise ValueError(
                "`feature_extractor` needs an `image_size` where there is no `unet`: nothing else says one."
            )
        # the denoiser halves so often
        self.size_multiple = 1 if unet is None else 2 ** (len(unet.config.block_out_channels) - 1)
        if processing_resolution is None:
            processing_resolution = feature_extractor.image_sizes[-1] if unet is None else unet.config.sample_size
        check_resolution(processing_resolution, self.size_multiple)
        check_feature_resolution(feature_resolution, as_size(feature_extractor.input_resolution(processing_resolution)))
        self.scored_layers = scored_layers(score_strides, feature_extractor)
        self.patch_layers = patch_layers(feature_extractor.layer_strides)
        named = register_categories(categories)
        check_class_embeddings(unet, category_names(named))
        check_calibrated_categories(calibration, category_names(named))
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            calibration=calibration,
            tile_calibration=tile_calibration,
            gaussian=gaussian,
        )
        self.register_to_config(
            timesteps=timesteps,
            alpha=alpha,
            kl_sigma=kl_sigma,
            feature_sigma=feature_sigma,
            score_fraction=score_fraction,
            contrast=contrast,
            weights=weights,
            position_trust=position_trust,
            score_strides=None if score_strides is None else sorted(score_strides),
            processing_resolution=as_side(processing_resolution),
            feature_resolution=feature_resolution,
            categories=named,
            value_range=value_range,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
        )

    @property
    def processing_resolution(self) -> int | tuple[int, int]:
        """Side in pixels at which the denoiser sees images, or height and width, unless a call says otherwise."""
        return as_side(self.config.processing_resolution)

    @property
    def input_resolution(self) -> int | tuple[int, int]:
        """Side to which images are resized at first: the feature extractor may look closer than the denoiser."""
        return self.feature_extractor.input_resolution(self.processing_resolution)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        processing_resolution: Side | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple:
        """Maps and scores of one image or many.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), tensor ([C,] H, W) or (N, C, H, W), or a list of
                these. Floats lie in [0, 1].
            category: of a unified model, its name or index, one for all images or one each; None takes that which an
                image's features are nearest to (`recognise`).
            batch_size: images, or tiles of one, in one pass of the network; each counts `len(timesteps)` samples.
            processing_resolution: side in pixels at which the network sees the images, or height and width; None takes
                the pipeline's own, at which it was calibrated. A pipeline of tiles takes no other.
            match_input_resolution: whether maps come at the images' own size, which then must be one; else at the
                processing resolution, or, where images are looked at in tiles, as they were blended: a pixel for each
                4 x 4 of what the networks see, all of the first image's size.
            generator: of the noise, one for all images or one each. The noise of an image depends neither on the batch
                size nor on the images after it. None gives every image the model's own, as a calibration and an
                exported graph do, so that calls repeat.
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.

        Returns:
            [`AnomalyOutput`]; `reconstruction` is None.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        # 1. Check the inputs: N images (3, H_i, W_i) in [0, 1], a category (N,) and a generator for each
        images = ImageSequence(image, self.value_range)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        check_call(images, batch_size, resolution, self.size_multiple, match_input_resolution, generator, output_type)
        device, calibration = self._execution_device, self.calibration
        if category is None and len(self.categories) > 1:
            category = self.recognise(images, batch_size)
        categories = category_indices(category, self.categories, len(images)).to(device)
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * len(images)
        resolution = as_size(resolution)
        size = images.sizes[0] if match_input_resolution else resolution
        if self.tile_size is not None:
            check_tiled_call(self, resolution)
            size = size if match_input_resolution else grid_of(self, images.sizes[0])[:2]
        seen = as_size(self.feature_extractor.input_resolution(resolution))
        own_noise = all(one is None for one in generators) if self.runs_denoiser else None
        settings = {**self.config, **self.scheduler_settings, "processing_resolution": as_side(resolution)}
        check_calibration(calibration, categories, self.categories, self.precision, settings, own_noise)

        anomaly_maps, anomaly_scores = [], []
        starts: Any = range(0, len(images), batch_size)
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            batch = slice(start, start + batch_size)
            if self.tile_size is not None:
                of_tiles = detect_large(self, images[batch], categories[batch], generators[batch], batch_size, size)
                anomaly_maps.append(of_tiles[0])
                anomaly_scores.append(of_tiles[1])
                continue

            # 2. Pixels in [-1, 1] as the feature extractor sees them: (B, 3, R', R')
            pixel_values = images_to_pixel_values(images[batch], seen).to(device)
            pixel_values = hide_outside(pixel_values, inside_region(self.region, categories[batch], seen))

            # 3. Noise for each of the T levels, the model's own or each image's from its generator: (B, T, 3, R, R);
            #    T is 0 where no denoiser runs
            noise = draw_noise((self.num_levels, 3, *resolution), generators[batch], device)

            # 4. One pass of the networks: KL (B, T, R, R) of eq. 8, feature residual (B, T, C, h, w) of eq. 10, and
            #    the features themselves, where they count
            measurement = self.measure(pixel_values, noise, categories[batch])

            # 5. Smoothed maps: the KL at each level, the feature error by what good images show, the features by their
            #    Gaussian and by the nearest of good images: (B, S, R, R)
            maps = self.score_maps(measurement, categories[batch], calibration)

            # 6. In standard deviations above good images, and joined (eq. 11, with `weights`): (B, R, R)
            anomaly_map = self.join_maps(maps, categories[batch], calibration)

            # 7. The image's score, of its region of interest: (B,)
            anomaly_map, scores = self.score_inside(anomaly_map, categories[batch])
            anomaly_scores.append(scores.cpu())

            # 8. At the images' own size: (B, H, W)
            anomaly_maps.append(self.at_size(anomaly_map, size, categories[batch]).cpu())
        self.maybe_free_model_hooks()

        # 9. Alarms, masks and p-values, where thresholds are
        output = AnomalyOutput(torch.cat(anomaly_maps), torch.cat(anomaly_scores))
        output = threshold_output(output, categories.cpu(), calibration)

        # 10. As arrays or pictures
        return convert_output(output, output_type, return_dict)

    def measure(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor,
        category: torch.Tensor,
        feature_size: tuple[int, int] | None = None,
    ) -> Measurement:
        """What the networks say of images, in one pass for all of them and all noise levels.

        Args:
            pixel_values: (N, 3, R', R') in [-1, 1].
            noise: standard normal, (N, T, 3, R, R).
            category: (N,) integers; a unified model's class labels.
            feature_size: rows and columns of the features that have a Gaussian; None takes `feature_resolution`.

        Returns:
            KL maps (N, T, R, R) in nats, averaged over the colours, and the residual (N, T, C, h, w) of the scored
            layers' features. Where no KL counts its maps are 0, and the denoiser ends with the features.
        """
        extractor = self.feature_extractor
        backbone_layers = extractor.layers(pixel_values.to(extractor.dtype))  # each (N, C_i, h_i, w_i)
        grid = feature_size or self.feature_resolution
        features, patches = measure_features(extractor, backbone_layers, self.weights, grid)  # (N, C, h, w) each
        if features is not None:
            features = self._of_scored_layers(features[:, None])[:, 0]
        if not self.runs_denoiser:  # no noise, and no KL: (N, 0, R, R)
            return Measurement(maps=noise[:, :0, 0], features=features, patches=patches)
        levels = list(self.config.timesteps)
        if not torch.compiler.is_compiling():  # a graph has one scheduler, which may have been replaced before
            check_forward_process(self.scheduler, levels)
        count, size = noise.shape[:2], tuple(noise.shape[-2:])

        # a. x_t of every image at every level: (N * T, 3, R, R), DDPM eq. 4
        t = torch.tensor(levels, device=noise.device).repeat(count[0])  # (N * T,)
        clean = resize_images(pixel_values, size).repeat_interleave(len(levels), dim=0)
        noisy = self.scheduler.add_noise(clean, noise.flatten(0, 1), t)

        # b. The denoiser: epsilon and variance (N * T, 6, R, R), the clean image's features (N * T, C, h, w)
        class_labels = category.repeat_interleave(len(levels)) if self.unet.config.num_class_embeds else None
        # channels last: convolutions in half precision take two thirds of the time, on CPUs as on tensor cores
        sample = noisy.to(self.unet.dtype, memory_format=torch.channels_last)
        needs_kl = bool(self.weights["kl"])
        prediction = self.unet(sample, t, class_labels=class_labels, features_only=not needs_kl)

        # c. KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) (eq. 8): (N, T, R, R)
        if needs_kl:
            kl = kl_divergence_map(self.scheduler, prediction.sample, noisy, clean, t).mean(dim=1).unflatten(0, count)
        else:
            kl = torch.zeros_like(noise[:, :, 0])

        # d. f(x_0) - f_theta(x_t, t) (eq. 10), of the layers that are scored: (N, T, C, h, w)
        predicted = prediction.features.float().unflatten(0, count)
        true = extractor.standardize(backbone_layers, tuple(predicted.shape[-2:])).float()  # (N, C, h, w)
        return Measurement(kl, self._of_scored_layers(true[:, None] - predicted), features, patches)

    def _of_scored_layers(self, features: torch.Tensor) -> torch.Tensor:
        """(N, T, C, h, w) of all layers to those that are scored."""
        if list(self.scored_layers) == list(range(len(self.feature_extractor.layer_channels))):
            return features  # all of them: no copy
        of_layers = features.split(self.feature_extractor.layer_channels, dim=2)
        return torch.cat([of_layers[i] for i in self.scored_layers], dim=2)

    @property
    def feature_resolution(self) -> tuple[int, int]:
        """Rows and columns of the features that have a Gaussian."""
        if self.config.feature_resolution:
            return as_size(self.config.feature_resolution)
        height, width = as_size(self.input_resolution)
        num_channels = sum(self.feature_extractor.layer_channels[i] for i in self.scored_layers)
        return feature_grid((max(1, height // 4), max(1, width // 4)), num_channels)

    @property
    def weights(self) -> dict[str, float]:
        """Of the maps by their names, all four."""
        return map_weights(self.config.weights, self.config.alpha, self.unet is not None)

    @property
    def num_levels(self) -> int:
        """How many noise levels a measurement has, and KL maps."""
        return len(self.config.timesteps) if self.runs_denoiser else 0

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise that an image is measured with: (T, 3, R, R)."""
        return self.num_levels, 3, *as_size(self.processing_resolution)

    @property
    def runs_denoiser(self) -> bool:
        """Whether a map counts that the denoiser has a part in."""
        return self.unet is not None and bool(self.weights["kl"] or self.weights["feature_error"])

    @property
    def scores_features(self) -> bool:
        """Whether no map counts that the denoiser has a part in."""
        return not self.runs_denoiser

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """What of the scheduler's configuration says how images are noised and compared, where the denoiser runs."""
        if not self.runs_denoiser:
            return {}
        record = scheduler_record(self.scheduler)
        return {SCHEDULER: {name: record[name] for name in SCHEDULER_SETTINGS if name in record}}

    @property
    def measuring_networks(self) -> tuple[Any, ...]:
        """What `measure` runs."""
        return self.unet if self.runs_denoiser else None, self.feature_extractor

    def measure_pixels(
        self,
        pixel_values: torch.Tensor,
        category: torch.Tensor,
        generators: Sequence[torch.Generator | None],
        of_tiles: bool = False,
    ) -> Measurement:
        """Steps 3 and 4 of a call. The features of tiles have the finest grid, as its positions share a Gaussian."""
        noise = draw_noise(self.noise_shape, generators, pixel_values.device)
        finest = as_size(self.input_resolution)
        feature_size = (max(1, finest[0] // 4), max(1, finest[1] // 4)) if of_tiles else self.feature_resolution
        return self.measure(pixel_values, noise, category, feature_size=feature_size)

    def score_maps(
        self,
        measurement: Measurement,
        category: torch.Tensor,
        calibration: ScoreCalibration | None,
        num_seen: int = 0,
    ) -> torch.Tensor:
        """Smoothed maps (N, S, H, W): the KL at each of T levels, then the feature error and the features' own maps.

        Uncalibrated, the feature error is that of each level and layer (S = T + T * L), or without a denoiser the
        features' squares. Calibrated, it is the one or two maps of the residual's log Mahalanobis distance, averaged
        over the levels; then come the features' log distance and that of the nearest patches, where they count.
        `num_seen` is `ScoreCalibration.log_distances`'.
        """
        kl, residual, features, _, _ = measurement
        size, sigma = (kl.shape[-2], kl.shape[-1]), self.config.feature_sigma
        if calibration is None:
            layer_channels = [self.feature_extractor.layer_channels[i] for i in self.scored_layers]
            errors = features[:, None] if residual is None and features is not None else residual
            if errors is None:
                raise ValueError("`weights`: the nearest good patches alone give a map after `calibrate` only.")
            maps = [resize_maps(feature_error(errors, layer_channels), size, sigma)]
        else:
            calibration.check_measurement(measurement)
            maps = []
            if residual is not None:
                maps.append(calibration.distance_maps(residual.mean(dim=1), category, size, num_seen, sigma))
            maps += feature_maps(measurement, category, calibration, size, sigma, num_seen)
        inside = None if calibration is None else calibration.inside(category, size)
        return torch.cat([gaussian_smooth(kl, self.config.kl_sigma, inside), *maps], dim=1)

    def join_maps(
        self, maps: torch.Tensor, category: torch.Tensor, calibration: ScoreCalibration | None
    ) -> torch.Tensor:
        """Eq. 11: maps (N, S, H, W) to the anomaly map (N, H, W), normalised where there is a calibration."""
        if calibration is None:
            levels = self.num_levels
            return joint_map(maps[:, :levels], maps[:, levels:], self.config.alpha if levels else 0.0)
        named = calibration.named_maps(calibration.normalize(maps, category), *MAP_NAMES[:2])
        weights = shares(self.weights)
        errors = named.pop("feature_error").unbind(dim=1)  # (N, H, W) of cells, and of positions if they differ
        rest: Any = sum(weights[name] * one.mean(dim=1) for name, one in named.items() if one.shape[1])
        joined = [rest + weights["feature_error"] * error for error in errors] or [rest]
        return outlined(joined, calibration, category)

    def image_scores(self, anomaly_map: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H, W) to (N,): the map's maximum where its pixels count, or the mean of its highest pixels there."""
        anomaly_map = values_inside(anomaly_map, inside)
        if self.config.score_fraction:
            return top_fraction_score(anomaly_map, self.config.score_fraction)
        return max_score(anomaly_map)

    def update(
        self,
        images: Sequence[Any],
        good_images: GoodImages,
        batch_size: int = 16,
        accelerator: Accelerator | None = None,
    ) -> list[int]:
        """Learns more good images without the old files, of a pipeline of `diffad fit --kept-images`.

        ```python
        good_images = load_good_images(pipe, "runs/parts")  # of diffad.pipelines.updating
        pipe.update(new_good_parts, good_images)
        save_updatable(pipe, good_images, "runs/parts")
        ```

        Args:
            images: PIL images, paths, arrays, or a column of a `datasets.Dataset`; all good parts of a whole period,
                those that raise an alarm among them, or the false-alarm rate holds no longer.
            good_images: what the pipeline keeps, to which they are added.
            batch_size: images in one pass.
            accelerator: whose processes share the images; every process calls this and ends with the same.

        Returns:
            Which of them raise an alarm by the calibration so far: look at them.

        Raises:
            ValueError: the pipeline is none of `diffad fit`.
        """
        from diffad.pipelines.updating import update_calibration

        return update_calibration(self, images, good_images, batch_size, accelerator)

    def explain(self, image: ImageInput, **options: Any) -> Explanation:
        """Why one image has its score: which map, layer and noise level, and the good images most like it.

        What would have to change for the image to be normal, `reconstruct` shows, where there is a denoiser.

        Args:
            image: one image, as a call takes it.
            options: `category`, `generator`, `good_images`, `num_nearest` and `batch_size`, as of
                `diffad.pipelines.explaining.explain`.

        Example:
            >>> pipe.explain("part.png", good_images=paths).in_words()  # doctest: +SKIP
        """
        from diffad.pipelines.explaining import explain

        return explain(self, image, **options)

    # -- one-line ways to the pipelines that share these networks ------------------------------------------------

    def reconstruct(self, image: ImageInput, **options: Any) -> ReconstructionOutput | tuple:
        """The image as it would be without its defect (eqs. 12-13): a call of [`GradientDenoisingPipeline`].

        It looks at the whole image, also where the calibration has a region of interest.

        Args:
            image: as a call takes it.
            options: `num_iterations`, `learning_rate`, `denoise_every`, ..., of that pipeline's call.

        Returns:
            Its output, with `reconstruction` (N, H, W, 3) in [0, 1].

        Example:
            >>> pipe.reconstruct("part.png").reconstruction  # doctest: +SKIP
        """
        self._require_denoiser("reconstruct")
        output = self.share_components(GradientDenoisingPipeline)(image, **options)
        self.maybe_free_model_hooks()
        return output

    def denoise(self, image: ImageInput, **options: Any) -> AnomalyOutput | tuple:
        """The reverse process from the noised image: a call of [`DDPMReconstructionPipeline`].

        It looks at the whole image, also where the calibration has a region of interest.

        Args:
            image: as a call takes it.
            options: `timestep`, `num_inference_steps`, `scheduler`, ..., of that pipeline's call.

        Returns:
            Its output, with `reconstruction` (N, H, W, 3) in [0, 1] and the map of what has changed.

        Example:
            >>> pipe.denoise("part.png", timestep=250).reconstruction  # doctest: +SKIP
        """
        self._require_denoiser("denoise")
        output = self.share_components(DDPMReconstructionPipeline)(image, **options)
        self.maybe_free_model_hooks()
        return output

    def fit_gaussian(self, images: Sequence[Any], **options: Any) -> AnomalyDenoisePipeline:
        """Gives the pipeline the `gaussian` that `reconstruct` needs.

        Args:
            images: good images, as `calibrate` takes them.
            options: `category`, `batch_size`, `generator`, ..., of `GradientDenoisingPipeline.fit_gaussian`.

        Returns:
            The pipeline.

        Example:
            >>> pipe.fit_gaussian(good_images).save_pretrained("runs/parts")  # doctest: +SKIP
        """
        self._require_denoiser("fit_gaussian")
        self.register_modules(
            gaussian=self.share_components(GradientDenoisingPipeline).fit_gaussian(images, **options).gaussian
        )
        return self

    def _require_denoiser(self, method: str) -> None:
        if self.unet is None:
            raise ValueError(f"`{method}` takes a denoiser, and this pipeline has none: its `unet` is None. Train one.")
