"""Draws synthetic defects onto good images, to tell settings of a detector apart where no real defect is known.

    python -m diffad.data.synthetic_defects DATA --output sheet.png

Each kind imitates what goes wrong with real parts. Sizes go from a few pixels to a third of the part, strengths from
barely visible to obvious, both evenly on a logarithmic scale: subtle defects are the ones that tell settings apart.

Stains in noise-shaped regions follow Zavrtanik et al., "DRAEM" (ICCV 2021), moved patches Li et al., "CutPaste"
(CVPR 2021), and their soft seams Schlüter et al., "Natural Synthetic Anomalies" (ECCV 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from diffad.data.defect_kinds import (
    KINDS,
    VISIBLE,
    Change,
    Images,
    away,
    border,
    bounds,
    fill_holes,
    keep_components,
    noise_level,
    point,
)

LARGEST_SHARE = 0.5  # of the image; of a larger change nobody would say where it is
SMALLEST_MASK = 4  # pixels
SMALLEST_SIDE = 32  # pixels; below, no kind is told from another
TRIES = 12  # of a kind that shows nothing, for example blur on a smooth part


class SyntheticDefect(NamedTuple):
    """A good image with one defect drawn on it."""

    image: np.ndarray  # (H, W, 3) float32 in [0, 1]
    mask: np.ndarray  # (H, W) bool: what visibly differs from the good image
    kind: str  # a key of `KINDS`


def foreground(image: np.ndarray) -> np.ndarray:
    """Where the part is rather than its background.

    The background is what has the colour of the image's border. Where the border has no one colour, or where that
    leaves nearly nothing or nearly everything, the whole image is the part.

    Args:
        image: (H, W, 3) float32 in [0, 1].

    Returns:
        (H, W) bool, True on the part, without holes.

    Raises:
        ValueError: `image` has another shape, type or range, or a side below 32.

    Example:
        >>> image[foreground(image)].mean(axis=0)  # the part's mean colour
    """
    _check(image, "image")
    rim = border(image, max(2, min(image.shape[:2]) // 64))
    color = np.median(rim, axis=0)
    distance = np.abs(rim - color).max(axis=1)
    spread = 1.4826 * float(np.median(distance))
    limit = max(0.08, 4.0 * spread)
    everything = np.ones(image.shape[:2], dtype=bool)
    if spread > 0.02 or (distance > limit).mean() > 0.25:  # a part may touch the border, but not be most of it
        return everything
    part = ndimage.binary_opening(np.abs(image - color).max(axis=2) > limit, np.ones((3, 3)))
    part = keep_components(fill_holes(part), 0.05)
    return part if 0.03 < part.mean() < 0.97 else everything


def add_defect(image: np.ndarray, others: Images, rng: Generator, kind: str | None = None) -> SyntheticDefect:
    """Draws one defect onto a good image.

    A defect that does not show, or that covers more than half of the image, is drawn again; after a number of such
    tries it is of another kind.

    Args:
        image: (H, W, 3) float32 in [0, 1], sides from 32 up. It is left as it is.
        others: other good images, of any size, of which one is drawn to take a texture from. Without any the image
            itself serves.
        rng: all that is random comes from it.
        kind: a key of `KINDS`; None draws one.

    Returns:
        The changed image, the mask of what visibly changed, and the kind. A grey image stays grey.

    Raises:
        ValueError: a wrong shape, type or range, an image that is too small, or an unknown kind.

    Example:
        >>> image = np.full((64, 64, 3), 0.5, dtype=np.float32)
        >>> changed, mask, kind = add_defect(image, [], np.random.default_rng(0), kind="scratch")
    """
    _check(image, "image")
    if len(others):  # one is enough, and `others` may decode each as it is asked for
        i = int(rng.integers(len(others)))
        others = [others[i]]
        _check(others[0], f"others[{i}]")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)} or None, but is {kind!r}.")
    return _add(image, foreground(image), others, rng, kind or str(rng.choice(list(KINDS))))


def add_defects(images: Images, per_image: int, seed: int = 0) -> Iterator[tuple[int, SyntheticDefect]]:
    """Draws defects onto each of a number of good images; all kinds come about equally often.

    Each defect depends on the images, the seed and its two numbers alone, of its image and within it: a smaller
    `per_image` gives the first of the same ones.

    Args:
        images: (H, W, 3) float32 in [0, 1] each, sides from 32 up, of any sizes.
        per_image: defects of each image.
        seed: of all that is random.

    Yields:
        An image's index and the defect, image by image.

    Raises:
        ValueError: `per_image` below 1 or `seed` below 0; at an image's turn, what `add_defect` raises of it.

    Example:
        >>> for i, (changed, mask, kind) in add_defects(images, per_image=4):
        ...     print(i, kind, mask.mean())
    """
    if per_image < 1:
        raise ValueError(f"`per_image` must be at least 1, but is {per_image}.")
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, but is {seed}.")
    return (one for i in range(len(images)) for one in _defects_of(images, i, per_image, seed))


def _defects_of(images: Images, i: int, per_image: int, seed: int) -> Iterator[tuple[int, SyntheticDefect]]:
    image = images[i]
    _check(image, f"images[{i}]")
    part = foreground(image)
    for number in range(per_image):
        rng = np.random.default_rng((seed, i, number))
        others = []
        if len(images) > 1:
            other = (i + int(rng.integers(1, len(images)))) % len(images)
            others = [images[other]]
            _check(others[0], f"images[{other}]")
        # 5 has no factor in common with 14 kinds: few images with few defects each still have many kinds
        yield i, _add(image, part, others, rng, list(KINDS)[(5 * i + number) % len(KINDS)])


def _add(image: np.ndarray, part: np.ndarray, others: Images, rng: Generator, kind: str) -> SyntheticDefect:
    for attempt in range(3 * TRIES):
        name = kind if attempt < TRIES else str(rng.choice(list(KINDS)))
        found = _finish(image, *KINDS[name](image, part, others, rng))
        if found is not None:
            return SyntheticDefect(*found, name)
    down, right = away(bounds(np.ones_like(part)), point(part, rng))
    dot = down**2 + right**2 <= 5  # of another brightness, it shows on whatever it lies
    return SyntheticDefect(np.where(dot[..., None], (image + np.float32(0.5)) % 1, image), dot, "spot")


def _finish(image: np.ndarray, changed: np.ndarray, region: np.ndarray) -> Change | None:
    """The changed image within its region, and the mask of what shows; None if that is too little or too much."""
    window = bounds(region)
    before, inside = image[window], region[window]
    after = np.where(inside[..., None], changed[window].clip(0.0, 1.0), before)
    few = image[::4, ::4]
    if np.abs(few - few[..., [1, 2, 0]]).max() < 0.02:  # a camera without colours shows no coloured defect
        after = before + (after - before).mean(axis=2, keepdims=True)
    change = np.abs(after - before).max(axis=2)
    visible = change > VISIBLE
    # where one pixel in three differs, as in a texture on another, the region as a whole does
    side = 2 * max(1, min(image.shape[:2]) // 96) + 1
    dense = ndimage.uniform_filter(visible.astype(np.float32), side, mode="constant") > 0.33
    kept = fill_holes(keep_components((visible | dense) & inside, 0.05), 0.05)
    if not SMALLEST_MASK <= kept.sum() <= LARGEST_SHARE * region.size or not (visible & kept).any():
        return None
    if change[kept].mean() < 1.5 * noise_level(image):  # noise in another's place is no defect
        return None
    dropped = visible & ~kept  # specks that no one would call a part of the defect
    changed, mask = image.copy(), np.zeros_like(region)
    changed[window], mask[window] = np.where(dropped[..., None], before, after).clip(0.0, 1.0), kept
    return changed, mask


def _check(image: np.ndarray, name: str) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
        found = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise ValueError(f"`{name}` must be (H, W, 3) float32, but is {found}. Convert it.")
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise ValueError(f"`{name}` must have sides from {SMALLEST_SIDE} up, but is {image.shape}. Enlarge it.")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN is neither
        raise ValueError(f"`{name}` must lie in [0, 1], but spans [{low:.4g}, {high:.4g}]. Scale or clip it.")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws a contact sheet: a row for each kind, defects and beside each the outline of its mask."""
    from diffad.data import load_anomaly_dataset
    from diffad.images import image_to_rgb, resize_image
    from diffad.training.arguments import POSITIVE, SEED, FlagParser, local_path, whole_number
    from diffad.visualization import OUTLINE, outline, save_rows, to_uint8

    parser = FlagParser(description="Draws a contact sheet of synthetic defects on a data set's good images.")
    parser.add_argument("data", metavar="DATA", help="MVTec-AD style tree or folder of good images, or 'elpv'")
    parser.add_argument(
        "--output", type=local_path, required=True, metavar="FILE", help="the sheet, for example sheet.png"
    )
    parser.add_argument("--per_kind", type=POSITIVE, default=6, help="defects of each kind (6)")
    parser.add_argument("--seed", type=SEED, default=0, help="of all that is random (0)")
    parser.add_argument("--resolution", type=whole_number(SMALLEST_SIDE), default=256, help="side in pixels (256)")
    parser.add_argument("--category", metavar="NAME", help="only this category (default: all that there are)")
    args = parser.parse_args(argv)

    good = load_anomaly_dataset(args.data, "train", args.category)
    good = good.select(np.flatnonzero(np.asarray(good["label"]) == 0))
    rng = np.random.default_rng(args.seed)
    images = []
    for i in rng.permutation(len(good))[: args.per_kind]:
        tensor = resize_image(image_to_rgb(good[int(i)]["image"]), (args.resolution, args.resolution))
        images.append(tensor[0].permute(1, 2, 0).clamp(0.0, 1.0).numpy())
    rows: list[list[np.ndarray]] = [[] for _ in KINDS]
    for row, kind in zip(rows, KINDS, strict=True):
        for j in range(args.per_kind):
            i = j % len(images)
            changed, mask, _ = add_defect(images[i], images[:i] + images[i + 1 :], rng, kind)
            row += [to_uint8(changed), to_uint8(changed)]
            row[-1][outline(ndimage.binary_dilation(mask))] = OUTLINE
    save_rows(rows, args.output, row_titles=list(KINDS), tile=min(args.resolution, 256))


if __name__ == "__main__":
    main()
