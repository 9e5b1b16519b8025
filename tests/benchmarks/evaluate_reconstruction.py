"""What `AnomalyDenoisePipeline.reconstruct` does to a data set's test images, defective and good.

    python tests/benchmarks/evaluate_reconstruction.py MODEL --data elpv/mono --output runs/reconstruction

All numbers are taken at the processing resolution, from the image as the denoiser sees it, but for those that say
otherwise. The Mahalanobis score is `pipe.gaussian.squared_distance`, averaged over positions: -2 log p of the image's
features, constants aside, which is what the process descends. Good images have about as much as there are channels.
A score that is descended may fall without the defect going, so the pipeline's own anomaly score, which is not, stands
beside it. Images go through in batches, and nothing but sums and the few cases of the picture is kept.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from diffad import AnomalyDenoisePipeline, GradientDenoisingPipeline
from diffad.data import load_anomaly_dataset
from diffad.images import images_to_tensors, resize_images
from diffad.pipelines.checks import category_indices
from diffad.visualization import heat_map, save_rows, to_uint8

NUM_STEPS = 4  # of the trajectory, in the picture


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring pixels, down plus across, (N, C, H, W) to (N,)."""
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.mean(dim=(1, 2, 3)) + across.mean(dim=(1, 2, 3))


def spread(indices: np.ndarray, count: int | None) -> np.ndarray:
    """Up to `count` of the indices, evenly spaced."""
    if count is None or count >= len(indices):
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]


@torch.no_grad()
def measure(
    pipeline: AnomalyDenoisePipeline,
    rows: list[dict[str, Any]],
    indices: list[int],
    num_iterations: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Numbers of a batch, each (B,), and its pictures."""
    gaussian, device = pipeline.gaussian, pipeline.device
    category = [row["category"] for row in rows] if len(pipeline.categories) > 1 else None
    index = category_indices(category, pipeline.categories, len(rows)).to(device)
    images = images_to_tensors([row["image"] for row in rows])
    common = {
        "category": category,
        "batch_size": len(rows),
        "match_input_resolution": False,
        "output_type": "pt",
    }
    output = pipeline.reconstruct(images, num_iterations, return_trajectory=True, **common)
    noisy = pipeline.reconstruct(images, num_iterations, denoise_every=None, **common).reconstruction
    given, result = output.trajectory[:, 0], output.reconstruction  # (B, 3, R, R) in [0, 1]

    def mahalanobis(pictures: torch.Tensor) -> torch.Tensor:
        return gaussian.squared_distance(pictures.to(device) * 2.0 - 1.0, index).mean(dim=(1, 2)).cpu()

    def own_score(pictures: torch.Tensor) -> torch.Tensor:
        return pipeline(pictures, **common).anomaly_score

    enlarged = [resize_images(one[None], tuple(image.shape[-2:]))[0] for one, image in zip(result, images, strict=True)]
    before, after = mahalanobis(given), mahalanobis(result)
    numbers = {
        "mahalanobis_before": before,
        "mahalanobis_after": after,
        "mahalanobis_ratio_of_each": after / before,
        "share_halved": (after <= 0.5 * before).float(),
        "mahalanobis_without_denoising": mahalanobis(noisy),
        "anomaly_score_before": own_score(given),
        "anomaly_score_after": own_score(result),
        "anomaly_score_without_denoising": own_score(noisy),
        "difference": (result - given).abs().mean(dim=(1, 2, 3)),
        "difference_at_input_resolution": torch.stack(
            [(one - image).abs().mean() for one, image in zip(enlarged, images, strict=True)]
        ),
        "total_variation_before": total_variation(given),
        "total_variation_after": total_variation(result),
        "total_variation_without_denoising": total_variation(noisy),
    }
    pictures = {"trajectory": output.trajectory, "without": noisy, "map": output.anomaly_map}
    return numbers, pictures


def picture_row(pictures: dict[str, torch.Tensor], i: int) -> list[np.ndarray]:
    """One case: input, the trajectory's steps, the result, what comes without denoising, the map."""
    states = pictures["trajectory"][i]  # (K, 3, R, R)
    between = spread(np.arange(1, len(states) - 1), NUM_STEPS)
    shown = [*states[[0, *between.tolist(), len(states) - 1]], pictures["without"][i]]
    return [*(to_uint8(state * 2.0 - 1.0) for state in shown), heat_map(pictures["map"][i], low=0.0, high=0.3)]


def summarize(sums: dict[str, dict[str, float]], counts: dict[str, int]) -> dict[str, Any]:
    """Means of good and defective images, and the ratios that say what happened."""
    summary: dict[str, Any] = {}
    for kind, count in counts.items():
        mean = {name: total / count for name, total in sums[kind].items()}
        ratios = {
            f"{name}_ratio{suffix}": mean[f"{name}_{end}"] / mean[f"{name}_before"]
            for name in ("mahalanobis", "total_variation")
            for end, suffix in (("after", ""), ("without_denoising", "_without_denoising"))
        }
        summary[kind] = {"images": count, **{name: round(value, 5) for name, value in (mean | ratios).items()}}
    return summary


def table(summary: dict[str, Any]) -> str:
    """A row for each number, a column for each kind of image."""
    kinds = list(summary)
    lines = [f"{'':<44}" + "".join(f"{kind:>12}" for kind in kinds)]
    for name in summary[kinds[0]]:
        cells = "".join(f"{summary[kind][name]:>12.4g}" for kind in kinds)
        lines.append(f"{name.replace('_', ' '):<44}{cells}")
    return "\n".join(lines)


def run(pipeline: AnomalyDenoisePipeline, dataset: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    labels = np.asarray(dataset["label"])
    bad, good = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    chosen = np.sort(np.concatenate([spread(bad, args.limit), spread(good, args.limit)])).tolist()
    # the picture's six cases: four defective and two good ones, where there are
    measured_bad, measured_good = np.intersect1d(bad, chosen), np.intersect1d(good, chosen)
    num_good = max(2, 6 - len(measured_bad)) if len(measured_good) else 0
    cases = [*spread(measured_bad, 6 - num_good).tolist(), *spread(measured_good, num_good).tolist()]
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, int] = defaultdict(int)
    rows: dict[int, list[np.ndarray]] = {}
    started = time.time()
    for start in tqdm(range(0, len(chosen), args.batch_size)):
        indices = chosen[start : start + args.batch_size]
        numbers, pictures = measure(pipeline, [dataset[i] for i in indices], indices, args.num_iterations)
        for j, i in enumerate(indices):
            kind = "defective" if labels[i] else "good"
            counts[kind] += 1
            for name, values in numbers.items():
                sums[kind][name] += float(values[j])
            if i in cases:
                rows[i] = picture_row(pictures, j)
    steps = ["on the way"] * (len(rows[cases[0]]) - 4)
    titles = ["input", *steps, "result", "not denoised", "difference"]
    names = ["defective" if labels[i] else "good" for i in cases]
    save_rows([rows[i] for i in cases], Path(args.output, "reconstruction.png"), titles, names, tile=128)
    return {
        "model": args.model,
        "data": args.data,
        "num_iterations": args.num_iterations,
        "mahalanobis": "squared distance averaged over positions",
        "seconds": round(time.time() - started, 1),
        "results": summarize(sums, counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an AnomalyDenoise pipeline with a Gaussian")
    parser.add_argument("--data", required=True, help="data set's folder or Hub id, or 'elpv/mono'")
    parser.add_argument("--category", nargs="+", help="only these categories")
    parser.add_argument(
        "--output", default="runs/reconstruction", help="folder of the report and picture (%(default)s)"
    )
    default = inspect.signature(GradientDenoisingPipeline.__call__).parameters["num_iterations"].default
    parser.add_argument("--num_iterations", type=int, default=default, help="gradient steps (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="images in one pass (16)")
    parser.add_argument("--limit", type=int, help="only so many defective images and so many good, evenly spaced")
    args = parser.parse_args()
    dataset = load_anomaly_dataset(args.data, split="test", category=args.category)
    pipeline = AnomalyDenoisePipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    report = run(pipeline, dataset, args)
    path = Path(args.output, "reconstruction.json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{table(report['results'])}\n{report['seconds']} s. Report and picture: {args.output}")


if __name__ == "__main__":
    main()
