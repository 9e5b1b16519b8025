"""What normal looks like: per-position statistics of good images, thresholds, and p-values.

Neither paper has this. Both methods take noise in the background of good images for defects, because a good image's
error is not the same everywhere: measuring it by what good images show at that place is worth more than any other
choice. The residual of pretrained features is measured by a Gaussian at each place, as PaDiM (Defard et al., 2021) does
with the features themselves; every map by its mean and deviation. Thresholds and p-values are conformal (Vovk et al.,
"Algorithmic Learning in a Random World", 2005): they hold for any distribution, as long as the good images to come are
like the good images measured here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffad.models.gaussian_feature_model import FeatureMoments

# Shrinkage: how many images the average over all positions counts for, see `MomentSums.standard_deviation`.
PRIOR_IMAGES = 8.0

# Share of the identity in the correlations of the feature residual.
RIDGE = 0.05

# How many numbers the covariances may take, 64 MB in float32, see `residual_grid`; how many an image's residual, see
# `residual_size`; and how many places are factorised together, which bounds the memory of float64 copies.
COVARIANCE_NUMBERS = 2**24
RESIDUAL_NUMBERS = 2**19
PLACES_AT_ONCE = 64


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
        values = (values.cpu() if values.device.type == "mps" else values).double()  # MPS knows no float64
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

    def variance(self) -> torch.Tensor:
        return (self.total_of_squares / self.count - self.mean().square()).clamp(min=0.0)

    def standard_deviation(self, prior_images: float = PRIOR_IMAGES) -> torch.Tensor:
        """Per position over the last two dimensions, its variance shrunk towards the average over all positions."""
        variance = self.variance()
        if self.count == 1:  # one image cannot say how images differ: how its places differ stands in for that
            variance = self.mean().var(dim=(-2, -1), correction=0, keepdim=True).expand_as(variance)
        return shrink(variance, self.count, prior_images).sqrt()


def residual_grid(size: tuple[int, int], num_channels: int, num_categories: int = 1) -> tuple[int, int]:
    """Rows and columns of the places that have a covariance of their own, of a residual map of `size`.

    A covariance takes C (C + 1) / 2 numbers; those of all places and categories together are bounded, whatever the
    map's size: to 32 x 32 places for 176 channels, to 3 x 3 for ResNet-50's 1,792. The sides are divisors of the map's,
    so a place is a whole number of positions. The covariance is that of the residual's average over them: on held-out
    good images against synthetic defects that was worth more than one of single positions, which share it.
    """
    places = COVARIANCE_NUMBERS // (num_categories * num_channels * (num_channels + 1) // 2)
    most = max(1, math.isqrt(places))
    return tuple(max(d for d in range(1, most + 1) if side % d == 0) for side in size)


def residual_size(size: tuple[int, int], grid: tuple[int, int], num_channels: int) -> tuple[int, int]:
    """Rows and columns of the positions at which a residual map of `size` is measured: its own, or fewer.

    All of them where its C channels make up to 2^19 numbers, 1 MB in half precision, which is what an image's residual
    may take while it is calibrated; else divisors of `size`, as many as that allows, and never fewer than the `grid`'s
    places.
    """
    most = math.isqrt(RESIDUAL_NUMBERS // num_channels)
    return tuple(
        max(d for d in range(places, max(most, places) + 1) if side % d == 0 and d % places == 0)
        for side, places in zip(size, grid, strict=True)
    )


def by_place(residual: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(N, C, h, w) to (P, C, A, N): P places of A positions each, see `from_places`."""
    rows, columns = grid
    residual = residual.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (N, C, rows, a, columns, b)
    return residual.permute(2, 4, 1, 3, 5, 0).flatten(3, 4).flatten(0, 1)


def from_places(values: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """(P, A, N) to (N, h, w), the inverse of `by_place` for one channel."""
    values = values.unflatten(1, (size[0] // grid[0], -1)).unflatten(0, grid)  # (rows, columns, a, b, N)
    return values.permute(4, 0, 2, 1, 3).reshape(-1, *size)


def residual_gaussian(
    moments: FeatureMoments, mean: torch.Tensor, grid: tuple[int, int], prior_images: float = PRIOR_IMAGES
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian of the feature residual at every place, from sums over good images.

    Few images leave most of a covariance to chance, so each statistic is shrunk towards what needs fewer numbers, as if
    `prior_images` images had shown it: means towards 0, where a denoiser's residual should be; variances towards their
    average over the places; correlations towards theirs. A ridge keeps directions that no image has shown finite.

    Args:
        moments: sums over residuals (N, C, P), averaged over the positions of each place.
        mean: of the residual at every one of Q positions, (Q, C).
        grid: rows and columns of the P places.
        prior_images: what each prior counts for.

    Returns:
        The shrunk means, (Q, C), and the whitening, (P, C (C + 1) / 2): the lower triangle, row by row, of the matrix W
        for which W^T W is the covariance's inverse. Both float64.
    """
    num_places, num_channels = moments.total.shape
    weight = moments.count / (moments.count + prior_images)
    raw_mean = moments.mean()  # (P, C)

    def covariance(places: slice) -> torch.Tensor:  # about the shrunk mean, (P', C, C)
        raw = raw_mean[places]
        offset = (1.0 - weight) * raw
        products = moments.total_of_products[places] / moments.count
        return products - raw[:, :, None] * raw[:, None, :] + offset[:, :, None] * offset[:, None, :]

    parts = [slice(start, start + PLACES_AT_ONCE) for start in range(0, num_places, PLACES_AT_ONCE)]
    mean_square = moments.total_of_products.diagonal(dim1=1, dim2=2) / moments.count
    variance = mean_square - raw_mean.square() + ((1.0 - weight) * raw_mean).square()  # (P, C)
    variance = shrink(variance.mT.unflatten(1, grid), moments.count, prior_images).flatten(1).mT
    deviation = variance.sqrt()

    def correlation(places: slice) -> torch.Tensor:
        return covariance(places) / (deviation[places, :, None] * deviation[places, None, :])

    identity = torch.eye(num_channels, dtype=torch.float64, device=raw_mean.device)
    average = sum(correlation(part).sum(dim=0) for part in parts) / num_places  # (C, C)
    average = average.where(identity == 0, 1.0)
    lower = identity.new_ones(num_channels, num_channels).tril().bool()
    whitening = []
    for part in parts:
        shrunk = weight * correlation(part) + (1.0 - weight) * average  # (P', C, C)
        factor = torch.linalg.cholesky((1.0 - RIDGE) * shrunk + RIDGE * identity)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        whitening.append((inverse / deviation[part, None, :])[:, lower])
    return weight * mean, torch.cat(whitening)


def leave_one_out(
    distance: torch.Tensor,
    product: torch.Tensor,
    place_distance: torch.Tensor,
    num_channels: int,
    count: int,
    prior_images: float = PRIOR_IMAGES,
) -> torch.Tensor:
    """What images' distances would be, had the Gaussian of `residual_gaussian` not seen them.

    An image draws mean and covariance towards itself, so among a few hundred it looks much closer than a new one will.
    Its share of the covariance is one product of rank one, which the Sherman-Morrison formula takes out again: all
    images can serve the covariance, and still say what a new one's distance will be. Variances and the average of the
    correlations stay as they are: a single image of hundreds hardly moves them (for 300 images of 176 channels the
    result is within 1% of 300 Gaussians of 299 images). One of three does, and so does one of fewer images than
    channels (15% for 60 images of 100 channels): distances then come out too small, though never below those given.

    Args:
        distance: |Wy|^2 / C of residuals y of images among those seen; any shape.
        product: Wy . Wx / C with x, the average over the place's positions that the covariance was computed from.
        place_distance: |Wx|^2 / C.
        num_channels: C.
        count: images seen.
        prior_images: as in `residual_gaussian`.

    Returns:
        The distances, of the same shape.
    """
    share = (1.0 - RIDGE) * num_channels / (count + prior_images)
    leverage = share * place_distance  # below 1
    of_mean = (count + prior_images) / (count + prior_images - 1.0)
    return of_mean**2 * (distance + share * product.square() / (1.0 - leverage).clamp(min=1e-6))


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
        residual_shape: (C, h, w) of the feature residual as it is measured (`residual_size`), or None for methods
            without one.
        residual_places: (rows, columns) of the places that have a covariance (`residual_grid`), divisors of h and w;
            None for one at each position.
        num_scores: n, the most held-out good images of any category.
        false_alarm_rate: the rate at which the thresholds were set.

    Attributes:
        map_mean, map_std: (K, S, H, W), of the smoothed maps over good images.
        residual_mean: (K, h * w, C), mean of the feature residual over good images at every position.
        residual_whitening: (K, P, C (C + 1) / 2), lower triangles at P places: with them the residual's channels
            become uncorrelated, of variance 1 (`residual_gaussian`).
        normal_scores: (K, n), held-out good images' scores, ascending, padded with NaN.
        image_threshold: (K,): scores above it are anomalous.
        pixel_threshold: (K,): pixels of the map above it are. At most `false_alarm_rate` of good images show any.
    """

    _keep_in_fp32_modules = [  # noqa: RUF012 (the form diffusers expects)
        "map_mean",
        "map_std",
        "residual_mean",
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
        residual_shape: tuple[int, int, int] | None = None,
        num_scores: int = 0,
        false_alarm_rate: float = 0.01,
        residual_places: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.register_buffer("map_mean", torch.zeros(num_categories, *map_shape))
        self.register_buffer("map_std", torch.ones(num_categories, *map_shape))
        if residual_shape is not None:
            num_channels, *size = residual_shape
            identity = torch.eye(num_channels)[torch.ones(num_channels, num_channels).tril().bool()]
            self.register_buffer("residual_mean", torch.zeros(num_categories, math.prod(size), num_channels))
            self.register_buffer("residual_whitening", identity.repeat(num_categories, math.prod(self.grid), 1))
        else:
            self.residual_mean = self.residual_whitening = None
        self._dense_whitening: dict[int, torch.Tensor] = {}
        self.register_buffer("normal_scores", torch.full((num_categories, num_scores), float("nan")))
        self.register_buffer("image_threshold", torch.full((num_categories,), float("inf")))
        self.register_buffer("pixel_threshold", torch.full((num_categories,), float("inf")))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ScoreCalibration:
        # Follows a move to another device, not one to another dtype: thresholds rounded to bfloat16 (three digits)
        # would no longer hold their false-alarm rate.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            device = fn(tensor.new_empty(0)).device
            return fn(tensor) if device.type == "meta" or tensor.is_meta else tensor.to(device)

        self._dense_whitening.clear()
        return super()._apply(move, recurse)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the places that have a covariance."""
        return tuple(self.config.residual_places or self.config.residual_shape[1:])

    @property
    def num_distances(self) -> int:
        """How many maps `log_distances` gives; 0 for methods without a residual."""
        if self.config.residual_shape is None:
            return 0
        return 1 if self.grid == tuple(self.config.residual_shape[1:]) else 2

    def set_residual_gaussian(self, category: int, mean: torch.Tensor, whitening: torch.Tensor) -> None:
        """Stores what `residual_gaussian` found for a category."""
        self.residual_mean[category] = mean
        self.residual_whitening[category] = whitening
        self._dense_whitening.clear()

    def log_distances(
        self, residual: torch.Tensor, category: torch.Tensor, num_seen: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Logarithms of the squared Mahalanobis distance of a feature residual from good images', by its channels.

        Pretrained channels vary together. A crack that moves many of them a little, against their habit, is nothing to
        a mean of squares and much to this. Distances are skewed: without the logarithm a few far images would decide
        what deviation is normal at a place.

        Args:
            residual: (N, C, H, W), of the calibration's own size or any other, which is then resized.
            category: (N,) integers.
            num_seen: how many images the Gaussian was computed from, where these, all of one category, are among them:
                each is then measured by the Gaussian of the others. 0 for images that it has not seen.

        Returns:
            (N, rows, columns) float32, of the residual's average at each place. Around 0 for a new good image where the
            Gaussian has seen many more images than it has channels, and above where fewer. Where places are of several
            positions, also (N, h, w): the mean of each position's own distance, by its place's covariance, and of the
            places' distances, interpolated there. The first says whether something is there, the second where it ends.
        """
        grid, (num_channels, *size) = self.grid, self.config.residual_shape
        has_positions = self.num_distances == 2
        residual = F.adaptive_avg_pool2d(residual.float(), size)  # (N, C, h, w)
        of_places, of_positions = (residual.new_empty(len(residual), *shape) for shape in (grid, size))
        with torch.autocast(residual.device.type, enabled=False):
            for index in set(category.tolist()):
                chosen = category == index
                mean = self.residual_mean[index].mT.unflatten(1, size)  # (C, h, w)
                centered = by_place(residual[chosen] - mean, grid)  # (P, C, A, N')
                whitened = (self._whitening(index) @ centered.flatten(2)).view_as(centered)
                average = whitened.mean(dim=2, keepdim=True) if has_positions else whitened  # (P, C, 1, N')
                place = average.square().mean(dim=1)  # (P, 1, N')
                if has_positions:
                    position = whitened.square().mean(dim=1)  # (P, A, N')
                    if num_seen:
                        product = (whitened * average).mean(dim=1)  # (P, A, N')
                        position = leave_one_out(position, product, place, num_channels, num_seen)
                    of_positions[chosen] = from_places(position, grid, size)
                if num_seen:
                    place = leave_one_out(place, place, place, num_channels, num_seen)
                of_places[chosen] = from_places(place, grid, grid)
        if not has_positions:
            return (of_places.clamp(min=1e-6).log(),)
        around = F.interpolate(of_places[:, None], size, mode="bilinear")[:, 0]
        return tuple(distance.clamp(min=1e-6).log() for distance in (of_places, (of_positions + around) / 2.0))

    def _whitening(self, category: int) -> torch.Tensor:
        """One category's triangles as matrices, (P, C, C); made once, as that takes as long as their product."""
        if category not in self._dense_whitening:
            packed, num_channels = self.residual_whitening[category], self.residual_mean.shape[2]
            lower = torch.ones(num_channels, num_channels, dtype=torch.bool, device=packed.device).tril()
            dense = packed.new_zeros(len(packed), num_channels, num_channels)
            self._dense_whitening[category] = dense.masked_scatter_(lower, packed)
        return self._dense_whitening[category]

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
