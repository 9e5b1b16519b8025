"""At which sizes of an image the backbone computes features."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

from diffad import TimmFeatureExtractor
from diffad.images import Side, as_side, as_size, size_of_ratio
from diffad.training.arguments import PIXELS
from diffad.training.data import choose_tile_size

DEFAULT_SIDE = 224  # pixels a side of a square of as many
SIDE_MULTIPLE = 16  # of what the sides of other images are a multiple: the coarsest stride
# `auto`, in shares of one size: 128 and 448 px for 224. The small image shows what a large part looks like, the large
# one scratches and spots. Drawn defects chose them (docs/tried.md, "Strides, positions, sizes").
SCALES = (4 / 7, 2.0)


class FeatureSizes(argparse.Action):
    """Increasing whole numbers, or `auto`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            sizes = values[0] if values == ["auto"] else [PIXELS(value) for value in values]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option_string} {error}, or 'auto'")
        if sizes != "auto" and sizes != sorted(set(sizes)):
            parser.error(f"{option_string} must increase, but is {' '.join(map(str, sizes))}")
        setattr(namespace, self.dest, sizes)


def add_feature_image_size(group: Any) -> None:
    group.add_argument(
        "--feature_image_size",
        nargs="+",
        action=FeatureSizes,
        metavar="SIDE",
        help="pixels the backbone sees; several, increasing, for its features of each; auto: 128 and 448, or one size "
        "where images are large enough for tiles (default: the resolution)",
    )


def side_multiple(backbone: str, strides: Sequence[int], layers: Sequence[int] | None) -> int:
    """Of what images' sides must be a multiple: a transformer's patch, or else the coarsest stride."""
    with torch.device("meta"):  # only to read it
        patch_size = TimmFeatureExtractor(backbone, strides, out_indices=layers).patch_size
    return patch_size if patch_size > 1 else SIDE_MULTIPLE


def choose_feature_sizes(
    args: argparse.Namespace, sizes: Sequence[tuple[int, int]], one_size: Side, categories: Sequence[str], multiple: int
) -> list[int] | None:
    """What `--feature_image_size auto` means: the sides, or None for `one_size`, where images are looked at in tiles.

    A tile shows what is small, and the whole image beside it what is large. `args.tile_size` is decided as well.

    Args:
        args: what the command line says.
        sizes: of all images.
        one_size: what the backbone would see at one size.
        categories: of the same images.
        multiple: of what the sides must be a multiple.
    """
    if args.tile_size == "auto":
        args.tile_size = choose_tile_size(sizes, one_size, categories)
    if args.tile_size is not None:
        return None
    side = math.sqrt(math.prod(as_size(one_size)))
    return [multiple * max(1, round(scale * side / multiple)) for scale in SCALES]


def extractor_image_size(sides: Sequence[int], resolution: Side, multiple: int) -> int | Sequence[Side]:
    """The extractor's `image_size`: as many pixels as squares of `sides`, at the ratio of `resolution`.

    448 at 352 x 144 is 704 x 288; squares stay as they are.

    Raises:
        ValueError: two sides become the same size.
    """
    height, width = as_size(resolution)
    found = [as_side(size_of_ratio(side, height / width, multiple)) for side in sides]
    if len(set(found)) < len(found):
        raise ValueError(
            f"--feature_image_size {' '.join(map(str, sides))}: in multiples of {multiple} at the ratio of {height} x "
            f"{width}, two of them are the same. Give sides that are farther apart."
        )
    return found[0] if len(found) == 1 and isinstance(found[0], int) else found


def describe_sizes(extractor: TimmFeatureExtractor) -> str:
    """In words, where there are several."""
    sizes = (" x ".join(map(str, as_size(size))) for size in extractor.image_sizes)
    return f"The backbone sees images at {' and '.join(sizes)} px."
