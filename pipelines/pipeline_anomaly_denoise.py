"""Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization" (ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffad.pipelines.anomaly_pipeline import AnomalyOutput, AnomalyPipeline, Measurement
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffad.calibration import ScoreCalibration
from diffad.images import ImageInput, images_to_tensors, resize_images
from diffad.likelihood import kl_divergence_map
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.scoring import feature_error, gaussian_smooth, joint_map, max_score, top_fraction_score


class AnomalyDenoisePipeline(AnomalyPipeline):
    r"""Finds defects as what a denoiser of good images does not expect.

    The image is noised to a few small timesteps. At each, the per-pixel KL divergence between the true and the
    predicted posterior (eq. 8) is one map, the error of the predicted pretrained features (eq. 10) another; both are
    normalised by what good images show, joined (eq. 11) and averaged.

    Args:
        unet: the denoiser, with learned variance and a feature head.
        scheduler: the forward process; `variance_type` "learned_range".
        feature_extractor: the frozen network whose features the denoiser predicts.
        calibration: statistics of good images; None until `calibrate`.
        timesteps: noise levels T; None takes the paper's 5, 50 and 100.
        alpha: weight of the KL in eq. 11, in [0, 1].
        kl_sigma: smoothing of the KL maps, in pixels at the processing resolution.
        feature_sigma: smoothing of the feature error, in pixels at the processing resolution.
        score_fraction: the image's score is the mean of this share of the map's highest pixels; 0 for the maximum.
        processing_resolution: side in pixels to which images are resized; None takes the network's `sample_size`.
        categories: names of the categories of a unified model, in the order of its class labels.
    """

    model_cpu_offload_seq = "feature_extractor->unet"
    _optional_components = ["calibration"]  # noqa: RUF012 (diffusers' own form)
    _exclude_from_cpu_offload = ["calibration"]  # noqa: RUF012

    def __init__(
        self,
        unet: DenoisingUNet2DModel,
        scheduler: DDPMScheduler,
        feature_extractor: TimmFeatureExtractor,
        calibration: ScoreCalibration | None = None,
        timesteps: list[int] | None = None,
        alpha: float = 0.5,
        kl_sigma: float = 2.0,
        feature_sigma: float = 4.0,
        score_fraction: float = 0.0,
        processing_resolution: int | None = None,
        categories: list[str] | None = None,
    ):
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"`alpha` must lie in [0, 1], but is {alpha}.")
        timesteps = [5, 50, 100] if timesteps is None else list(timesteps)
        last = scheduler.config.num_train_timesteps - 1
        if not timesteps or any(not 0 <= t <= last for t in timesteps):
            raise ValueError(f"`timesteps` must list integers in [0, {last}], but is {timesteps}.")
        self.register_modules(
            unet=unet.eval(),
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            calibration=calibration,
        )
        self.register_to_config(
            timesteps=timesteps,
            alpha=alpha,
            kl_sigma=kl_sigma,
            feature_sigma=feature_sigma,
            score_fraction=score_fraction,
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
        """KL maps (N, T, H, W) and feature residuals (N, T, C, h, w): one pass for all images and noise levels."""
        device, count, levels = pixel_values.device, len(pixel_values), len(self.config.timesteps)
        clean = resize_images(pixel_values, (resolution, resolution))  # (N, 3, H, W)

        # 1. Noise every image to every timestep
        noise = torch.stack(
            [randn_tensor((levels, *clean.shape[1:]), generator=g, device=device) for g in generator]
        )  # (N, T, 3, H, W)
        timesteps = torch.tensor(self.config.timesteps, device=device).repeat(count)  # (N * T,)
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

    def score_maps(
        self, measurement: Measurement, category: torch.Tensor | None, calibration: ScoreCalibration | None
    ) -> torch.Tensor:
        """(N, 2T, H, W): the smoothed KL at each noise level, then the smoothed feature error at each."""
        residual = measurement.residual
        if calibration is not None:
            residual = calibration.scale_residual(residual, category)
        errors = F.interpolate(feature_error(residual), measurement.maps.shape[-2:], mode="bilinear")  # (N, T, H, W)
        return torch.cat(
            [
                gaussian_smooth(measurement.maps, self.config.kl_sigma),
                gaussian_smooth(errors, self.config.feature_sigma),
            ],
            dim=1,
        )

    def join_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Eq. 11: (N, 2T, H, W) to (N, H, W)."""
        kl_maps, feature_maps = maps.chunk(2, dim=1)
        return joint_map(kl_maps, feature_maps, self.config.alpha)

    def image_scores(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """(N, H, W) to (N,): the map's maximum, or the mean of its highest pixels."""
        if self.config.score_fraction:
            return top_fraction_score(anomaly_map, self.config.score_fraction)
        return max_score(anomaly_map)
