"""The `diffad` command. Each subcommand imports what it needs."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from diffad import __version__
from diffad.commands.explain import explain
from diffad.commands.line import drift, serve, update, watch
from diffad.commands.models import is_exported, load_model, load_pipeline
from diffad.commands.options import (
    BadImages,
    BatchSize,
    Category,
    Device,
    DtypeOrOwn,
    Model,
    ModelOrFile,
    OnBadImage,
    PartPattern,
)
from diffad.commands.predict import predict
from diffad.commands.size_options import Resolution, Roi, TakesHeightAndWidth, TileSize
from diffad.commands.transfer import convert, export, push
from diffad.model_folder import MODEL_LOCK_NAME, check_model_folder
from diffad.reading.unicode_forms import same_name

app = typer.Typer(
    help="Finds defects, having seen only good parts. Also: --version and --debug.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # boxes and blank lines would take a second screen
    pretty_exceptions_enable=False,
    # the scripts' spelling of flags, which their errors have, is taken as well
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
console = Console(stderr=True)  # standard output is for results


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffad {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
    version: Annotated[bool, typer.Option("--version", hidden=True, is_eager=True, callback=show_version)] = False,
) -> None:
    # torch reads it at its first large tensor: a page of 2 MB is one fault where 512 were, which saves `fit` a second
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@app.command(short_help="The whole story on real solar cells, in minutes.")
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Gets model, report, pictures.")] = Path("runs/demo"),
    max_train_steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fewer is faster and worse.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, data order and noise.")] = 0,
) -> None:
    """Trains on good solar cells, and shows which others it finds defective."""
    from diffad.demo import run_demo

    report = run_demo(check_model_folder(output), max_train_steps, seed)
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


GoodImages = Annotated[str, typer.Argument(metavar="DATA", help="Good images: a folder, data set, elpv.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Gets the pipeline.")]
Categories = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one; may be repeated.")]
Layout = Annotated[str | None, typer.Option(metavar="NAME", help="Force a layout: mvtec_ad, visa, ...")]
FalseAlarmRate = Annotated[float, typer.Option(metavar="RATE", help="Of good parts that may alarm.")]
DataSeed = Annotated[int, typer.Option(min=0, metavar="N", help="Of what is held out, noise.")]


def training_flags(
    data: str,
    output: Path,
    category: list[str] | None,
    dataset: str | None,
    false_alarm_rate: float,
    part_pattern: str | None,
    on_bad_image: OnBadImage,
    seed: int,
    resolution: str | None,
    tile_size: str | None,
    roi: Path | None,
) -> list[str]:
    """The same, as the scripts in `training` take them."""
    if not data:
        raise ValueError("`data` is empty. Is a variable of the shell not set?")
    source = ["--train_data_dir", data] if data == "elpv" or data.startswith("elpv/") or Path(data).exists() else []
    flags = [*(source or ["--dataset_name", data]), f"--output_dir={check_model_folder(output)}", "--seed", str(seed)]
    flags += ["--false_alarm_rate", str(false_alarm_rate), "--on_bad_image", on_bad_image.value]
    flags += ["--dataset", dataset] if dataset else []
    flags += [] if part_pattern is None else [f"--part_pattern={part_pattern}"]  # which may begin with a dash
    flags += ["--resolution", *resolution.split()] if resolution else []
    flags += ["--roi", str(roi)] if roi else []
    flags += ["--tile_size", *tile_size.split()] if tile_size else []
    return [*flags, *(["--category", *category] if category else [])]


@app.command(cls=TakesHeightAndWidth, short_help="Trains AnomalyDenoise on good images, and chooses the rest.")
def train(
    data: GoodImages,
    output: Output,
    minutes: Annotated[float, typer.Option(metavar="N", help="Of the whole run.")] = 20.0,
    category: Categories = None,
    dataset: Layout = None,
    false_alarm_rate: FalseAlarmRate = 0.01,
    part_pattern: PartPattern = None,
    on_bad_image: BadImages = OnBadImage.error,
    seed: DataSeed = 0,
    resolution: Resolution = None,
    tile_size: TileSize = None,
    roi: Roi = None,
) -> None:
    """A denoiser, and beside it what fit keeps; what of them counts, defects drawn on good images choose.

    More settings, several processes: accelerate launch training/train_ddpm.py.
    """
    from diffad.training.train_ddpm import main as run

    flags = training_flags(
        data, output, category, dataset, false_alarm_rate, part_pattern, on_bad_image, seed, resolution, tile_size, roi
    )
    run([*flags, "--minutes", str(minutes)])
    console.print(f"Next: diffad predict {escape(str(output))} NEW_PARTS --output RESULTS", highlight=False)


@app.command(cls=TakesHeightAndWidth, short_help="A detector from good images in a minute, with nothing trained.")
def fit(
    data: GoodImages,
    output: Output,
    category: Categories = None,
    dataset: Layout = None,
    false_alarm_rate: FalseAlarmRate = 0.01,
    part_pattern: PartPattern = None,
    on_bad_image: BadImages = OnBadImage.error,
    seed: DataSeed = 0,
    resolution: Resolution = None,
    tile_size: TileSize = None,
    roi: Roi = None,
    multi_scale: Annotated[bool, typer.Option("--multi-scale", help="Two sizes: finds more, 4x as slow.")] = False,
    calibration_fraction: Annotated[
        float | None, typer.Option(metavar="F", help="Share held out (none: left out in turn).")
    ] = None,
    kept_images: Annotated[int, typer.Option(min=0, metavar="K", help="For update to go on (200).")] = 0,
) -> None:
    """Good images' features: their Gaussian and the nearest of them, calibrated.
    More settings, several processes: accelerate launch training/fit.py.
    """
    from diffad.training.fit import main as run

    flags = training_flags(
        data, output, category, dataset, false_alarm_rate, part_pattern, on_bad_image, seed, resolution, tile_size, roi
    )
    flags += ["--feature_image_size", "auto"] if multi_scale else []
    flags += [] if calibration_fraction is None else ["--calibration_fraction", str(calibration_fraction)]
    run([*flags, "--kept_images", str(kept_images)])
    console.print(f"Next: diffad predict {escape(str(output))} NEW_PARTS --output RESULTS", highlight=False)


app.command(short_help="Scores images, and outlines their defects.")(predict)
app.command(short_help="Why images have their scores, and which good ones they are like.")(explain)
app.command(short_help="Whether light, focus or parts have changed since calibration.")(drift)
app.command(short_help="Learns new good images, without the old files.")(update)
app.command(short_help="Scores images as they come into a folder.")(watch)
app.command(short_help="A page and an HTTP API for a model.")(serve)


@app.command(short_help="The field's metrics on a test split, and a page to read.")
def evaluate(
    model: ModelOrFile,
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="With a test split: folder, Hub id, elpv/mono.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The report, .json.")] = Path("report.json"),
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Force a layout: mvtec_ad, visa, ...")] = None,
    category: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one; may be repeated.")] = None,
    on_bad_image: BadImages = OnBadImage.error,
    batch_size: BatchSize = 16,
    resolution: Annotated[int, typer.Option(metavar="PIXELS", help="A side, at which maps meet masks.", min=8)] = 256,
) -> None:
    """The field's metrics on a test split, by category, as tables and a page.

    For several processes: accelerate launch training/evaluate.py.
    """
    from diffad.training.evaluate import main as run

    flags = ["--model", model, "--data", data, "--output", str(output), "--on_bad_image", on_bad_image.value]
    flags += ["--batch_size", str(batch_size), "--resolution", str(resolution)]
    flags += ["--dataset", dataset] if dataset else []
    run([*flags, *(["--category", *category] if category else [])])


@app.command(short_help="Statistics and thresholds from good images.")
def calibrate(
    model: Model,
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="Good images: a folder, data set, elpv.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to save (MODEL, if a folder).")] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Of good parts that may alarm (MODEL's, else 0.01).")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Force a layout.")] = None,
    category: Category = None,
    part_pattern: PartPattern = None,
    smallest_area: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of an image: less is no defect (as MODEL has it).")
    ] = None,
    on_bad_image: BadImages = OnBadImage.error,
    batch_size: BatchSize = 16,
    device: Device = None,
    roi: Roi = None,
) -> None:
    """Statistics and thresholds from good images that training has not seen.

    Of a data set, its train split. Half of the parts set thresholds, or all where no denoiser runs.
    """
    import numpy as np

    from diffad.data import check_part_pattern, halve_parts, load_anomaly_dataset, part_index
    from diffad.data.checks import dataset_value_range, good_of_one_category, without_copies
    from diffad.data.loading import is_plain_folder
    from diffad.files import locked_folder
    from diffad.model_card import REPORT_NAME, remove_reports
    from diffad.process_share import launched_processes, on_main

    if output is None and not Path(model).is_dir():
        raise ValueError(f"`output` is needed: {model} is not a folder that could be written to.")
    if not model:
        raise ValueError("`model` is empty. Is a variable of the shell not set?")
    folder = check_model_folder(Path(model) if output is None else output)
    if part_pattern is not None:
        check_part_pattern(part_pattern)
    # of a folder of images alone, `category` says what the model calls them
    of_data = None if dataset in (None, "folder") and is_plain_folder(data) else category
    loaded = load_anomaly_dataset(data, "train", of_data, dataset, on_bad_image.value)
    good = good_of_one_category(loaded, f"`category` is needed: {data}", "one is calibrated at a time.")
    good = without_copies(good)
    images, statistics_images = good["image"], None
    if part_pattern is not None:
        part = part_index(good["path"], part_pattern)
        if part.max(initial=0) == 0:
            raise ValueError(
                f"`part_pattern` {part_pattern!r} finds the same part in all {len(good)} good images, and it takes "
                "two. Give one that tells them apart, or leave it out."
            )
        of_statistics = halve_parts(part)
        images, statistics_images = (
            good.select(np.flatnonzero(chosen))["image"] for chosen in (~of_statistics, of_statistics)
        )
    accelerator = launched_processes()
    with ExitStack() as stack:
        # of two at once, each would begin with the old model, and the later one lose what the other has set
        folder.mkdir(parents=True, exist_ok=True)
        on_main(accelerator, lambda: stack.enter_context(locked_folder(folder, MODEL_LOCK_NAME, "`output`")))
        pipeline = load_pipeline(model, device or (str(accelerator.device) if accelerator else None))
        if not pipeline.categories and category is not None and same_name(category, {*good["category"]}) is None:
            raise ValueError(
                f"`category` is {category!r}, but the model is of one category without a name, and the images are of "
                f"{good['category'][0]!r}. Leave it out."
            )
        leave_one_out = part_pattern is None and pipeline.leaves_each_out(len(good))
        rate_before = None if pipeline.calibration is None else pipeline.calibration.false_alarm_rate
        pipeline.calibrate(
            images,
            statistics_images,
            false_alarm_rate=false_alarm_rate,
            category=category if len(pipeline.categories) > 1 else None,
            batch_size=batch_size,
            value_range=None if pipeline.config.value_range is not None else dataset_value_range(good),
            roi=roi,
            leave_one_out=leave_one_out,
            smallest_area=smallest_area,
            accelerator=accelerator,
        )
        on_main(accelerator, lambda: pipeline.save_pretrained(folder))
    if accelerator is not None:
        accelerator.end_training()  # a process that exits with its group still open may abort
        if not accelerator.is_main_process:
            return
    if (folder / REPORT_NAME).is_file():  # it spoke of the statistics that were here before
        remove_reports(folder)
        console.print(f"Removed {escape(str(folder / REPORT_NAME))}: it was measured with the old calibration.")
    if not pipeline.has_thresholds:
        console.print(f"Saved to {escape(str(folder))}. One or two images give maps and scores, and no thresholds.")
        return
    index = pipeline.category_index(category if len(pipeline.categories) > 1 else None)
    calibration = pipeline.calibration
    console.print(
        f"Calibrated on {len(good)} good images, of which {calibration.num_good_images(index)} set the thresholds, and "
        f"saved to {escape(str(folder))}: {calibration.describe_rate(index)}.",
        highlight=False,
        soft_wrap=True,
    )
    for i, name in enumerate(pipeline.categories if calibration.false_alarm_rate != rate_before else ()):
        if i != index and calibration.image_threshold[i].isfinite():
            told = f"{escape(name)}, whose thresholds were set anew: {calibration.describe_rate(i)}."
            console.print(told, highlight=False, soft_wrap=True)


@app.command()
def benchmark(
    model: ModelOrFile,
    batch_size: BatchSize = 16,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls, after a first.")] = 5,
    device: Device = None,
    dtype: DtypeOrOwn = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="On the CPU: torch, ONNX Runtime, OpenVINO.")] = False,
) -> None:
    """Images per second, where the time goes, and peak memory."""
    if compare:
        others = {"batch_size": batch_size != 16, "device": device is not None, "dtype": dtype is not None}
        if given := [name for name, is_given in others.items() if is_given]:
            raise ValueError(
                f"`compare` takes batches of 1 and 16 on the CPU, in precisions of its own: leave out `{given[0]}`."
            )
        from diffad.evaluation.comparison import compare_runtimes, comparison_text

        comparison = compare_runtimes(load_pipeline(model, "cpu"), repeats)
        print(json.dumps({"model": model, **comparison}) if as_json else comparison_text(comparison))
        return
    from diffad.evaluation.speed import benchmark_pipeline

    loaded = load_model(model, device, dtype)
    dtype = loaded.precision if is_exported(model) else dtype or "float32"
    result = benchmark_pipeline(loaded, batch_size, repeats)
    if as_json:
        print(json.dumps({"model": model, "dtype": dtype, **result}))
        return
    parts = ", ".join(f"{name} {value:.1f}" for name, value in result["milliseconds_by_part"].items())
    print(
        f"{result['milliseconds_per_image']:.1f} ms an image ({result['images_per_second']:.1f} images/s), batch of "
        f"{batch_size} at {result['resolution']} px, {dtype}\nof which, in ms: {parts}\n"
        f"peak memory {result['peak_memory_mib']} MiB"
    )


app.command(short_help="One graph, from pixels to verdicts, that runs without torch.")(export)
app.command()(convert)
app.command()(push)


# Where an exported file is all there is, `diffad` was installed without what it needs
BROUGHT_BY = dict.fromkeys(("torch", "accelerate", "diffusers", "matplotlib"), "diffad")
BROUGHT_BY["datasets"] = "'diffad[train]'"


def why_nothing_is_written(error: Exception) -> str | None:
    """In the system's words, where a disk is full or may only be read; else None."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors has it
    number = int(told[1]) if told else getattr(error, "errno", None)
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else None


def describe_error(error: Exception, arguments: list[str]) -> str:
    """One line for the one who typed `arguments`.

    The library's `batch_size` is --batch-size here, and its dataset='hub' is --dataset hub.
    """
    message = " ".join(str(error).split())
    if (reason := why_nothing_is_written(error)) is not None:  # such an error names an unfinished file, or none
        words = [part for word in arguments for part in (word.split("=", 1) if word[:9] == "--output=" else [word])]
        where = " ".join(words[words.index("--output") :][:2]) if "--output" in words else "the output"
        return f"{reason}, while {where} was written. Free space there, or give another."
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):  # nobody foresaw it
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    commands = getattr(typer.main.get_command(app), "commands", {})
    command = next((commands[word] for word in arguments if word in commands), None)
    typed = {}
    for parameter in command.params if command else ():
        option = next((name for name in parameter.opts if name.startswith("--")), None)
        typed[parameter.name] = option or parameter.metavar
    if isinstance(error, ModuleNotFoundError) and error.name in BROUGHT_BY:
        message = (
            f"This needs the package {error.name}: pip install {BROUGHT_BY[error.name]} brings it. Without torch, "
            "predict, watch and serve run what `diffad export` has written."
        )
    typed.setdefault("images", typed.get("data", "`images`"))
    typed.setdefault("output", typed.get("output_dir", typed.get("collect", "`output`")))
    typed.setdefault("precision", typed.get("dtype", "`precision`"))
    typed["path_or_hub_id"] = typed.get("data", "`path_or_hub_id`")
    message = re.sub(r"Call `pipe\.calibrate\(.*category=(.+?)\)`", r"Run `diffad calibrate --category \1`", message)
    message = re.sub(r"`(\w+)`", lambda match: typed.get(match[1]) or match[0], message)
    return re.sub(
        r"\b(\w+)='(\w+)'", lambda match: f"{typed[match[1]]} {match[2]}" if match[1] in typed else match[0], message
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point: an error is one line that says what to do, and with `--debug`, anywhere, a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [word for word in given if word != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as of standard error: its encoding may lack a file's name
    warnings.formatwarning = lambda message, *where, **more: f"warning: {' '.join(str(message).split())}\n"
    try:
        for before, word in zip(["", *arguments], arguments, strict=False):
            if (not word and before.startswith("--")) or re.fullmatch("--[a-z_-]+=", word):
                # of an empty path typer would make the working folder
                raise ValueError(f"{word[:-1] or before} is empty. Is a variable of the shell not set?")
        app(arguments)
    except KeyboardInterrupt:
        console.print("Stopped.")
        sys.exit(130)
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
        else:
            console.print(
                f"[red]error:[/red] {escape(describe_error(error, arguments))}", highlight=False, soft_wrap=True
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
