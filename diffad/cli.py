"""The `diffad` command. Each subcommand imports what it needs: `--help` must not wait for torch."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Finds and outlines defects in images, having seen only good ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)  # standard output is for results

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a saved pipeline.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (the fastest there is)")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in one pass of the networks.")]


@app.callback()
def callback(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Finds and outlines defects in images, having seen only good ones."""


def load_pipeline(model: str, device: str | None = None, dtype: str = "float32") -> Any:
    """A saved pipeline of either method, on its device, without a progress bar of its own."""
    import torch
    from diffusers import DiffusionPipeline

    import diffad  # noqa: F401 (registers the pipelines with diffusers)

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, but is {dtype!r}.")
    folder = Path(model)
    if (folder.exists() or model.count("/") != 1) and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{model} holds no pipeline (no model_index.json there).")
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Gets the model, the report and pictures.")] = Path("runs/demo"),
    max_train_steps: Annotated[int | None, typer.Option(min=1, help="Fewer is faster and worse.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data order and noise.")] = 0,
) -> None:
    """Trains on good solar cells, finds the defective ones, and shows what it found."""
    from diffad.training.demo import run_demo

    report = run_demo(output, max_train_steps, seed)
    result = report["results"]["mono"]
    print(
        f"\nImage AUROC {result['image_auroc']:.4f} (AP {result['image_ap']:.4f}, F1-max {result['image_f1max']:.4f}) "
        f"on {result['good_images']} good and\n{result['defective_images']} defective cells, none seen in training.\n"
        f"At the calibrated threshold {result['defects_found']:.0%} of the defective cells raise an alarm, and "
        f"{result['false_alarms']:.0%} of the good ones.\n"
        f"{report['train_and_calibrate_seconds']:.0f} s to train and calibrate, {report['total_seconds']:.0f} s in all "
        f"on {report['machine']['device']}; {result['images_per_second']:.0f} images/s in the test.\n"
        f"Pictures: {output}/cells.png, {output}/scores.png. Load the model:\n\n"
        "    from diffad import AnomalyDenoisePipeline\n"
        f'    pipe = AnomalyDenoisePipeline.from_pretrained("{output}")\n'
        '    pipe("cell.png").anomaly_map'
    )


@app.command()
def predict(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", help="Files, or folders of them.")],
    output: Annotated[Path, typer.Option(help="Gets overlays, maps, masks and scores.csv.")],
    category: Annotated[str | None, typer.Option(help="Of a unified model.")] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    fail_on_anomaly: Annotated[bool, typer.Option("--fail-on-anomaly", help="Exit with 3 if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an image on standard output.")] = False,
) -> None:
    """Scores images; run again, it skips what is done.

    A file that cannot be read stands in scores.csv as unreadable, and the rest goes on.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from diffad.prediction import find_images, predict_files

    paths = find_images(images)
    pipeline = load_pipeline(model, device, dtype)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Predicting", total=len(paths))

        def report(row: dict[str, Any]) -> None:
            progress.advance(task)
            if as_json:
                numbers = {k: float(row[k]) for k in ("score", "p_value", "map_low", "map_high") if row[k] is not None}
                print(json.dumps({**row, **numbers}), flush=True)

        counts = predict_files(pipeline, paths, output, batch_size, category, seed, report=report)
        progress.update(task, completed=len(paths))
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "skipped")
    console.print(f"{summary} ({counts['skipped']} done before). Scores: {output / 'scores.csv'}")
    if fail_on_anomaly and counts["anomalous"]:
        raise typer.Exit(3)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Data set with a test split: folder, Hub id, or elpv/mono.")],
    output: Annotated[Path, typer.Option(help="The report.")] = Path("report.json"),
    dataset: Annotated[str | None, typer.Option(help="Force a layout: mvtec_ad, visa, ...")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """The field's metrics on a test split, per category and mean.

    For several processes: accelerate launch training/evaluate.py.
    """
    from diffad.training.evaluate import main as run

    flags = ["--model", model, "--data", data, "--output", str(output)]
    flags += ["--batch_size", str(batch_size), "--seed", str(seed)]
    flags += ["--dataset", dataset] if dataset else []
    run([*flags, *(["--category", *category] if category else [])])


@app.command()
def calibrate(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Good images: a folder, a data set's folder (its train split), or elpv/mono.")
    ],
    output: Annotated[Path | None, typer.Option(help="Where to save (in place, if MODEL is a folder).")] = None,
    false_alarm_rate: Annotated[float, typer.Option(help="Share of good parts that may raise an alarm.")] = 0.01,
    category: Annotated[str | None, typer.Option(help="Of a unified model.")] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Statistics and thresholds from good images that no network was trained on."""
    import torch

    from diffad.data import load_anomaly_dataset

    pipeline = load_pipeline(model, device)
    good = load_anomaly_dataset(data, split="train", category=category)
    good = good.filter(lambda label: label == 0, input_columns="label")
    if output is None and not Path(model).is_dir():
        raise ValueError(f"--output is needed: {model} is not a folder that could be written to.")
    pipeline.calibrate(
        good["image"],
        false_alarm_rate=false_alarm_rate,
        category=category if len(pipeline.config.categories or []) > 1 else None,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    pipeline.save_pretrained(output or model)
    console.print(f"Calibrated on {len(good)} good images and saved to {output or model}.")


@app.command()
def benchmark(
    model: Model,
    batch_size: BatchSize = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls, after one that warms up.")] = 5,
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")] = False,
) -> None:
    """Images per second, where the time goes, and peak memory."""
    from diffad.benchmark import benchmark_pipeline

    result = benchmark_pipeline(load_pipeline(model, device, dtype), batch_size, repeats)
    if as_json:
        print(json.dumps({"model": model, "dtype": dtype, **result}))
        return
    parts = ", ".join(f"{name} {value:.1f}" for name, value in result["milliseconds_by_part"].items())
    print(
        f"{result['milliseconds_per_image']:.1f} ms an image ({result['images_per_second']:.1f} images/s), batch of "
        f"{batch_size} at {result['resolution']} px, {dtype}\nof which, in ms: {parts}\n"
        f"peak memory {result['peak_memory_mib']} MiB"
    )


@app.command()
def convert(
    method: Annotated[str, typer.Argument(metavar="diad", help="Method of the checkpoint.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=".ckpt, .pth or .safetensors")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the pipeline.")],
    prompt_embeds: Annotated[Path | None, typer.Option(help="Empty prompt's embedding, .safetensors.")] = None,
) -> None:
    """A published checkpoint to a saved pipeline."""
    from diffad.conversion import load_diad_checkpoint

    if method != "diad":
        raise ValueError(f"Only 'diad' checkpoints can be converted, not {method!r}.")
    load_diad_checkpoint(checkpoint, prompt_embeds=prompt_embeds).save_pretrained(output)
    console.print(f"Saved to {output}. Next: diffad calibrate {output} --data GOOD_IMAGES")


@app.command()
def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="org/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    token: Annotated[str | None, typer.Option(help="Hub token (the one you logged in with).")] = None,
) -> None:
    """Uploads a saved pipeline with its model card."""
    pipeline = load_pipeline(model, "cpu")
    console.print(f"Pushed to {pipeline.push_to_hub(repo_id, private=private, token=token)}")


def main() -> None:
    """Entry point: an error that a user can mend is one line, with `--debug` a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        console.print("Stopped.")
        sys.exit(130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        else:
            console.print(
                f"[red]error:[/red] {str(error).strip() or type(error).__name__}", highlight=False, soft_wrap=True
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
