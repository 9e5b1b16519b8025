"""Options of the `diffad` command that say which pixels the networks see: sizes of one number or two, and a region."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Resolution = Annotated[
    str | None,
    typer.Option(metavar="SIDE|H W", help="Pixels the networks see (at the images' ratio)."),
]
Roi = Annotated[Path | None, typer.Option(metavar="PATH", help="What counts: mask (PNG), COCO JSON.")]
TileSize = Annotated[str | None, typer.Option(metavar="SIDE|H W", help="Tiles of large images; none: no tiles.")]


class TakesHeightAndWidth(TyperCommand):
    """A command whose sizes are one number or two; click's options have one number of values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined = ["--tile-size" if word == "--tile_size" else word for word in args]
        for option in ("--resolution", "--tile-size"):
            at = joined.index(option) if option in joined else len(joined)
            if all(word.isdigit() for word in joined[at + 1 : at + 3]):
                joined[at + 1 : at + 3] = [" ".join(joined[at + 1 : at + 3])] if joined[at + 1 :] else []
        return super().parse_args(ctx, joined)
