"""What an anomaly pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.regions import Region, find_regions, without_small_regions

OUTPUT_TYPES = ("np", "pt", "pil")
Images = np.ndarray | torch.Tensor | list[Image.Image]


@dataclass
class AnomalyOutput(BaseOutput):
    """
    What an anomaly pipeline returns for N images. Arrays are numpy's, or torch's with `output_type="pt"`.

    Args:
        anomaly_map: (N, H, W) float32, higher is more anomalous. Calibrated: how many standard deviations a pixel lies
            above good images' maps there. `contrast` lowers all but the peak. Where a cell of the residual's covariance
            covers several positions, only the peak is in these units. With `output_type="pil"` a list of mode "F"
            images.
        anomaly_score: (N,) float32, higher is more anomalous.
        reconstruction: (N, H, W, 3) in [0, 1] ((N, 3, H, W) as tensors; PIL images), or None where the method makes
            none.
        anomaly_mask: (N, H, W) bool, where the map of an anomalous image is above its threshold. An image that raises
            no alarm has an empty mask: alarm and mask share one false-alarm rate. Less the regions that are below the
            calibration's `smallest_area`. None until the pipeline is calibrated.
        is_anomalous: (N,) bool, the score above its threshold; None until the pipeline is calibrated.
        p_value: (N,) float32 in (0, 1]: the share of good images at least as anomalous, (1 + #{normal >= score}) /
            (1 + #normal); None until the pipeline is calibrated.
    """

    anomaly_map: Images
    anomaly_score: np.ndarray | torch.Tensor
    reconstruction: Images | None = None
    anomaly_mask: Images | None = None
    is_anomalous: np.ndarray | torch.Tensor | None = None
    p_value: np.ndarray | torch.Tensor | None = None

    @property
    def regions(self) -> list[list[Region]] | None:
        """Each image's defects as a list: the connected regions of its mask, the highest peak first.

        A [`~diffad.regions.Region`] has the box, area, peak and mean. Found when asked for, and no field of the tuple
        that `return_dict=False` gives. None until the pipeline is calibrated; empty lists for images without an alarm.
        """
        if self.anomaly_mask is None:
            return None
        pairs = zip(self.anomaly_map, self.anomaly_mask, strict=True)
        return [find_regions(np.asarray(one), np.asarray(mask)) for one, mask in pairs]


@dataclass
class ReconstructionOutput(AnomalyOutput):
    """
    `AnomalyOutput` of a pipeline that turns images into normal ones, and how that came about.

    Args:
        trajectory: (N, K, H, W, 3) in [0, 1] ((N, K, 3, H, W) as tensors; a list of PIL images for each image): the
            image as the process began, and after each denoising step; None unless asked for.
    """

    trajectory: np.ndarray | torch.Tensor | list[list[Image.Image]] | None = None


Output = TypeVar("Output", bound=AnomalyOutput)


def check_scores(scores: torch.Tensor) -> None:
    """Raises a ValueError where one of the scores (N,) is NaN."""
    # a graph that is exported or compiled has no values to look at
    wrong = [] if torch.compiler.is_compiling() else scores.isnan().nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"The scores of images {wrong} of this call are NaN, which is no verdict. Run the networks in float32 "
            "(`dtype`); where they are, their weights are damaged."
        )


def threshold_output(output: Output, category: torch.Tensor, calibration: ScoreCalibration | None) -> Output:
    """Adds masks, alarms and p-values to an output of tensors; as it is where there is no calibration.

    Args:
        output: its maps (N, H, W) and scores (N,), on the CPU.
        category: (N,) indices of the images' categories.
        calibration: of the pipeline.

    Raises:
        ValueError: a score is NaN, which no threshold could tell from that of a good image.
    """
    check_scores(torch.as_tensor(output.anomaly_score))
    if calibration is None or not calibration.has_thresholds:
        return output
    indices = category.to(calibration.map_mean.device)
    scores = torch.as_tensor(output.anomaly_score, device=indices.device)
    output.is_anomalous = (scores > calibration.image_threshold[indices]).cpu()  # (N,)
    above = torch.as_tensor(output.anomaly_map) > calibration.pixel_threshold[indices].cpu()[:, None, None]  # (N, H, W)
    mask = above & output.is_anomalous[:, None, None]
    smallest_area = calibration.smallest_area
    if smallest_area:
        mask = torch.stack([torch.from_numpy(without_small_regions(one.numpy(), smallest_area)) for one in mask])
    output.anomaly_mask = mask
    output.p_value = calibration.p_value(scores, indices).cpu()
    return output


def convert_output(output: Output, output_type: str, return_dict: bool = True) -> Output | tuple[Any, ...]:
    """An output of tensors as arrays ("np") or PIL images ("pil"); "pt" leaves it as it is.

    Without `return_dict`, a tuple of its fields, None where they are.
    """
    values: dict[str, Any] = {field.name: getattr(output, field.name) for field in fields(output)}
    if output_type != "pt":
        for name in ("reconstruction", "trajectory"):
            if values.get(name) is not None:
                values[name] = values[name].movedim(-3, -1)  # (N, [K,] H, W, 3)
        values = {name: None if value is None else value.numpy() for name, value in values.items()}
    if output_type == "pil":
        for name in ("anomaly_map", "anomaly_mask"):
            if values[name] is not None:
                values[name] = [Image.fromarray(one) for one in values[name]]
        if values["reconstruction"] is not None:
            values["reconstruction"] = _to_pictures(values["reconstruction"])
        if values.get("trajectory") is not None:
            values["trajectory"] = [_to_pictures(frames) for frames in values["trajectory"]]
    return type(output)(**values) if return_dict else tuple(values.values())


def _to_pictures(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(one) for one in (images * 255.0).round().astype(np.uint8)]
