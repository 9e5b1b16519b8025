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
from diffad.scoring import Measurement, cut_small_peaks, outline_by_positions

FEATURE_WEIGHTS = {"gaussian": 0.75, "nearest": 0.25}  # those of `diffad fit`; docs/tried.md says what chose them
CONTRAST = 0.2  # of maps of whole images, see `chosen_contrast`; likewise


def outlined(joined: Sequence[torch.Tensor], calibration: ScoreCalibration, category: Any) -> torch.Tensor:
    """The anomaly map (N, H, W) of joined maps, of cells and of positions where they differ: one or two (N, H, W).

    Where a region of interest has been set, peaks and small regions are those inside.
    """
    inside = calibration.inside(category, joined[0].shape[1:])
    inside = None if inside is None else inside[:, 0]
    anomaly_map = outline_by_positions(joined[0], joined[1], inside) if len(joined) == 2 else joined[0]
    return cut_small_peaks(anomaly_map, calibration.config.smallest_area, inside)


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
