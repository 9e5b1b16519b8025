"""The page of `diffad serve`: an image, what was found in it, and the threshold as a false-alarm rate."""

from __future__ import annotations

import csv
import datetime
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from diffad.deployment.batching import BusyError
from diffad.deployment.detector import Detector, Finding, Sent, TooLargeError, found_regions
from diffad.files import write_whole
from diffad.installation import needs_extra
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.image_files import read_image
from diffad.reading.inputs import is_image_name
from diffad.visualization import overlay, to_uint8

with needs_extra("app"):
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing about a line leaves its machine
    import gradio as gr
    from fastapi import FastAPI

HISTORY = ["time", "image", "score", "p-value", "verdict", "false-alarm rate (%)"]
REGIONS = ["x", "y", "width", "height", "area (px)", "peak", "mean"]
Seen = tuple[str, Sent, Finding]


def show(detector: Detector, seen: Seen | None, rate: float | None) -> tuple[Any, str, list[list[Any]], str]:
    """A finding at a false-alarm rate in percent: overlay, words, regions, verdict."""
    if seen is None:
        return None, "", [], ""
    _, sent, finding = seen
    assert sent.shown is not None
    anomaly_map = detector.map_at(finding, sent, sent.shown.shape[:2])
    if rate is None or finding.p_value is None:
        return overlay(sent.shown, anomaly_map), f"Score **{finding.score:.4g}** (the model is not calibrated)", [], "-"
    image_threshold, pixel_threshold = detector.thresholds_at(rate / 100.0)
    is_anomalous = finding.score > image_threshold
    mask, regions = found_regions(anomaly_map, pixel_threshold, is_anomalous, detector.smallest_area)
    verdict = "anomalous" if is_anomalous else "normal"
    words = (
        f"**{verdict}**: score **{finding.score:.4g}**, threshold {image_threshold:.4g}. p-value "
        f"**{finding.p_value:.2g}**: the share of good parts that look at least as anomalous."
    )
    if detector.drift is not None and detector.drift.drifted_at is not None:
        words += "\n\nThe parts no longer look as they did at calibration: look at light, focus and place."
    scale = sent.size[1] / mask.shape[1]  # regions are told in the image's own pixels
    rows = []
    for region in regions:
        box = [round(scale * edge) for edge in region.box]
        rows.append([*box, round(scale**2 * region.area), round(region.peak, 3), round(region.mean, 3)])
    return overlay(sent.shown, anomaly_map, mask, pixel_threshold), words, rows, verdict


def write_history(history: list[list[Any]], folder: str) -> str:
    """The visit's table as a CSV file in a new folder below one; its path."""
    path = Path(tempfile.mkdtemp(dir=folder), "history.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HISTORY, *history])
    return str(path)


def keep_good(path: str | None, folder: Path) -> str:
    """Copies an image into a folder, once, however often it is called good; says so."""
    if path is None:
        return ""
    content = Path(path).read_bytes()
    try:
        read_image(path, content)
    except UnreadableImageError as error:
        return f"Not kept: {error}"
    number = hashlib.sha256(content).hexdigest()[:16]
    if not list(folder.glob(f"*-{number}.*")):
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        with write_whole(folder / f"{now}-{number}{Path(path).suffix.lower()}") as unfinished:
            unfinished.write_bytes(content)
    return f"Kept. In the folder now: {sum(map(is_image_name, os.listdir(folder)))}."


def build_page(detector: Detector, max_bytes: int, collect: Path | None = None) -> gr.Blocks:
    """The page, as Gradio has it; `collect` is a folder for what is called good."""
    calibration = detector.pipeline.calibration if detector.pipeline.has_thresholds else None
    stated, least = None, 1.0
    if calibration is not None:
        least = 100.0 / (calibration.num_good_images(detector.index) + 1)
        stated = 100.0 * calibration.stated_false_alarm_rate(detector.index)

    written = tempfile.TemporaryDirectory(prefix="diffad-")  # tables that somebody asked for; goes with the process

    def look(path: str | None, rate: float | None, history: list[list[Any]]) -> tuple[Any, ...]:
        if path is None:
            return None, None, "", "", [], None, history, history
        name = Path(path).name
        try:
            if Path(path).stat().st_size > max_bytes:
                raise TooLargeError(f"{name} has more than {max_bytes:,} bytes.")
            sent = detector.read(name, Path(path).read_bytes(), for_screen=True)
            finding = detector.submit([sent])[0].result()
            explanation = detector.explain(sent)
            because = "" if explanation is None else explanation.in_words()
        except (UnreadableImageError, TooLargeError, BusyError) as error:
            gr.Warning(str(error))
            return None, None, f"**No verdict.** {error}", "", [], None, history, history
        seen = (name, sent._replace(network_input=None), finding)
        picture, words, rows, verdict = show(detector, seen, rate)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        p_value = None if finding.p_value is None else round(finding.p_value, 4)
        history = [*history, [now, name, round(finding.score, 4), p_value, verdict, rate]]
        rebuilt = finding.reconstruction
        rebuilt = None if rebuilt is None else to_uint8(rebuilt)
        return seen, picture, words, because, rows, rebuilt, history, history

    def move(seen: Seen | None, rate: float | None) -> tuple[Any, ...]:
        return show(detector, seen, rate)[:3]

    with gr.Blocks(title="diffad", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        seen = gr.State(None, time_to_live=3600)
        history = gr.State([], time_to_live=86400)
        gr.Markdown("# Is this part good?")
        with gr.Row():
            sources: Any = ["upload", "webcam", "clipboard"]
            image = gr.Image(
                label="Part",
                type="filepath",
                image_mode=None,
                sources=sources,
                webcam_options=gr.WebcamOptions(mirror=False),  # a mirrored part is another one
                elem_id="part",
            )
            shown: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"], "format": "png"}
            picture = gr.Image(label="What is unusual", elem_id="overlay", **shown)
            rebuilt = gr.Image(label="As it would be without", visible=False, **shown)
        rate = gr.Slider(
            round(least, 2),
            50.0,
            round(stated, 2) if stated is not None else 1.0,
            step=0.01,
            label="False-alarm rate: of good parts that may raise an alarm, in %",
            visible=calibration is not None,
            elem_id="rate",
        )
        words = gr.Markdown(elem_id="words")
        why = gr.Markdown(elem_id="why")
        if collect is not None:
            with gr.Row():
                good = gr.Button("This part is good: keep it for the next update", elem_id="good")
                kept = gr.Markdown(elem_id="kept")
        regions = gr.Dataframe(headers=REGIONS, label="Regions, in the image's pixels", interactive=False)
        with gr.Accordion("This visit", open=False):
            table = gr.Dataframe(headers=HISTORY, interactive=False)
            as_file = gr.Button("As CSV", elem_id="csv")
            download = gr.DownloadButton("Download history.csv", visible=False, elem_id="download")
        current = rate if calibration is not None else gr.State(None)
        outputs: list[Any] = [seen, picture, words, why, regions, rebuilt, history, table]
        image.change(look, [image, current, history], outputs, show_progress="minimal", api_visibility="private").then(
            lambda seen: gr.Image(visible=seen is not None and seen[2].reconstruction is not None),
            seen,
            rebuilt,
            api_visibility="private",
        )
        # a file of every look's table would take room by the square of a visit's pictures
        as_file.click(
            lambda history: gr.DownloadButton(value=write_history(history, written.name), visible=True),
            history,
            download,
            api_visibility="private",
        )
        if collect is not None:
            folder = collect
            good.click(lambda path: keep_good(path, folder), image, kept, api_visibility="private")
            image.change(lambda: "", None, kept, api_visibility="private")
        if calibration is not None:
            rate.change(move, [seen, rate], [picture, words, regions], show_progress="hidden", api_visibility="private")
    return page


def mount_page(app: FastAPI, detector: Detector, max_bytes: int, collect: Path | None = None) -> FastAPI:
    """Puts the page at `/`, behind the API's own paths. It loads nothing from elsewhere.

    `app.state.end_streams`, called by a server that ends, lets go of the pages that somebody has open: each holds a
    request that would never end.
    """
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    page = build_page(detector, max_bytes, collect)
    app = gr.mount_gradio_app(app, page, path="/", theme=theme, footer_links=[], max_file_size=max_bytes)
    mounted: Any = app.routes[-1]
    app.state.end_streams = mounted.app.stop_event.set
    return app
