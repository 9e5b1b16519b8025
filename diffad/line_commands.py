"""The commands for a production line: `diffad drift`. `diffad.cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

console = Console(stderr=True)  # standard output is for results


def drift(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.csv", help="As `diffad predict` or `watch` writes it.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The plot (drift.png beside it).")] = None,
    chance: Annotated[float, typer.Option(metavar="C", help="Of ever alarming while nothing changes.")] = 0.01,
    fail_on_drift: Annotated[bool, typer.Option("--fail-on-drift", help="Exit with 3 if there is some.")] = False,
) -> None:
    """Whether the parts, in the table's order, still score as the calibration's good images did.

    A bet against it, part by part, and how far it has paid off; parts that raise an alarm are left out.
    """
    from diffad.drift_table import TableDrift, draw_drift
    from diffad.inputs import DRIFT_NAME

    found = TableDrift(scores, chance)
    plot = output or scores.with_name(DRIFT_NAME)
    draw_drift(found, plot)
    print(found.sentence())
    console.print(f"Plot: {escape(str(plot))}", highlight=False, soft_wrap=True)
    if fail_on_drift and found.test.drifted_at is not None:
        raise typer.Exit(3)
