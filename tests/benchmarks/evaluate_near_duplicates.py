"""How many test images have near duplicates among the training images, and what that does to false alarms.

    python tests/benchmarks/evaluate_near_duplicates.py --data magnetic_tile [--model runs/tiles]

A data set may hold several photographs of one part. Where they are split at random, good test images have near
duplicates among the training images, defective ones few, and a model is also asked which parts it has seen.

Two images are as far apart as their pretrained features, each standardised over the training images, differ in the mean
square; near duplicates are nearer than a third of what two training images have in the median. With `--model`, its
pipeline is calibrated again: without all images of some groups of near duplicates, and without one image of each of
some other groups, half of which set the thresholds. The false alarms on the rest of the latter and on the former are
printed, and how well the scores tell the one from the other. The pipeline's networks may have been trained on both.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DiffusionPipeline
from scipy.sparse.csgraph import connected_components
from torchmetrics.functional import auroc

import diffad  # noqa: F401 (the pipelines' classes, for `DiffusionPipeline.from_pretrained`)
from diffad.data import load_anomaly_dataset
from diffad.evaluation.baselines import image_batches
from diffad.models.feature_extractor import TimmFeatureExtractor

GRID = (8, 8)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def image_features(extractor: TimmFeatureExtractor, images: Dataset, batch_size: int = 32) -> torch.Tensor:
    """(N, C * rows * columns): features of whole images, coarse enough for photographs that do not quite agree."""
    batches = []
    for pixel_values in image_batches(images, batch_size, extractor.config.image_size, None):
        layers = extractor.layers(pixel_values)
        batches.append(torch.cat([F.adaptive_avg_pool2d(layer, GRID) for layer in layers], dim=1).flatten(1))
    return torch.cat(batches)


def mean_square_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, D), (M, D) to (N, M)."""
    return torch.cdist(a, b).square() / a.shape[1]


def hold_out(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of: all images of some groups; one image of each of some others; the rest.

    Only groups of two or more are taken, so that the first two differ in nothing but what is left of their groups. At
    most a `share` of all images is in each.
    """
    rng, count, sizes = np.random.default_rng(seed), round(share * len(groups)), np.bincount(groups)
    order = rng.permutation(np.flatnonzero(sizes > 1))
    is_unseen = sizes[order].cumsum() <= count
    unseen = np.flatnonzero(np.isin(groups, order[is_unseen]))
    seen = np.array([rng.choice(np.flatnonzero(groups == group)) for group in order[~is_unseen][:count]], dtype=int)
    if len(unseen) < 10 or len(seen) < 20:
        raise SystemExit(
            f"Too few near duplicates: {len(unseen)} images of whole groups and {len(seen)} of others. Raise --share, "
            "or leave --model out."
        )
    return unseen, seen, np.setdiff1d(np.arange(len(groups)), [*unseen, *seen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or name, as `load_anomaly_dataset` takes it")
    parser.add_argument("--category", help="of data or a model of several")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="timm's name (%(default)s)")
    parser.add_argument("--image_size", type=int, default=128, help="pixels the backbone sees (%(default)s)")
    parser.add_argument("--model", help="a pipeline to calibrate again, on both kinds of held-out images")
    parser.add_argument("--share", type=float, default=0.15, help="of the training images, held out each way (0.15)")
    parser.add_argument("--false_alarm_rate", type=float, default=0.05, help="of the thresholds (0.05)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args()

    training = load_anomaly_dataset(args.data, "train", args.category)
    training = training.select(np.flatnonzero(np.asarray(training["label"]) == 0))
    test = load_anomaly_dataset(args.data, "test", args.category)
    extractor = TimmFeatureExtractor.from_backbone(args.backbone, image_size=args.image_size)
    known, new = image_features(extractor, training), image_features(extractor, test)
    mean, deviation = known.mean(dim=0), known.std(dim=0).clamp(min=1e-6)
    known, new = (known - mean) / deviation, (new - mean) / deviation
    among = mean_square_distance(known, known)
    limit = float(among[torch.ones_like(among).triu(1).bool()].median()) / 3.0
    nearest = {"training, among themselves": (among + torch.diag(torch.full((len(among),), torch.inf))).amin(dim=1)}
    kinds, distance = np.asarray(test["defect"]), mean_square_distance(new, known).amin(dim=1)
    for kind in sorted(set(kinds.tolist()), key=lambda kind: (kind != "good", kind)):
        nearest[f"test, {kind}"] = distance[torch.from_numpy(kinds == kind)]
    print(f"Near duplicates: below {limit:.2f}, a third of the median of two training images.\n")
    print(f"| images | number | near duplicates | {' | '.join(f'{q:.0%}' for q in QUANTILES)} |")
    print(f"|---|---|---|{'---|' * len(QUANTILES)}")
    for name, values in nearest.items():
        quantiles = " | ".join(f"{q:.2f}" for q in values.quantile(torch.tensor(QUANTILES)))
        print(f"| {name} | {len(values)} | {(values < limit).float().mean():.0%} | {quantiles} |")

    count, groups = connected_components((among < limit).numpy())
    print(f"\n{len(training)} training images fall into {count} groups of near duplicates.")
    if args.model is None:
        return
    unseen, seen, rest = hold_out(groups, args.share, args.seed)
    pipeline = DiffusionPipeline.from_pretrained(args.model, calibration=None)
    pipeline.set_progress_bar_config(disable=True)
    category = args.category if len(pipeline.categories) > 1 else None
    thresholds, fresh = seen[::2], seen[1::2]
    pipeline.calibrate(
        training.select(thresholds)["image"],
        training.select(rest)["image"],
        false_alarm_rate=args.false_alarm_rate,
        category=category,
    )
    scores = []
    for name, held_out in (("with near duplicates", fresh), ("with none", unseen)):
        images = training.select(held_out)["image"][:]
        result = pipeline(images, category, match_input_resolution=False)
        scores.append(torch.from_numpy(result.anomaly_score))
        alarms = f"false alarms {result.is_anomalous.mean():.0%}"
        print(f"{len(held_out)} good images {name} among those calibrated on: {alarms}")
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(scores)])
    print(f"AUROC of the one against the other: {auroc(torch.cat(scores), labels, task='binary'):.3f}")


if __name__ == "__main__":
    main()
