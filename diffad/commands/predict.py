"""`diffad predict`; `diffad.cli` gives it its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from diffad.commands.models import is_exported, load_model
from diffad.commands.options import BatchSize, Category, Device, DtypeOrOwn, ModelOrFile
from diffad.model_folder import check_folder

console = Console(stderr=True)  # standard output is for results
MOST_OF_DRIFT = 100_000  # images, which are ranked in some 20 s


def predict(
    model: ModelOrFile,
    images: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Images, folders, or a manifest.")],
    output_dir: Annotated[str, typer.Option("--output", metavar="DIR", help="Gets all of this; may be a URL.")],
    category: Category = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: DtypeOrOwn = None,
    parts: Annotated[Path | None, typer.Option(metavar="CSV", help="image,part: one verdict a part.")] = None,
    max_pictures: Annotated[int, typer.Option(min=0, metavar="N", help="Of more images, scores alone.")] = 100_000,
    fail_on_anomaly: Annotated[bool, typer.Option("--fail-on-anomaly", help="Exit with 3 if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each image that is new.")] = False,
) -> None:
    """Overlays, maps, masks, scores.csv, and a sheet of the most anomalous images.

    Run again, it goes on. Exits with 0 if an image was scored, 4 if none was. Several processes: accelerate launch -m
    diffad.predict.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from diffad.predict import predict_files
    from diffad.prediction.input_sources import find_inputs
    from diffad.prediction.manifest import Manifest
    from diffad.prediction.part_verdicts import check_parts, read_parts, write_part_verdicts
    from diffad.prediction.remote_output import check_store, is_there, output_place, tables_of
    from diffad.process_share import launched_processes, on_main
    from diffad.reading.inputs import SHEET_NAME

    def check_place() -> Path | str:
        place = output_place(output_dir)
        if isinstance(place, Path):
            return check_folder(place)
        check_store(place)
        return place

    accelerator = launched_processes()
    is_main = accelerator is None or accelerator.is_main_process
    console.quiet = not is_main
    place = on_main(accelerator, check_place)
    paths = on_main(accelerator, lambda: find_inputs(images, place))
    local = [] if isinstance(paths, Manifest) else [path for path in paths if isinstance(path, Path)]
    if parts is not None and (isinstance(paths, Manifest) or len(local) < len(paths)):
        raise ValueError("`parts` goes with images and folders here, not with a manifest or a store.")
    of_parts = None if parts is None else read_parts(parts)
    own = None if accelerator is None or is_exported(model) else str(accelerator.device)
    pipeline = load_model(model, device or own, dtype)
    rate = None if of_parts is None else check_parts(of_parts, local, pipeline, category)
    total = None if isinstance(paths, Manifest) else len(paths)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    spent: dict[str, float] = {}
    with Progress(*columns, console=console, disable=not is_main) as progress:
        task = progress.add_task("Predicting", total=total)

        def report(row: dict[str, Any]) -> None:
            progress.advance(task)
            if as_json:
                numbers = {k: float(row[k]) for k in ("score", "p_value", "map_low", "map_high") if row[k] is not None}
                print(json.dumps({**row, **numbers}), flush=True)

        counts = predict_files(
            pipeline,
            paths,
            place,
            batch_size,
            category,
            report=report,
            max_pictures=max_pictures,
            accelerator=accelerator,
            spent=spent,
        )
        progress.update(task, completed=total)
    if accelerator is not None:
        accelerator.end_training()  # a process that exits with its group still open may abort
        if not is_main:
            return
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "skipped")
    files = f"{place}/scores.csv"
    if is_there(place, SHEET_NAME):
        files += f"; the most anomalous: {place}/{SHEET_NAME}"
    console.print(
        f"{summary} ({counts['skipped']} done before). Scores: {escape(files)}", highlight=False, soft_wrap=True
    )
    if spent["without_pictures"]:
        console.print(
            f"{spent['without_pictures']} of those done before have no pictures: give another --output to have them.",
            highlight=False,
            soft_wrap=True,
        )
    if (new := sum(counts.values()) - 2 * counts["skipped"]) > 0:
        retried = f" {spent['retried']:.0f} requests were made again." if spent["retried"] else ""
        console.print(
            f"{new / spent['seconds']:.1f} images/s in each process, whose networks waited for images "
            f"{spent['waiting'] / spent['seconds']:.0%} of the time.{retried}",
            highlight=False,
            soft_wrap=True,
        )
    if sum(counts.values()) - counts["skipped"] > MOST_OF_DRIFT:
        of_store = "" if isinstance(place, Path) else ", of a copy beside which calibration.json lies"
        console.print(f"Drift in so many takes a while: diffad drift {escape(str(place))}/scores.csv{of_store}")
    elif counts["normal"] or counts["anomalous"]:
        from diffad.prediction.drift_table import TableDrift

        with tables_of(place) as folder:
            told = TableDrift(folder / "scores.csv").sentence()
        console.print(escape(told), highlight=False, soft_wrap=True)
    num_alarms = counts["anomalous"]
    if of_parts is not None and rate is not None:
        with tables_of(place) as folder:
            of_part = write_part_verdicts(folder, of_parts, rate)
        num_alarms = of_part["anomalous"]
        summary = ", ".join(f"{count} {verdict}" for verdict, count in of_part.items() if count)
        console.print(f"Parts: {summary}, at a false-alarm rate of {rate:g} for parts.", highlight=False)
    if fail_on_anomaly and num_alarms:
        raise typer.Exit(3)
    if not any(counts[verdict] for verdict in ("normal", "anomalous", "scored")):
        raise typer.Exit(4)
