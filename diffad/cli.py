"""The `diffad` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Finds and outlines defects in images, having seen only good ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.callback()
def callback() -> None:
    """Finds and outlines defects in images, having seen only good ones."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, the report and the pictures.")] = Path(
        "runs/demo"
    ),
    max_train_steps: Annotated[int | None, typer.Option(min=1, help="Fewer is faster and worse.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data order and noise.")] = 0,
) -> None:
    """Trains on good solar cells, finds the defective ones, and shows what it found."""
    from diffad.training.demo import run_demo

    report = run_demo(output, max_train_steps, seed)
    result = report["results"]["mono"]
    console.print(
        f"\n[bold]Image AUROC {result['image_auroc']:.4f}[/bold] on {result['good_images']} good and "
        f"{result['defective_images']} defective cells, none seen in training "
        f"(AP {result['image_ap']:.4f}, F1-max {result['image_f1max']:.4f})."
    )
    console.print(
        f"At the calibrated threshold {result['defects_found']:.0%} of the defective cells raise an alarm, and "
        f"{result['false_alarms']:.0%} of the good ones."
    )
    console.print(
        f"{report['train_and_calibrate_seconds']:.0f} s to train and calibrate, {report['total_seconds']:.0f} s in all "
        f"on {report['machine']['device']}; {result['images_per_second']:.0f} images/s in the test."
    )
    console.print(f"Pictures: {output}/cells.png, {output}/scores.png. Load it:\n")
    console.print(
        "    from diffad import AnomalyDenoisePipeline\n"
        f'    pipe = AnomalyDenoisePipeline.from_pretrained("{output}")\n'
        '    pipe("cell.png").anomaly_map',
        highlight=False,
    )


def main() -> None:
    """Entry point: errors that a user can mend are one line."""
    app()
