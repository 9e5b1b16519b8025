"""The drift test's promise and its power: simulated streams, and real images under another light, focus and place.

    python tests/benchmarks/evaluate_drift.py
    python tests/benchmarks/evaluate_drift.py --model runs/tiles --images tiles/test/good

Simulated: streams of 10,000 good parts, 0, 1 or 5% defects among them; how many ever alarm at a stated chance of 1%.
Good parts score as a skewed distribution does; defects three deviations higher, so that some raise no alarm.

Real: good images that the model has not seen are scored as they are and changed. Each of many streams takes a random
part of them for a calibration of its own, then some as they are, and then changed ones, drawn at random with
replacement. That a few images come again and again is a change by itself, so unchanged ones are drawn in the same way
beside it. How many changed parts the alarm took.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from diffad.calibration.conformal import threshold_rank
from diffad.calibration.drift import ALARM_BETS, RANK_BETS, DriftTest, allowance_among, bet, paid_after
from diffad.reading.inputs import find_images

RATE, CHANCE = 0.01, 0.01


def draw_scores(rng: np.random.Generator, shape: tuple[int, ...], defects: float) -> np.ndarray:
    scores = rng.gumbel(size=shape)
    is_bad = rng.random(shape) < defects
    return np.where(is_bad, scores + 3.0 * np.pi / np.sqrt(6.0), scores)


def simulate(calibration: int, parts: int, streams: int, defects: float, seed: int, shift: float = 0.0) -> np.ndarray:
    """Whether each stream ever alarmed, (streams,): `DriftTest` over all streams at once, with a Fenwick tree each."""
    rng = np.random.default_rng(seed)
    higher = shift * 100.0 / calibration * np.pi / np.sqrt(6.0)
    normal = np.sort(draw_scores(rng, (streams, calibration), 0.0) + higher, axis=1)
    threshold = normal[:, min(threshold_rank(calibration, RATE), calibration) - 1]
    scores = np.concatenate([normal, draw_scores(rng, (streams, parts), defects)], axis=1)
    order = scores.argsort(axis=1).argsort(axis=1).astype(np.int32) + 1  # ranks from 1 on: places in the tree
    total, rows = scores.shape[1], np.arange(streams)
    tree, kept_so_far = np.zeros((streams, total + 1), np.int32), np.zeros(streams, int)
    of_ranks, of_alarms = np.zeros((streams, 3)), np.zeros((streams, 1))
    uniform = [np.random.default_rng(seed * 100_003 + i) for i in range(streams)]
    ties = np.stack([one.random(parts) for one in uniform])
    num_ranked, alarmed = np.zeros(streams, int), np.zeros(streams, bool)
    reserve = 1.0 / np.log(np.e + np.arange(parts + 2))
    for t in range(total):
        place, kept = order[:, t], scores[:, t] < threshold
        if t >= calibration:
            not_above, step = np.zeros(streams, int), place.copy()
            while step.any():  # how many earlier ones score less; none is equal
                not_above += tree[rows, step]
                step -= step & -step
            p_value = (num_ranked - not_above + ties[rows, kept_so_far.clip(max=parts - 1)]) / (num_ranked + 1)
            of_alarms = bet(of_alarms, ALARM_BETS, (~kept).astype(float), paid_after(t - calibration))
            paid = reserve[kept_so_far] - reserve[kept_so_far + 1]
            after = bet(of_ranks, RANK_BETS, p_value, paid, allowance_among(num_ranked))
            of_ranks = np.where(kept[:, None], after, of_ranks)
            kept_so_far += kept
            evidence = of_ranks.sum(axis=1) + of_alarms[:, 0] + reserve[kept_so_far] + reserve[t - calibration + 1]
            alarmed |= evidence / 2.0 >= 1.0 / CHANCE
        step = np.where(kept, place, total + 1)
        while (inside := step <= total).any():
            tree[rows[inside], step[inside]] += 1
            step = np.where(inside, step + (step & -step), step)
        num_ranked += kept
    for i in range(3):  # the shipped test says the same
        test = DriftTest(normal[i], RATE, CHANCE)
        test.random = np.random.default_rng(seed * 100_003 + i)
        for score in scores[i, calibration:]:
            test.update(score)
        assert (test.drifted_at is not None) == alarmed[i], "the simulation is not the test that ships"
    return alarmed


def print_promise(parts: int, streams: int, shift: float) -> None:
    print(f"Streams of {parts} parts that ever alarm, at a stated chance of {CHANCE:.0%}; {streams} streams each\n")
    print("| calibration images | 0% defects | 1% defects | 5% defects |\n|---|---|---|---|")
    for calibration in (62, 200, 1000):
        shares = []
        for defects in (0.0, 0.01, 0.05):
            chunks = [
                simulate(calibration, parts, min(500, streams), defects, s, shift) for s in range(-(-streams // 500))
            ]
            shares.append(f"{np.concatenate(chunks).mean():.2%}")
        print(f"| {calibration} | {' | '.join(shares)} |", flush=True)


def shifted(image: Image.Image, share: float) -> Image.Image:
    """Moved to the right, the border's pixels repeated."""
    pixels = round(share * image.width)
    moved = ImageChops.offset(image, pixels, 0)
    moved.paste(image.crop((0, 0, 1, image.height)).resize((pixels, image.height)), (0, 0))
    return moved


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "exposure +10%": lambda image: image.point([min(255, round(1.1 * value)) for value in range(256)] * 3),
    "exposure -10%": lambda image: image.point([round(0.9 * value) for value in range(256)] * 3),
    "blur of 1 px": lambda image: image.filter(ImageFilter.GaussianBlur(1.0)),
    "shift of 2%": lambda image: shifted(image, 0.02),
}


def print_power(model: str, folder: Path, calibration: int, before: int, streams: int) -> None:
    from diffad.commands.models import load_pipeline

    pipeline = load_pipeline(model)
    images = [Image.open(path).convert("RGB") for path in find_images([folder])]
    scores = {}
    for name, change in CHANGES.items():
        batches = range(0, len(images), 16)
        outputs = [
            pipeline([change(image) for image in images[i : i + 16]], match_input_resolution=False) for i in batches
        ]
        scores[name] = np.concatenate([output.anomaly_score for output in outputs])
    print(
        f"\n{len(images)} good images; in each of {streams} streams {calibration} at random calibrate, {before} others "
        "come first as they are, and then up to 1000 changed ones, from the rest, with replacement\n"
    )
    print("| change | noticed | after how many parts: median (90% quantile) | of them at or above the threshold |")
    print("|---|---|---|---|")
    for name in ("none, no image twice", *CHANGES):
        is_fresh, name = name not in CHANGES, name if name in CHANGES else "none"
        took, left_out = [], []
        for seed in range(streams):
            rng = np.random.default_rng(seed)
            order = rng.permutation(len(images))
            calibrating, first, rest = np.split(order, [calibration, calibration + before])
            rate = max(RATE, 1.0 / (calibration + 1))
            test = DriftTest(scores["none"][calibrating], rate, CHANCE, seed)
            changed = rest if is_fresh else rng.choice(rest, 1000)
            for score in [*scores["none"][first], *scores[name][changed]]:
                test.update(float(score))
                if test.drifted_at is not None:
                    break
            took.append(np.inf if test.drifted_at is None else test.drifted_at - before)
            left_out.append(np.mean(scores[name][rest] >= test.threshold))
        noticed = np.isfinite(took).mean()
        median, high = (
            "more" if np.isinf(q) else f"{q:.0f}" for q in np.quantile(took, [0.5, 0.9], method="inverted_cdf")
        )
        shown = "none, no image twice" if is_fresh else name
        print(f"| {shown} | {noticed:.1%} | {median} ({high}) | {np.mean(left_out):.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=10_000, help="in a simulated stream (10000)")
    parser.add_argument("--streams", type=int, default=2000, help="simulated (2000)")
    parser.add_argument(
        "--shift",
        type=float,
        default=0.0,
        help="of 100 calibration images' scores, in deviations: each left out in turn, they are higher, the less the "
        "more images there are (0)",
    )
    parser.add_argument("--model", help="folder of a calibrated pipeline; then real images instead")
    parser.add_argument("--images", type=Path, help="folder of good images that it has not seen")
    parser.add_argument("--calibration", type=int, default=62, help="of them calibrate a stream (62)")
    parser.add_argument("--before", type=int, default=30, help="parts before the change (30)")
    args = parser.parse_args()
    if args.model is None:
        print_promise(args.parts, args.streams, args.shift)
    else:
        print_power(args.model, args.images, args.calibration, args.before, 200)


if __name__ == "__main__":
    main()
