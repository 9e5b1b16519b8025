"""What an anomaly pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class AnomalyOutput(BaseOutput):
    """
    What an anomaly pipeline returns for N images. Arrays are numpy's, or torch's with `output_type="pt"`.

    Args:
        anomaly_map: (N, H, W) float32, higher is more anomalous. Calibrated: in standard deviations above what good
            images show at that place, less what the pipeline's `suppression` takes off; where positions share a place's
            covariance, so its peak. With `output_type="pil"` a list of mode "F" images.
        anomaly_score: (N,) float32, higher is more anomalous.
        reconstruction: (N, H, W, 3) in [0, 1] ((N, 3, H, W) as tensors; PIL images), or None where the method makes
            none.
        anomaly_mask: (N, H, W) bool, the map above its threshold; None until the pipeline is calibrated.
        is_anomalous: (N,) bool, the score above its threshold; None until the pipeline is calibrated.
        p_value: (N,) float32 in (0, 1]: the share of good images at least as anomalous, (1 + #{normal >= score}) /
            (1 + #normal); None until the pipeline is calibrated.
    """

    anomaly_map: np.ndarray | torch.Tensor | list[Image.Image]
    anomaly_score: np.ndarray | torch.Tensor
    reconstruction: np.ndarray | torch.Tensor | list[Image.Image] | None = None
    anomaly_mask: np.ndarray | torch.Tensor | list[Image.Image] | None = None
    is_anomalous: np.ndarray | torch.Tensor | None = None
    p_value: np.ndarray | torch.Tensor | None = None


def convert_output(output: AnomalyOutput, output_type: str) -> AnomalyOutput:
    if output_type == "pt":
        return output
    converted = {
        field.name: value.numpy() for field in fields(output) if (value := getattr(output, field.name)) is not None
    }
    if output.reconstruction is not None:
        converted["reconstruction"] = converted["reconstruction"].transpose(0, 2, 3, 1)  # (N, H, W, 3)
    if output_type == "pil":
        converted["anomaly_map"] = [Image.fromarray(one) for one in converted["anomaly_map"]]
        if "anomaly_mask" in converted:
            converted["anomaly_mask"] = [Image.fromarray(one) for one in converted["anomaly_mask"]]
        if "reconstruction" in converted:
            pixels = (converted["reconstruction"] * 255.0).round().astype(np.uint8)
            converted["reconstruction"] = [Image.fromarray(one) for one in pixels]
    return AnomalyOutput(**converted)
