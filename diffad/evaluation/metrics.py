"""The field's metrics for anomaly detection and localisation, in one streaming torchmetrics metric.

AUROC and average precision (AP) at image and pixel level; F1-max, the best F1 over all thresholds (Zou et
al., "SPot-the-Difference Self-supervised Pre-training for Anomaly Detection and Segmentation", ECCV 2022);
PRO, the per-region overlap (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2);
AUPIMO, the overlap per image at very low false-positive rates (Bertoldo et al., BMVC 2024); DICE at the best
threshold. Where they are asked for: sPRO, the overlap with defects of which a part suffices (Bergmann et al., "Beyond
Dents and Scratches", IJCV 2022, section 5.1); SegF1, the F1 of masks at a threshold that no test image has set
(Heckler-Kram et al., "The MVTec AD 2 Dataset", 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from diffad.evaluation.score_histogram import (
    EMPTY,
    PER_REGION,
    SATURATED,
    Histogram,
    count_scores,
    curve,
    is_ranked,
    merge,
    merge_packed,
    pack,
    per_image_overlap,
    per_region_overlap,
    ranking_metrics,
    thin,
    unpack,
    up_to,
)
from diffad.installation import needs_extra

with needs_extra("evaluate"):
    from torchmetrics import Metric

# The pixel buffer is folded into the histogram when it holds this many pixels per bin. Fewer, larger folds
# spend less time on merging the bins.
_BUFFERED_PIXELS_PER_BIN = 4

SPRO_FPR_LIMIT = 0.05  # as MVTec LOCO's tables
AUPIMO_BOUNDS = (1e-5, 1e-4)  # of false-positive rates, as the paper's


_DEFECTIVE_STATES = ("defective_scores", "region_areas", "defective_areas")


class AnomalyMetrics(Metric):
    """AUROC, AP, F1-max, PRO, AUPIMO and DICE of anomaly maps and image scores; sPRO and SegF1 where asked for.

    ```python
    metrics = AnomalyMetrics()
    for batch in loader:
        out = pipe(batch["image"])
        metrics.update(
            anomaly_map=out.anomaly_map,
            mask=batch["mask"],
            anomaly_score=out.anomaly_score,
            label=batch["label"],
        )
    metrics.compute()  # {"image_auroc": 0.97, ...}
    ```

    Pixel metrics stream: their memory does not grow with the number of images. Of each image, its score and
    label are kept. Scores are compared as float32. It works as any torchmetrics metric: it synchronises over
    processes, merges with `merge_state`, moves with `.to(device)`. Maps may be on any device; counting is
    done on the CPU.

    Args:
        pro_fpr_limit: PRO is integrated over false-positive rates from 0 to this, in (0, 1].
        num_bins: how many distinct pixel scores to hold without dropping bits, at least 512. Results are exact
            until there are more.
        kwargs: torchmetrics' own, such as `process_group`.

    Raises:
        ValueError: an argument is out of range.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    image_scores: list[torch.Tensor]
    image_labels: list[torch.Tensor]
    pixel_scores: list[torch.Tensor]
    defective_scores: list[torch.Tensor]
    region_areas: list[torch.Tensor]
    defective_areas: list[torch.Tensor]
    good_scores: list[torch.Tensor]
    saturated_scores: list[torch.Tensor]
    saturation_areas: list[torch.Tensor]
    segmented_pixels: torch.Tensor
    num_buffered_pixels: torch.Tensor
    pixel_histogram: torch.Tensor

    def __init__(self, pro_fpr_limit: float = 0.3, num_bins: int = 2**18, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 < pro_fpr_limit <= 1.0:
            raise ValueError(f"`pro_fpr_limit` must lie in (0, 1], but is {pro_fpr_limit}.")
        # below 512 bins a float's mantissa may go altogether, and infinity falls in with finite scores
        if num_bins < 512:
            raise ValueError(f"`num_bins` must be at least 512, but is {num_bins}.")
        self.pro_fpr_limit = float(pro_fpr_limit)
        self.num_bins = num_bins

        # Lists are float32 throughout: it is what torchmetrics sends for a process that has seen no image.
        self.add_state("image_scores", default=[], dist_reduce_fx="cat")
        self.add_state("image_labels", default=[], dist_reduce_fx="cat")
        # Pixels not yet in the histogram: all; the defective ones again, with the areas of their region and of all
        # defects of their image; those of images without a defect again; those that count in sPRO again.
        for name in (*_DEFECTIVE_STATES, "pixel_scores", "good_scores", "saturated_scores", "saturation_areas"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # of predicted masks: pixels that are defective and in them, pixels in them, defective pixels
        self.add_state("segmented_pixels", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_buffered_pixels", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pixel_histogram", default=pack(EMPTY, num_bins), dist_reduce_fx=merge_packed)

    def update(
        self,
        *,
        anomaly_map: torch.Tensor | np.ndarray | None = None,
        mask: torch.Tensor | np.ndarray | None = None,
        anomaly_score: torch.Tensor | np.ndarray | Sequence[float] | None = None,
        label: torch.Tensor | np.ndarray | Sequence[int] | None = None,
        predicted_mask: torch.Tensor | np.ndarray | None = None,
        defects: Sequence[Sequence[tuple[np.ndarray, float]] | None] | None = None,
        region: torch.Tensor | np.ndarray | None = None,
    ) -> None:
        """Adds N images.

        Args:
            anomaly_map: (N, H, W), higher is more anomalous, infinities allowed. H and W may change between
                updates. None leaves these images out of the pixel metrics.
            mask: (N, H, W), true or 1 at defective pixels. None: good images (label 0) count as normal pixels
                throughout, defective ones are left out of the pixel metrics. A defective image may have an
                empty mask; its pixels are normal then.
            anomaly_score: (N,), higher is more anomalous. None leaves these images out of the image metrics.
            label: (N,), 1 for defective images, 0 for good ones. Needed with `anomaly_score`, and for maps
                without `mask`.
            predicted_mask: (N, H, W), true or 1 where a detector outlines a defect, for SegF1; with `mask`.
            defects: for sPRO, of each image its defects, which may overlap: a mask (H, W) bool and the share of its
                pixels, in (0, 1], from which on it counts as found in full. None for an image without. With `mask`.
            region: of interest, (H, W), true or 1 where pixels of these images count in the pixel metrics; None where
                all do. Of a defect, what is inside counts; a defective image without any counts as good pixels. With
                `anomaly_map`.

        Raises:
            ValueError: a shape does not fit the others, a value is NaN, `mask` or `label` holds something
                other than 0 and 1, a good image has defective pixels, or there is nothing to count. Nothing
                is added then.
        """
        maps = None if anomaly_map is None else _as_float32(anomaly_map, "anomaly_map", "(N, H, W)")
        scores = None if anomaly_score is None else _as_float32(anomaly_score, "anomaly_score", "(N,)")
        labels = None if label is None else _as_bool(label, "label", "(N,)")
        masks = None if mask is None else _as_bool(mask, "mask", "(N, H, W)")
        predicted = None if predicted_mask is None else _as_bool(predicted_mask, "predicted_mask", "(N, H, W)")
        if scores is None and (maps is None or (masks is None and labels is None)):
            raise ValueError(
                "Nothing to count: give `anomaly_score` and `label`, or `anomaly_map` and `mask` or `label`."
            )
        if scores is not None and labels is None:
            raise ValueError("`label` must come with `anomaly_score`: 1 for defective images, 0 for good.")
        if maps is not None and masks is not None and maps.shape != masks.shape:
            raise ValueError(
                f"`mask` has shape {masks.shape}, `anomaly_map` {maps.shape}: resize one to fit the other."
            )
        if (predicted is not None or defects is not None) and (maps is None or masks is None):
            raise ValueError("`predicted_mask` and `defects` come with `anomaly_map` and `mask`.")
        if predicted is not None and masks is not None and predicted.shape != masks.shape:
            raise ValueError(f"`predicted_mask` has shape {predicted.shape}, `mask` {masks.shape}: resize one.")
        given: dict[str, Any] = {"anomaly_map": maps, "mask": masks, "anomaly_score": scores, "label": labels}
        given |= {"predicted_mask": predicted, "defects": defects}
        if defects is not None and masks is not None:
            _check_defects(defects, masks.shape[1:])
        lengths = {name: len(value) for name, value in given.items() if value is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All arguments must hold the same number of images, but have {lengths}.")
        if masks is not None and labels is not None:
            wrong = np.flatnonzero(masks.any(axis=(1, 2)) & ~labels)
            if wrong.size:
                raise ValueError(
                    "`label` is 0 (good), but `mask` has defective pixels, for images "
                    f"{wrong.tolist()} of this update. Correct one of them."
                )

        inside = None if region is None else _as_bool(region, "region", "(H, W)")
        if inside is not None:
            if maps is None or maps.shape[1:] != inside.shape or not inside.any():
                raise ValueError(
                    f"`region` has shape {inside.shape} and {int(inside.sum())} pixels that count. It comes with an "
                    "`anomaly_map` of that height and width, and some pixels must count."
                )
            masks = None if masks is None else masks & inside
            predicted = None if predicted is None else predicted & inside

        if scores is not None and labels is not None:
            self.image_scores.append(self._to_state(scores))
            self.image_labels.append(self._to_state(labels))
        if maps is None:
            return
        if predicted is not None and masks is not None:
            counts = [(predicted & masks).sum(), predicted.sum(), masks.sum()]
            self.segmented_pixels = self.segmented_pixels + torch.tensor(counts, dtype=torch.float64).to(self.device)
        for i, scores_at in enumerate(maps):  # (H, W)
            if masks is not None:
                self._add_defects(scores_at, (defects[i] if defects is not None else None) or (), inside)
                self._add_pixels(scores_at, masks[i], inside)
            elif labels is not None and not labels[i]:
                self._add_pixels(scores_at, np.zeros(scores_at.shape, bool), inside)

    def compute(self) -> dict[str, float]:
        """All metrics over the images seen so far, as fractions in [0, 1].

        Returns:
            `image_auroc`, `image_ap`, `image_f1max`, `pixel_auroc`, `pixel_ap`, `pixel_f1max`, `pixel_pro`,
            `pixel_aupimo`, `pixel_dice`; always these keys. Without at least one defective and one normal example there
            is nothing to rank, and a level's metrics are NaN: the pixel metrics, say, if no mask was ever given. AUPIMO
            takes an image without a defect, too. `pixel_spro`, up to a false-positive rate of 5%, where `defects` were
            given, and `pixel_segf1` where predicted masks were, and a defect in the masks.
            `pixel_dice` equals `pixel_f1max`: it is the DICE of all pixels together at the best threshold, as
            the medical literature gives it.

        Raises:
            ValueError: no image has been added.
        """
        image, pixel = self._image_histogram(), self._pixel_histogram()
        if not image.keys.size and not pixel.keys.size:
            raise ValueError("There are no images to compute metrics of: call `update` first.")
        result: dict[str, float] = {}
        for level, histogram in (("image", image), ("pixel", pixel)):
            auroc, ap, f1max = ranking_metrics(histogram)
            result |= {f"{level}_auroc": auroc, f"{level}_ap": ap, f"{level}_f1max": f1max}
        result["pixel_pro"] = per_region_overlap(pixel, self.pro_fpr_limit)
        result["pixel_aupimo"] = per_image_overlap(pixel, AUPIMO_BOUNDS)
        result["pixel_dice"] = result["pixel_f1max"]
        if pixel.counts[SATURATED].any():
            result["pixel_spro"] = per_region_overlap(pixel, SPRO_FPR_LIMIT, SATURATED)
        found, outlined, defective = self.segmented_pixels.tolist()
        if defective > 0:
            result["pixel_segf1"] = 2.0 * found / (outlined + defective)
        return result

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Curves for plots, each thinned to at most 500 points.

        Returns:
            `image_roc` and `pixel_roc`: false- and true-positive rate. `pro`: false-positive rate up to
            `pro_fpr_limit`, and per-region overlap. Each is a pair of non-decreasing float64 arrays that
            begins at (0, 0). A curve that is not defined (see `compute`) is left out.
        """
        to_sync = self._to_sync and not self._is_synced
        with self.sync_context(self.dist_sync_fn, should_sync=to_sync, should_unsync=to_sync):
            image, pixel = self._image_histogram(), self._pixel_histogram()
        result = {}
        if is_ranked(image):
            result["image_roc"] = thin(*curve(image))
        if is_ranked(pixel):
            result["pixel_roc"] = thin(*curve(pixel))
            result["pro"] = thin(*up_to(self.pro_fpr_limit, *curve(pixel, PER_REGION)))
        return result

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds the images of another `AnomalyMetrics` with the same `num_bins` and `pro_fpr_limit`."""
        for name in ("num_bins", "pro_fpr_limit") if isinstance(incoming_state, AnomalyMetrics) else ():
            other, own = getattr(incoming_state, name), getattr(self, name)
            if other != own:
                raise ValueError(f"`incoming_state` has `{name}` {other}, but this metric has {own}.")
        super().merge_state(incoming_state)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # Also the last step of `forward`, which starts each batch from empty lists: without folding here the
        # lists would grow with every batch.
        super()._reduce_states(incoming_state)
        self._computed = None
        self._fold_if_full()

    def _to_state(self, values: np.ndarray) -> torch.Tensor:
        """A flat float32 copy on the metric's device: callers may write to their array again."""
        return torch.from_numpy(values.ravel().astype(np.float32)).to(self.device)

    def _add_pixels(self, scores: np.ndarray, mask: np.ndarray, inside: np.ndarray | None) -> None:
        """Adds an image's pixels (H, W), of which those inside count; the mask has no others."""
        defective, counted = scores[mask], scores if inside is None else scores[inside]
        self.pixel_scores.append(self._to_state(counted))
        self.num_buffered_pixels = self.num_buffered_pixels + counted.size
        if defective.size:
            # 8-connected, as in MVTec's evaluation
            regions = ndimage.label(mask, structure=np.ones((3, 3)))[0][mask]
            self.defective_scores.append(self._to_state(defective))
            self.region_areas.append(self._to_state(np.bincount(regions)[regions]))
            self.defective_areas.append(self._to_state(np.full(defective.size, defective.size)))
        else:
            self.good_scores.append(self._to_state(counted))
        self._fold_if_full()

    def _add_defects(
        self, scores: np.ndarray, defects: Sequence[tuple[np.ndarray, float]], inside: np.ndarray | None
    ) -> None:
        """As the threshold falls, a defect's overlap rises by one over its saturation area for each pixel, and stops at
        1: so its highest pixels count, as many as that area, and the others do not.
        """
        for mask, share in defects:
            own = scores[mask if inside is None else mask & inside]
            if own.size:
                area = min(own.size, max(1, round(share * int(mask.sum()))))
                self.saturated_scores.append(self._to_state(np.partition(own, -area)[-area:]))
                self.saturation_areas.append(self._to_state(np.full(area, area)))

    def _fold_if_full(self) -> None:
        if self.num_buffered_pixels < _BUFFERED_PIXELS_PER_BIN * self.num_bins:
            return
        self.pixel_histogram = pack(self._pixel_histogram(), self.num_bins).to(self.device)
        self.pixel_scores, self.good_scores, self.saturated_scores, self.saturation_areas = [], [], [], []
        self.defective_scores, self.region_areas, self.defective_areas = [], [], []
        self.num_buffered_pixels = torch.zeros_like(self.num_buffered_pixels)
        # one tensor an update would take far more memory than the number in it
        self.image_scores = [self._to_state(concatenate(self.image_scores))]
        self.image_labels = [self._to_state(concatenate(self.image_labels))]

    def _image_histogram(self) -> Histogram:
        scores, labels = concatenate(self.image_scores), concatenate(self.image_labels)
        return count_scores(scores, [(scores[labels > 0], None)])

    def _pixel_histogram(self) -> Histogram:
        folded = unpack(self.pixel_histogram)
        defective, saturated = concatenate(self.defective_scores), concatenate(self.saturated_scores)
        rows = [  # in the order of the histogram's
            (defective, None),
            (defective, _inverse(self.region_areas)),
            (defective, _inverse(self.defective_areas)),
            (concatenate(self.good_scores), None),
            (saturated, _inverse(self.saturation_areas)),
        ]
        buffered = count_scores(concatenate(self.pixel_scores), rows, folded.dropped_bits, self.num_bins)
        return merge([folded, buffered], self.num_bins) if folded.keys.size else buffered


def concatenate(state: torch.Tensor | list[torch.Tensor]) -> np.ndarray:
    """A list state as one array. Synchronised over processes, it is one tensor already."""
    tensors = [state] if isinstance(state, torch.Tensor) else state
    return np.concatenate([np.zeros(0, np.float32), *(tensor.numpy(force=True) for tensor in tensors)])


def _inverse(areas: torch.Tensor | list[torch.Tensor]) -> np.ndarray:
    return 1.0 / concatenate(areas).astype(np.float64)


def _as_array(value: Any, name: str, shape: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        # numpy has no bfloat16
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"`{name}` must have shape {shape}: {error}") from error
    if array.dtype.kind not in "biuf" or array.ndim != len(shape.split(", ")):
        raise ValueError(f"`{name}` must be numbers of shape {shape}, but is {array.dtype} of shape {array.shape}.")
    if array.size == 0 and len(array):
        raise ValueError(f"`{name}` of shape {array.shape} has no pixels.")
    return array


def _check_defects(defects: Sequence[Sequence[tuple[np.ndarray, float]] | None], shape: tuple[int, ...]) -> None:
    for i, of_image in enumerate(defects):
        for mask, share in of_image or ():
            if np.shape(mask) != shape or np.asarray(mask).dtype != bool or not 0.0 < share <= 1.0:
                raise ValueError(
                    f"`defects[{i}]` must hold masks {shape} of bool, each with a share in (0, 1], but holds "
                    f"{np.asarray(mask).dtype} of shape {np.shape(mask)} with {share}."
                )


def _as_float32(value: Any, name: str, shape: str) -> np.ndarray:
    array = _as_array(value, name, shape).astype(np.float32, copy=False)
    if array.size and np.isnan(array.min()):  # the minimum is NaN if any value is
        images = np.flatnonzero(np.isnan(array).reshape(len(array), -1).any(axis=1))
        raise ValueError(f"`{name}` holds NaN: images {images.tolist()} of this update.")
    return array


def _as_bool(value: Any, name: str, shape: str) -> np.ndarray:
    array = _as_array(value, name, shape)
    if array.dtype == bool:
        return array
    result = array != 0
    wrong = array[array != result]
    if wrong.size:
        raise ValueError(f"`{name}` must hold only 0 and 1, but holds {wrong[0]}. Pass `{name} > 0`.")
    return result
