"""`AnomalyMetrics` against published values, and against all pixels sorted.

Long, as every metric is tried in the same ways: streamed, merged, over processes, with ties.
"""

from __future__ import annotations

import itertools
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, ndimage, stats
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from diffad.evaluation.metrics import AnomalyMetrics
from diffad.evaluation.report import markdown_table

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEYS = [
    *("image_auroc", "image_ap", "image_f1max"),
    *("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_pro", "pixel_aupimo", "pixel_dice"),
]


def make_images(seed: int = 0, num_images: int = 12, size: int = 48, levels: int | None = None) -> dict:
    """Noise with up to three brighter squares on two images in three. `levels`: scores to a unit, for ties."""
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((num_images, size, size), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    for i in range(num_images):
        for _ in range(3 if i % 3 else 0):
            top, left, height, width = rng.integers(1, size // 3, 4)
            masks[i, top : top + height, left : left + width] = True
    maps[masks] += 1.0
    if levels is not None:
        maps = np.round(maps * levels) / levels
    scores = maps.reshape(num_images, -1).max(axis=1)
    return {"anomaly_map": maps, "mask": masks, "anomaly_score": scores, "label": masks.any(axis=(1, 2))}


def take(images: dict, index) -> dict:
    return {name: value[index] for name, value in images.items()}


def evaluate(*updates: dict, **options) -> dict[str, float]:
    metrics = AnomalyMetrics(**options)
    for images in updates:
        metrics.update(**images)
    return metrics.compute()


def assert_equal(result: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert list(result) == list(expected) == KEYS
    assert result == pytest.approx(expected, rel=0, abs=tolerance, nan_ok=True)


def brute_force_pro(maps: np.ndarray, masks: np.ndarray, fpr_limit: float) -> float:
    """As the definition reads: at each threshold, the overlap of each region, one by one."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [scores[labels == i] for i in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        fpr.append(np.mean(maps[~masks] >= threshold))
        pro.append(np.mean([np.mean(region >= threshold) for region in regions]))
    grid = np.union1d(fpr, [fpr_limit])
    grid = grid[grid <= fpr_limit]
    area = 0.0
    for left, right in itertools.pairwise(grid):
        # between two rates the curve is a line from the last point at the left one to the first at the right one
        start = max(p for f, p in zip(fpr, pro, strict=True) if f <= left)
        after = min(i for i, f in enumerate(fpr) if f >= right)
        before = after - 1
        slope = (pro[after] - pro[before]) / (fpr[after] - fpr[before])
        end = pro[before] + slope * (right - fpr[before])
        area += (right - left) * (start + end) / 2
    return area / fpr_limit


def sorted_reference(images: dict, fpr_limit: float = 0.3) -> dict[str, float]:
    """All metrics from all pixels, sorted, with no bit of a score dropped. There must be images of both kinds."""
    weights = np.zeros(images["mask"].shape)  # of a defective pixel: one over the area of its region
    for weight, mask in zip(weights, images["mask"], strict=True):
        regions = ndimage.label(mask, structure=np.ones((3, 3)))[0]
        weight[mask] = 1 / np.bincount(regions.ravel())[regions[mask]]
    result = {}
    for level, scores, labels in (
        ("image", images["anomaly_score"], images["label"]),
        ("pixel", images["anomaly_map"], images["mask"]),
    ):
        scores, labels = scores.ravel().astype(np.float64), labels.ravel()
        pairs = labels.sum() * (~labels).sum()
        higher = stats.mannwhitneyu(scores[labels], scores[~labels], method="asymptotic").statistic
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each run of equal scores
        found, flagged = np.cumsum(labels[order])[ends], ends + 1
        result |= {
            f"{level}_auroc": higher / pairs,
            f"{level}_ap": np.sum(np.diff(found, prepend=0) * found / flagged) / labels.sum(),
            f"{level}_f1max": np.max(2 * found / (flagged + labels.sum())),
        }
    # order, ends and the rest are of pixels now
    fpr = np.append(0, (flagged - found) / (~labels).sum())
    overlap = np.append(0, np.cumsum(weights.ravel()[order])[ends] / weights.sum())
    inside = fpr < fpr_limit
    x, y = np.append(fpr[inside], fpr_limit), np.append(overlap[inside], np.interp(fpr_limit, fpr, overlap))
    result["pixel_pro"] = integrate.trapezoid(y, x) / fpr_limit
    # AUPIMO: what share of the logarithmic range of false-positive rates finds each defective pixel
    good = images["anomaly_map"][~images["mask"].any(axis=(1, 2))].ravel()
    of_images = []
    for anomaly_map, mask in zip(images["anomaly_map"], images["mask"], strict=True):
        rates = [np.mean(good >= score) for score in anomaly_map[mask]]
        if mask.any():
            of_images.append(np.mean(np.log(1e-4 / np.clip(rates, 1e-5, 1e-4)) / np.log(10)))
    return {**result, "pixel_aupimo": np.mean(of_images), "pixel_dice": result["pixel_f1max"]}


# ---------------------------------------------------------------------------------------------- values


def test_published_evaluation():
    arrays = np.load(FIXTURES / "metrics_dev.npz")
    reference = json.loads((FIXTURES / "metrics_dev.json").read_text())
    maps, masks = torch.from_numpy(arrays["anomaly_maps"]).float(), torch.from_numpy(arrays["masks"])
    pooled = maps[:, None]
    for _ in range(8):
        pooled = F.avg_pool2d(pooled, 8, stride=1)
    result = evaluate(
        {"anomaly_map": maps, "mask": masks, "anomaly_score": pooled.amax((1, 2, 3)), "label": masks.amax((1, 2))}
    )
    expected = {
        "image_auroc": reference["diad_max"],
        "image_ap": reference["diad_apsp"],
        "image_f1max": reference["diad_f1sp"],
        "pixel_auroc": reference["diad_pixel"],
        "pixel_ap": reference["diad_appx"],
        "pixel_f1max": reference["diad_f1px"],
        "pixel_dice": reference["diad_f1px"],
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert result["pixel_pro"] == pytest.approx(reference["anomalib_aupro"], abs=1e-5)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("fpr_limit", [0.05, 0.3, 1.0])
def test_independent_implementations(levels: int | None, fpr_limit: float):
    images = make_images(num_images=4, size=16, levels=levels)
    result = evaluate(images, pro_fpr_limit=fpr_limit)
    maps, masks = images["anomaly_map"], images["mask"]
    for level, scores, labels in (
        ("pixel", maps, masks),
        ("image", images["anomaly_score"], images["label"]),
    ):
        scores, labels = torch.from_numpy(scores.ravel()).double(), torch.from_numpy(labels.ravel()).long()
        scores = (scores - scores.min()) / (scores.max() - scores.min())  # else torchmetrics takes the sigmoid
        f1 = [2 * (labels * (scores >= t)).sum() / (labels.sum() + (scores >= t).sum()) for t in scores]
        assert result[f"{level}_auroc"] == pytest.approx(float(binary_auroc(scores, labels)), abs=1e-6)
        assert result[f"{level}_ap"] == pytest.approx(float(binary_average_precision(scores, labels)), abs=1e-6)
        assert result[f"{level}_f1max"] == pytest.approx(float(max(f1)), abs=1e-6)
    assert result["pixel_pro"] == pytest.approx(brute_force_pro(maps, masks, fpr_limit), abs=1e-9)


def test_pro_counts_regions_alike_and_corners_connect():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :4, :4] = True  # found
    mask[0, 6, 6] = mask[0, 7, 7] = True  # touch at a corner: one region, missed
    maps = np.zeros((1, 8, 8), np.float32)
    maps[mask] = -1.0
    maps[0, :4, :4] = 1.0
    # one region of two at once, the other only after every normal pixel: the overlap stays at one half
    result = evaluate({"anomaly_map": maps, "mask": mask})
    assert result["pixel_pro"] == pytest.approx(0.5)
    # whatever its area
    mask[0, 7, 7] = False
    assert evaluate({"anomaly_map": maps, "mask": mask})["pixel_pro"] == pytest.approx(0.5)


def test_good_images_count_towards_the_false_positive_rate():
    images = make_images()
    good = np.full((4, 48, 48), -100.0, np.float32)
    more = {"anomaly_map": good, "mask": np.zeros(good.shape), "anomaly_score": np.zeros(4), "label": np.zeros(4)}
    result, alone = evaluate(images, more), evaluate(images)
    assert result["pixel_pro"] > alone["pixel_pro"] + 0.01
    assert result["pixel_auroc"] > alone["pixel_auroc"] + 0.01
    assert_equal(evaluate(images, {**more, "mask": None}), result)


def test_dice_is_at_the_best_threshold():
    images = make_images()
    maps, masks = images["anomaly_map"], images["mask"]
    result = evaluate(images)
    predictions = [maps >= threshold for threshold in np.linspace(-1, 3, 81)]
    best = max(2 * (one & masks).sum() / (one.sum() + masks.sum()) for one in predictions)
    assert best == pytest.approx(result["pixel_dice"], abs=2e-3)
    assert best <= result["pixel_dice"]
    assert result["pixel_dice"] == result["pixel_f1max"]


def test_pixels_outside_of_a_region_count_nowhere():
    images = make_images()
    predicted = images["anomaly_map"] > 1.5
    defects = [[(mask, 0.5)] if mask.any() else None for mask in images["mask"]]
    region = np.zeros((48, 48), bool)
    region[4:20, 2:16] = True  # through some of the defects
    cut = {name: images[name][:, 4:20, 2:16] for name in ("anomaly_map", "mask")}
    cut_defects = []  # half of a whole defect, or what is inside of it, is enough
    for whole, mask in zip(images["mask"], cut["mask"], strict=True):
        enough = min(mask.sum(), round(0.5 * whole.sum()))
        cut_defects.append([(mask, enough / mask.sum())] if mask.any() else None)
    assert 0 < cut["mask"].sum() < images["mask"].sum()
    scores = {name: images[name] for name in ("anomaly_score", "label")}
    expected = evaluate({**scores, **cut, "predicted_mask": predicted[:, 4:20, 2:16], "defects": cut_defects})
    given = {**images, "predicted_mask": predicted, "defects": defects}
    assert evaluate({**given, "region": region}) == pytest.approx(expected, abs=1e-12)
    assert expected["pixel_pro"] != pytest.approx(evaluate(given)["pixel_pro"], abs=1e-3)
    for wrong in (region[:9], ~np.ones_like(region)):
        with pytest.raises(ValueError, match="`region` has shape"):
            evaluate({**images, "region": wrong})


# ------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x,
        lambda x: np.exp(3 * x),
        lambda x: 1000 + x,  # a narrow range far from zero
        lambda x: 1 / (1 + np.exp(-x - 5)),  # close to 1
        lambda x: 1e-30 * x,
        lambda x: np.round(4 * x) / 4,  # 40 distinct scores
    ],
    ids=["normal", "exp", "offset", "sigmoid", "tiny", "tied"],
)
def test_streaming_agrees_with_sorting(transform):
    images = make_images(num_images=20, size=128)  # 330,000 pixels for 2^16 bins
    images["anomaly_map"] = transform(images["anomaly_map"]).astype(np.float32)
    assert_equal(evaluate(images, num_bins=2**16), sorted_reference(images), 4e-4)


def test_memory_does_not_grow_with_images():
    def held(metrics: AnomalyMetrics) -> int:
        states = metrics.metric_state
        tensors = [t for s in states for t in (states[s] if isinstance(states[s], list) else [states[s]])]
        return sum(t.numel() * t.element_size() for t in tensors)

    images = take(make_images(), slice(1, 2))
    for method in ("update", "forward"):
        metrics = AnomalyMetrics(num_bins=1024)  # a buffer of 4096 pixels: every other image fills it
        roomy = AnomalyMetrics(num_bins=2**16)  # a buffer that 20 images do not fill: every pixel stays
        empty = held(roomy)
        sizes = []
        for _ in range(20):
            getattr(metrics, method)(**images)
            roomy.update(**images)
            sizes.append(held(metrics))
        scores_and_labels = 8 * 20
        assert max(sizes[4:]) <= max(sizes[:4]) + scores_and_labels
        assert held(roomy) > empty + 20 * images["anomaly_map"].nbytes
        assert_equal(metrics.compute(), roomy.compute(), 0.05)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(2, 12),
    size=st.integers(8, 64),
    levels=st.sampled_from([None, 1, 3, 100]),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 5.0, -100.0]),
)
def test_streaming_agrees_with_sorting_on_any_set(seed, num_images, size, levels, scale, offset):
    images = make_images(seed, num_images, size, levels)
    images["anomaly_map"] = (images["anomaly_map"] * scale + offset).astype(np.float32)
    streaming = evaluate(*(take(images, [i]) for i in range(num_images)), num_bins=2**14)
    assert_equal(streaming, sorted_reference(images), 1e-3)
    assert_equal(evaluate(images), sorted_reference(images), 1e-9)  # fewer pixels than bins


def test_neighbouring_scores_fill_the_bins():
    # 1026 floats next to each other: with one bit dropped, one more than there are bins
    scores = (np.float32(1.0).view(np.int32) + np.arange(1026, dtype=np.int32)).view(np.float32)
    maps = np.tile(scores, 4).reshape(1, 4, 1026)
    mask = np.random.default_rng(0).random(maps.shape) < np.linspace(0, 1, 1026)
    images = {"anomaly_map": maps, "mask": mask}
    assert_equal(evaluate(images, images, num_bins=512), evaluate(images, num_bins=2**18), 0.005)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cut=st.integers(0, 12),
    num_bins=st.sampled_from([512, 2000, 2**18]),
)
def test_order_batches_and_merging_change_nothing(seed, cut, num_bins):
    images = make_images(seed)
    images["anomaly_map"][:6] += 1000.0  # fewer bits to drop here
    expected = evaluate(images, num_bins=num_bins)
    order = np.random.default_rng(seed).permutation(12)
    assert_equal(evaluate(take(images, order), num_bins=num_bins), expected)
    assert_equal(evaluate(*(take(images, [i]) for i in order), num_bins=num_bins), expected)

    first, second = AnomalyMetrics(num_bins=num_bins), AnomalyMetrics(num_bins=num_bins)
    first.update(**take(images, slice(None, cut)))
    second.update(**take(images, slice(cut, None)))
    if cut:
        first.compute()  # must not be returned again after the merge
    first.merge_state(second)
    assert_equal(first.compute(), expected)


@pytest.mark.parametrize("cut", [5, 12])  # the second process has some of the images, or none
def test_synchronised_over_processes(cut: int):
    # Two threads stand for the processes. Only the collective itself is replaced; as a real one, it needs tensors of
    # one dtype and rank on all sides, in the same order.
    barrier, sent = threading.Barrier(2, timeout=30), [None, None]
    images = make_images()

    def process(rank: int) -> tuple[dict, dict]:
        def all_gather(tensor: torch.Tensor, group=None) -> list[torch.Tensor]:
            sent[rank] = tensor
            barrier.wait()
            gathered = list(sent)
            barrier.wait()
            assert gathered[0].dtype == gathered[1].dtype
            assert gathered[0].ndim == gathered[1].ndim
            return gathered

        metrics = AnomalyMetrics(num_bins=4096, dist_sync_fn=all_gather, distributed_available_fn=lambda: True)
        part = slice(0, cut) if rank == 0 else slice(cut, 12)
        if part.start < part.stop:
            metrics.update(**take(images, part))
        return metrics.compute(), metrics.curves()

    together = AnomalyMetrics(num_bins=4096)
    together.update(**images)
    with ThreadPoolExecutor(2) as executor:
        for result, curves in executor.map(process, range(2)):
            assert_equal(result, together.compute())
            for name, curve in together.curves().items():
                np.testing.assert_allclose(curves[name], curve, rtol=0, atol=1e-12)


def test_forward_reset_clone_and_pickle():
    first, second = take(make_images(), slice(0, 6)), take(make_images(), slice(6, 12))
    metrics = AnomalyMetrics(num_bins=2048)
    assert_equal(metrics(**first), evaluate(first, num_bins=2048))
    assert_equal(metrics(**second), evaluate(second, num_bins=2048))
    both = evaluate(first, second, num_bins=2048)
    assert_equal(metrics.compute(), both)
    assert_equal(metrics.clone().compute(), both)
    assert_equal(pickle.loads(pickle.dumps(metrics)).compute(), both)
    metrics.reset()
    metrics.update(**second)
    assert_equal(metrics.compute(), evaluate(second, num_bins=2048))


# ------------------------------------------------------------------------------------------ invariance


@settings(max_examples=40, deadline=None)
@given(
    scores=hnp.arrays(np.int32, (3, 6, 6), elements=st.integers(-8, 8)),
    mask=hnp.arrays(bool, (3, 6, 6)),
    increments=hnp.arrays(np.float64, 17, elements=st.floats(1e-3, 1e3)),
)
def test_only_the_order_of_scores_matters(scores, mask, increments):
    increasing = np.cumsum(increments)[scores + 8]
    images = {"mask": mask, "label": mask.any(axis=(1, 2))}
    plain = {"anomaly_map": scores.astype(np.float32), "anomaly_score": scores.max(axis=(1, 2)), **images}
    mapped = {"anomaly_map": increasing, "anomaly_score": increasing.max(axis=(1, 2)), **images}
    assert_equal(evaluate(mapped), evaluate(plain))


@settings(max_examples=60, deadline=None)
@given(
    maps=hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(width=32, allow_nan=False)),
    mask=hnp.arrays(bool, (3, 4, 5)),
    fpr_limit=st.floats(1e-3, 1.0),
)
def test_values_lie_in_the_unit_interval(maps, mask, fpr_limit):
    label = mask.any(axis=(1, 2))
    metrics = AnomalyMetrics(pro_fpr_limit=fpr_limit)
    metrics.update(anomaly_map=maps, mask=mask, anomaly_score=maps.max(axis=(1, 2)), label=label)
    result = metrics.compute()
    for level, both_classes in (("image", 0 < label.sum() < 3), ("pixel", 0 < mask.sum() < mask.size)):
        for name in (key for key in KEYS if key.startswith(level)):
            is_defined = both_classes if name != "pixel_aupimo" else 0 < label.sum() < 3  # it takes a good image
            assert 0.0 <= result[name] <= 1.0 if is_defined else np.isnan(result[name])
    for x, y in metrics.curves().values():
        assert len(x) == len(y) <= 500
        assert x[0] == y[0] == 0.0
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) >= 0).all()
        assert y[-1] <= 1.0


def test_input_kinds_and_sizes_are_equal():
    images = make_images()
    images["anomaly_map"] = images["anomaly_map"].astype(np.float16).astype(np.float32)
    expected = evaluate(images)
    tensors = {name: torch.from_numpy(value) for name, value in images.items()}
    tensors["anomaly_map"] = tensors["anomaly_map"].half().requires_grad_()
    tensors["mask"] = tensors["mask"].float()
    assert_equal(evaluate(tensors), expected)
    lists = {"anomaly_score": images["anomaly_score"].tolist(), "label": images["label"].astype(int).tolist()}
    assert_equal(evaluate({**images, "anomaly_map": images["anomaly_map"].astype(np.float64), **lists}), expected)
    bfloat = evaluate({**tensors, "anomaly_map": tensors["anomaly_map"].detach().bfloat16()})
    assert_equal(bfloat, expected, 0.02)

    wide = take(images, slice(0, 3))
    wide = {**wide, "anomaly_map": wide["anomaly_map"].reshape(3, 24, 96)}
    wide["mask"] = np.zeros((3, 24, 96), bool)
    wide["label"] = [1, 1, 1]
    scores = torch.from_numpy(np.concatenate([i["anomaly_map"].ravel() for i in (wide, images)]))
    labels = torch.from_numpy(np.concatenate([i["mask"].ravel() for i in (wide, images)])).long()
    auroc = float(binary_auroc(scores.double().sigmoid(), labels))
    assert evaluate(wide, images)["pixel_auroc"] == pytest.approx(auroc, abs=1e-6)


def test_the_callers_arrays_are_copied():
    images = make_images()
    expected = evaluate(images)
    metrics = AnomalyMetrics()
    metrics.update(**images)
    for value in images.values():
        value[:] = 0
    assert_equal(metrics.compute(), expected)


# ------------------------------------------------------------------------------------------ edge cases


def test_constant_maps_are_chance():
    images = make_images()
    images["anomaly_map"] = np.full_like(images["anomaly_map"], 0.25)
    images["anomaly_score"] = np.ones(12)
    result = evaluate(images)
    assert result["image_auroc"] == result["pixel_auroc"] == 0.5
    assert result["image_ap"] == pytest.approx(8 / 12)
    prevalence = images["mask"].mean()
    assert result["pixel_ap"] == pytest.approx(prevalence)
    assert result["pixel_f1max"] == pytest.approx(2 * prevalence / (1 + prevalence))
    assert result["pixel_pro"] == pytest.approx(0.15)  # the diagonal, up to 0.3


def test_perfect_and_inverted_maps():
    images = make_images()
    images["anomaly_map"] = images["mask"].astype(np.float32)
    images["anomaly_score"] = images["label"].astype(np.float32)
    assert_equal(evaluate(images), dict.fromkeys(KEYS, 1.0))
    inverted = evaluate({**images, "anomaly_map": -images["anomaly_map"], "anomaly_score": -1.0 * images["label"]})
    assert inverted["pixel_auroc"] == inverted["image_auroc"] == inverted["pixel_pro"] == 0.0


@pytest.mark.parametrize("num_bins", [512, 2**18])
def test_infinities_are_above_and_below_everything(num_bins: int):
    images = make_images()
    largest = np.finfo(np.float32).max
    maps = images["anomaly_map"] = np.clip(images["anomaly_map"], -3, 3) * np.float32(1e38)
    with_infinities = maps.copy()
    with_infinities[1, 0, :8], with_infinities[2, 0, :8] = np.inf, -np.inf  # normal pixels
    finite = maps / 2
    finite[1, 0, :8], finite[2, 0, :8] = largest, -largest
    assert not images["mask"][1:3, 0].any()
    result = evaluate({**images, "anomaly_map": with_infinities}, num_bins=num_bins)
    exact = evaluate({**images, "anomaly_map": finite}, num_bins=2**18)
    assert_equal(result, exact, 1e-12 if num_bins > maps.size else 0.02)


def test_negative_zero_ties_with_zero():
    images = {"anomaly_map": np.float32([[[0.0, -0.0]]]), "mask": [[[0, 1]]]}
    assert evaluate(images)["pixel_auroc"] == 0.5


@pytest.mark.parametrize("defective", [False, True])
def test_one_class_only_is_nan(defective: bool):
    images = make_images()
    images["mask"] = np.full(images["mask"].shape, defective)
    images["label"] = np.full(12, defective)
    metrics = AnomalyMetrics()
    metrics.update(**images)
    assert_equal(metrics.compute(), dict.fromkeys(KEYS, np.nan))
    assert metrics.curves() == {}


def test_without_masks_only_image_metrics():
    images = make_images()
    expected = evaluate(images)
    for left_out in (["mask"], ["anomaly_map"], ["mask", "anomaly_map"]):
        metrics = AnomalyMetrics()
        metrics.update(**{name: value for name, value in images.items() if name not in left_out})
        assert_equal(metrics.compute(), {k: v if k.startswith("image") else np.nan for k, v in expected.items()})
        assert list(metrics.curves()) == ["image_roc"]
    pixels_only = evaluate({"anomaly_map": images["anomaly_map"], "mask": images["mask"]})
    assert_equal(pixels_only, {k: v if k.startswith("pixel") else np.nan for k, v in expected.items()})


def test_one_image():
    result = evaluate(take(make_images(), [1]))
    assert 0.5 < result["pixel_auroc"] < 1.0
    assert np.isnan(result["image_auroc"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        AnomalyMetrics().compute()
    with pytest.raises(ValueError, match="no images"):
        evaluate(take(make_images(), slice(0, 0)))


def test_curves_follow_the_metrics():
    images = make_images(size=128)
    metrics = AnomalyMetrics()
    metrics.update(**images)
    result, curves = metrics.compute(), metrics.curves()
    assert list(curves) == ["image_roc", "pixel_roc", "pro"]
    for name, key, limit in (
        ("image_roc", "image_auroc", 1.0),
        ("pixel_roc", "pixel_auroc", 1.0),
        ("pro", "pixel_pro", 0.3),
    ):
        x, y = curves[name]
        assert x[-1] == limit
        area = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit
        assert area == pytest.approx(result[key], abs=1e-4)
    assert len(curves["pixel_roc"][0]) > 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly_map": np.full((12, 48, 48), np.nan)}, r"`anomaly_map` holds NaN.*\[0, 1, 2"),
        ({"anomaly_score": np.r_[np.zeros(5), np.nan, np.zeros(6)]}, r"`anomaly_score` holds NaN.*\[5\]"),
        ({"anomaly_map": np.zeros((12, 40, 48))}, r"`mask` has shape \(12, 48, 48\), `anomaly_map` \(12, 40, 48\)"),
        ({"anomaly_map": np.zeros((48, 48))}, r"`anomaly_map` must be numbers of shape \(N, H, W\)"),
        ({"anomaly_map": np.zeros((12, 0, 48))}, "`anomaly_map` of shape .* has no pixels"),
        ({"anomaly_map": [[[0.0], [0.0, 1.0]]]}, r"`anomaly_map` must have shape \(N, H, W\)"),
        ({"mask": np.full((12, 48, 48), 255)}, "`mask` must hold only 0 and 1, but holds 255"),
        ({"mask": np.zeros((12, 1, 48, 48))}, "`mask` must be numbers of shape"),
        ({"label": np.zeros(12)}, r"`label` is 0 \(good\), but `mask` has defective pixels.*\[1, 2, 4"),
        ({"label": np.full(12, 2)}, "`label` must hold only 0 and 1, but holds 2"),
        ({"label": ["good"] * 12}, "`label` must be numbers"),
        ({"label": None}, "`label` must come with `anomaly_score`"),
        ({"anomaly_score": 0.5}, r"`anomaly_score` must be numbers of shape \(N,\)"),
        ({"anomaly_score": np.zeros(11)}, "same number of images, but have .*'anomaly_score': 11"),
        ({"anomaly_score": None, "label": None, "mask": None}, "Nothing to count"),
        ({"anomaly_score": None, "anomaly_map": None}, "Nothing to count"),
    ],
)
def test_wrong_input_is_named_and_adds_nothing(change: dict, message: str):
    images = make_images()
    metrics = AnomalyMetrics()
    metrics.update(**images)
    with pytest.raises(ValueError, match=message):
        metrics.update(**{**images, **change})
    assert_equal(metrics.compute(), evaluate(images))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"pro_fpr_limit": 0.0}, "pro_fpr_limit"),
        ({"pro_fpr_limit": 1.5}, "pro_fpr_limit"),
        ({"num_bins": 100}, "num_bins"),
    ],
)
def test_wrong_settings(arguments: dict, name: str):
    with pytest.raises(ValueError, match=f"`{name}`"):
        AnomalyMetrics(**arguments)


def test_merging_different_settings_is_an_error():
    with pytest.raises(ValueError, match=r"`pro_fpr_limit` 0.3, but this metric has 0.1"):
        AnomalyMetrics(pro_fpr_limit=0.1).merge_state(AnomalyMetrics())
    with pytest.raises(ValueError, match="`num_bins` 512, but this metric has 262144"):
        AnomalyMetrics().merge_state(AnomalyMetrics(num_bins=512))


def test_a_tables_category_keeps_to_its_cell():
    table = markdown_table({"left|right": {"image_auroc": 0.5}})
    assert table.splitlines()[-1] == r"| left\|right | 50.0 |"
