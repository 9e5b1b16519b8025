"""A watched folder: each event once, whatever writers and the watching process go through."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import texture, textures, tiny_pipeline, write_folder, write_png
from PIL import Image

from diffad.deployment.outbox import Outbox, http_sender, mqtt_sender, without_secrets
from diffad.deployment.watch import SettlingFiles, take_up_table, watch_folder
from diffad.prediction.journal import COLUMNS, ENCODING

pytest.importorskip("watchfiles")


@pytest.fixture(scope="module")
def calibrated():
    return tiny_pipeline().calibrate(textures(12), false_alarm_rate=0.25)


@pytest.fixture(scope="module")
def model(calibrated, tmp_path_factory) -> Path:
    calibrated.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


def rows_of(output: Path) -> list[dict[str, str]]:
    if not (output / "scores.csv").is_file():
        return []
    with open(output / "scores.csv", **ENCODING) as file:
        return [row for row in csv.DictReader(file) if row["verdict"]]


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Watching:
    """`watch_folder` in a thread, until the block ends."""

    def __init__(self, *arguments, **options):
        self.stop = threading.Event()
        self.error: BaseException | None = None

        def run() -> None:
            try:
                watch_folder(*arguments, self.stop, **{"settle": 0.2, **options})
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        assert self.error is None, self.error


def write_slowly(path: Path, seed: int, pieces: int = 4) -> None:
    write_png(path.parent / "source" / ".png" / f"{seed}.png", texture(seed))
    content = (path.parent / "source" / ".png" / f"{seed}.png").read_bytes()
    step = len(content) // pieces + 1
    with open(path, "wb") as file:
        for start in range(0, len(content), step):
            file.write(content[start : start + step])
            file.flush()
            time.sleep(0.03)


@pytest.mark.parametrize("poll", [False, True])
def test_each_event_is_scored_once_and_as_by_a_call(calibrated, tmp_path, poll):
    """Files that were there, written slowly, renamed into place, in a new folder, and written anew."""
    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    with Watching(calibrated, folder, out, poll=poll):
        wait_for(lambda: len(rows_of(out)) == 2)
        write_slowly(folder / "slow.png", 7)
        write_png(folder / ".part.png", texture(8)).rename(folder / "renamed.png")
        write_png(tmp_path / "aside" / "deep.png", texture(9))
        (tmp_path / "aside").rename(folder / "sub")
        (folder / "notes.txt").write_text("no image")
        wait_for(lambda: len(rows_of(out)) == 5)
        write_png(folder / "000.png", texture(10))
        wait_for(lambda: len(rows_of(out)) == 6)
    rows = rows_of(out)
    names = Counter(Path(row["path"]).relative_to(folder).as_posix() for row in rows)
    assert names == {"000.png": 2, "001.png": 1, "slow.png": 1, "renamed.png": 1, "sub/deep.png": 1}
    assert len({row["picture"] for row in rows}) == 6  # the rewritten file's pictures replaced none
    for row in rows:
        assert Image.open(out / "overlays" / row["picture"]).size == (16, 16)
        assert row["verdict"] in ("normal", "anomalous")
    again = [row for row in rows if row["path"].endswith("000.png")]
    assert again[0]["score"] != again[1]["score"]

    with Watching(calibrated, folder, out, poll=poll):  # nothing is left to do, and what comes is done
        write_png(folder / "late.png", texture(11))
        wait_for(lambda: len(rows_of(out)) == 7)
    assert rows_of(out)[:6] == rows


def test_a_broken_file_gets_time_and_then_a_row(calibrated, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    content = write_png(tmp_path / "whole.png", texture(0, 64)).read_bytes()
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "paused.png").write_bytes(content[:500])
    with Watching(calibrated, folder, out, settle=0.5):  # a machine may be slow: five seconds until it is broken
        write_png(folder / "good.png", texture(1))
        wait_for(lambda: len(rows_of(out)) >= 1)  # longer than a file takes to settle
        (folder / "paused.png").write_bytes(content)
        wait_for(lambda: len(rows_of(out)) == 3)
    verdicts = {Path(row["path"]).name: row["verdict"] for row in rows_of(out)}
    assert verdicts.pop("broken.png") == "unreadable"
    assert set(verdicts) == {"good.png", "paused.png"}
    assert "unreadable" not in verdicts.values()


@pytest.mark.skipif(sys.platform != "linux", reason="names there are UTF-8")
@pytest.mark.parametrize("poll", [False, True])
def test_a_name_that_is_no_utf_8_ends_nothing(calibrated, tmp_path, poll):
    folder, out = write_folder(tmp_path / "in", 1), tmp_path / "out"
    with Watching(calibrated, folder, out, poll=poll):
        wait_for(lambda: len(rows_of(out)) == 1)
        (folder / os.fsdecode(b"notiz\xfc.txt")).touch()
        time.sleep(0.5)
        write_png(folder / "after.png", texture(7))
        wait_for(lambda: len(rows_of(out)) == 2)
        write_png(folder / "b.png", texture(8)).rename(folder / os.fsdecode(b"geh\xe4use.png"))
        write_png(folder / "last.png", texture(9))
        wait_for(lambda: len(rows_of(out)) == 4, 30.0)  # not only when all is listed again
    assert all(row["verdict"] in ("normal", "anomalous") for row in rows_of(out))
    assert len(list((out / "overlays").iterdir())) == 4


def test_an_empty_path_is_not_the_working_folder(calibrated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "in", 1)
    for folder, output, name in (("", "out", "folder"), ("in", "", "output_dir")):
        with pytest.raises(ValueError, match=f"`{name}` is an empty path. Is a variable of the shell not set"):
            watch_folder(calibrated, folder, output, threading.Event())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_still_grows_is_not_taken_for_whole(tmp_path):
    files = SettlingFiles(0.2, set())
    path = tmp_path / "a.png"
    for length in range(1, 4):
        path.write_bytes(b"x" * length)
        files.note(path)
        assert files.ready() == []
        time.sleep(0.12)
    wait_for(lambda: len(files.ready()) == 1, 5.0)
    assert files.waiting == {}


def test_killed_and_started_again_each_image_is_there_once(model, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-m", "diffad.cli", "watch", str(model), str(folder), "--output", str(out)]
    command += ["--settle", "0.3", "--batch-size", "2", "--device", "cpu", "--json"]
    seeds = iter(range(1000))
    expected: Counter[str] = Counter()
    for run in range(3):
        for i in range(12):
            write_png(folder / f"{run}-{i}.png", texture(next(seeds)))
            expected[f"{run}-{i}.png"] += 1
            time.sleep(0.01)  # so that their times differ
        if run:  # of those that the first run has scored, as the oldest come first
            write_png(folder / f"0-{run}.png", texture(next(seeds)))
            expected[f"0-{run}.png"] += 1
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                lines = [process.stdout.readline() for _ in range(4)]
                assert all(json.loads(line)["event"] for line in lines)
                if run < 2:
                    continue
                wait_for(lambda: len(rows_of(out)) == sum(expected.values()))
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0  # Ctrl-C is the ordinary end
            finally:
                process.kill()
    assert Counter(Path(row["path"]).name for row in rows_of(out)) == expected
    assert len({(row["file"], row["size"], row["modified"]) for row in rows_of(out)}) == len(rows_of(out))


def test_a_row_that_was_cut_off_in_its_last_number_is_no_row(tmp_path):
    """As a disk that is full leaves it: the event is done again, and not entered twice."""
    whole = {**dict.fromkeys(COLUMNS, ""), "path": "a.png", "verdict": "normal", "modified": "1700000000000000000"}
    with open(tmp_path / "scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([whole, {**whole, "path": "b.png"}])
    (tmp_path / "scores.csv").write_bytes((tmp_path / "scores.csv").read_bytes()[:-8])
    assert len(take_up_table(tmp_path)[0]) == 1
    assert [row["path"] for row in rows_of(tmp_path)] == ["a.png"]


def test_a_table_whose_times_were_rounded_is_of_the_same_events(calibrated, tmp_path):
    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    with Watching(calibrated, folder, out):
        wait_for(lambda: len(rows_of(out)) == 2)
    rows = [{**row, "modified": f"{float(row['modified']):.5E}"} for row in rows_of(out)]  # as Excel saves them
    with open(out / "scores.csv", "w", **ENCODING) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with Watching(calibrated, folder, out):
        write_png(folder / "new.png", texture(9))
        wait_for(lambda: len(rows_of(out)) > 2)
    assert [Path(row["path"]).name for row in rows_of(out)] == ["000.png", "001.png", "new.png"]


def test_a_score_that_somebody_made_none_is_named_at_the_start(calibrated, tmp_path):
    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    with Watching(calibrated, folder, out):
        wait_for(lambda: len(rows_of(out)) == 2)
    rows = rows_of(out)
    rows[1]["score"] = "n/a"
    with open(out / "scores.csv", "w", **ENCODING) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=r"scores\.csv holds the score 'n/a' of .*\.png: it is no number"):
        watch_until_it_fails(calibrated, folder, out, print)
    assert rows_of(out) == rows


def test_a_table_that_is_saved_or_removed_meanwhile_gets_the_rows_that_follow(calibrated, tmp_path):
    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    table = out / "scores.csv"
    with Watching(calibrated, folder, out):
        wait_for(lambda: len(rows_of(out)) == 2)
        first = rows_of(out)
        (out / "saved").write_bytes(table.read_bytes().rstrip())  # an editor that leaves out the last line's end
        (out / "saved").replace(table)
        write_png(folder / "after.png", texture(7))
        wait_for(lambda: len(rows_of(out)) == 3)
        assert rows_of(out)[:2] == first
        table.unlink()
        write_png(folder / "later.png", texture(8))
        wait_for(lambda: len(rows_of(out)) == 1)
    assert [Path(row["path"]).name for row in rows_of(out)] == ["later.png"]
    with Watching(calibrated, folder, out):  # what has no row is done again, the rest is not
        wait_for(lambda: len(rows_of(out)) == 4)
    assert sorted(Path(row["path"]).name for row in rows_of(out)) == ["000.png", "001.png", "after.png", "later.png"]


def watch_until_it_fails(pipeline, folder: Path, out: Path, report, **options) -> None:
    stop = threading.Event()
    timer = threading.Timer(60.0, stop.set)  # of a test that would else wait for ever
    timer.start()
    try:
        watch_folder(pipeline, folder, out, stop, settle=0.2, report=report, **options)
    finally:
        timer.cancel()


@pytest.mark.parametrize("leave", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("renamed"))])
def test_a_watched_folder_that_goes_away_ends_it(calibrated, tmp_path, leave):
    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"

    def report(event: dict) -> None:
        if len(rows_of(out)) == 2 and folder.is_dir():
            leave(folder)

    with pytest.raises(FileNotFoundError, match=r"watched folder .*in is no longer there.*start again"):
        watch_until_it_fails(calibrated, folder, out, report)
    assert len(rows_of(out)) == 2


def test_a_polled_folder_is_waited_for(calibrated, tmp_path):
    """As a network drive is away for a while."""
    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    with Watching(calibrated, folder, out, poll=True):
        wait_for(lambda: len(rows_of(out)) == 2)
        folder.rename(tmp_path / "away")
        time.sleep(0.5)
        write_png(tmp_path / "away" / "later.png", texture(7))
        (tmp_path / "away").rename(folder)
        wait_for(lambda: len(rows_of(out)) == 3)
    assert Path(rows_of(out)[-1]["path"]).name == "later.png"


def test_an_output_folder_that_goes_away_ends_it(calibrated, tmp_path):
    folder, out = write_folder(tmp_path / "in", 1), tmp_path / "out"

    def report(event: dict) -> None:
        out.rename(tmp_path / "moved")
        write_png(folder / "later.png", texture(7))

    with pytest.raises(
        FileNotFoundError, match=r"out.scores\.csv cannot be written: its folder was renamed or removed"
    ):
        watch_until_it_fails(calibrated, folder, out, report)
    assert not out.exists()
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "moved")] == ["000.png"]


class Receiver:
    """Answers the first posts with an error of its own, as a service does that is being started."""

    def __init__(self, refused: int):
        self.received: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                nonlocal refused
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = 503 if refused > 0 else 204
                refused -= 1
                if status == 204:
                    outer.received.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alarm"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.filterwarnings("ignore:.*does not take an event")
def test_anomalies_and_drift_are_posted_until_they_are_taken(tmp_path):
    pipeline = tiny_pipeline().calibrate(textures(24), false_alarm_rate=0.08)
    pipeline.calibration.image_threshold.fill_(-1e9)  # everything raises an alarm
    pipeline.calibration.normal_scores.fill_(-1e9)
    receiver = Receiver(refused=1)
    folder, out = write_folder(tmp_path / "in", 30), tmp_path / "out"
    outboxes = lambda below: {"anomaly": Outbox(below / "anomaly", http_sender(receiver.url), "The receiver")}  # noqa: E731
    with Watching(pipeline, folder, out, outboxes=outboxes):
        wait_for(lambda: len({event["event"] for event in receiver.received}) == 31)
    images = [event for event in receiver.received if event["verdict"] == "anomalous"]
    assert {event["path"] for event in images} == {str(path) for path in folder.iterdir()}
    assert all(Path(event["overlay"]).is_file() for event in images)
    [drift] = [event for event in receiver.received if event["verdict"] == "drift"]
    assert "More than half of the parts raise an alarm" in drift["message"]
    assert list((out / "outbox" / "anomaly").iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*does not take an event")
def test_what_a_receiver_did_not_take_waits_for_the_next_start(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outbox = Outbox(tmp_path, http_sender(f"http://127.0.0.1:{port}"), "The receiver")
    outbox.put({"event": "0123456789", "verdict": "anomalous"})
    outbox.close()
    assert [path.name for path in tmp_path.iterdir()] == ["0123456789.json"]
    receiver = Receiver(refused=0)
    Outbox(tmp_path, http_sender(receiver.url), "The receiver").close()
    assert receiver.received[0] == {"event": "0123456789", "verdict": "anomalous"}
    assert list(tmp_path.iterdir()) == []


def test_a_receivers_password_is_told_to_nobody(tmp_path):
    url = Receiver(refused=1).url.replace("http://", "http://line:s3cret@") + "?token=s3cret"
    for i, address in enumerate((url, "http://line:s3cret@127.0.0.1:9/alarm")):  # the other one is not there
        outbox = Outbox(tmp_path / str(i), http_sender(address), without_secrets(address))
        outbox.close()
        outbox.folder.joinpath("1.json").write_text('{"event": "1"}')
        with pytest.warns(UserWarning, match=r"^http://127\.0\.0\.1:\d+/alarm does not take an event") as told:
            outbox.deliver_all(time.monotonic() + 30.0)
        assert not any("s3cret" in str(one.message) for one in told)


def test_a_name_that_is_no_utf_8_is_posted(tmp_path):
    receiver = Receiver(refused=0)
    outbox = Outbox(tmp_path, http_sender(receiver.url), "The receiver")
    outbox.put({"event": "0123456789", "path": os.fsdecode(b"part\xff.png")})
    outbox.close()
    assert os.fsencode(receiver.received[0]["path"]) == b"part\xff.png"


@pytest.mark.parametrize(
    "url",
    ["mqtt://host:70000/topic", "mqtt://host:x/topic", "mqtt://host/line/#", "mqtt://host/+/a", "mqtt://host/a?b", "x"],
)
def test_a_wrong_broker_is_told_before_anything_waits_for_it(url):
    pytest.importorskip("paho.mqtt")
    with pytest.raises(ValueError, match="`mqtt`"):
        mqtt_sender(url)


@pytest.mark.parametrize("url", ["http://", "https:///path", "http://[1/x", "http://host:70000/x"])
def test_a_wrong_receiver_is_told_before_anything_waits_for_it(url):
    with pytest.raises(ValueError, match="`on_anomaly` must be a URL"):
        http_sender(url)


@pytest.mark.parametrize(
    ("sender", "url", "shown"),
    [
        (mqtt_sender, "mqtt://me:secret@host", "'mqtt://...@host'"),
        (mqtt_sender, "mqtt://me:sec#ret@host/line", "'mqtt://...@host/line'"),
        (mqtt_sender, "mqtt://me:sec/?ret@host:x/line", "'mqtt://...@host:x/line'"),
        (mqtt_sender, "mqtt://host/line?token=secret", "'mqtt://host/line?...'"),
        (mqtt_sender, "me:secret@host/line", "'...@host/line'"),
        (http_sender, "https://me:secret@host:70000/x?token=secret", "'https://...@host:70000/x?...'"),
    ],
)
def test_an_error_of_a_wrong_url_has_no_password_in_it(sender, url, shown):
    with pytest.raises(ValueError, match=re.escape(shown)) as error:
        sender(url)
    assert all(word not in str(error.value) for word in ("sec", "ret", "me:"))


class Broker:
    """What an MQTT broker answers to who connects and publishes once, which is all that events need."""

    def __init__(self, port: int = 0, code: int = 0):
        self.received: list[dict] = []
        self.code = code  # 5 in CONNACK: not authorised
        self.connections: list[socket.socket] = []
        self.listening = socket.create_server(("127.0.0.1", port))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                self.connections.append(self.listening.accept()[0])
                threading.Thread(target=self.answer, args=(self.connections[-1],), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with suppress(OSError, struct.error), connection.makefile("rb") as stream:
            while kind := stream.read(1):
                length = shift = 0
                while True:
                    (byte,) = stream.read(1)
                    length, shift = length | (byte & 127) << shift, shift + 7
                    if byte < 128:
                        break
                body = stream.read(length)
                if kind[0] >> 4 == 1:  # CONNECT
                    connection.sendall(bytes([0x20, 2, 0, self.code]))
                elif kind[0] >> 4 == 3:  # PUBLISH
                    start = 2 + struct.unpack(">H", body[:2])[0]
                    self.received.append(json.loads(body[start + 2 :]))
                    connection.sendall(bytes([0x40, 2]) + body[start : start + 2])

    def stop(self) -> None:
        for one in (self.listening, *self.connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def test_what_failed_while_the_broker_was_away_is_published_once(tmp_path):
    pytest.importorskip("paho.mqtt")
    broker = Broker()
    deliver = mqtt_sender(f"mqtt://127.0.0.1:{broker.port}/line")
    deliver({"event": 1})
    assert broker.received == [{"event": 1}]
    broker.stop()
    for _ in range(3):
        with pytest.raises((OSError, RuntimeError)):
            deliver({"event": 2})
    broker = Broker(broker.port)
    deliver({"event": 2})
    deliver({"event": 3})
    assert broker.received == [{"event": 2}, {"event": 3}]
    broker.stop()


def test_a_login_that_the_broker_does_not_take_is_told():
    pytest.importorskip("paho.mqtt")
    broker = Broker(code=5)
    with pytest.raises(PermissionError, match=r"127\.0\.0\.1 does not take the login: Not authorized"):
        mqtt_sender(f"mqtt://line:wrong@127.0.0.1:{broker.port}/line")({"event": 1})
    broker.stop()


MOSQUITTO = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
@pytest.mark.filterwarnings("ignore:.*does not take an event")
def test_every_event_is_published(calibrated, tmp_path):
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    received: list[dict] = []
    configuration = (Path(__file__).parents[2] / "docs" / "docker" / "mosquitto.conf").read_text()
    (tmp_path / "mosquitto.conf").write_text(configuration.replace("listener 1883", f"listener {port} 127.0.0.1"))
    command = [MOSQUITTO, "-c", str(tmp_path / "mosquitto.conf")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as broker:
        try:
            client = Client(CallbackAPIVersion.VERSION2)
            client.on_message = lambda _, __, message: received.append(json.loads(message.payload))
            client.on_connect = lambda *_: client.subscribe("line/1", qos=1)
            client.connect_async("127.0.0.1", port)
            client.loop_start()
            folder, out = write_folder(tmp_path / "in", 3), tmp_path / "out"
            sender = mqtt_sender(f"mqtt://127.0.0.1:{port}/line/1")
            wait_for(client.is_connected)
            with Watching(calibrated, folder, out, outboxes=lambda below: {"all": Outbox(below, sender, "The broker")}):
                wait_for(lambda: len({event["event"] for event in received}) == 3)
            client.loop_stop()
        finally:
            broker.kill()
    scores = {row["path"]: float(row["score"]) for row in rows_of(out)}
    assert {event["path"]: event["score"] for event in received} == scores


def test_more_than_8_bits_take_a_range(calibrated, tmp_path):
    """One for each image would move their scores against each other; what can be scored, is."""
    folder = write_folder(tmp_path / "in", 2)
    Image.fromarray(texture(3)[..., 0].astype(np.uint16) * 16).save(folder / "deep.png")
    with Watching(calibrated, folder, tmp_path / "out"):
        wait_for(lambda: len(rows_of(tmp_path / "out")) == 3)
    refused = {Path(row["path"]).name: row["message"] for row in rows_of(tmp_path / "out") if not row["score"]}
    assert list(refused) == ["deep.png"]
    assert "--value_range" in refused["deep.png"]
    with_range = tiny_pipeline(value_range=4080).calibrate(textures(12), false_alarm_rate=0.25)
    with Watching(with_range, folder, tmp_path / "other"):
        wait_for(lambda: len(rows_of(tmp_path / "other")) == 3)
    assert all(row["score"] for row in rows_of(tmp_path / "other"))


def test_a_folder_is_written_to_by_one_process(calibrated, tmp_path):
    from diffad.predict import predict_files

    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    with Watching(calibrated, folder, out):
        wait_for(lambda: len(rows_of(out)) == 2)
        with pytest.raises(RuntimeError, match="is being written to by process"):
            predict_files(calibrated, sorted(folder.iterdir()), out)
        with pytest.raises(RuntimeError, match="is being written to by process"):
            watch_folder(calibrated, folder, out, threading.Event())


def test_results_of_another_kind_are_not_taken_for_these(calibrated, tmp_path):
    from diffad.predict import predict_files

    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    stop = threading.Event()
    stop.set()
    watch_folder(calibrated, folder, out, stop)
    with pytest.raises(ValueError, match="holds results of another command"):
        predict_files(calibrated, sorted(folder.iterdir()), out)
    with pytest.raises(ValueError, match=r"holds results of images in .*in\. Give another"):
        watch_folder(calibrated, tmp_path, out, stop)
    predict_files(calibrated, sorted(folder.iterdir()), tmp_path / "predicted")
    with pytest.raises(ValueError, match="holds results of another command"):
        watch_folder(calibrated, folder, tmp_path / "predicted", stop)
    assert np.array_equal([row["path"] for row in rows_of(tmp_path / "predicted")], sorted(map(str, folder.iterdir())))


@pytest.mark.filterwarnings("ignore:The receiver does not take an event")
def test_refused_events_do_not_hold_up_the_others(tmp_path):
    taken: list[str] = []

    def deliver(event: dict) -> None:
        if event["event"].startswith("bad"):
            raise OSError("refused")
        taken.append(event["event"])

    for number, name in enumerate(["bad1", "bad2", "bad3", "good1", "good2"]):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"event": name}))
        os.utime(path, (number, number))
    outbox = Outbox(tmp_path, deliver, "The receiver")
    wait_for(lambda: len(taken) == 2)
    outbox.close()
    assert taken == ["good1", "good2"]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["bad1", "bad2", "bad3"]


@pytest.mark.filterwarnings("ignore:The receiver does not take an event")
def test_a_new_event_does_not_wait_until_a_refused_one_is_tried_again(tmp_path):
    taken, refused = [], []

    def deliver(event: dict) -> None:
        (refused if event["event"] == "bad" else taken).append(event["event"])
        if event["event"] == "bad":
            raise OSError("refused")

    outbox = Outbox(tmp_path, deliver, "The receiver")
    outbox.put({"event": "bad"})
    wait_for(lambda: len(refused) == 3)  # the fourth try comes after 4 seconds
    outbox.put({"event": "good"})
    wait_for(lambda: taken, seconds=2.0)
    assert len(refused) == 3
    outbox.close()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_a_damaged_event_is_set_aside(tmp_path):
    (tmp_path / "cut.json").write_text('{"event": "cu')
    taken: list[dict] = []
    with warnings.catch_warnings(record=True) as told:
        outbox = Outbox(tmp_path, taken.append, "The receiver")
        outbox.put({"event": "whole"})
        wait_for(lambda: taken)
        outbox.close()
    assert [
        str(one.message).endswith("cut.json holds no event: it is kept as cut.damaged, not delivered.") for one in told
    ] == [True]
    assert taken == [{"event": "whole"}]
    assert [path.name for path in tmp_path.iterdir()] == ["cut.damaged"]


@pytest.mark.filterwarnings("ignore:The receiver does not take an event")
def test_an_event_that_cannot_be_read_ends_no_delivery(tmp_path):
    (tmp_path / "folder.json").mkdir()
    taken: list[dict] = []
    outbox = Outbox(tmp_path, taken.append, "The receiver")
    for number in range(2):
        outbox.put({"event": number})
        wait_for(lambda number=number: len(taken) == number + 1)
    outbox.close()
    assert taken == [{"event": 0}, {"event": 1}]


def test_pictures_of_other_results_below_the_watched_folder_are_no_events(calibrated, tmp_path):
    from diffad.predict import predict_files

    folder, out = write_folder(tmp_path / "in", 2), tmp_path / "out"
    parts = sorted(write_folder(tmp_path / "parts", 2).iterdir())
    with Watching(calibrated, folder, out):
        wait_for(lambda: len(rows_of(out)) == 2)
        predict_files(calibrated, parts, folder / "found")
        write_png(folder / "late.png", texture(77))
        wait_for(lambda: len(rows_of(out)) >= 3)
    assert list((folder / "found" / "overlays").iterdir())
    assert {Path(row["path"]).parent.name for row in rows_of(out)} == {"in"}


def test_the_output_does_not_hide_the_folder_that_is_watched(calibrated, tmp_path):
    for output in (tmp_path, tmp_path.parent):
        with pytest.raises(ValueError, match="`output_dir` must not be the watched folder or one above"):
            watch_folder(calibrated, tmp_path, output, threading.Event())
