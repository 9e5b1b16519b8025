"""The commands for a production line, `diffad drift`, `update`, `watch` and `serve`; `diffad.cli` names them."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from diffad.commands.models import load_model, load_pipeline
from diffad.commands.options import BadImages, BatchSize, Category, Device, Model, ModelOrFile, OnBadImage
from diffad.model_folder import MODEL_LOCK_NAME, check_folder, check_local, check_model_folder

if TYPE_CHECKING:
    from diffad.deployment.outbox import Outbox

console = Console(stderr=True)  # standard output is for results
SECONDS_TO_END = 8  # that `serve` gives running requests; Docker gives 10


def drift(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.csv", help="As `diffad predict` or `watch` writes it.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The plot (drift.png beside it).")] = None,
    chance: Annotated[float, typer.Option(metavar="C", help="Of ever alarming while nothing changes.")] = 0.01,
    fail_on_drift: Annotated[bool, typer.Option("--fail-on-drift", help="Exit with 3 if there is some.")] = False,
) -> None:
    """Whether the parts, in the table's order, still score as the calibration's good images did.

    A bet against it, part by part, and how far it has paid off; parts that raise an alarm are left out.
    """
    from diffad.prediction.drift_table import TableDrift, draw_drift, is_png
    from diffad.reading.inputs import DRIFT_NAME

    if output is not None:
        check_local(output)
    found = TableDrift(scores, chance)
    plot = output or scores.with_name(DRIFT_NAME)
    if plot.is_dir() or (plot.is_file() and not is_png(plot)):  # such as the table, or what lies beside it
        raise ValueError(f"`output` must be the plot's own file, such as drift.png, but is {plot}.")
    print(found.sentence().encode("utf-8", "replace").decode())  # a name in it may be no UTF-8
    try:
        draw_drift(found, plot)
        told = f"Plot: {plot}"
    except ModuleNotFoundError:
        if output is not None:
            raise
        told = "No plot, which takes matplotlib: pip install matplotlib brings it."
    console.print(escape(told), highlight=False, soft_wrap=True)
    if fail_on_drift and found.test.drifted_at is not None:
        raise typer.Exit(3)


def update(
    model: Model,
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="New good images: a folder or data set.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to save (MODEL).")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Force a layout.")] = None,
    category: Annotated[str | None, typer.Option(metavar="NAME", help="Of the data set.")] = None,
    on_bad_image: BadImages = OnBadImage.error,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Statistics and thresholds learn new good images, without the old files; nothing is trained.

    Of a model of `diffad fit --kept-images 200`. Give all good parts of whole periods, alarms among them.
    """
    from diffad.data import load_anomaly_dataset
    from diffad.data.checks import dataset_value_range, good_of_one_category, without_copies
    from diffad.files import locked_folder
    from diffad.model_card import remove_reports
    from diffad.pipelines.updating import load_good_images, save_updatable
    from diffad.process_share import launched_processes, on_main

    if not model or not Path(model).is_dir():
        raise ValueError(f"`model` must be a folder, as `diffad fit` writes it, but there is none at {model}.")
    folder = check_model_folder(Path(model) if output is None else output)
    accelerator = launched_processes()
    with ExitStack() as stack:
        # of two at once, each would begin with the old model, and the later one lose what the other has learned
        folder.mkdir(parents=True, exist_ok=True)
        on_main(accelerator, lambda: stack.enter_context(locked_folder(folder, MODEL_LOCK_NAME, "`output`")))
        pipeline = load_pipeline(model, device or (str(accelerator.device) if accelerator else None))
        good_images = load_good_images(pipeline, model)
        loaded = load_anomaly_dataset(data, "train", category, dataset, on_bad_image.value)
        good = good_of_one_category(loaded, f"`category` is needed: {data}", "this model is of one.")
        good = without_copies(good)
        if pipeline.value_range is None and dataset_value_range(good) is not None:
            raise ValueError(
                f"`data`: images of {data} have more than 8 bits, and {model} learned from images of 8. Give such, or "
                "fit a model to the new ones."
            )
        alarms = pipeline.update(good["image"], good_images, batch_size, accelerator)
        on_main(accelerator, lambda: save_updatable(pipeline, good_images, folder))
    if accelerator is not None:
        accelerator.end_training()  # a process that exits with its group still open may abort
        if not accelerator.is_main_process:
            return
    remove_reports(folder)  # they speak of the calibration that was here before
    if alarms:
        console.print(
            f"{len(alarms)} of the {len(good)} new images raised an alarm before. Look at them: a defect among them is "
            "now good, and the old model must learn again without it.\n"
            + "\n".join(escape(path) for path in good.select(alarms)["path"]),
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"Learned {len(good) - good_images.num_known} good images, and saved to {escape(str(folder))}: "
        f"{good_images.num_seen} are in the statistics ({len(good_images.for_statistics)} kept), "
        f"{len(good_images.for_thresholds)} set the thresholds: {pipeline.calibration.describe_rate(0)}.",
        highlight=False,
        soft_wrap=True,
    )


def watch(
    model: ModelOrFile,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where images come in.")],
    output_dir: Annotated[Path, typer.Option("--output", metavar="DIR", help="Gets scores.csv and pictures.")],
    settle: Annotated[float, typer.Option(metavar="S", help="Seconds unchanged until a file is whole.")] = 1.0,
    poll: Annotated[bool, typer.Option("--poll", help="List the folder: for network drives.")] = False,
    on_anomaly: Annotated[str | None, typer.Option(metavar="URL", help="Gets anomalies, JSON.")] = None,
    mqtt: Annotated[str | None, typer.Option(metavar="URL", help="mqtt://host/topic gets every event.")] = None,
    category: Category = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each event.")] = False,
) -> None:
    """Scores images as they come into a folder, each once, until Ctrl-C.

    Started again, it goes on. A receiver may get an event twice: `event` tells.
    """
    from diffad.deployment.outbox import Outbox, http_sender, mqtt_sender, without_secrets
    from diffad.deployment.watch import watch_folder

    check_folder(output_dir)
    senders = {}
    if on_anomaly is not None:
        senders["anomaly"] = (http_sender(on_anomaly), without_secrets(on_anomaly))
    if mqtt is not None:
        senders["all"] = (mqtt_sender(mqtt), "The MQTT broker")
    pipeline = load_model(model, device)
    stop = threading.Event()
    former = {one: signal.signal(one, lambda *_: stop.set()) for one in (signal.SIGINT, signal.SIGTERM)}

    def outboxes(below: Path) -> dict[str, Outbox]:
        return {name: Outbox(below / name, *sender) for name, sender in senders.items()}

    def report(event: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(event), flush=True)
        elif event["verdict"] == "drift":
            console.print(escape(event["message"]), highlight=False, soft_wrap=True)
        elif event["verdict"] != "normal":
            score = f", score {event['score']:.4g}" if "score" in event else ""
            console.print(escape(f"{event['verdict']}: {event['path']}{score}"), highlight=False, soft_wrap=True)

    console.print(f"Watching {escape(str(folder))}; Ctrl-C ends it.", highlight=False, soft_wrap=True)
    try:
        count = watch_folder(
            pipeline, folder, output_dir, stop, settle, poll, outboxes, category, batch_size, report=report
        )
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)
    console.print(f"Stopped after {count} images. Scores: {escape(str(output_dir / 'scores.csv'))}", soft_wrap=True)


def serve(
    model: ModelOrFile,
    host: Annotated[str, typer.Option(metavar="H", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="P", help="Where it listens.")] = 7860,
    token: Annotated[str | None, typer.Option(metavar="T", help="Callers must show it.")] = None,
    collect: Annotated[Path | None, typer.Option(metavar="DIR", help="Gets what the page calls good.")] = None,
    category: Category = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """A page at /, and an API: POST /predict with the field image, /healthz, /metrics.

    With a token: `Authorization: Bearer T`, and the page at /?token=T.
    """
    from diffad.deployment.allocator import limit_arenas

    limit_arenas()  # before there are threads

    from diffad.deployment.service import create_app
    from diffad.installation import needs_extra

    with needs_extra("app"):
        import uvicorn
    if collect is not None:
        check_folder(collect)
    listening = bound_socket(host, port)  # before the model is loaded
    app = create_app(load_model(model, device), category, token, batch_size, collect=collect)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Says where it serves once it does, when Ctrl-C ends it in good order and port 0 has become a number."""
            await super().startup(sockets)
            _, port, *_ = self.servers[0].sockets[0].getsockname()
            shown = f"http://{host}:{port}/" + ("" if token is None else "?token=...")
            console.print(f"Serving at {escape(shown)}; Ctrl-C ends it.", highlight=False, soft_wrap=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Waits for running requests, and for no page that is open."""
            app.state.end_streams()
            await super().shutdown(sockets)

    with listening, suppress(KeyboardInterrupt):
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_END)
        Server(config).run([listening])
    console.print("Stopped.")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket for a server, at which nobody is heard yet.

    Raises:
        ValueError: the port is taken, or the host is none of this machine's.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # else a port stays taken for a minute after a server's end
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"`port`: nobody can be served at {host}:{port} ({error.strerror}). Give another `port` or `host`."
        ) from error
    return bound
