"""A headless Chromium, for tests that look at a page as its reader does: the DevTools protocol over two pipes.

https://chromedevtools.github.io/devtools-protocol: messages are JSON, each closed by a zero byte.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


def find_browser() -> str | None:
    """An installed Chromium or Chrome, or the one that Playwright has fetched; None without."""
    if os.name != "posix":  # the pipes are handed on as file descriptors 3 and 4
        return None
    found = next(filter(None, map(shutil.which, NAMES)), None)
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    fetched = sorted(p for name in ("chrome", "headless_shell") for p in cache.glob(f"chromium*/*/{name}"))
    return found or (str(fetched[-1]) if fetched else None)


# Puts our pipes where the browser looks for them, and becomes the browser. Through higher numbers, as the pipes may be
# 3 and 4 in the wrong order.
LAUNCH = """
import fcntl, os, sys
theirs_in, theirs_out = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(theirs_in, 3)
os.dup2(theirs_out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab. `events` holds what the browser has told so far, as (method, parameters)."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.numbers = itertools.count(1)
        self.received = b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        message = {"id": next(self.numbers), "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != message["id"]:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            content = os.read(self.from_browser, 1 << 16)
            assert content, "the browser has ended"
            self.received += content
        one, self.received = self.received.split(b"\0", 1)
        message = json.loads(one)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Shows a page, with all that it loads, on a screen of this size and colour scheme."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and warnings of the console, exceptions of scripts."""
        told = [p["entry"] for m, p in self.events if m == "Log.entryAdded"]
        told += [p for m, p in self.events if m in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
        return [one for one in told if one.get("level", "error") in ("error", "warning")]

    def requests(self) -> list[str]:
        return [p["request"]["url"] for m, p in self.events if m == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """The whole page, also what lies below the screen's end."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """Starts a browser with an empty profile, and ends it."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to work for root
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            LAUNCH,
            str(theirs_in),
            str(theirs_out),
            executable,
            *flags,
            f"--user-data-dir={profile}",
        ],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
