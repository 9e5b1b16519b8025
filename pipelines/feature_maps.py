"""The features' own maps, which both methods can join to theirs: by their Gaussian, and by the nearest good patches.

Defard et al., "PaDiM" (2021), and Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (2022). Neither
takes a network but the frozen one that the methods look through anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffad.calibration.coreset import locally_aware_patches, patch_layers
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.scoring import Measurement

FEATURE_WEIGHTS = {"gaussian": 0.75, "nearest": 0.25}  # those of `diffad fit`; docs/tried.md says what chose them
CONTRAST = 0.2  # of maps of whole images, see `chosen_contrast`; likewise


def chosen_contrast(tile_size: Any) -> float:
    """That of `diffad fit`, and of `diffad train` by its own choice; none in tiles.

    Most of a large image is no surroundings of its peak.
    """
    return 0.0 if tile_size else CONTRAST


def measure_features(
    extractor: TimmFeatureExtractor,
    layers: Sequence[torch.Tensor],
    weights: Mapping[str, float],
    size: tuple[int, int],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the maps are made of, as `Measurement` has it.

    Args:
        extractor: that gave the layers.
        layers: of images, each (N, C_i, h_i, w_i).
        weights: of "gaussian" and "nearest"; what has none is not computed.
        size: rows and columns of the features that have a Gaussian.

    Returns:
        Features (N, C, *size), standardised per channel, or None; and patches (N, C', h, w), or None.
    """
    features = extractor.standardize(layers, size).float() if weights["gaussian"] else None
    patches = None
    if weights["nearest"]:
        patches = locally_aware_patches([layers[i] for i in patch_layers(extractor.layer_strides)])
    return features, patches


def feature_maps(
    measurement: Measurement,
    category: torch.Tensor,
    calibration: ScoreCalibration,
    size: tuple[int, int],
    sigma: float,
    num_seen: int,
) -> list[torch.Tensor]:
    """Maps (N, 1, *size) of log distances: the Gaussian's, then the nearest patches', of those that were measured.

    `sigma` smooths them, in pixels; `num_seen` is `ScoreCalibration.log_distances`'.
    """
    maps = []
    if measurement.features is not None:
        maps.append(calibration.gaussian_map(measurement.features, category, size, num_seen, sigma))
    if measurement.patches is not None:
        maps.append(calibration.nearest_map(measurement, category, size, sigma))
    return maps
