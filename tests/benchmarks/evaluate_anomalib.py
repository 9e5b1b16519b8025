#!/usr/bin/env python
"""anomalib's own PaDiM and PatchCore on a data set's test images, over diffad's backbone and scored by its metrics.

    pip install anomalib
    python tests/benchmarks/evaluate_anomalib.py --data elpv --category mono --output runs/anomalib_mono.json

Data, good training images, backbone weights, resizing, normalisation, resolution of maps and masks, and metrics are
those of `training/evaluate.py`: only the detectors are anomalib's. That its backbone gives the same features as ours is
checked on one image before anything is fitted. Maps and image scores are taken as anomalib's models return them.

PaDiM (Defard et al., ICPR 2021) takes strides 4, 8 and 16, and 100 random channels as with ResNet-18. PatchCore (Roth
et al., CVPR 2022) takes strides 8 and 16, the paper's layer2 and layer3, a coreset of 1 % and 9 neighbours. anomalib
passes over all patches once for each that it keeps: with 600 images, 4704 times over 470400. `--fast_coreset` selects
by the same rule and the same random numbers, in passes that take a fraction of the time on a CPU; only a near tie may
fall the other way by rounding. The report is written after each detector.

`--tile` cuts images up by anomalib's own tiler. Where tiles and strides do not make up the image, that tiler pads it
and keeps the padding, so give an `--image_size` of a tile and some strides:

    python tests/benchmarks/evaluate_anomalib.py --data KOLEKTOR_SDD --models patchcore --fast_coreset \
        --image_size 1248 496 --tile 352 144 --tile_stride 224 88 --output runs/anomalib_tiles.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from diffad import AnomalyOutput, TimmFeatureExtractor
from diffad.data import load_anomaly_dataset
from diffad.evaluation.baselines import image_batches, load_training_images
from diffad.evaluation.detectors import evaluate_detectors, split_by_category
from diffad.evaluation.metric_names import METRIC_TITLES
from diffad.evaluation.report import describe_machine, with_mean
from diffad.images import as_size, images_to_pixel_values, images_to_tensors
from diffad.models.feature_extractor import LITE0_BACKBONE
from diffad.training.arguments import POSITIVE, OneSideOrTwo
from diffad.training.evaluate import add_evaluation_arguments

try:
    from anomalib.data.utils.tiler import Tiler
    from anomalib.models.components import KCenterGreedy
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
except ModuleNotFoundError as error:
    sys.exit(f"This benchmark runs anomalib's models, and {error.name!r} is missing: pip install anomalib")

TITLES = {"padim": "PaDiM", "patchcore": "PatchCore"}
STRIDES = {"padim": (4, 8, 16), "patchcore": (8, 16)}
NUM_NEIGHBORS = 9
CANDIDATES = 32  # of the next centres, whose distances are computed together


class FastKCenterGreedy(KCenterGreedy):
    """anomalib's coreset selection with the same distances for less memory traffic.

    anomalib passes over all projected patches once for each centre. The next centres mostly are among the patches that
    are farthest now: one matrix product gives all patches' distances to `CANDIDATES` of these, and a centre among them
    costs no pass. Besides, the projection (Johnson and Lindenstrauss's bound on the number of patches) has more
    components than these backbones have channels: the triangular factor of its QR decomposition gives the same
    distances in as many components as there are channels.
    """

    def select_coreset_idxs(self) -> list[int]:
        project = self.model.fit

        def fit(embedding: torch.Tensor) -> None:
            project(embedding)
            matrix = self.model.sparse_random_matrix  # (components, channels)
            if matrix.shape[0] > matrix.shape[1]:
                self.model.sparse_random_matrix = torch.linalg.qr(matrix.double()).R.float()

        self.model.fit = fit
        return super().select_coreset_idxs()

    def reset_distances(self) -> None:
        super().reset_distances()
        self.features -= self.features.mean(dim=0)  # smaller norms, less rounding
        self.squared_norms = torch.linalg.vecdot(self.features, self.features)  # (N,)
        self.rows: dict[int, int] = {}  # of a candidate, its row in `squared_distances`

    def update_distances(self, cluster_center: torch.Tensor) -> None:
        center = int(cluster_center)
        if center not in self.rows:
            chosen = cluster_center[None]
            if self.min_distances is not None:
                chosen = torch.cat([chosen, self.min_distances[:, 0].topk(min(CANDIDATES, len(self.features)))[1]])
            self.rows = {index: row for row, index in enumerate(chosen.tolist())}
            products = self.features[chosen] @ self.features.T  # (candidates, N)
            self.squared_distances = products.mul_(-2.0).add_(self.squared_norms)
            self.squared_distances.add_(self.squared_norms[chosen, None]).clamp_(min=0.0)
        squared = self.squared_distances[self.rows[center], :, None]  # ordered as the distances are
        self.min_distances = (
            squared.clone() if self.min_distances is None else torch.minimum(self.min_distances, squared)
        )


def create_model(
    name: str, feature_extractor: TimmFeatureExtractor, n_features: int | None = 100
) -> PadimModel | PatchcoreModel:
    """Anomalib's model over our backbone's weights, unfitted.

    Args:
        name: "padim" or "patchcore".
        feature_extractor: ours, with weights, at the strides that the model is to take.
        n_features: how many channels PaDiM draws, from torch's global generator. None takes all.
    """
    layers = list(feature_extractor.network.feature_info.out_indices)
    common = {"layers": layers, "backbone": feature_extractor.config.backbone, "pre_trained": False}
    if name == "padim":
        model = PadimModel(**common, n_features=n_features or feature_extractor.num_channels)
    else:
        model = PatchcoreModel(**common, num_neighbors=NUM_NEIGHBORS)
    model.feature_extractor.feature_extractor.load_state_dict(feature_extractor.network.state_dict())
    return model


def normalize(feature_extractor: TimmFeatureExtractor, pixel_values: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to the statistics of the backbone, as `TimmFeatureExtractor.layers` has them."""
    return (pixel_values / 2.0 + 0.5 - feature_extractor.image_mean) / feature_extractor.image_std


@torch.no_grad()
def check_features(
    model: PadimModel | PatchcoreModel, feature_extractor: TimmFeatureExtractor, pixel_values: torch.Tensor
) -> float:
    """The largest difference between anomalib's features and ours, relative to the largest value of a layer.

    Raises:
        RuntimeError: it is more than rounding makes.
    """
    theirs = list(model.feature_extractor(normalize(feature_extractor, pixel_values)).values())
    ours = feature_extractor.layers(pixel_values)
    if [one.shape for one in theirs] != [one.shape for one in ours]:
        raise RuntimeError(
            f"anomalib's layers are {[tuple(one.shape) for one in theirs]}, ours {[tuple(one.shape) for one in ours]}."
        )
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(theirs, ours, strict=True))
    if not difference < 1e-4:
        raise RuntimeError(f"anomalib's features differ from ours, by up to {difference:.2g} of a layer's maximum.")
    return difference


def fit_model(
    name: str, good: Dataset, device: torch.device, args: argparse.Namespace
) -> tuple[PadimModel | PatchcoreModel, TimmFeatureExtractor, dict[str, float]]:
    """One of anomalib's models, fitted to good images.

    Args:
        name: "padim" or "patchcore".
        good: the images.
        device: to run on.
        args: of `main`: those of the model, of the images and of the seed.

    Returns:
        The model, our backbone whose weights it has, and `features_differ_by` and `fit_seconds`.
    """
    set_seed(args.seed)  # PaDiM's channels come from torch's generator, PatchCore's projection from NumPy's too
    feature_extractor = TimmFeatureExtractor.from_backbone(LITE0_BACKBONE, STRIDES[name]).to(device)
    model = create_model(name, feature_extractor, args.n_features).to(device)
    first = next(image_batches(good.select([0]), 1, args.image_size, None)).to(device)
    difference = check_features(model, feature_extractor, first)
    if args.tile:
        model.tiler = Tiler(args.tile, args.tile_stride or args.tile)

    started = time.perf_counter()
    model.train()  # it gathers embeddings so; the backbone stays in evaluation mode
    with torch.no_grad():
        for pixel_values in image_batches(good, args.batch_size, args.image_size, None):
            model(normalize(feature_extractor, pixel_values.to(device)))
        if name == "padim":
            model.fit()
        elif args.fast_coreset:
            patches = torch.vstack(model.embedding_store)
            model.embedding_store.clear()
            model.memory_bank = FastKCenterGreedy(patches, args.coreset_ratio).sample_coreset()
        else:
            model.subsample_embedding(args.coreset_ratio)
    model.eval()
    record = {"features_differ_by": difference, "fit_seconds": round(time.perf_counter() - started, 1)}
    return model, feature_extractor, record


def evaluate_model(
    name: str, good: Dataset, images: Dataset, category: str, accelerator: Accelerator, args: argparse.Namespace
) -> dict[str, Any]:
    """Fits one of anomalib's models to a category's good images and evaluates it on its test images."""
    device = accelerator.device
    model, feature_extractor, record = fit_model(name, good, device, args)
    detect_seconds = 0.0

    def detect(pictures: list[Any], indices: list[int]) -> list[AnomalyOutput]:
        nonlocal detect_seconds
        began = time.perf_counter()
        pixel_values = images_to_pixel_values(images_to_tensors(pictures), as_size(args.image_size)).to(device)
        output = model(normalize(feature_extractor, pixel_values))
        maps, scores = output.anomaly_map[:, 0].cpu(), output.pred_score.flatten().cpu()  # (N, S, S), (N,)
        detect_seconds += time.perf_counter() - began
        return [AnomalyOutput(anomaly_map=maps, anomaly_score=scores)]

    limits = (args.resolution, args.pro_fpr_limit, args.batch_size)
    maps = None if args.save_maps is None else Path(args.save_maps, name)
    evaluation = evaluate_detectors(detect, 1, images, category, accelerator, *limits, maps)[0]
    return {
        **evaluation.result,
        "scores": [{key: one[key] for key in ("path", "label", "score")} for one in evaluation.records],
        "training_images": len(good),
        **record,
        **({"n_features": model.n_features} if name == "padim" else {"memory_bank": list(model.memory_bank.shape)}),
        "seconds_per_image": round(detect_seconds / len(images), 4),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Metrics, in percent, and seconds: a row for each model and category, and for the mean of several."""
    rows = {
        f"{TITLES[name]} (anomalib), {category}": result
        for name, of_category in results.items()
        for category, result in (with_mean(of_category) if len(of_category) > 1 else of_category).items()
    }
    columns = {
        **{name: (title, 100.0, 1) for name, title in METRIC_TITLES.items()},
        "fit_seconds": ("fit, s", 1.0, 1),
        "seconds_per_image": ("s an image", 1.0, 3),
    }
    shown = [name for name in columns if any(row.get(name) is not None for row in rows.values())]
    lines = [" | ".join(["model", *(columns[name][0] for name in shown)]), " | ".join(["---"] * (len(shown) + 1))]
    for title, row in rows.items():
        cells = [(row.get(name), *columns[name][1:]) for name in shown]
        lines.append(
            " | ".join([title, *("" if v is None else f"{v * scale:.{digits}f}" for v, scale, digits in cells)])
        )
    return "".join(f"| {line} |\n" for line in lines)


def parse_n_features(text: str) -> int | None:
    return None if text == "all" else int(text)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_evaluation_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of channels and coreset (0)")
    size_flag: dict[str, Any] = {"type": POSITIVE, "nargs": "+", "action": OneSideOrTwo}
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES), help="(padim patchcore)")
    parser.add_argument(
        "--n_features", type=parse_n_features, default=100, help="random channels of PaDiM, or 'all' (%(default)s)"
    )
    parser.add_argument(
        "--coreset_ratio", type=float, default=0.01, help="share of patches that PatchCore keeps (%(default)s)"
    )
    parser.add_argument("--fast_coreset", action="store_true", help="select it with fewer passes over memory")
    parser.add_argument(
        "--image_size", **size_flag, default=224, help="to which images are resized, a side or height and width (224)"
    )
    parser.add_argument("--tile", **size_flag, help="that the backbone sees at once, by anomalib's tiler (the image)")
    parser.add_argument("--tile_stride", **size_flag, help="from one tile to the next (a tile)")
    parser.add_argument("--save_maps", metavar="DIR", help="float32 TIFF maps, a folder for each model")
    parser.add_argument("--output", default="runs/anomalib.json", help="the report (%(default)s)")
    args = parser.parse_args(argv)
    if args.mixed_precision not in (None, "no"):
        parser.error("--mixed_precision: anomalib fits in float32, and is tested in it as well")

    torch.backends.cudnn.allow_tf32 = False  # the three digits of a GPU's default do not tell features apart
    accelerator = Accelerator(mixed_precision="no")
    dataset = load_anomaly_dataset(args.data, split="test", category=args.category, dataset=args.dataset)
    training = load_training_images(args.data, args.category, args.dataset, dataset, accelerator)
    if training is None:
        raise ValueError(f"--data: {args.data} has no good training images, and both models are fitted to those.")
    goods = split_by_category(training)
    report: dict[str, Any] = {
        "anomalib": version("anomalib"),
        "backbone": LITE0_BACKBONE,
        "strides": {name: STRIDES[name] for name in args.models},
        "num_neighbors": NUM_NEIGHBORS,
        **{name: value for name, value in vars(args).items() if name not in ("models", "output")},
        "machine": describe_machine(),
        "results": {},
    }
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        report["results"][name] = {}
        for category, images in split_by_category(dataset).items():
            good = goods.get(category, [])
            if len(good) < 2:
                raise ValueError(
                    f"--data: {category} has {len(good)} good training images, and a covariance takes two."
                )
            report["results"][name][category] = evaluate_model(name, good, images, category, accelerator, args)
            path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{table(report['results'])}Report: {path}")
    return report


if __name__ == "__main__":
    main()
