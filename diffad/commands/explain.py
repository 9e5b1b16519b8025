"""`diffad explain`; `diffad.cli` gives it its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from diffad.commands.models import load_pipeline
from diffad.commands.options import BatchSize, Category, Device, Dtype, Model

if TYPE_CHECKING:
    from diffad.pipelines.explaining import Explanation

console = Console(stderr=True)  # standard output is for results


def explain(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Images, or folders of them.")],
    good_images: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Images or folder, to compare with; may be repeated.")
    ] = None,
    num_nearest: Annotated[int, typer.Option(min=1, metavar="N", help="How many of these are told.")] = 3,
    category: Category = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each image.")] = False,
) -> None:
    """Which map, layer and noise level spoke where an image's map is highest, and the good images most like it.

    Of AnomalyDenoise models that look at whole images. Exits with 4 if no image could be read.
    """
    from diffad.prediction.input_sources import OTHER_LISTS, SUFFIXES, range_of_inputs
    from diffad.reading.grey_depth import warn_of_found_range
    from diffad.reading.inputs import find_images

    lists = [one for one in images if Path(one).suffix.lower() in (*SUFFIXES, *OTHER_LISTS, ".tar")]
    if lists and Path(lists[0]).is_file():
        raise ValueError(f"`images`: {lists[0]} is no image. Give the images themselves, or folders of them.")
    paths = find_images(images)
    good_paths = None if good_images is None else find_images(good_images)
    pipeline = load_pipeline(model, device, dtype)
    if not hasattr(pipeline, "explain"):
        raise ValueError("`model` must be an AnomalyDenoise pipeline: DiAD shows its reconstruction (diffad serve).")
    if good_paths is not None and category is None and len(pipeline.categories) > 1:
        names = ", ".join(pipeline.categories)
        raise ValueError(f"`good_images` are of one category: say which by `category`, of {names}.")
    if good_paths is not None:
        good_paths = readable_of(good_paths)
    if pipeline.value_range is None:  # one for all images, as predict has it: each with its own would get another score
        value_range = range_of_inputs([*paths, *(good_paths or [])])
        if value_range is not None:
            warn_of_found_range(value_range)
            pipeline.register_to_config(value_range=value_range)
    num_told = 0
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        for path, why, nearest in explain_batch(pipeline, batch, good_paths, num_nearest, category, batch_size):
            num_told += 1
            print(as_line(path, why, nearest) if as_json else as_text(path, why, nearest), flush=True)
    if not num_told:
        raise typer.Exit(4)


def readable_of(paths: Sequence[Path]) -> list[Path]:
    """The images that can be read; of each other one a line tells why not."""
    from diffad.reading.grey_depth import UnreadableImageError
    from diffad.reading.image_files import read_image

    readable = []
    for path in paths:
        try:
            read_image(path, reduce_large=True)
        except UnreadableImageError as error:
            console.print(f"[red]not compared with:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        else:
            readable.append(path)
    if not readable:
        console.print("[red]No good image could be read:[/red] nothing is compared.")
    return readable


def explain_batch(
    pipeline: Any,
    paths: Sequence[Path],
    good_paths: Sequence[Path] | None,
    num_nearest: int,
    category: str | None,
    batch_size: int,
) -> Iterator[tuple[Path, Explanation, list[tuple[Path, float]]]]:
    """Each image that can be read, its explanation, and the good images most like it; one look at these for all."""
    from diffad.images import ImageSequence
    from diffad.pipelines.explaining import most_alike
    from diffad.reading.grey_depth import UnreadableImageError

    told: list[tuple[Path, Explanation]] = []
    for path in paths:
        try:
            told.append((path, pipeline.explain(path, category=category)))
        except UnreadableImageError as error:
            console.print(f"[red]unreadable:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
    nearest: list[list[tuple[int, float]]] = [[] for _ in told]
    if good_paths is not None and told:
        own = ImageSequence([path for path, _ in told], pipeline.value_range)
        good = ImageSequence.of_rows(good_paths, range(len(good_paths)), pipeline.value_range)
        try:
            nearest = most_alike(pipeline, own, good, pipeline.category_index(category), num_nearest, batch_size)
        except UnreadableImageError as error:
            console.print(f"[red]nothing compared:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
    for (path, why), places in zip(told, nearest, strict=True):
        yield path, why, [(good_paths[i], distance) for i, distance in places] if good_paths else []


def as_text(path: Path, why: Explanation, nearest: Sequence[tuple[Path, float]]) -> str:
    """Two or three lines, for people."""
    lines = [f"{path}: score {why.score:.4g}, highest at row {why.peak[0]}, column {why.peak[1]}", why.in_words()]
    if nearest:
        lines.append("Most like: " + ", ".join(f"{good} ({distance:.3g} away)" for good, distance in nearest))
    return "\n  ".join(lines).encode("utf-8", "replace").decode()  # a name may be no UTF-8


def as_line(path: Path, why: Explanation, nearest: Sequence[tuple[Path, float]]) -> str:
    """One JSON object, for programs."""
    of_good = [{"path": str(good), "distance": distance} for good, distance in nearest]
    return json.dumps({"path": str(path), **why._asdict(), "nearest": of_good})
