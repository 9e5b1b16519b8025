"""AUPIMO, sPRO and SegF1 against anomalib's numbers and against their definitions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import texture, textures, tiny_pipeline, write_folder, write_png

from diffad.data import load_anomaly_dataset
from diffad.data.saturation import read_defects
from diffad.evaluation.detectors import evaluate_category
from diffad.evaluation.metrics import AnomalyMetrics

FIXTURES = Path(__file__).parents[1] / "fixtures"


def many_images(seed: int, shift: float, good: int = 52, bad: int = 8, size: int = 256) -> tuple:
    """Noise, with brighter squares on the last images; enough pixels for rates of one in a hundred thousand."""
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((good + bad, size, size), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    for i in range(good, good + bad):
        for _ in range(1 + i % 3):
            top, left, height, width = rng.integers(1, size // 3, 4)
            masks[i, top : top + height, left : left + width] = True
    maps[masks] += shift
    return maps, masks


def few_images() -> tuple[np.ndarray, list[list[tuple[np.ndarray, float]]]]:
    """Maps (6, 20, 20) with ties, and defects that overlap and lie in several places."""
    rng = np.random.default_rng(3)
    maps = np.round(rng.standard_normal((6, 20, 20)) * 3).astype(np.float32) / 3
    defects = []
    for i in range(6):
        own = []
        for number in range(i % 3):
            mask = np.zeros((20, 20), bool)
            mask[2 * number : 7, 3:9] = True
            mask[15:17, 15:18] = True
            own.append((mask, (1.0, 0.4, 0.01)[(i + number) % 3]))
            maps[i][mask] += 1.0
        defects.append(own)
    return maps, defects


def union(defects: list[list[tuple[np.ndarray, float]]]) -> np.ndarray:
    return np.stack([np.any([mask for mask, _ in own] or [np.zeros((20, 20), bool)], axis=0) for own in defects])


def brute_force_spro(maps: np.ndarray, defects: list, fpr_limit: float) -> float:
    """As the definition reads: at each threshold the overlap of each defect, over its saturation area, at most 1."""
    masks = union(defects)
    pairs = [(maps[i][mask], max(1, round(share * mask.sum()))) for i, own in enumerate(defects) for mask, share in own]
    fpr, spro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        fpr.append(np.mean(maps[~masks] >= threshold))
        spro.append(np.mean([min(np.sum(scores >= threshold) / area, 1.0) for scores, area in pairs]))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(fpr, spro, strict=True)):
        if x0 >= fpr_limit:
            break
        end = min(x1, fpr_limit)
        y_end = y1 if x1 == x0 else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / fpr_limit


@pytest.mark.parametrize("case", json.loads((FIXTURES / "aupimo.json").read_text())["cases"])
def test_aupimo_is_anomalibs(case):
    maps, masks = many_images(case["seed"], case["shift"])
    metrics = AnomalyMetrics()
    for start in range(0, len(maps), 20):
        metrics.update(anomaly_map=maps[start : start + 20], mask=masks[start : start + 20])
    # anomalib's thresholds are a grid, of 3000 points in this range, and its curves lines between them
    assert metrics.compute()["pixel_aupimo"] == pytest.approx(case["aupimo"], abs=1e-3)


def test_aupimo_takes_good_images_and_a_defect():
    maps, masks = np.random.default_rng(0).random((2, 4, 4)), np.zeros((2, 4, 4), bool)
    metrics = AnomalyMetrics()
    masks[:, 0] = True
    metrics.update(anomaly_map=maps, mask=masks)
    assert np.isnan(metrics.compute()["pixel_aupimo"])
    metrics.update(anomaly_map=maps - 1.0, label=[0, 0])
    assert metrics.compute()["pixel_aupimo"] == 1.0  # every defective pixel is above all of good images


def test_spro_is_its_definition(monkeypatch):
    maps, defects = few_images()
    for limit in (0.05, 0.3, 1.0):
        monkeypatch.setattr("diffad.evaluation.metrics.SPRO_FPR_LIMIT", limit)
        metrics = AnomalyMetrics()
        for i in range(0, 6, 2):
            metrics.update(anomaly_map=maps[i : i + 2], mask=union(defects)[i : i + 2], defects=defects[i : i + 2])
        assert metrics.compute()["pixel_spro"] == pytest.approx(brute_force_spro(maps, defects, limit), abs=1e-9)


@pytest.mark.parametrize(
    "defect",
    [
        (np.ones((4, 5), bool), 0.5),
        (np.ones((4, 4), np.uint8), 0.5),  # which NumPy would take for rows
        (np.ones((4, 4), bool), 0.0),
        (np.ones((4, 4), bool), 1.5),
        (np.ones((4, 4), bool), float("nan")),
    ],
)
def test_wrong_defects_are_named_and_nothing_is_added(defect):
    metrics = AnomalyMetrics()
    masks = np.ones((1, 4, 4), bool)
    with pytest.raises(ValueError, match=r"`defects\[0\]` must hold masks \(4, 4\) of bool, each with a share in"):
        metrics.update(anomaly_map=np.ones((1, 4, 4)), mask=masks, anomaly_score=[1], label=[1], defects=[[defect]])
    with pytest.raises(ValueError, match="no images"):
        metrics.compute()


def test_spro_of_defects_that_count_in_full_is_pro_and_a_part_suffices():
    maps, masks = np.zeros((2, 10, 10), np.float32), np.zeros((2, 10, 10), bool)
    masks[0, 2:6, 2:6] = True
    maps[0, 2:4, 2:6] = 1.0  # half of it
    spro = {}
    for share in (1.0, 0.5):
        metrics = AnomalyMetrics(pro_fpr_limit=0.05)
        metrics.update(anomaly_map=maps, mask=masks, defects=[[(masks[0], share)], None])
        result = metrics.compute()
        spro[share] = result["pixel_spro"]
    assert spro[1.0] == pytest.approx(result["pixel_pro"])
    assert spro[0.5] == pytest.approx(1.0)
    assert spro[1.0] < 0.6


def test_segf1_is_that_of_all_pixels_together():
    rng = np.random.default_rng(0)
    maps, masks, predicted = rng.random((6, 9, 9)), rng.random((6, 9, 9)) > 0.7, rng.random((6, 9, 9)) > 0.5
    first, second = AnomalyMetrics(), AnomalyMetrics()
    first.update(anomaly_map=maps[:2], mask=masks[:2], predicted_mask=predicted[:2])
    second.update(anomaly_map=maps[2:], mask=masks[2:], predicted_mask=predicted[2:])
    first.merge_state(second)
    precision, recall = (masks & predicted).sum() / predicted.sum(), (masks & predicted).sum() / masks.sum()
    assert first.compute()["pixel_segf1"] == pytest.approx(2 * precision * recall / (precision + recall))
    alone = AnomalyMetrics()
    alone.update(anomaly_map=maps, mask=masks)
    assert not {"pixel_segf1", "pixel_spro"} & set(alone.compute())
    alone.reset()
    alone.update(anomaly_map=maps, mask=np.zeros_like(masks), predicted_mask=predicted)  # none had a chance to be found
    assert "pixel_segf1" not in alone.compute()
    with pytest.raises(ValueError, match="`predicted_mask` has shape"):
        alone.update(anomaly_map=maps, mask=masks, predicted_mask=predicted[:, 1:])
    with pytest.raises(ValueError, match="come with `anomaly_map` and `mask`"):
        alone.update(anomaly_map=maps, label=np.ones(6), predicted_mask=predicted)


def test_nothing_of_the_new_metrics_grows_with_the_images():
    maps, defects = few_images()
    metrics = AnomalyMetrics(num_bins=512)
    sizes = []
    for _ in range(60):
        metrics.update(anomaly_map=maps, mask=union(defects), defects=defects, predicted_mask=union(defects))
        held = (metrics.good_scores, metrics.saturated_scores, metrics.defective_areas, metrics.saturation_areas)
        sizes.append(sum(tensor.numel() for one in held for tensor in one))
    assert max(sizes[30:]) <= max(sizes[:30])
    assert 0.0 < metrics.compute()["pixel_spro"] < 1.0


@pytest.fixture
def loco(tmp_path: Path) -> Path:
    """A data set whose masks are files for each defect, with a list of how much of each must be found."""
    category = tmp_path / "pushpins"
    write_folder(category / "train" / "good", 4)
    write_folder(category / "test" / "good", 3, first_seed=50)
    for i in range(3):
        write_png(category / "test" / "logical_anomalies" / f"{i:03}.png", texture(70 + i, defect=True))
        for number, value in enumerate((255, 254)):
            mask = np.zeros((16, 16), np.uint8)
            mask[4 * number : 4 * number + 8, 2:7] = value
            write_png(category / "ground_truth" / "logical_anomalies" / f"{i:03}" / f"{number:03}.png", mask)
    entries = [
        {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 10, "relative_saturation": False},
        {"defect_name": "cut", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
    ]
    (category / "defects_config.json").write_text(json.dumps(entries), encoding="utf-8-sig")
    return category


def test_saturation_areas_are_read_as_published(loco: Path):
    folder = loco / "ground_truth" / "logical_anomalies" / "000"
    (first, share), (second, other_share) = read_defects(folder, (32, 32))
    assert (share, other_share) == (10 / 40, 0.5)
    assert (first.sum(), second.sum()) == (160, 160)  # twice the size
    write_png(folder / "002.png", np.full((16, 16), 7, np.uint8))
    with pytest.raises(ValueError, match=r"002\.png holds the value 7, which is not in .*defects_config\.json"):
        read_defects(folder, (32, 32))
    (loco / "defects_config.json").write_text('{"pixel_value": 255}')
    with pytest.raises(ValueError, match=r"defects_config\.json is not as expected"):
        read_defects(folder, (32, 32))
    (loco / "defects_config.json").unlink()
    assert read_defects(folder, (32, 32)) is None


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_evaluation_has_what_the_data_set_and_the_detector_say(loco: Path):
    pipeline = tiny_pipeline()
    test, accelerator = load_anomaly_dataset(loco, "test"), Accelerator(cpu=True)
    raw = evaluate_category(pipeline, test, "pushpins", accelerator, resolution=16).result
    assert 0.0 < raw["pixel_spro"] <= 1.0
    assert "pixel_segf1" not in raw  # no threshold, no masks
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    result = evaluate_category(pipeline, test, "pushpins", accelerator, resolution=16, batch_size=4).result
    assert 0.0 <= result["pixel_segf1"] <= result["pixel_f1max"]
    (loco / "defects_config.json").unlink()
    assert "pixel_spro" not in evaluate_category(pipeline, test, "pushpins", accelerator, resolution=16).result
