"""A pipeline's call as a module over a batch: what is exported, and of AnomalyDenoise what may be compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.deployment.metadata import OUTPUTS
from diffad.exporting import is_exporting
from diffad.image_sizes import as_size
from diffad.pipelines.output import AnomalyOutput, threshold_output
from diffad.pipelines.pipeline_diad import DiADPipeline
from diffad.region_of_interest import hide_outside, inside_region
from diffad.scoring import Measurement
from diffad.seeding import draw_noise, model_noise

NETWORKS = ("vae", "unet", "sg_network", "feature_extractor")
MEASURED = ("maps", "residual", "features", "patches")  # of a `Measurement`


@dataclass
class GraphThresholds:
    """A calibration's thresholds as `threshold_output` takes them, here inputs of a graph."""

    map_mean: torch.Tensor  # says on which device
    image_threshold: torch.Tensor  # (K,)
    pixel_threshold: torch.Tensor  # (K,)
    normal_scores: torch.Tensor  # (K, n)
    has_thresholds: bool = True
    smallest_area: float = 0.0

    p_value: ClassVar[Any] = ScoreCalibration.p_value


class InspectionGraph(nn.Module):
    """A pipeline's call from pixels to verdicts as a module: what is exported. AnomalyDenoise's may be compiled.

    Images come at the size that the feature extractor or the denoiser looks at, maps at the processing resolution.
    DiAD's steps stand in the graph one after another. A file holds each network's large weights once, however many
    steps use them.
    Where a smallest area counts, for which no runtime has an operator, an exported graph gives map and score before it.

    Args:
        pipeline: on the CPU, in float32. A change of it changes the graph that is exported next. Its networks need no
            gradient from then on.
        input_type: "float32", images in [0, 1]; or "uint8", from 0 to 255.
    """

    noise: torch.Tensor
    shown: torch.Tensor | None
    inside: torch.Tensor | None
    places: torch.Tensor | None

    def __init__(self, pipeline: Any, input_type: str = "float32"):
        super().__init__()
        self.pipeline, self.calibration, self.input_type = pipeline, pipeline.calibration, input_type
        parts = {name: getattr(pipeline, name, None) for name in NETWORKS}
        used = {name: part for name, part in parts.items() if any(part is one for one in pipeline.measuring_networks)}
        used["calibration"] = pipeline.calibration
        self.networks = nn.ModuleDict({name: part for name, part in used.items() if part is not None})
        # the same for every image: (T, 3, R, R), or (C, h, w) of DiAD's latents
        self.register_buffer("noise", draw_noise(pipeline.noise_shape, [model_noise()], "cpu")[0])
        first = torch.tensor([0])  # a region goes with models of one category
        for name, side in (("shown", pipeline.input_resolution), ("inside", pipeline.processing_resolution)):
            self.register_buffer(name, inside_region(pipeline.region, first, as_size(side)))  # (1, H, W) or None
        places = None if self.inside is None else self.inside.flatten().nonzero()[:, 0]  # (n,)
        self.register_buffer("places", places)
        self.eval().requires_grad_(False)

    def measure(self, image: torch.Tensor, category: torch.Tensor) -> tuple[Measurement, list[torch.Tensor]]:
        """What the networks say of images (N, R', R', 3) of the input type, and of categories (N,).

        And of DiAD the reconstruction, (N, R, R, 3) in [0, 1].
        """
        if self.input_type == "uint8":
            image = image.float() / 255.0
        pixel_values = hide_outside(image.permute(0, 3, 1, 2) * 2.0 - 1.0, self.shown)  # (N, 3, R', R')
        noise = self.noise.expand(image.shape[0], *self.noise.shape)
        if not isinstance(self.pipeline, DiADPipeline):
            return self.pipeline.measure(pixel_values, noise, category), []
        reconstruction = self.pipeline.reconstruct(pixel_values, noise=noise)
        measurement = self.pipeline.compare(pixel_values, reconstruction)
        return measurement, [(reconstruction / 2.0 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1)]

    def output_names(self, count: int) -> list[str]:
        """Of the outputs, so many as there are."""
        pictures = ["reconstruction"] * isinstance(self.pipeline, DiADPipeline)
        return [*OUTPUTS[: count - len(pictures)], *pictures]

    def forward(
        self,
        image: torch.Tensor,
        image_threshold: torch.Tensor | None = None,
        pixel_threshold: torch.Tensor | None = None,
        normal_scores: torch.Tensor | None = None,
        category: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Verdicts on a batch of one category.

        Args:
            image: (N, R', R', 3), of the input type.
            image_threshold, pixel_threshold: (K,), and
            normal_scores: (K, n), as of `ScoreCalibration`; None takes the calibration's.
            category: a unified model's index (), of all images.

        Returns:
            `OUTPUTS`, as of `AnomalyOutput`; without thresholds the first two. Of DiAD, the reconstruction is the last.
        """
        pipeline, calibration = self.pipeline, self.calibration
        index: Any = 0 if category is None else category
        indices = torch.as_tensor(index).expand(image.shape[0])  # (N,)
        measurement, pictures = self.measure(image, indices)
        maps = pipeline.score_maps(measurement, index, calibration)  # (N, S, R, R)
        anomaly_map = pipeline.join_maps(maps, index, calibration)  # (N, R, R)
        if calibration is not None and calibration.smallest_area and is_exporting():
            return anomaly_map, pipeline.image_scores(anomaly_map), *pictures
        of_score = anomaly_map if self.inside is None else anomaly_map.flatten(1)[:, self.places][:, None]  # (N, 1, n)
        score = pipeline.image_scores(of_score)  # (N,)
        anomaly_map = pipeline.lower_surroundings(anomaly_map, self.inside)
        if calibration is None or not calibration.has_thresholds:
            return anomaly_map, score, *pictures
        thresholds: Any = calibration
        if image_threshold is not None and pixel_threshold is not None and normal_scores is not None:
            thresholds = GraphThresholds(calibration.map_mean, image_threshold, pixel_threshold, normal_scores)
        output = threshold_output(AnomalyOutput(anomaly_map, score), indices, thresholds)
        return *(getattr(output, name) for name in OUTPUTS), *pictures


class MeasurementGraph(InspectionGraph):
    """What the networks say alone, before any statistic: those of `MEASURED` that the pipeline has."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Images (N, R', R', 3) of a model of one category, as of `InspectionGraph`."""
        measurement, _ = self.measure(image, torch.as_tensor(0).expand(image.shape[0]))
        return tuple(getattr(measurement, name) for name in self.measured)

    @property
    def measured(self) -> list[str]:
        """The names of what is given."""
        pipeline = self.pipeline
        denoises = pipeline.runs_denoiser
        is_there = (denoises, denoises, pipeline.weights["gaussian"], pipeline.weights["nearest"])
        return [name for name, there in zip(MEASURED, is_there, strict=True) if there]
