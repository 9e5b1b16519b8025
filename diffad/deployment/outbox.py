"""Events on their way to whoever wants to know: kept on disk until they are delivered, whatever happens meanwhile.

An event may be delivered twice, as when the receiver's answer is lost or the process is killed between delivery and
the removal of its file. Its `event` tells: the same event has the same.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from diffad.files import read_json_object, sync_folder, write_whole
from diffad.installation import needs_extra

SECONDS = 10.0  # that a receiver has to answer
LONGEST_WAIT = 60.0  # between two tries, in seconds; the first comes after one, each next after twice as long
TRIES_IN_A_ROW = 3  # that fail, of different events, before the receiver is taken to be away

Deliver = Callable[[dict[str, Any]], None]


class Outbox:
    """A folder of events, one file each, and a thread that delivers them in their order.

    Args:
        folder: is made; what a former process has left in it is delivered first.
        deliver: takes an event, and raises where the receiver did not take it.
        name: of the receiver, for messages.
    """

    def __init__(self, folder: Path, deliver: Deliver, name: str):
        self.folder, self.deliver, self.name = folder, deliver, name
        folder.mkdir(parents=True, exist_ok=True)
        self.refused: Counter[str] = Counter()  # how often each waiting event was
        self.new, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"outbox {folder.name}", daemon=True)
        self.thread.start()

    def put(self, event: dict[str, Any]) -> None:
        """Keeps an event, which has its number as `event`; once this returns, it is on disk."""
        with write_whole(self.folder / f"{event['event']}.json") as unfinished, open(unfinished, "wb") as file:
            file.write(json.dumps(event).encode())  # in ASCII
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        self.new.set()

    def close(self) -> None:
        """Tries once more to deliver what is left, and ends; what is not delivered waits for the next process."""
        self.closing.set()
        self.new.set()
        self.thread.join(timeout=3 * SECONDS)
        if not self.thread.is_alive():
            self.deliver_all(time.monotonic() + 3 * SECONDS)

    def deliver_all(self, until: float = float("inf"), again: bool = True) -> bool:
        """Delivers what there is, the oldest first, up to a time of the monotonic clock; whether all of it was taken.

        An event that a receiver refuses does not hold up the others: it comes after those that it has refused less,
        and not at all without `again`. A file that holds no event is set aside.
        """
        waiting = []
        for path in self.folder.glob("[!.]*.json"):  # with a dot begins what is being written
            with suppress(FileNotFoundError):
                waiting.append((self.refused[path.name], path.stat().st_mtime_ns, path.name, path))
        failed = 0
        for refused, _, name, path in sorted(waiting):
            if time.monotonic() > until or (self.closing.is_set() and until == float("inf")):
                return False
            if refused and not again:
                return False  # and those behind it were refused as well
            try:
                if event := read_json_object(path):
                    self.deliver(event)
                else:
                    aside = path.replace(path.with_suffix(".damaged"))
                    warnings.warn(f"{path} holds no event: it is kept as {aside.name}, not delivered.", stacklevel=2)
            except Exception as error:  # of the network's many, or the disk's
                failed += 1
                self.refused[name] += 1
                if failed == 1:
                    warnings.warn(f"{self.name} does not take an event, which waits: {error}", stacklevel=2)
                if failed == TRIES_IN_A_ROW:
                    break
                continue
            path.unlink(missing_ok=True)
            del self.refused[name]
        return not failed

    def _run(self) -> None:
        wait, due = 1.0, 0.0  # until what was refused is tried again, and when, in seconds
        while not self.closing.is_set():
            self.new.clear()
            again = time.monotonic() >= due
            if self.deliver_all(again=again):
                wait, due = 1.0, 0.0
                self.new.wait()
                continue
            if again:
                due = time.monotonic() + wait
                wait = min(2.0 * wait, LONGEST_WAIT)
            self.new.wait(max(0.0, due - time.monotonic()))  # a new event is not kept waiting by the others


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None where its host or port is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.port else None
    except ValueError:
        return None


def without_secrets(url: str) -> str:
    """A URL for messages, without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def shown_wrong(url: str) -> str:
    """A URL that may be none, for an error: nothing that may be a user, a password or a token is left in it."""
    before_host = re.sub(r"^(\w+://)?.*@", r"\1...@", url, flags=re.DOTALL)
    return repr(re.sub(r"\?.+", "?...", before_host, flags=re.DOTALL))


def http_sender(url: str) -> Deliver:
    """Posts events as JSON; any answer of 200 to 299 is a delivery."""
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`on_anomaly` must be a URL, http:// or https://, but is {shown_wrong(url)}.")
    with needs_extra("watch"):
        import httpx

    def deliver(event: dict[str, Any]) -> None:
        content = json.dumps(event)  # in ASCII, as a file's name may be no UTF-8
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(url, content=content, headers=headers, timeout=SECONDS)
        if not answer.is_success:  # httpx's own error has the URL in it, with its password
            raise OSError(f"it answers {answer.status_code} {answer.reason_phrase}")

    return deliver


def mqtt_sender(url: str) -> Deliver:
    """Publishes events as JSON with quality of service 1 (at least once), over one connection.

    Args:
        url: mqtt://[user:password@]host[:port]/topic, or mqtts:// for TLS.
    """
    parts = _split(url)
    topic = "" if parts is None else unquote(parts.path.lstrip("/"))
    if parts is None or parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or not topic:
        raise ValueError(f"`mqtt` must be mqtt://host/topic or mqtts://host/topic, but is {shown_wrong(url)}.")
    if parts.query or "#" in url or "+" in topic:
        raise ValueError(
            f"`mqtt`: the topic of {shown_wrong(url)} must hold no #, + or ?, and a password has them as %23, %2B, %3F."
        )
    with needs_extra("watch"):
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion
    host, port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
    late = f"no answer of {host} in {SECONDS:g} s"
    client: Client | None = None

    def connect() -> None:
        """Makes `client` one whose login the broker has taken."""
        nonlocal client
        client = Client(CallbackAPIVersion.VERSION2)
        if parts.username:
            client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if parts.scheme == "mqtts":
            client.tls_set()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.on_connect = lambda client, userdata, flags, reason, properties: answers.put(reason)
        client.connect(host, port)
        client.loop_start()
        try:
            answer = answers.get(timeout=SECONDS)
        except queue.Empty:
            raise TimeoutError(late) from None
        client.on_connect = None
        if answer.is_failure:
            raise PermissionError(f"{host} does not take the login: {answer}")

    def deliver(event: dict[str, Any]) -> None:
        nonlocal client
        try:
            if client is None:
                connect()
            assert client is not None
            published = client.publish(topic, json.dumps(event), qos=1)
            published.wait_for_publish(SECONDS)
            if not published.is_published():
                raise TimeoutError(late)
        except Exception:
            if client is not None:  # it would publish what it holds once more, beside the next try
                client.loop_stop()
                client.disconnect()
                client = None
            raise

    return deliver
