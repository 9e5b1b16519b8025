"""What normal looks like: per-position statistics of good images, thresholds, and p-values.

Neither paper has this. Both methods take noise in the background of good images for defects, because a good image's
error is not the same everywhere: dividing each map by what good images show at that place is worth more than any other
choice. Thresholds and p-values are conformal (Vovk et al., "Algorithmic Learning in a Random World", 2005): they hold
for any distribution, as long as the good images to come are like the good images measured here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

# Shrinkage: how many images the average over all positions counts for, see `MomentSums.standard_deviation`.
PRIOR_IMAGES = 8.0


class MomentSums:
    """Mean and variance per position from running sums, in one pass and constant memory.

    Sums are float64, and add up across processes: `a + b` holds what both have seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: torch.Tensor | float = 0.0
        self.total_of_squares: torch.Tensor | float = 0.0

    def update(self, values: torch.Tensor) -> None:
        """Adds a batch, (N, ...); the statistics have the shape (...)."""
        values = values.double()
        self.count += values.shape[0]
        self.total = self.total + values.sum(dim=0)
        self.total_of_squares = self.total_of_squares + values.square().sum(dim=0)

    def __add__(self, other: MomentSums) -> MomentSums:
        both = MomentSums()
        both.count = self.count + other.count
        both.total = self.total + other.total
        both.total_of_squares = self.total_of_squares + other.total_of_squares
        return both

    def mean(self) -> torch.Tensor:
        return self.total / self.count

    def mean_square(self) -> torch.Tensor:
        return self.total_of_squares / self.count

    def variance(self) -> torch.Tensor:
        return (self.mean_square() - self.mean().square()).clamp(min=0.0)

    def standard_deviation(self, prior_images: float = PRIOR_IMAGES) -> torch.Tensor:
        """Per position over the last two dimensions, its variance shrunk towards the average over all positions."""
        variance = self.variance()
        if self.count == 1:  # one image cannot say how images differ: how its places differ stands in for that
            variance = self.mean().var(dim=(-2, -1), correction=0, keepdim=True).expand_as(variance)
        return shrink(variance, self.count, prior_images).sqrt()

    def root_mean_square(self, prior_images: float = PRIOR_IMAGES) -> torch.Tensor:
        """As `standard_deviation`, of the distance from zero instead of from the mean."""
        return shrink(self.mean_square(), self.count, prior_images).sqrt()


class ResidualMoments:
    """Scale per channel and position, and covariance between channels, of a feature residual; one streaming pass.

    The covariance is of the scaled residual, pooled over positions. Each batch is scaled by what the batches before it
    have shown, so one pass serves for both.
    """

    def __init__(self) -> None:
        self.moments = MomentSums()
        self.products: torch.Tensor | float = 0.0  # (T, C, C), summed over images, averaged over positions
        self.product_count = 0

    def update(self, residual: torch.Tensor) -> None:
        """Adds a batch, (N, T, C, h, w)."""
        if self.moments.count:
            scaled = residual / self.scale().to(residual.dtype)
            positions = scaled.permute(1, 0, 3, 4, 2).flatten(1, 3)  # (T, N * h * w, C)
            with torch.autocast(residual.device.type, enabled=False):
                products = positions.mT @ positions / residual[0, 0, 0].numel()  # (T, C, C)
            self.products = self.products + products.double()
            self.product_count += len(residual)
        self.moments.update(residual)

    def scale(self) -> torch.Tensor:
        """(T, C, h, w)."""
        return self.moments.root_mean_square()

    def whitening(self, prior_images: float = PRIOR_IMAGES) -> torch.Tensor:
        """W of (T, C, C) with W^T W the covariance's inverse; the covariance is shrunk towards the identity.

        Pretrained channels vary together. A crack that moves many channels a little, against their habit, is nothing to
        a mean of squares and much to a Mahalanobis distance.
        """
        num_levels, num_channels = self.moments.total.shape[:2]
        identity = torch.eye(num_channels, dtype=torch.float64, device=self.moments.total.device)
        covariance = (self.products + prior_images * identity) / (self.product_count + prior_images)
        cholesky = torch.linalg.cholesky(covariance.expand(num_levels, -1, -1))
        return torch.linalg.solve_triangular(cholesky, identity.expand_as(cholesky), upper=False)


def shrink(variance: torch.Tensor, count: int, prior_images: float) -> torch.Tensor:
    """Shrinks (..., H, W) variances towards their average over H and W, which counts for `prior_images` images.

    With n images, a variance at one position is uncertain by a factor of about sqrt(2 / n): with three images some
    positions look almost constant by chance, and dividing by their deviation would make every new image a defect there.
    A weighted mean of the two, n : `prior_images`, is the posterior mean of a normal's variance under a conjugate
    prior. A prior worth 8 images leaves 100 images almost alone (7%) and makes 3 images nearly uniform (73%).
    """
    average = variance.mean(dim=(-2, -1), keepdim=True)
    shrunk = (count * variance + prior_images * average) / (count + prior_images)
    # nothing varies at all (constant images): any positive floor will do, as no score can come out of it
    return shrunk.clamp(min=1e-12)


def conformal_threshold(sorted_scores: torch.Tensor, false_alarm_rate: float) -> float:
    """The score above which at most `false_alarm_rate` of good images fall (split conformal).

    Args:
        sorted_scores: scores of good images that no statistic was computed from, (n,), ascending.
        false_alarm_rate: in (0, 1). n images can vouch for no less than 1 / (n + 1).

    Returns:
        The k-th smallest score, k = ceil((n + 1)(1 - rate)); the largest, with a warning, where k is above n.
    """
    if not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"`false_alarm_rate` must lie in (0, 1), but is {false_alarm_rate}.")
    count = sorted_scores.numel()
    rank = math.ceil((count + 1) * (1.0 - false_alarm_rate) - 1e-9)
    if rank > count:
        warnings.warn(
            f"{count} good images cannot vouch for a false-alarm rate of {false_alarm_rate:g}: the threshold is their "
            f"largest score, which holds {1.0 / (count + 1):.2g}. Calibrate with at least "
            f"{math.ceil(1.0 / false_alarm_rate) - 1} held-out good images.",
            stacklevel=2,
        )
        rank = count
    return float(sorted_scores[rank - 1])


class ScoreCalibration(ModelMixin, ConfigMixin):
    r"""Statistics of good images' scores, saved with a pipeline in safetensors.

    A leading dimension K of every tensor holds one set for each category of a unified model. Always float32: moving
    a pipeline to half precision leaves it as it is.

    Args:
        num_categories: K.
        map_shape: (S, H, W): S score maps (one for each noise level and kind of score) of H x W pixels.
        residual_shape: (T, C, h, w) of the feature residual, or None for methods without one.
        num_scores: n, the most held-out good images of any category.
        false_alarm_rate: the rate at which the thresholds were set.

    Attributes:
        map_mean, map_std: (K, S, H, W), of the smoothed maps over good images.
        residual_scale: (K, T, C, h, w), root mean square of the feature residual over good images.
        residual_whitening: (K, T, C, C), takes the scaled residual's channels to uncorrelated ones of variance 1.
        normal_scores: (K, n), held-out good images' scores, ascending, padded with NaN.
        image_threshold: (K,): scores above it are anomalous.
        pixel_threshold: (K,): pixels of the map above it are. At most `false_alarm_rate` of good images show any.
    """

    _keep_in_fp32_modules = [  # noqa: RUF012 (the form diffusers expects)
        "map_mean",
        "map_std",
        "residual_scale",
        "residual_whitening",
        "normal_scores",
        "image_threshold",
        "pixel_threshold",
    ]

    @register_to_config
    def __init__(
        self,
        num_categories: int = 1,
        map_shape: tuple[int, int, int] = (1, 1, 1),
        residual_shape: tuple[int, int, int, int] | None = None,
        num_scores: int = 0,
        false_alarm_rate: float = 0.01,
    ):
        super().__init__()
        self.register_buffer("map_mean", torch.zeros(num_categories, *map_shape))
        self.register_buffer("map_std", torch.ones(num_categories, *map_shape))
        if residual_shape is not None:
            num_levels, num_channels = residual_shape[:2]
            self.register_buffer("residual_scale", torch.ones(num_categories, *residual_shape))
            identity = torch.eye(num_channels).repeat(num_categories, num_levels, 1, 1)
            self.register_buffer("residual_whitening", identity)
        else:
            self.residual_scale = self.residual_whitening = None
        self.register_buffer("normal_scores", torch.full((num_categories, num_scores), float("nan")))
        self.register_buffer("image_threshold", torch.full((num_categories,), float("inf")))
        self.register_buffer("pixel_threshold", torch.full((num_categories,), float("inf")))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ScoreCalibration:
        # Follows a move to another device, not one to another dtype: thresholds rounded to bfloat16 (three digits)
        # would no longer hold their false-alarm rate.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            device = fn(tensor.new_empty(0)).device
            return fn(tensor) if device.type == "meta" or tensor.is_meta else tensor.to(device)

        return super()._apply(move, recurse)

    def whiten_residual(self, residual: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """A feature residual (N, T, C, h, w) in units of what good images show; `category` is (N,) integers.

        A good image's result has variance 1 in every channel and position, and no correlation between channels.
        """
        scale = self.residual_scale
        if residual.shape[-2:] != scale.shape[-2:]:  # another processing resolution than the calibrated one
            flat = F.interpolate(scale.flatten(0, 1), residual.shape[-2:], mode="bilinear")
            scale = flat.unflatten(0, scale.shape[:2])
        scaled = (residual / scale[category]).flatten(3)  # (N, T, C, h * w)
        with torch.autocast(residual.device.type, enabled=False):
            whitened = self.residual_whitening[category] @ scaled
        return whitened.unflatten(3, residual.shape[-2:])

    def normalize(self, maps: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Smoothed maps (N, S, H, W) in standard deviations above what good images show at that place."""
        mean, std = self.map_mean, self.map_std
        if maps.shape[-2:] != mean.shape[-2:]:
            mean = F.interpolate(mean, maps.shape[-2:], mode="bilinear")
            std = F.interpolate(std, maps.shape[-2:], mode="bilinear")
        return (maps - mean[category]) / std[category]

    def p_value(self, scores: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Conformal p-value, (1 + #{normal >= score}) / (1 + #normal), (N,) -> (N,) float32."""
        normal = self.normal_scores[category]  # (N, n)
        at_least = (normal >= scores[:, None]).sum(dim=1)  # NaN padding compares False
        return (1.0 + at_least) / (1.0 + (~normal.isnan()).sum(dim=1))

    def set_thresholds(
        self,
        category: int,
        scores: Sequence[float] | torch.Tensor,
        map_maxima: Sequence[float] | torch.Tensor,
    ) -> None:
        """Stores held-out good images' scores and sets both thresholds at the configured false-alarm rate.

        Args:
            category: index into the K categories.
            scores: the images' scores, (m,), m at most `num_scores`.
            map_maxima: the maxima of their maps, (m,).
        """
        rate = self.config.false_alarm_rate
        ordered = torch.as_tensor(scores, dtype=torch.float32).sort().values
        self.normal_scores[category] = float("nan")
        self.normal_scores[category, : len(ordered)] = ordered
        self.image_threshold[category] = conformal_threshold(ordered, rate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once already, for the same number of images
            maxima = torch.as_tensor(map_maxima, dtype=torch.float32).sort().values
            self.pixel_threshold[category] = conformal_threshold(maxima, rate)
