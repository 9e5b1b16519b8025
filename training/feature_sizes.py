"""At which sizes of an image the backbone computes features."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from diffad.images import Side, as_side, as_size, size_of_ratio
from diffad.training.arguments import PIXELS
from diffad.training.data import choose_tile_size

ONE_SIZE = 224  # pixels a side of a square of as many
COARSEST_STRIDE = 16  # of what sides are a multiple
# A small image for what a large part looks like, a large one for scratches and spots. Against synthetic defects on six
# data sets better than 224 px alone, at four times the cost (docs/tried.md, "Strides, positions, sizes").
TWO_SIZES = (128, 448)


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
        help="pixels the backbone sees; several, increasing, for its features of each; auto: "
        f"{' and '.join(map(str, TWO_SIZES))}, or {ONE_SIZE} where images are large enough for tiles (default: the "
        "resolution)",
    )


def set_feature_image_size(
    args: argparse.Namespace, sizes: Sequence[tuple[int, int]], ratio: float, categories: Sequence[str]
) -> None:
    """Replaces `auto`: a tile shows what is small, and the whole image beside it what is large.

    Args:
        args: what the command line says.
        sizes: of all images.
        ratio: of what the networks see, height over width.
        categories: of the same images.
    """
    if args.feature_image_size != "auto":
        return
    tile = args.tile_size
    if tile == "auto":
        tile = choose_tile_size(sizes, as_side(size_of_ratio(ONE_SIZE, ratio, COARSEST_STRIDE)), categories)
    args.feature_image_size = list(TWO_SIZES) if tile is None else [ONE_SIZE]


def extractor_image_size(sides: Sequence[int], resolution: Side) -> int | list[Side]:
    """The extractor's `image_size`: as many pixels as squares of `sides`, at the ratio of `resolution`."""
    height, width = as_size(resolution)
    sizes = [as_side(size_of_ratio(side, height / width, COARSEST_STRIDE)) for side in sides]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else sizes
