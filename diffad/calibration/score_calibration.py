"""What is saved of a calibration: statistics of good images, thresholds, and p-values.

This file is long so that what is saved, and all that is asked of it, stand in one place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffad.calibration.conformal import (
    ROUNDING,
    conformal_threshold,
    false_alarm_bound,
    rounded_up,
    thresholds_at,
)
from diffad.calibration.coreset import nearest_distances, project
from diffad.calibration.feature_gaussian import feature_distances
from diffad.calibration.recorded_settings import OWN_NOISE, changed_settings
from diffad.calibration.residual_gaussian import residual_distances
from diffad.exporting import is_exporting
from diffad.float32_part import Float32Part
from diffad.region_of_interest import inside_region
from diffad.scoring import Measurement, resize_maps
from diffad.triangles import identity_triangle, triangle_parts
from diffad.warn_once import warn_once

MOST_UNPACKED_BYTES = 2**30  # of the whitening in full precision, four categories' or more


class ScoreCalibration(Float32Part, ModelMixin, ConfigMixin):
    r"""Statistics of good images' scores, saved with a pipeline in safetensors.

    A leading dimension K of every tensor holds one set for each category of a unified model. Always float32: moving
    a pipeline to half precision leaves it as it is.

    Args:
        num_categories: K.
        map_shape: (S, H, W): S score maps (one for each noise level and kind of score) of H x W pixels.
        residual_shape: (C, h, w) of the feature residual as it is measured (`residual_size`), or None for methods
            without one.
        residual_places: (rows, columns) of the cells that have a covariance (`residual_grid`), divisors of h and w;
            None for one at each position.
        num_scores: n, the most held-out good images of any category.
        false_alarm_rate: the rate at which the thresholds were set.
        precision: in which the networks ran, such as "float32"; None where it is not known.
        settings: the pipeline's, as they were.
        feature_shape: (C, h, w) of the features that have a Gaussian at each position (`feature_gaussian`), or None.
        value_range: of images of more than 8 bits, where the calibration has found it and the pipeline has none.
        coreset_shape: (M, D) of the good images' patches that are kept, or None.
        patch_channels: C of the patches, of which D principal directions count; None where all C do.
        smallest_area: of a region that counts, as a share of the image's area, in [0, 1) (`cut_small_peaks`).
        region_shape: (h, w) of the categories' regions of interest, or None.
        shared_whitening: whether all positions have one covariance of the features, as those of tiles do: a place in a
            tile, which may lie anywhere, says nothing of the part.
        place_shape: (rows, columns) of the places in an image whose maps of tiles have a mean and a deviation each, or
            None.
        category_channels: C of the features by which a model of several categories tells them apart
            (`diffad.calibration.category_features`), or None.
        keeps_maxima: whether the maxima of good images' maps are kept; an earlier version did not.
        leave_one_out: whether the good images of any category's thresholds were each left out in turn, so that its
            false-alarm rate is not exact, and not held out; an earlier version did not say.

    Attributes:
        map_mean, map_std: (K, S, H, W), of the smoothed maps over good images; the latter times one constant for each
            category, so that the joined map of new good images has deviation 1 over all its pixels.
        residual_mean: (K, h * w, C), mean of the feature residual over good images at every position.
        residual_whitening: (K, P, C (C + 1) / 2), lower triangles at P cells: with them the residual's channels
            become uncorrelated, of variance 1 (`residual_gaussian`).
        feature_mean, feature_whitening: the same of the features themselves, (K, h * w, C) and, in half precision,
            (K, h * w, C (C + 1) / 2), or (K, 1, ...) where the covariance is shared.
        coreset: (K, M, D) float16, patches of good images (`diffad.calibration.coreset`).
        patch_directions: (K, C, D), along which patches are compared, or None.
        place_mean, place_std: (K, rows, columns), of good images' maps that are blended of tiles, or None.
        category_mean, category_covariance: (K, C) and (K, C, C), of good images' features, by which categories are
            told apart; NaN where nothing is known.
        region: (K, h, w) bool, which pixels of an image count (`diffad.region_of_interest`).
        normal_scores: (K, n), scores of good images that were held out or left out, ascending, padded with NaN.
        normal_maxima: the maxima of their maps, likewise, or None.
        image_threshold: (K,): scores above it are anomalous.
        pixel_threshold: (K,): pixels of the map above it are. At most `false_alarm_rate` of good images show any.
    """

    _keep_in_fp32_modules = [  # noqa: RUF012 (the form diffusers expects)
        "map_mean",
        "map_std",
        "residual_mean",
        "residual_whitening",
        "feature_mean",
        "feature_whitening",
        "coreset",
        "patch_directions",
        "place_mean",
        "place_std",
        "category_mean",
        "category_covariance",
        "normal_scores",
        "normal_maxima",
        "image_threshold",
        "pixel_threshold",
    ]

    map_mean: torch.Tensor
    map_std: torch.Tensor
    residual_mean: torch.Tensor  # None, as is the whitening, for methods without a residual
    residual_whitening: torch.Tensor
    feature_mean: torch.Tensor  # these three are None where they do not count
    feature_whitening: torch.Tensor
    coreset: torch.Tensor
    patch_directions: torch.Tensor  # None, as well, where all channels count
    region: torch.Tensor | None
    place_mean: torch.Tensor | None
    place_std: torch.Tensor | None
    category_mean: torch.Tensor | None
    category_covariance: torch.Tensor | None
    normal_scores: torch.Tensor
    normal_maxima: torch.Tensor  # None where they are not kept
    image_threshold: torch.Tensor
    pixel_threshold: torch.Tensor

    @register_to_config
    def __init__(
        self,
        num_categories: int = 1,
        map_shape: tuple[int, int, int] = (1, 1, 1),
        residual_shape: tuple[int, int, int] | None = None,
        num_scores: int = 0,
        false_alarm_rate: float = 0.01,
        residual_places: tuple[int, int] | None = None,
        precision: str | None = None,
        settings: dict[str, Any] | None = None,
        feature_shape: tuple[int, int, int] | None = None,
        value_range: float | None = None,
        coreset_shape: tuple[int, int] | None = None,
        smallest_area: float = 0.0,
        shared_whitening: bool = False,
        region_shape: tuple[int, int] | None = None,
        keeps_maxima: bool = False,
        category_channels: int | None = None,
        place_shape: tuple[int, int] | None = None,
        patch_channels: int | None = None,
        leave_one_out: bool | None = None,
    ):
        super().__init__()
        self.register_buffer("map_mean", torch.zeros(num_categories, *map_shape))
        self.register_buffer("map_std", torch.ones(num_categories, *map_shape))
        if residual_shape is not None:
            num_channels, *size = residual_shape
            self.register_buffer("residual_mean", torch.zeros(num_categories, math.prod(size), num_channels))
            identity = identity_triangle(num_channels)
            self.register_buffer("residual_whitening", identity.repeat(num_categories, math.prod(self.grid), 1))
        else:
            for name in ("residual_mean", "residual_whitening"):
                self.register_buffer(name, None)
        if feature_shape is not None:
            num_channels, *size = feature_shape
            self.register_buffer("feature_mean", torch.zeros(num_categories, math.prod(size), num_channels))
            identity = identity_triangle(num_channels).half()  # as large as it is, and as exact for distances
            positions = 1 if shared_whitening else math.prod(size)
            self.register_buffer("feature_whitening", identity.repeat(num_categories, positions, 1))
        else:
            for name in ("feature_mean", "feature_whitening"):
                self.register_buffer(name, None)
        # made of the buffers when they are used, and anew where those change
        self._whitening: dict[tuple[str, int], list[torch.Tensor]] = {}  # `triangle_parts`
        self._inside: dict[tuple[int, int], torch.Tensor] = {}  # by size, of which a model has few
        self.register_load_state_dict_post_hook(forget)
        self._graph_whitening: dict[str, list[torch.Tensor]] = {}  # of all categories, while a graph is exported
        coreset = None if coreset_shape is None else torch.zeros(num_categories, *coreset_shape).half()
        self.register_buffer("coreset", coreset)
        directions = None
        if coreset_shape is not None and patch_channels is not None:
            directions = torch.eye(patch_channels, coreset_shape[1]).repeat(num_categories, 1, 1)
        self.register_buffer("patch_directions", directions)
        self.coreset_owner: dict[int, torch.Tensor] = {}  # (M,), while a category's statistics are taken
        region = None if region_shape is None else torch.ones(num_categories, *region_shape, dtype=torch.bool)
        self.register_buffer("region", region)
        for name, value in (("place_mean", 0.0), ("place_std", 1.0)):
            places = None if place_shape is None else torch.full((num_categories, *place_shape), value)
            self.register_buffer(name, places)
        for name, power in (("category_mean", 1), ("category_covariance", 2)):
            shape = None if category_channels is None else (num_categories, *(category_channels,) * power)
            self.register_buffer(name, None if shape is None else torch.full(shape, float("nan")))
        self.register_buffer("normal_scores", torch.full((num_categories, num_scores), float("nan")))
        self.register_buffer(
            "normal_maxima", torch.full_like(self.normal_scores, float("nan")) if keeps_maxima else None
        )
        self.register_buffer("image_threshold", torch.full((num_categories,), float("inf")))
        self.register_buffer("pixel_threshold", torch.full((num_categories,), float("inf")))

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As of every network, but half precision stays half, where an explicit `dtype` would double it."""
        loaded = super().from_pretrained(*args, **options)
        calibration = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        for name in ("feature_whitening", "coreset"):
            if (values := getattr(calibration, name)) is not None:
                setattr(calibration, name, values.half())
        return loaded

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ScoreCalibration:
        # In float32 still: thresholds rounded to bfloat16 (three digits) would no longer hold their false-alarm rate.
        forget(self)
        return super()._apply(fn, recurse)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the cells that have a covariance."""
        return tuple(self.config.residual_places or self.config.residual_shape[1:])

    @property
    def smallest_area(self) -> float:
        """Of a region that counts, as a share of the image's area."""
        return self.config.smallest_area

    @property
    def num_distances(self) -> int:
        """How many maps `log_distances` gives; 0 for methods without a residual."""
        if self.config.residual_shape is None:
            return 0
        return 1 if self.grid == tuple(self.config.residual_shape[1:]) else 2

    @property
    def num_feature_maps(self) -> int:
        """How many of the maps are of features: of their residual, by their Gaussian, and of the nearest patches."""
        return self.num_distances + (self.feature_mean is not None) + (self.coreset is not None)

    def named_maps(self, maps: torch.Tensor, measured: str, distances: str) -> dict[str, torch.Tensor]:
        """Maps (N, S, H, W), in the order of `score_maps`, by their names; each is (N, n, H, W), and n may be 0.

        Args:
            maps: smoothed.
            measured: name of those that the method measures itself.
            distances: of the residual's, which are `num_distances`; "gaussian" and "nearest" follow.
        """
        counts = {
            measured: maps.shape[1] - self.num_feature_maps,
            distances: self.num_distances,
            "gaussian": int(self.feature_mean is not None),
            "nearest": int(self.coreset is not None),
        }
        return dict(zip(counts, maps.split([*counts.values()], dim=1), strict=True))

    def set_residual_gaussian(self, category: int, mean: torch.Tensor, whitening: torch.Tensor) -> None:
        """Stores what `residual_gaussian` found for a category."""
        self.residual_mean[category] = mean
        self.residual_whitening[category] = whitening
        self._whitening.clear()

    def set_feature_gaussian(self, category: int, mean: torch.Tensor, whitening: torch.Tensor) -> None:
        """Stores what `feature_gaussian` found for a category."""
        self.feature_mean[category] = mean
        self.feature_whitening[category] = whitening
        self._whitening.clear()

    def log_distances(
        self, residual: torch.Tensor, category: torch.Tensor, num_seen: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Logarithms of the squared Mahalanobis distance of a feature residual from good images', by its channels.

        Pretrained channels vary together. A crack that moves many of them a little, against their habit, is nothing to
        a mean of squares and much to this. Distances are skewed: without the logarithm a few far images would decide
        what deviation is normal at a cell.

        Args:
            residual: (N, C, H, W), of the calibration's own size or any other, which is then resized.
            category: (N,) integers.
            num_seen: how many images the Gaussian was computed from, where these, all of one category, are among them:
                each is then measured by the Gaussian of the others. 0 for images that it has not seen.

        Returns:
            (N, rows, columns) float32, of the residual's average at each cell. Around 0 for a new good image where the
            Gaussian has seen many more images than it has channels, and above where fewer. Where cells are of several
            positions, also (N, h, w): the mean of each position's own distance, by its cell's covariance, and of the
            cells' distances, interpolated there. The first says whether something is there, the second where it ends.
        """
        grid, (_, *size) = self.grid, self.config.residual_shape
        has_positions = self.num_distances == 2
        residual = F.adaptive_avg_pool2d(residual.float(), size)  # (N, C, h, w)
        of_cells, of_positions = (residual.new_empty(residual.shape[0], *shape) for shape in (grid, size))
        with torch.autocast(residual.device.type, enabled=False):
            for index, chosen in of_each_category(category):
                gaussian = self.residual_mean[index], self._whitening_parts("residual", index)
                of_cells[chosen], *found = residual_distances(residual[chosen], *gaussian, grid, num_seen)
                if has_positions:
                    [of_positions[chosen]] = found
        if not has_positions:
            return (of_cells.clamp(min=1e-6).log(),)
        around = resize_maps(of_cells[:, None], (size[0], size[1]), inside=self.inside(category, grid))[:, 0]
        return tuple(distance.clamp(min=1e-6).log() for distance in (of_cells, (of_positions + around) / 2.0))

    def distance_maps(
        self,
        residual: torch.Tensor,
        category: torch.Tensor,
        size: tuple[int, int],
        num_seen: int = 0,
        sigma: float = 0.0,
    ) -> torch.Tensor:
        """`log_distances` as maps (N, E, *size), E = `num_distances`: of cells, then of positions where they differ.

        Arguments as there; the residual is (N, C, h, w), and `sigma` smooths the maps, in their pixels.
        """
        maps = [distance[:, None] for distance in self.log_distances(residual, category, num_seen)]
        return torch.cat([resize_maps(one, size, sigma, self.inside(category, one.shape[2:])) for one in maps], dim=1)

    def gaussian_map(
        self,
        features: torch.Tensor,
        category: torch.Tensor,
        size: tuple[int, int],
        num_seen: int = 0,
        sigma: float = 0.0,
    ) -> torch.Tensor:
        """Logarithms of the features' squared Mahalanobis distance at each position (PaDiM), as a map (N, 1, *size).

        The features are (N, C, h, w); the other arguments those of `distance_maps`.
        """
        _, *grid = self.config.feature_shape
        distances = features.new_empty(features.shape[0], math.prod(grid), dtype=torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            for index, chosen in of_each_category(category):
                gaussian = self.feature_mean[index], self._whitening_parts("feature", index)
                values, is_shared = features[chosen].float().flatten(2), self.config.shared_whitening  # (N', C, P)
                distances[chosen] = feature_distances(values, *gaussian, is_shared, num_seen)
        distances = distances.unflatten(1, grid)
        return resize_maps(distances.clamp(min=1e-6).log()[:, None], size, sigma, self.inside(category, grid))

    def nearest_map(
        self, measurement: Measurement, category: torch.Tensor, size: tuple[int, int], sigma: float = 0.0
    ) -> torch.Tensor:
        """How far the patches are from the nearest of good images, (N, 1, *size), smoothed by `sigma` pixels.

        The images of the statistics are measured by the others' patches.
        """
        patches, image = measurement.patches, measurement.image
        if patches is None:
            raise ValueError("`measurement` has no patches, which this calibration scores. Take it from `measure`.")
        distances = patches.new_empty(patches.shape[0], *patches.shape[-2:], dtype=torch.float32)
        with torch.autocast(patches.device.type, enabled=False):
            for index, chosen in of_each_category(category):
                own = None if image is None else image[chosen]
                owner = None if image is None else self.coreset_owner[index]
                of_category = patches[chosen]
                if self.patch_directions is not None:
                    of_category = project(of_category, self.patch_directions[index])
                distances[chosen] = nearest_distances(of_category, self.coreset[index], owner, own)
        return resize_maps(distances[:, None], size, sigma, self.inside(category, distances.shape[1:]))

    def check_measurement(self, measurement: Measurement) -> None:
        """Raises a ValueError where the statistics are of other scores than a pipeline's settings give."""
        residual, shape = measurement.residual, self.config.residual_shape
        distances = 0 if residual is None else max(1, self.num_distances)
        distances += (measurement.features is not None) + (measurement.patches is not None)
        found = (measurement.maps.shape[1] + distances, 0 if residual is None else residual.shape[2])
        features, patches = measurement.features, measurement.patches
        of_features = None if features is None else list(features.shape[1:])
        known = self.config.feature_shape and list(self.config.feature_shape)
        width = 0 if patches is None else patches.shape[1]
        if (
            found != (self.config.map_shape[0], shape[0] if shape else 0)
            or of_features != known
            or width != (self.config.get("patch_channels") or (self.config.coreset_shape or (0, 0))[1])
        ):
            raise ValueError(
                "`calibration` was made for other scores than this pipeline's settings give (timesteps, strides, "
                "distance, weights or feature_resolution), or by an earlier version. Load the pipeline with "
                "`calibration=None` and call `calibrate` with good images."
            )

    @property
    def has_thresholds(self) -> bool:
        """Not from one or two good images."""
        return self.config.num_scores > 0

    def check_category(self, category: torch.Tensor, names: Sequence[str]) -> None:
        """Raises a ValueError where one of images (N,) is of a category without thresholds: it would never alarm."""
        if not self.has_thresholds:
            warn_once(
                "This pipeline was calibrated with one or two good images, which vouch for no false-alarm rate: "
                "anomaly_mask, is_anomalous and p_value are None. Calibrate it with more."
            )
            return
        for index in sorted(set(category.tolist())):
            if not self.image_threshold[index].isfinite():
                name = names[index] if names else "default"
                raise ValueError(
                    f"Category {name!r} is not calibrated. Call `pipe.calibrate(good_images, category={name!r})` first."
                )

    def warn_of_settings(self, settings: dict[str, Any]) -> None:
        """Warns, once, where a pipeline's settings are not those that the statistics were taken with."""
        if changed := changed_settings(self.config.settings, settings):
            warn_once(
                f"This pipeline was calibrated with other settings ({', '.join(changed)}), which moves scores. The "
                "stated false-alarm rate then holds no longer. Calibrate it again."
            )

    def warn_of_precision(self, precision: str) -> None:
        """Warns, once, where the networks run in another precision than when the statistics were taken."""
        if self.config.precision not in (None, precision):
            warn_once(
                f"This pipeline was calibrated in {self.config.precision} and runs in {precision}, which moves scores: "
                "by about a tenth of their deviation between float32 and bfloat16. The stated false-alarm rate then "
                f"holds no longer. Run it in {self.config.precision}, or calibrate it in {precision}."
            )

    def warn_of_noise(self, own_noise: bool) -> None:
        """Warns, once, where images get the model's noise and the statistics know other noise, or the reverse."""
        known = bool((self.config.settings or {}).get(OWN_NOISE))
        if known and not own_noise:
            warn_once(
                "This pipeline was calibrated with its own noise, and the call has other noise: scores of good images "
                "are higher, and more of them raise an alarm than stated. Leave out `generator` and `latents`, or "
                "calibrate it with a `generator`."
            )
        if own_noise and not known:
            warn_once(
                "This pipeline was calibrated with other noise than its own, by a `generator` or an earlier version, "
                "and the call has its own: fewer good images may raise an alarm than stated. Calibrate it again."
            )

    @property
    def calibrated_categories(self) -> list[int]:
        """Indices of the categories that have thresholds."""
        return self.image_threshold.isfinite().nonzero().flatten().tolist()

    def num_good_images(self, category: int) -> int:
        """How many good images one category's thresholds come from."""
        return int((~self.normal_scores[category].isnan()).sum())

    def good_scores(self, category: int) -> list[float]:
        """The scores of those images, ascending."""
        return self.normal_scores[category][~self.normal_scores[category].isnan()].tolist()

    def good_maxima(self, category: int) -> list[float]:
        """The maxima of their maps, ascending; empty where an earlier version kept none."""
        if self.normal_maxima is None:
            return []
        return self.normal_maxima[category][~self.normal_maxima[category].isnan()].tolist()

    @property
    def false_alarm_rate(self) -> float:
        """At which the thresholds were set."""
        return self.config.false_alarm_rate

    @property
    def leave_one_out(self) -> bool:
        """Whether good images were each left out in turn for the thresholds, whose rate is then not exact.

        Of a model that does not say it, whether they may have been: where features alone are measured.
        """
        known = self.config.leave_one_out
        return self.num_feature_maps == self.config.map_shape[0] if known is None else known

    def stated_false_alarm_rate(self, category: int) -> float:
        """The rate that holds on average over sets of good images; n vouch for no less than 1 / (n + 1).

        Raises:
            ValueError: the category is not calibrated.
        """
        return max(self.config.false_alarm_rate, 1.0 / (self._num_scores(category) + 1))

    def false_alarm_bound(self, category: int, confidence: float = 0.95) -> float:
        """The false-alarm rate that one category's threshold keeps with a given confidence, see `conformal`.

        Raises:
            ValueError: the category is not calibrated.
        """
        return false_alarm_bound(self._num_scores(category), self.config.false_alarm_rate, confidence)

    def describe_rate(self, category: int) -> str:
        """What one category's thresholds vouch for, in words.

        Raises:
            ValueError: the category is not calibrated.
        """
        about, below = ("about", "below about") if self.leave_one_out else ("at most", "below")
        rate, bound = self.stated_false_alarm_rate(category), self.false_alarm_bound(category)
        return (
            f"{about} {100.0 * rate:.3g}% of new good parts raise an alarm on average over such sets of images; with "
            f"95% confidence, these keep it {below} {100.0 * bound:.3g}%"
        )

    def _num_scores(self, category: int) -> int:
        count = self.num_good_images(category)
        if not count:
            raise ValueError(f"Category {category} is not calibrated. Call `pipe.calibrate` with its good images.")
        return count

    @contextmanager
    def laid_out_for_export(self) -> Iterator[None]:
        """Meanwhile the whitening is there as a graph's constants (`triangle_parts`)."""
        for name in ("residual", "feature"):
            if (packed := getattr(self, f"{name}_whitening")) is not None:
                self._graph_whitening[name] = triangle_parts(packed, getattr(self, f"{name}_mean").shape[2])
        try:
            yield
        finally:
            self._graph_whitening.clear()

    def inside(self, category: Any, size: Sequence[int]) -> torch.Tensor | None:
        """Which positions of maps of a size count, (N, 1, *size) bool; None where all do.

        `category` is (N,), or as of `of_each_category` that of all images; then N is 1.
        """
        if self.region is None:
            return None
        key = int(size[0]), int(size[1])
        if key not in self._inside:
            every = torch.arange(len(self.region), device=self.region.device)
            inside = inside_region(self.region, every, key)
            assert inside is not None
            self._inside[key] = inside
        found = self._inside[key][category]
        return found[:, None] if found.ndim == 3 else found[None, None]

    def _whitening_parts(self, name: str, category: Any) -> list[torch.Tensor]:
        """One category's whitening at P positions or cells, as `triangle_parts`."""
        if is_exporting():
            return [part[category] for part in self._graph_whitening[name]]
        if (name, category) not in self._whitening:  # made once, as that takes as long as a product with it
            packed = getattr(self, f"{name}_whitening")[category]
            parts = triangle_parts(packed, getattr(self, f"{name}_mean").shape[2])
            self._whitening[name, category] = [part.float() for part in parts]
            while len(self._whitening) > 1 and self._unpacked_bytes() > MOST_UNPACKED_BYTES:
                self._whitening.pop(next(iter(self._whitening)))  # which was used longest ago
        parts = self._whitening[name, category] = self._whitening.pop((name, category))
        return parts

    def _unpacked_bytes(self) -> int:
        return sum(part.nbytes for parts in self._whitening.values() for part in parts)

    def normalize(self, maps: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Smoothed maps (N, S, H, W) in standard deviations above what good images show at that pixel."""
        mean, std = self.map_mean, self.map_std
        if maps.shape[-2:] != mean.shape[-2:]:
            mean = F.interpolate(mean, maps.shape[-2:], mode="bilinear")
            std = F.interpolate(std, maps.shape[-2:], mode="bilinear")
        if len(mean) == 1:
            return (maps - mean).div_(std)
        return (maps - mean[category]) / std[category]

    def set_places(self, category: int, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Stores what `normalize_places` takes, each (rows, columns)."""
        for kept, values in ((self.place_mean, mean), (self.place_std, std)):
            if kept is not None:
                kept[category] = values

    def normalize_places(self, of_tiles: torch.Tensor, category: int) -> torch.Tensor:
        """A map (rows, columns) that is blended of tiles, in standard deviations above good images' at its place."""
        if self.place_mean is None or self.place_std is None:
            return of_tiles
        of_category = torch.stack([self.place_mean[category], self.place_std[category]])[None]  # (1, 2, rows, columns)
        size = of_tiles.shape[0], of_tiles.shape[1]
        mean, std = resize_maps(of_category, size)[0].to(of_tiles.device)
        return (of_tiles - mean) / std

    def p_value(self, scores: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Conformal p-value, (1 + #{normal >= score}) / (1 + #normal), (N,) -> (N,) float32."""
        normal = self.normal_scores[category]  # (N, n)
        lowest = scores - ROUNDING * scores.abs()  # an equal score counts, however its last digits were rounded
        at_least = (normal >= lowest[:, None]).sum(dim=1)  # NaN padding compares False
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
        self.image_threshold[category] = rounded_up(conformal_threshold(ordered.tolist(), rate))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once already, for the same number of images
            maxima = torch.as_tensor(map_maxima, dtype=torch.float32).sort().values
            self.pixel_threshold[category] = rounded_up(conformal_threshold(maxima.tolist(), rate))
        if self.normal_maxima is not None:
            self.normal_maxima[category] = float("nan")
            self.normal_maxima[category, : len(maxima)] = maxima

    def thresholds_at(self, category: int, false_alarm_rate: float) -> tuple[float, float]:
        """The thresholds of scores and of pixels that another false-alarm rate would have set.

        A calibration of an earlier version, which kept no maxima, takes the scores for them where a score is a map's
        maximum, and else leaves the pixels' threshold as it is.

        Raises:
            ValueError: the rate is not in (0, 1), or the category is not calibrated.
        """
        self._num_scores(category)
        threshold = float(self.pixel_threshold[category])
        return thresholds_at(self.good_scores(category), self.known_maxima(category), threshold, false_alarm_rate)

    def known_maxima(self, category: int) -> list[float] | None:
        """`good_maxima`, or the scores where each is its map's maximum; None where an earlier version kept neither."""
        is_maximum = bool(self.image_threshold[category] == self.pixel_threshold[category])
        return self.good_maxima(category) or (self.good_scores(category) if is_maximum else None)


def forget(calibration: ScoreCalibration, *_: Any) -> None:
    """Lets go of what was made of the buffers, which have changed."""
    calibration._whitening.clear()
    calibration._inside.clear()


def of_each_category(category: torch.Tensor | int) -> list[tuple[Any, Any]]:
    """Each category of images (N,), and which they are.

    A number, or a tensor (), is the category of all of them: so it is in a graph, which has no values.
    """
    if not isinstance(category, torch.Tensor) or category.ndim == 0:
        return [(category, slice(None))]
    indices = set(category.tolist())
    if len(indices) == 1:
        return [(indices.pop(), slice(None))]  # all of them: no copy
    return [(index, category == index) for index in indices]
