"""The HTTP API over a real port: answers as a call gives them, limits, the token, many callers at once."""

from __future__ import annotations

import base64
import io
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import texture, textures, tiny_pipeline
from launching import read_until_serving
from PIL import Image

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.cli import main
from diffad.deployment.batching import Batcher, BusyError
from diffad.deployment.detector import Detector, Sent

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from diffad.deployment.service import create_app, describe  # noqa: E402


@contextmanager
def running(*arguments, **options) -> Iterator[str]:
    """The address of a service, without the page unless asked for."""
    with serving(create_app(*arguments, **{"page": False, **options})) as url:
        yield url


@contextmanager
def serving(app) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline().calibrate(textures(19), false_alarm_rate=0.25)


@pytest.fixture(scope="module")
def url(pipeline) -> Iterator[str]:
    with running(pipeline, max_pixels=10_000, max_bytes=100_000) as address:
        yield address


def png_that_says(width: int, height: int) -> bytes:
    """A PNG file whose header names a size that its pixels do not have."""
    file = png(texture(0))
    header = b"IHDR" + struct.pack(">II", width, height) + file[24:29]
    return file[:12] + header + struct.pack(">I", zlib.crc32(header)) + file[33:]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def post(url: str, *contents: bytes, **options) -> httpx.Response:
    files = [("image", (f"{i}.png", content)) for i, content in enumerate(contents)]
    return httpx.post(f"{url}/predict", files=files, timeout=60, **options)


def expected(pipeline, pixels: np.ndarray):
    return pipeline(pixels)


def test_the_answer_is_what_a_call_gives(pipeline, url):
    images = [texture(50, (40, 30)), texture(51, (20, 60), defect=True)]
    answer = post(url, *map(png, images), params={"mask": "true"})
    assert answer.status_code == 200
    for i, (found, pixels) in enumerate(zip(answer.json()["images"], images, strict=True)):
        direct = expected(pipeline, pixels)
        assert found["name"] == f"{i}.png"
        assert found["size"] == list(pixels.shape[:2])
        assert found["score"] == pytest.approx(float(direct.anomaly_score[0]), rel=1e-4)
        assert found["p_value"] == pytest.approx(float(direct.p_value[0]))
        assert found["is_anomalous"] == bool(direct.is_anomalous[0])
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask_png"])))) > 0
        assert mask.shape == pixels.shape[:2]
        assert (mask != direct.anomaly_mask[0]).mean() < 0.01
        assert sum(region["area"] for region in found["regions"]) == mask.sum()
        for region in found["regions"]:
            x, y, width, height = region["box"]
            assert mask[y : y + height, x : x + width].any()
            assert region["mean"] <= region["peak"]
    assert "mask_png" not in post(url, png(images[0])).json()["images"][0]


@pytest.mark.parametrize(
    ("contents", "status", "words"),
    [
        ([b"no image"], 422, "Image 0 of the request: `image`: 0.png cannot be read as an image"),
        ([png(texture(0)), png(texture(0))[:200]], 422, "Image 1 of the request"),
        ([b""], 422, "empty"),
        ([png(np.zeros((101, 100, 3), np.uint8))], 413, "100 x 101 pixels, and 10,000 are the most"),
        ([png_that_says(60_000, 60_000)], 413, "too many pixels, and 10,000 are the most"),
        ([bytes(200_000)], 413, "more than 100,000 bytes"),
        ([png(texture(0))] * 65, 413, "64 are the most"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_a_reason(url, contents, status, words):
    answer = post(url, *contents)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_an_image_that_is_sent_as_text_is_refused_and_not_sent_back(url):
    """As `curl -F image=<part.png` sends it, without a name."""
    answer = httpx.post(f"{url}/predict", files=[("image", (None, png(texture(0, 64))))], timeout=60)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("Send each image as a file with a name, in the field `image`")
    assert "PNG" not in answer.text


def test_more_than_8_bits_take_a_range(pipeline):
    """One for each image would move their scores against each other."""
    file = io.BytesIO()
    grey = texture(3)[..., 0].astype(np.uint16)
    Image.fromarray(grey * 16).save(file, "PNG")
    with running(pipeline) as url:
        answer = post(url, file.getvalue())
        assert answer.status_code == 422
        assert "--value_range" in answer.json()["detail"]
    with_range = tiny_pipeline(value_range=4080).calibrate(textures(19), false_alarm_rate=0.25)
    with running(with_range) as url:
        [found] = post(url, file.getvalue()).json()["images"]
    expected = with_range(np.stack([grey.astype(np.uint8)] * 3, axis=-1))
    assert found["score"] == pytest.approx(float(expected.anomaly_score[0]), rel=1e-4)


def test_a_body_that_does_not_say_how_long_it_is_is_cut_off(url):
    parts = [b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n', *[bytes(50_000)] * 4]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{url}/predict", content=iter(parts), headers=headers, timeout=60)
    assert answer.status_code == 413
    assert httpx.post(f"{url}/predict", timeout=60).status_code == 422  # no image at all


def test_many_at_once_are_neither_lost_nor_mixed_up(pipeline):
    images = [texture(100 + i, (10 + i % 7, 12 + i % 5)) for i in range(60)]
    direct = [float(expected(pipeline, pixels).anomaly_score[0]) for pixels in images]
    with running(pipeline, batch_size=8) as url, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: post(url, b"broken" if i % 10 == 9 else png(images[i])), range(60)))
        told = httpx.get(f"{url}/metrics").text
    for i, answer in enumerate(answers):
        assert answer.status_code == (422 if i % 10 == 9 else 200)
        if answer.status_code == 200:
            [found] = answer.json()["images"]
            assert found["score"] == pytest.approx(direct[i], rel=1e-3)
            assert found["size"] == list(images[i].shape[:2])
    assert 'diffad_requests_total{status="200"} 54.0' in told
    assert 'diffad_requests_total{status="422"} 6.0' in told
    assert "diffad_images_total 54.0" in told
    assert "diffad_waiting_images 0.0" in told


def test_a_full_queue_says_so():
    begun, go_on = threading.Event(), threading.Event()
    sizes: list[int] = []

    def run(items: list[int]) -> list[int]:
        begun.set()
        assert go_on.wait(60)
        return [item + 1 for item in items]

    batcher = Batcher(run, 4, 6, sizes.append)
    futures = batcher.submit([0])
    assert begun.wait(60)
    futures += batcher.submit(range(1, 6))
    with pytest.raises(BusyError, match="6 images wait already"):
        batcher.submit([6])
    go_on.set()
    assert [future.result(60) for future in futures] == [1, 2, 3, 4, 5, 6]
    batcher.close()
    assert sizes == [1, 4, 1]  # what came meanwhile ran together


def test_what_nobody_waits_for_any_more_is_not_run():
    begun, go_on = threading.Event(), threading.Event()

    def run(items: list[int]) -> list[int]:
        begun.set()
        assert go_on.wait(60)
        return items

    batcher = Batcher(run, 1, 10)
    futures = batcher.submit([0, 1, 2])
    assert begun.wait(60)
    assert [future.cancel() for future in futures[:2]] == [False, True]  # the first is being run
    go_on.set()
    assert [futures[i].result(60) for i in (0, 2)] == [0, 2]
    batcher.close()
    assert batcher.count == 0


def test_health_and_metrics_are_told_while_many_wait():
    pipeline = tiny_pipeline().calibrate(textures(19), false_alarm_rate=0.25)
    go_on = threading.Event()

    def wait(*_) -> None:
        assert go_on.wait(120)

    hook = pipeline.unet.register_forward_hook(wait)
    with running(pipeline) as url, ThreadPoolExecutor(60) as pool:
        try:
            answers = [pool.submit(post, url, png(texture(i))) for i in range(60)]
            while "diffad_waiting_images 60.0" not in httpx.get(f"{url}/metrics", timeout=60).text:
                time.sleep(0.05)
            assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "ok"
            assert not any(answer.done() for answer in answers)
        finally:
            go_on.set()
            hook.remove()
        assert {answer.result(60).status_code for answer in answers} == {200}


def test_of_large_images_one_map_is_in_memory(pipeline):
    """And none of an image that raises no alarm."""
    detector = Detector(pipeline)
    sent = detector.read("part.png", png(texture(0)))
    finding = detector.submit([sent])[0].result(60)
    large = Sent((4100, 4100), None, None)

    def peak(callers: int, is_anomalous: bool, with_mask: bool) -> int:
        """In bytes, of so many at once."""
        found = finding._replace(is_anomalous=is_anomalous, anomaly_map=finding.anomaly_map + 100.0 * is_anomalous)
        tracemalloc.start()
        with ThreadPoolExecutor(callers) as pool:
            given = (detector, "part.png", large, found, with_mask)
            answers = list(pool.map(lambda _: describe(*given), range(callers)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [len(answer["regions"]) for answer in answers] == [int(is_anomalous)] * callers
        return most

    assert peak(3, is_anomalous=False, with_mask=False) < 10 * 2**20
    assert peak(1, is_anomalous=False, with_mask=True) < 4 * 4100**2  # less than a map
    alone = peak(1, is_anomalous=True, with_mask=False)
    assert alone > 4 * 4100**2
    assert peak(3, is_anomalous=True, with_mask=False) < 1.2 * alone


def test_an_error_of_a_batch_reaches_its_callers_and_no_others():
    def run(items: list[int]) -> list[float]:
        return [1 / item for item in items]

    for batch_size in (1, 4):
        batcher = Batcher(run, batch_size, 10)
        futures = batcher.submit([1, 0, 2, 4])
        with pytest.raises(ZeroDivisionError):
            futures[1].result(60)
        assert [futures[i].result(60) for i in (0, 2, 3)] == [1.0, 0.5, 0.25]
        batcher.close()
        assert batcher.count == 0


def test_an_image_without_a_score_fails_alone(pipeline):
    """White images come out of this network as NaN, as those do that are too much for half precision."""

    def overflow(network, arguments, output):
        output.features[arguments[0].mean(dim=(1, 2, 3)) > 0.9] = float("nan")

    hook, sizes = pipeline.unet.register_forward_hook(overflow), []
    white = png(np.full((24, 24, 3), 255, np.uint8))
    try:
        detector = Detector(pipeline, report=sizes.append)
        sent = [detector.read("image", content) for content in (png(texture(0)), png(texture(1)), white)]
        with detector.running:  # the first may go alone, and the others then go together
            futures = detector.submit(sent)
        scores = [future.result(60).score for future in futures[:2]]
        assert np.isfinite(scores).all()
        with pytest.raises(ValueError, match="NaN, which is no verdict"):
            futures[2].result(60)
        detector.batcher.close()
        assert max(sizes) >= 2
        with running(pipeline) as url:
            answer = post(url, white)
            assert answer.status_code == 500
            assert "NaN" in answer.json()["detail"]
            assert post(url, png(texture(0))).json()["images"][0]["score"] == pytest.approx(scores[0])
    finally:
        hook.remove()


@pytest.mark.parametrize("token", ["secret", "ab+c/d=="])
def test_only_who_shows_the_token_gets_in(pipeline, token):
    with running(pipeline, token=token) as url:
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "drift": False}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "diffad_token=wrong"}):
            answer = post(url, png(texture(0)), headers=headers)
            assert answer.status_code == 401
            assert "Bearer TOKEN" in answer.text
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/?token=wrong").status_code == 401
        assert post(url, png(texture(0)), headers={"Authorization": f"Bearer {token}"}).status_code == 200
        shown = httpx.get(f"{url}/?token={token}")
        assert (shown.status_code, shown.headers["location"]) == (303, "/")
        cookies = {"Cookie": shown.headers["set-cookie"].split(";")[0]}
        told = httpx.get(f"{url}/metrics", headers=cookies)
        assert told.status_code == 200
        assert 'diffad_requests_total{status="401"} 3.0' in told.text
        assert 'diffad_requests_total{status="200"} 1.0' in told.text


def test_a_changed_world_is_told():
    with running(tiny_pipeline().calibrate(textures(40), false_alarm_rate=0.05)) as url:
        black = png(np.zeros((16, 16, 3), np.uint8))
        for _ in range(40):
            assert post(url, black).status_code == 200
        assert httpx.get(f"{url}/healthz").json()["drift"] is True
        assert "diffad_drifted 1.0" in httpx.get(f"{url}/metrics").text


def test_another_rate_gives_the_thresholds_that_it_would_have_set():
    scores, maxima = torch.rand(99), torch.rand(99) + 1.0
    kept = ScoreCalibration(1, num_scores=99, false_alarm_rate=0.05, keeps_maxima=True)
    plain = ScoreCalibration(1, num_scores=99, false_alarm_rate=0.05)
    for calibration in (kept, plain):
        calibration.set_thresholds(0, scores, maxima)
    other = ScoreCalibration(1, num_scores=99, false_alarm_rate=0.2)
    other.set_thresholds(0, scores, maxima)
    assert kept.thresholds_at(0, 0.2) == pytest.approx((float(other.image_threshold), float(other.pixel_threshold)))
    # of an earlier version, which kept no maxima
    assert plain.thresholds_at(0, 0.2) == pytest.approx((float(other.image_threshold), float(plain.pixel_threshold)))
    plain.set_thresholds(0, maxima, maxima)
    assert plain.thresholds_at(0, 0.2) == pytest.approx((float(other.pixel_threshold),) * 2)


def test_the_space_is_the_same_service(pipeline, tmp_path, monkeypatch):
    """As the Hub runs it: `app.py`, with the variables that its README names; the metadata name what is there."""
    space = Path(__file__).parents[2] / "model_cards" / "space"
    metadata = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio"
    assert (space / metadata["app_file"]).is_file()
    assert (space / "requirements.txt").read_text() == "diffad[app]\n"
    with pytest.raises(SystemExit, match="DIFFAD_MODEL"):
        runpy.run_path(str(space / "app.py"))
    pipeline.save_pretrained(tmp_path)
    monkeypatch.setenv("DIFFAD_MODEL", str(tmp_path))
    monkeypatch.setenv("DIFFAD_TOKEN", "secret")
    app = runpy.run_path(str(space / "app.py"))["app"]
    with serving(app) as url:
        assert post(url, png(texture(0))).status_code == 401
        page = httpx.get(f"{url}/", headers={"Authorization": "Bearer secret"})
        assert "gradio" in page.text


@pytest.mark.parametrize("token", ["", "schlüssel", "secret\n", " secret"])
def test_a_token_that_no_header_holds_is_refused(pipeline, token):
    with pytest.raises(ValueError, match="`token` must"):
        create_app(pipeline, token=token, page=False)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(tmp_path, capsys):
    """And not by the status of an alarm."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for where in (["--port", port], ["--host", "no.such.host.invalid"]):
            with pytest.raises(SystemExit) as ended:
                main(["serve", str(tmp_path / "no model"), *map(str, where)])
            assert ended.value.code == 1
            assert "Give another --port or --host" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no signal reaches one process alone there")
@pytest.mark.parametrize("open_one", ["page", "half a request"])
def test_ctrl_c_ends_it_whatever_is_open(pipeline, tmp_path, open_one):
    pipeline.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "diffad.cli", "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, httpx.Client(timeout=60) as client:
        try:
            told = read_until_serving(process)
            url = httpx.URL(told.split("Serving at ")[1].split(";")[0])
            with socket.create_connection((url.host, url.port)) as connection:
                if open_one == "page":  # which Gradio keeps asking whether it is still there
                    connection.sendall(b"GET /gradio_api/heartbeat/visitor HTTP/1.1\r\nHost: x\r\n\r\n")
                    while b"ALIVE" not in connection.recv(1000):
                        pass
                else:
                    connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
                    assert client.get(url.join("/healthz")).status_code == 200
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0
            told = process.stderr.read()
            assert "Stopped." in told
            assert open_one != "page" or "Traceback" not in told
        finally:
            process.kill()


def test_a_category_without_thresholds_is_told_at_the_start():
    pipeline = tiny_pipeline(categories=["a", "b"]).calibrate(textures(6), category="a", false_alarm_rate=0.3)
    with pytest.raises(ValueError, match="Category 'b' is not calibrated"):
        create_app(pipeline, category="b", page=False)
