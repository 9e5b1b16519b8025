"""Which category an image shows, by its pretrained features: for a model of several categories that is not told.

The features' mean over an image's positions has a Gaussian for each category, all of one covariance; the nearest by
Mahalanobis distance is taken (linear discriminant analysis; Lee et al., "A Simple Unified Framework for Detecting
Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018, section 2.1).
"""

from __future__ import annotations

import torch

from diffad.models.feature_extractor import TimmFeatureExtractor

DIAGONAL_SHARE = 0.1  # of the covariance, so that it has an inverse where there are fewer images than channels


def mean_features(extractor: TimmFeatureExtractor, pixel_values: torch.Tensor) -> torch.Tensor:
    """(N, C) float32: the mean of each layer's channels over its positions, of images (N, 3, R, R) in [-1, 1]."""
    layers = extractor.layers(pixel_values.to(extractor.dtype))
    return torch.cat([layer.float().mean(dim=(2, 3)) for layer in layers], dim=1)


def nearest_category(features: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> torch.Tensor:
    """(N,): the index of the category whose Gaussian is nearest.

    Args:
        features: (N, C), as of `mean_features`, or (N, K, C), of each image as each category sees it.
        means: (K, C), of each category's good images; NaN for one that has none yet, which is never taken.
        covariances: (K, C, C), of the same.

    Raises:
        ValueError: no category has a mean.
    """
    known = torch.isfinite(means).all(dim=1)  # (K,)
    if not known.any():
        raise ValueError("`category` is needed: no category has been calibrated, so none can be recognised.")
    covariance = covariances[known].mean(dim=0)
    diagonal = covariance.diagonal().clamp(min=1e-12).diag()
    factor = torch.linalg.cholesky((1.0 - DIAGONAL_SHARE) * covariance + DIAGONAL_SHARE * diagonal)
    of_each = features[:, None] if features.ndim == 2 else features[:, known]
    offsets = of_each - means[known]  # (N, K', C)
    whitened = torch.linalg.solve_triangular(factor, offsets.flatten(0, 1).mT, upper=False)  # (C, N K')
    distances = whitened.square().sum(dim=0).view(offsets.shape[:2])  # (N, K')
    return known.nonzero()[:, 0][distances.argmin(dim=1)]
