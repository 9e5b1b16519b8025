"""The page as its reader sees it: an image goes in, a map comes out, and the slider moves the outline."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from browser import browser, find_browser
from conftest import texture, textures, tiny_pipeline, write_png
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("uvicorn")

from test_service import expected, running

from diffad.deployment.detector import Detector
from diffad.deployment.page import build_page

OVERLAY = "document.querySelector('#overlay img')"
OUTLINED = f"""(() => {{
    const canvas = new OffscreenCanvas(64, 64).getContext('2d');
    canvas.drawImage({OVERLAY}, 0, 0);
    const values = canvas.getImageData(0, 0, 64, 64).data;
    let count = 0;
    for (let i = 0; i < values.length; i += 4)
        count += values[i] == 0 && values[i + 1] == 255 && values[i + 2] == 255;
    return count;
}})()"""  # pixels of an outline's colour


def wait_for(tab, expression: str, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := tab.evaluate(expression)):
        assert time.monotonic() < deadline, expression
        time.sleep(0.1)
    return value


def upload(tab, path: Path) -> None:
    wait_for(tab, "!!document.querySelector('#part input[type=file]')")
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    field = tab.call("DOM.querySelector", nodeId=root, selector="#part input[type=file]")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])


def set_rate(tab, value: float) -> None:
    field = "document.querySelector('#rate input[type=number]')"
    setter = "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set"
    tab.evaluate(f"{setter}.call({field}, '{value}'); {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    tab.evaluate(f"{field}.dispatchEvent(new Event('change', {{bubbles: true}})); {field}.blur()")


def test_the_camera_s_picture_is_scored_as_it_is_seen():
    """Gradio mirrors it unless told otherwise, and a good part that is not symmetric would raise an alarm."""
    page = build_page(Detector(tiny_pipeline()), max_bytes=10**6)
    [part] = [one for one in page.config["components"] if one["props"].get("elem_id") == "part"]
    assert part["props"]["webcam_options"]["mirror"] is False


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_an_image_is_shown_with_its_map_and_the_slider_moves_the_mask(tmp_path):
    pipeline = tiny_pipeline().calibrate(textures(60), false_alarm_rate=0.05)
    scores = pipeline.calibration.normal_scores[0]  # (30,)
    large = [texture(seed).repeat(4, axis=0).repeat(4, axis=1) for seed in range(500, 700)]
    # a good one, and one that alarms, with a mask, once half of the good ones may
    often = pipeline.calibration.thresholds_at(0, 0.5)
    found = {i: expected(pipeline, pixels) for i, pixels in enumerate(large)}
    chosen = next(
        i
        for i, output in found.items()
        if often[0] < output.anomaly_score[0] < scores[-2] and output.anomaly_map.max() > 1.02 * often[1]
    )
    part = write_png(tmp_path / "part.png", large[chosen])
    with (
        running(pipeline, page=True, collect=tmp_path / "good") as url,
        browser(find_browser(), tmp_path / "profile") as tab,
    ):
        tab.open(url)
        upload(tab, part)
        wait_for(tab, f"{OVERLAY} && {OVERLAY}.complete && {OVERLAY}.naturalWidth == 64")
        wait_for(tab, "document.querySelector('#words').innerText.includes('normal')")
        assert tab.evaluate(OUTLINED) == 0
        assert "feature error" in tab.evaluate("document.querySelector('#why').innerText")
        set_rate(tab, 50)
        wait_for(tab, "document.querySelector('#words').innerText.includes('anomalous')")
        wait_for(tab, f"{OVERLAY}.complete && {OUTLINED} > 0")
        for _ in range(2):  # twice is once
            tab.evaluate("document.querySelector('#good').click()")
            wait_for(tab, "document.querySelector('#kept').innerText.includes('Kept. In the folder now: 1.')")
        [kept] = (tmp_path / "good").iterdir()
        assert np.array_equal(np.asarray(Image.open(kept)), large[chosen])
        tab.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText.includes('This visit')).click()")
        tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        wait_for(tab, "!!document.querySelector('#csv')")
        tab.evaluate("document.querySelector('#csv').click()")
        wait_for(tab, "!!document.querySelector('#download')")
        tab.evaluate("document.querySelector('#download').click()")
        while not (tmp_path / "history.csv").is_file():
            tab.evaluate("1")
            time.sleep(0.1)
        header, row = (tmp_path / "history.csv").read_text().splitlines()
        assert header == "time,image,score,p-value,verdict,false-alarm rate (%)"
        assert row.split(",")[1] == "part.png"
        assert float(row.split(",")[2]) == pytest.approx(float(found[chosen].anomaly_score[0]), rel=1e-3)
        errors = [told for told in tab.complaints() if "warning" not in (told.get("type"), told.get("level"))]
        assert errors == []  # Gradio itself warns of something that it does without
        assert [address for address in tab.requests() if not address.startswith((url, "data:", "blob:"))] == []
