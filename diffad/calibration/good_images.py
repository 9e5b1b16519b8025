"""What a model keeps of good images, so that it can learn more of them without the old files.

Means and covariances of features add up, whatever the order. What they cannot give (how far good images are from their
Gaussian, the patches to be near to, thresholds) comes from images that are kept, as the networks see them: at most K
for the statistics and K for the thresholds. A hash of an image's content says for which of both it is, and whether it
is kept. So it matters neither in which order images come nor in how many portions: the same images leave the same. An
image that comes again counts once, as the hashes of all are kept, 32 bytes each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.numpy import save_file

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.files import write_whole
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.moments import POSITIONS_AT_ONCE, FeatureMoments
from diffad.process_share import of_all_processes
from diffad.triangles import pack_triangle

NAME = "good_images-{}.safetensors"  # in a model's folder, with the digest of the calibration that it belongs to
FEWEST_KEPT = 3
LARGEST = 65535  # as finely is an image kept: no score could tell it from what the networks saw


class GoodImages:
    """Moments of the features of all good images, and some of the images themselves.

    Args:
        num_kept: K, the most images that are kept for the statistics, and again for the thresholds.
        held_out_share: of the images, for the thresholds, in (0, 1).
        moments: of the features (N, C, P), not standardised, of all images that are not held out; None at first.
        for_statistics, for_thresholds: the kept images, (3, R, R') uint16, by the SHA-256 of their bytes.
        seen: these hashes of all images; None takes those of the kept ones, as earlier versions know no others.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_kept: int,
        held_out_share: float = 0.2,
        moments: FeatureMoments | None = None,
        for_statistics: dict[bytes, np.ndarray] | None = None,
        for_thresholds: dict[bytes, np.ndarray] | None = None,
        seen: set[bytes] | None = None,
    ):
        if num_kept < FEWEST_KEPT:
            raise ValueError(
                f"`num_kept` must be at least {FEWEST_KEPT}, but is {num_kept}: of fewer, distances say nothing."
            )
        if not 0.0 < held_out_share < 1.0:
            raise ValueError(f"`held_out_share` must lie in (0, 1), but is {held_out_share}.")
        self.num_kept, self.held_out_share, self.moments = num_kept, held_out_share, moments
        self.for_statistics, self.for_thresholds = for_statistics or {}, for_thresholds or {}
        self.seen = {*self.for_statistics, *self.for_thresholds} if seen is None else seen
        self.num_known = 0  # of the images of the last call: those that had been seen before

    def keep(self, pixels: np.ndarray) -> tuple[bool, bool]:
        """Keeps an image, (3, R, R') uint16, or does not, as its hash says.

        Returns:
            Whether it is held out for the thresholds, and whether it had been seen before.
        """
        key = hashlib.sha256(pixels.tobytes()).digest()
        is_held_out = int.from_bytes(key[:8], "big") < self.held_out_share * 2**64
        kept = self.for_thresholds if is_held_out else self.for_statistics
        if key in self.seen:
            return is_held_out, True
        self.seen.add(key)
        kept[key] = pixels.copy()  # a batch's array would stay whole for one of its images
        if len(kept) > self.num_kept:
            del kept[max(kept)]
        return is_held_out, False

    def unite(self, accelerator: Accelerator | None, former: set[bytes]) -> None:
        """Makes of what each process has seen what one process would have that had seen all; None for one alone.

        Of an image that two of them have seen at once the features count twice: give no copies.

        Args:
            accelerator: whose processes have learned, each from images of its own. Moments from before are in those of
                the main process alone.
            former: the hashes of what all of them had seen before.
        """
        if accelerator is None or accelerator.num_processes == 1:
            return
        if self.moments is not None:
            self.moments.reduce(accelerator)
        self.seen.update(*of_all_processes(accelerator, self.seen - former))
        for kept in (self.for_thresholds, self.for_statistics):
            new = {key: pixels for key, pixels in kept.items() if key not in former}
            for one in of_all_processes(accelerator, new):
                kept |= one
            for key in sorted(kept)[self.num_kept :]:
                del kept[key]

    @property
    def num_seen(self) -> int:
        """How many images the statistics come from."""
        return 0 if self.moments is None else self.moments.count

    def save(self, folder: str | os.PathLike, digest: str) -> Path:
        """Writes a file into a model's folder, and returns its path.

        It takes 8 bytes for each number of a covariance, of which there are C (C + 1) / 2 at each position, and 6 for
        each pixel that is kept: 356 MB for 49 x 49 positions of 192 channels, and 0.3 MB for an image of 224 px. Of
        every image that was seen it has a hash of 32 bytes.
        """
        assert self.moments is not None
        path = Path(folder, NAME.format(digest))
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"total": self.moments.total.cpu().numpy(), "products": pack_products(self.moments)}
        for name, kept in (("statistics", self.for_statistics), ("thresholds", self.for_thresholds)):
            keys = sorted(kept)
            tensors[f"{name}_keys"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
            tensors[f"{name}_pixels"] = np.stack([kept[key] for key in keys])
        tensors["seen_keys"] = np.frombuffer(b"".join(sorted(self.seen)), np.uint8).reshape(-1, 32)
        record = {"num_kept": self.num_kept, "held_out_share": self.held_out_share, "count": self.moments.count}
        with write_whole(path) as unfinished:
            save_file(tensors, unfinished, {"diffad": json.dumps(record)})
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike, digest: str, device: torch.device | str = "cpu") -> GoodImages:
        """What `save` wrote with the same digest.

        Raises:
            FileNotFoundError: the model keeps nothing, or was calibrated since by another command.
        """
        path = Path(folder, NAME.format(digest))
        if not path.is_file():
            others = list(Path(folder).glob(NAME.format("*")))
            why = "was calibrated anew since it kept good images" if others else "has kept no good images to learn from"
            raise FileNotFoundError(
                f"{folder} {why}, so it cannot be updated. Fit it once again with `--kept-images 200`, or calibrate it "
                "by old and new images together."
            )
        with safe_open(path, "numpy") as file:
            record = json.loads(file.metadata()["diffad"])
            moments = unpack_moments(file.get_tensor("total"), file.get_tensor("products"), record["count"], device)
            kept = []
            for name in ("statistics", "thresholds"):
                keys, pixels = file.get_tensor(f"{name}_keys"), file.get_tensor(f"{name}_pixels")
                kept.append({key.tobytes(): one for key, one in zip(keys, pixels, strict=True)})
            has_seen = "seen_keys" in file.keys()  # noqa: SIM118 - a file of safetensors is no dictionary
            seen = {key.tobytes() for key in file.get_tensor("seen_keys")} if has_seen else None
        return cls(record["num_kept"], record["held_out_share"], moments, kept[0], kept[1], seen)


def calibration_digest(calibration: ScoreCalibration, extractor: TimmFeatureExtractor) -> str:
    """Tells a model's calibration from any other's, by thresholds, maps' statistics and the channels' scale."""
    told = hashlib.sha256()
    for values in (
        calibration.normal_scores,
        calibration.map_mean,
        calibration.map_std,
        extractor.channel_mean,
        extractor.channel_std,
    ):
        told.update(values.detach().float().cpu().numpy().tobytes())
    return told.hexdigest()[:16]


def remove_others(folder: str | os.PathLike, kept: Path | None) -> None:
    """Removes from a model's folder what was kept for its former calibrations."""
    for path in Path(folder).glob(NAME.format("*")):
        if path != kept:
            path.unlink()


def to_kept_pixels(pixel_values: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1] as they are kept, uint16."""
    return ((pixel_values.cpu().clamp(-1.0, 1.0) + 1.0) * (LARGEST / 2.0)).round().numpy().astype(np.uint16)


def from_kept_pixels(pixels: np.ndarray | Iterable[np.ndarray]) -> torch.Tensor:
    """The inverse of `to_kept_pixels`, float32."""
    return torch.from_numpy(np.asarray(pixels).astype(np.float32)) / (LARGEST / 2.0) - 1.0


def kept_batches(kept: dict[bytes, np.ndarray], batch_size: int, chosen: range) -> Iterator[torch.Tensor]:
    """Those of the kept images that are `chosen` in the order of their hashes, (B, 3, R, R') in [-1, 1]."""
    keys = sorted(kept)[chosen.start : chosen.stop : chosen.step]
    for start in range(0, len(keys), batch_size):
        yield from_kept_pixels([kept[key] for key in keys[start : start + batch_size]])


def pack_products(moments: FeatureMoments) -> np.ndarray:
    """The lower triangles of the sums of outer products, (P, C (C + 1) / 2) float64."""
    return torch.cat([pack_triangle(part.cpu()) for part in moments.total_of_products.split(POSITIONS_AT_ONCE)]).numpy()


def unpack_moments(total: np.ndarray, packed: np.ndarray, count: int, device: torch.device | str) -> FeatureMoments:
    """The moments that `pack_products` was made from, and their sums, (P, C) float64."""
    moments = FeatureMoments(total.shape[0], total.shape[1], device)
    moments.count = count
    moments.total.copy_(torch.from_numpy(total))
    rows, columns = np.tril_indices(total.shape[1])
    for start in range(0, len(total), POSITIONS_AT_ONCE):
        values = torch.from_numpy(packed[start : start + POSITIONS_AT_ONCE]).to(moments.total.device)
        part = moments.total_of_products[start : start + POSITIONS_AT_ONCE]
        part[:, rows, columns] = part[:, columns, rows] = values
    return moments
