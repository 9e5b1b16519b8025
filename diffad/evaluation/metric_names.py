"""Names of metrics and baselines, in reports, in tables and on the Hub."""

from __future__ import annotations

from collections.abc import Iterable

# report's name: (task on the Hub, metric on the Hub, title), in the order of the papers' tables
METRICS = {
    "image_auroc": ("image-classification", "roc_auc", "image AUROC"),
    "image_ap": ("image-classification", "average_precision", "image AP"),
    "image_f1max": ("image-classification", "f1", "image F1-max"),
    "pixel_auroc": ("image-segmentation", "roc_auc", "pixel AUROC"),
    "pixel_ap": ("image-segmentation", "average_precision", "pixel AP"),
    "pixel_f1max": ("image-segmentation", "f1", "pixel F1-max"),
    "pixel_pro": ("image-segmentation", "per_region_overlap", "PRO"),
    "pixel_aupimo": ("image-segmentation", "per_image_overlap", "AUPIMO"),
    "pixel_spro": ("image-segmentation", "saturated_per_region_overlap", "sPRO"),
    "pixel_segf1": ("image-segmentation", "f1", "SegF1"),
    "pixel_dice": ("image-segmentation", "dice", "DICE"),
    "false_alarms": ("image-classification", "false_positive_rate", "false alarms"),
    "defects_found": ("image-classification", "recall", "defects found"),
}

# what users would take otherwise: a report's name, title in tables
BASELINE_TITLES = {"padim": "PaDiM", "ddpm": "plain DDPM"}
COUNTS = {"good_images": "good", "defective_images": "defective"}
MEAN = "mean"  # over the categories

# the order of the papers' tables; DICE and the rates at the threshold are no columns there
METRIC_TITLES = {name: METRICS[name][2] for name in METRICS if name.split("_")[0] in ("image", "pixel")}
del METRIC_TITLES["pixel_dice"]


def check_category_names(names: Iterable[str]) -> None:
    """Raises a ValueError where a category has the name that the mean over all has in reports."""
    if MEAN in names:
        raise ValueError(
            f"A category is named {MEAN!r}, as the mean over all is in reports. Rename it in the data set."
        )
