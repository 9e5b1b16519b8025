"""Chooses how maps are smoothed and joined, by synthetic defects on good images that no network has seen.

Nobody who trains on good parts has defects to choose by. Defects that are drawn on good images stand in for them
(`diffad.data.synthetic_defects`). One pass of the networks over the images with and without them serves all settings,
as these act after the networks alone. docs/results.md says how well the choice ranks settings against real defects.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from diffad import AnomalyDenoisePipeline
from diffad.data.synthetic_defects import add_defects
from diffad.images import ImageSequence, as_size, resize_images, size_of_ratio
from diffad.metrics import AnomalyMetrics
from diffad.pipelines.checks import MAP_NAMES
from diffad.pipelines.detection import MAX_STATISTICS_IMAGES, setting_names, spread
from diffad.pipelines.feature_maps import FEATURE_WEIGHTS
from diffad.pipelines.large_images import cells_inside, grid_of, size_of
from diffad.region_of_interest import inside_region
from diffad.scoring import smooth_maps
from diffad.seeding import image_generators
from diffad.tiling import MOSTLY, places_inside, spread_places, tile_views
from diffad.visualization import to_uint8

WEIGHT_STEPS = 4  # weights are multiples of a quarter
SIGMAS = (0.5, 1.0, 2.0, 4.0)  # pixels at the processing resolution
MAX_IMAGES = 60  # on which defects are drawn; more hardly move the ranking
DEFECTS_AN_IMAGE = 4
BATCH_SIZE = 16
NUM_FOLDS = 10  # blocks of the images, each left out in turn, as each kind is, to see how sure a difference is
DEFECT_RESOLUTION = 256  # px a side of a square of as many, at which they are drawn


# Weights of the three metrics in the objective. Finding bad parts counts most: by the pixel metrics alone the KL would
# always be chosen, which outlines scratches better and finds fewer bad cells.
IMPORTANCE = {"image_auroc": 0.8, "pixel_ap": 0.1, "pixel_pro": 0.1}


class CategoryMaps(NamedTuple):
    """What is known of one category's images, good ones first.

    maps: (N, S, R, R), neither smoothed nor normalised, in the order of `AnomalyDenoisePipeline.score_maps`.
    is_good: (N,) bool.
    masks: (N, R, R) bool, all False for good images; None where there are none.
    source: (N,) which of the category's good images each shows, with a defect or without.
    kind: (N,) str, which kind of defect each shows; empty for good images.
    """

    maps: torch.Tensor
    is_good: np.ndarray
    masks: np.ndarray | None
    source: np.ndarray
    kind: np.ndarray

    def without_block(self, fold: int, num_folds: int) -> CategoryMaps:
        """Those of all images but one of so many blocks of neighbours, whose defects go with them."""
        return self._select(self.source * num_folds // self.is_good.sum() != fold)

    def without_kind(self, kind: str) -> CategoryMaps:
        """Those of all defects but one kind's."""
        return self._select(self.kind != kind)

    def _select(self, kept: np.ndarray) -> CategoryMaps:
        masks = None if self.masks is None else self.masks[kept]
        return CategoryMaps(
            self.maps[torch.from_numpy(kept)], self.is_good[kept], masks, self.source[kept], self.kind[kept]
        )


def choose_settings(
    pipeline: AnomalyDenoisePipeline,
    statistics: Dataset,
    unseen: Dataset,
    categories: Sequence[str],
    seed: int,
    accelerator: Accelerator,
    region: torch.Tensor | None = None,
) -> list[dict[str, Any]]:
    """Ranks weights of the maps and their smoothing, and chooses.

    The weights of `diffad fit` stay unless the best setting is better by more than luck explains: some three standard
    errors of the difference, as it is the best of some 40 (`errors_by_luck`). With these weights no denoiser runs.

    Args:
        pipeline: a trained one. Its own settings stay as they are.
        statistics: good images for the Gaussians and the nearest patches; those of training may serve.
        unseen: good images that no network has seen, on which defects are drawn.
        categories: the names; settings are the same for all of them, and chosen by the mean over them.
        seed: of defects and noise.
        accelerator: shares the statistics' images among its processes. Each ends with the same ranking.
        region: of each category, (K, h, w) bool, outside of which pixels do not count.

    Returns:
        For each setting a dictionary of `weights`, `kl_sigma`, `feature_sigma`, the `image_auroc`, `pixel_ap` and
        `pixel_pro` that it reaches against synthetic defects, and the `objective`, their mean by `IMPORTANCE`. The
        chosen one comes first; its `lead` is the best's objective less that of the weights of `diffad fit`, and
        `standard_error` is how sure that is. The others come by their objective. Nothing where no defect could be drawn
        in the region of a category.
    """
    raw = with_settings(pipeline, weights=dict.fromkeys(MAP_NAMES, 1.0), kl_sigma=0.0, feature_sigma=0.0)
    of_categories = []
    for index, name in enumerate(categories):
        seen, others = (of_category(images, name)["image"] for images in (statistics, unseen))
        if pipeline.tile_size is not None:  # which most of the map comes from
            seen, others = (
                sample_tiles(pipeline, seen, MAX_STATISTICS_IMAGES, index, region),
                sample_tiles(pipeline, others, MAX_IMAGES, index, region),
            )
        take_statistics(raw, seen, index, seed, accelerator, None if pipeline.tile_size else region)
        of_categories.append(measure_defects(raw, others, index, seed))

    return broadcast_object_list([rank_settings(raw, of_categories)])[0]  # processes may differ in the last digit


def rank_settings(pipeline: AnomalyDenoisePipeline, of_categories: Sequence[CategoryMaps]) -> list[dict[str, Any]]:
    """What `choose_settings` returns, of measured maps. The pipeline's weights, means and deviations change."""
    if any(measured.is_good.all() for measured in of_categories):
        return []

    # 1. Weights, at the middle sigmas; 2. sigmas, for the best weights
    of_fit = tuple(FEATURE_WEIGHTS.get(name, 0.0) for name in MAP_NAMES)
    others = [weights for weights in simplex(len(MAP_NAMES), WEIGHT_STEPS) if weights != of_fit]
    fitted, *ranking = [rate_setting(pipeline, of_categories, weights, 1.0, 1.0) for weights in (of_fit, *others)]
    best = max([fitted, *ranking], key=lambda one: one["objective"])
    kl_sigmas = SIGMAS if best["weights"]["kl"] else (1.0,)
    for pair in itertools.product(kl_sigmas, SIGMAS):
        if pair != (1.0, 1.0):
            ranking.append(rate_setting(pipeline, of_categories, tuple(best["weights"].values()), *pair))

    # 3. The best, if it is clearly better than the weights of `diffad fit`
    best = max([fitted, *ranking], key=lambda one: one["objective"])
    lead, error = best["objective"] - fitted["objective"], standard_error(pipeline, of_categories, best, fitted)
    stays = error is None or lead <= errors_by_luck(len(ranking)) * error
    ranking = [one for one in (fitted, *ranking) if one is not (fitted if stays else best)]
    ranking.sort(key=lambda one: -one["objective"])
    return [{**(fitted if stays else best), "lead": lead, "standard_error": error}, *ranking]


def errors_by_luck(num_settings: int) -> float:
    """How many standard errors the best of so many settings is ahead by luck, in one of twenty cases at most.

    By Bonferroni's inequality, as all of them are compared with the same one.
    """
    return NormalDist().inv_cdf(1.0 - 0.05 / num_settings)


def standard_error(
    pipeline: AnomalyDenoisePipeline,
    of_categories: Sequence[CategoryMaps],
    one: dict[str, Any],
    other: dict[str, Any],
) -> float | None:
    """Of the difference between two settings' objectives, by the jackknife (Quenouille, 1956), taken twice.

    Real defects are of other kinds than the drawn ones, and on other parts. So each kind is left out in turn, and each
    block of images; the variances add up. Blocks are of neighbours, so that tiles of an image and photographs of a
    part mostly stay together.

    Returns:
        None where it cannot be told: a category has a single image, or a block or a kind has all of the defects.
    """
    if one is other:
        return 0.0
    num_folds = min(NUM_FOLDS, *(int(measured.is_good.sum()) for measured in of_categories))
    kinds = sorted(set().union(*(measured.kind[~measured.is_good].tolist() for measured in of_categories)))
    variance = 0.0
    for selections in (
        [partial(CategoryMaps.without_block, fold=fold, num_folds=num_folds) for fold in range(num_folds)],
        [partial(CategoryMaps.without_kind, kind=kind) for kind in kinds],
    ):
        if len(selections) < 2:
            return None
        differences = []
        for without in selections:  # copied one at a time, as the maps of many categories are large
            ratings = [
                rate_setting(
                    pipeline,
                    map(without, of_categories),
                    tuple(setting["weights"].values()),
                    setting["kl_sigma"],
                    setting["feature_sigma"],
                )
                for setting in (one, other)
            ]
            differences.append(ratings[0]["objective"] - ratings[1]["objective"])
        variance += (len(selections) - 1) * float(np.var(differences))
    return float(np.sqrt(variance)) if np.isfinite(variance) else None


def with_settings(pipeline: AnomalyDenoisePipeline, **changed: Any) -> AnomalyDenoisePipeline:
    """A pipeline of the same networks, without a calibration, and with other settings."""
    settings = {name: pipeline.config[name] for name in setting_names(type(pipeline))}
    networks = {name: getattr(pipeline, name) for name in ("unet", "scheduler", "feature_extractor", "gaussian")}
    other = type(pipeline)(**networks, **{**settings, **changed})
    other.set_progress_bar_config(disable=True)
    return other


def of_category(dataset: Dataset, name: str) -> Dataset:
    return dataset.select(np.flatnonzero(np.asarray(dataset["category"]) == name))


def sample_tiles(
    pipeline: AnomalyDenoisePipeline,
    images: Sequence[Any],
    count: int,
    category: int,
    region: torch.Tensor | None,
) -> list[np.ndarray]:
    """At most `count` tiles, spread over the images and over each, as the networks see them: (R, R', 3) uint8."""
    size, value_range = as_size(pipeline.input_resolution), pipeline.value_range
    chosen = spread(range(len(images)), count)
    tiles = []
    for i, image in zip(chosen, ImageSequence.of_rows(images, chosen, value_range).whole(), strict=True):
        grid = grid_of(pipeline, size_of(image))
        inside = cells_inside(region, category, grid)
        places = spread_places(places_inside(grid, inside, MOSTLY), max(1, count // len(chosen)), i)
        for views in tile_views(image, grid, places, BATCH_SIZE, size, value_range, inside):
            tiles += [to_uint8(one) for one in views]
    return tiles


def simplex(length: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All weights that are multiples of 1 / steps, and add up to 1."""
    for whole in itertools.product(range(steps + 1), repeat=length):
        if sum(whole) == steps:
            yield tuple(part / steps for part in whole)


@torch.no_grad()
def take_statistics(
    pipeline: AnomalyDenoisePipeline,
    images: Sequence[Any],
    category: int,
    seed: int,
    accelerator: Accelerator,
    region: torch.Tensor | None = None,
) -> None:
    """Gives a pipeline the Gaussians and the patches of one category's good images."""
    fit = pipeline.calibration_fit(category, 0, 0.5, accelerator, region=region)
    indices = spread(range(len(images)), MAX_STATISTICS_IMAGES)
    generators = image_generators(torch.Generator().manual_seed(seed), len(indices))
    value_range = pipeline.value_range
    for measurement in pipeline.measurements(
        images, indices, category, BATCH_SIZE, generators, accelerator, value_range, region
    ):
        fit.add_statistics(measurement)
    pipeline.register_modules(calibration=fit.set_statistics())


def measure_defects(pipeline: AnomalyDenoisePipeline, unseen: Sequence[Any], category: int, seed: int) -> CategoryMaps:
    """What a pipeline with statistics says of good images, and of the same with defects."""
    chosen = np.linspace(0, len(unseen) - 1, min(len(unseen), MAX_IMAGES)).round().astype(int).tolist()
    height, width = as_size(pipeline.input_resolution)
    side = size_of_ratio(DEFECT_RESOLUTION, height / width)
    rows = ImageSequence.of_rows(unseen, chosen, pipeline.value_range).resized(side)
    good = [row[0].clamp(0.0, 1.0).permute(1, 2, 0).numpy() for row in rows]  # (R', R', 3) each
    drawn = list(add_defects(good, DEFECTS_AN_IMAGE, seed))
    inside = inside_region(pipeline.region, torch.tensor([category]), side)
    if inside is not None:
        counts = inside[0].numpy()
        drawn = [
            (i, one._replace(mask=one.mask & counts)) for i, one in drawn if 2 * one.mask[counts].sum() > one.mask.sum()
        ]
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in [*good, *(defect.image for _, defect in drawn)]]
    masks = np.stack([*(np.zeros(side, dtype=bool) for _ in good), *(defect.mask for _, defect in drawn)])
    is_good, source = np.arange(len(images)) < len(good), np.array([*range(len(good)), *(i for i, _ in drawn)])
    kind = np.array([*("" for _ in good), *(defect.kind for _, defect in drawn)])
    return measure_maps(pipeline, images, masks, is_good, source, kind, category, seed)


@torch.no_grad()
def measure_maps(
    pipeline: AnomalyDenoisePipeline,
    images: Sequence[torch.Tensor],
    masks: np.ndarray | None,
    is_good: np.ndarray,
    source: np.ndarray,
    kind: np.ndarray,
    category: int,
    seed: int,
) -> CategoryMaps:
    """The maps of images (3, H, W) in [0, 1], and their masks (N, H, W) at the maps' size."""
    calibration = pipeline.calibration
    generators = image_generators(torch.Generator().manual_seed(seed), len(images))
    parts = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        index = torch.full((len(images[batch]),), category, device=calibration.map_mean.device)
        measurement = pipeline.measure_images(images[batch], index, generators[batch], pipeline.region)
        parts.append(pipeline.score_maps(measurement, index, calibration))
    maps = torch.cat(parts)
    if masks is None:
        return CategoryMaps(maps, is_good, None, source, kind)
    shares = resize_images(torch.from_numpy(masks).float()[:, None], (maps.shape[-2], maps.shape[-1]))[:, 0].numpy()
    small = shares > 0.5
    for mask, share in zip(small, shares, strict=True):
        if not mask.any() and share.max() > 0.0:
            mask[share == share.max()] = True  # a defect below a pixel of the map keeps one
    return CategoryMaps(maps, is_good, small, source, kind)


def rate_setting(
    pipeline: AnomalyDenoisePipeline,
    of_categories: Iterable[CategoryMaps],
    weights: Sequence[float],
    kl_sigma: float,
    feature_sigma: float,
    references: Sequence[CategoryMaps] | None = None,
) -> dict[str, Any]:
    """What a setting reaches, averaged over the categories; NaN for what the masks that are missing would tell.

    Maps are normalised by one mean and one deviation each, of the good images of `references`, or of the same images.
    """
    named = dict(zip(MAP_NAMES, weights, strict=True))
    pipeline.register_to_config(weights=named)
    calibration, names = pipeline.calibration, tuple(IMPORTANCE)
    found = []
    pairs = zip(of_categories, references, strict=True) if references else ((one, one) for one in of_categories)
    for category, (measured, reference) in enumerate(pairs):
        num_kl = measured.maps.shape[1] - calibration.num_feature_maps
        inside = calibration.inside(category, measured.maps.shape[-2:])
        of_good = reference.maps[torch.from_numpy(reference.is_good)]
        good = smooth_maps(of_good, num_kl, kl_sigma, feature_sigma, inside)
        good = good.flatten(2) if inside is None else good[:, :, inside[0, 0]]  # (N, S, pixels)
        calibration.map_mean[category] = good.mean(dim=(0, 2))[:, None, None]
        calibration.map_std[category] = good.std(dim=(0, 2)).clamp(min=1e-6)[:, None, None]
        smoothed = smooth_maps(measured.maps, num_kl, kl_sigma, feature_sigma, inside)
        index = torch.full((len(smoothed),), category, device=good.device)
        joined, scores = pipeline.score_inside(pipeline.join_maps(smoothed, index, calibration), index)
        metrics = AnomalyMetrics()
        metrics.update(
            anomaly_map=None if measured.masks is None else joined.cpu().numpy(),
            mask=measured.masks,
            anomaly_score=scores.cpu().numpy(),
            label=~measured.is_good,
            region=None if inside is None or measured.masks is None else inside[0, 0].cpu().numpy(),
        )
        values = metrics.compute()
        found.append([values[name] for name in names])
    means = np.mean(found, axis=0).tolist()
    return {
        "weights": named,
        "kl_sigma": kl_sigma,
        "feature_sigma": feature_sigma,
        **dict(zip(names, means, strict=True)),
        "objective": float(np.average(means, weights=[IMPORTANCE[name] for name in names])),
    }


def describe_choice(ranking: list[dict[str, Any]]) -> str:
    """What was chosen and why, and what each map reaches alone."""
    chosen = ranking[0]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in chosen["weights"].items() if weight)
    lines = [
        f"Chosen by synthetic defects: {weights}; smoothing {chosen['feature_sigma']:g} px"
        + (f", of the KL {chosen['kl_sigma']:g} px" if chosen["weights"]["kl"] else ""),
        f"{'':14} image AUROC  pixel AP  PRO",
    ]
    alone = [
        one
        for one in ranking
        if max(one["weights"].values()) == 1.0 and (one["kl_sigma"], one["feature_sigma"]) == (1.0, 1.0)
    ]
    named = [("chosen", chosen), *((max(one["weights"], key=one["weights"].get), one) for one in alone)]
    for name, one in named:
        figures = (100.0 * one[metric] for metric in IMPORTANCE)
        lines.append("{:14} {:11.1f} {:9.1f} {:4.1f}".format(name, *figures))
    error = chosen["standard_error"]
    unsure = "which so few images or kinds of defects cannot confirm"
    sure = unsure if error is None else f"standard error {100.0 * error:.2f}"
    lead = f"by {100.0 * chosen['lead']:.2f} ({sure})"
    if chosen["lead"] == 0.0:
        lines.append("No setting is ahead of these, the weights of `diffad fit`.")
    elif chosen["objective"] < max(one["objective"] for one in ranking):
        lines.append(f"The best of {len(ranking)} is ahead of these, the weights of `diffad fit`, {lead}: too little.")
    else:
        lines.append(f"It is ahead of the weights of `diffad fit` {lead}.")
    return "\n".join(lines)
