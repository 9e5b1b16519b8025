"""What several commands of `diffad` take, with the words of their help."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a pipeline.", show_default=False)]
ModelOrFile = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, Hub id or exported file.", show_default=False)
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... (the fastest there is)")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")]
DtypeOrOwn = Annotated[
    str | None, typer.Option(metavar="NAME", help="float32 (a file: as calibrated), bfloat16, float16.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images in one pass.")]
PartPattern = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Finds the part in a path (several photographs).")
]
Category = Annotated[str | None, typer.Option(metavar="NAME", help="Of a unified model.")]


class OnBadImage(str, Enum):
    error, skip = "error", "skip"


BadImages = Annotated[OnBadImage, typer.Option("--on-bad-image", metavar="WHAT", help="error, or skip those files.")]
