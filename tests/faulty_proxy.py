"""A proxy before a server that, now and then, answers with an error, slowly, or not at all."""

from __future__ import annotations

import itertools
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[int, str], str | None]  # a request's number and path -> "error", "slow", "silent" or None


@contextmanager
def faulty_proxy(upstream: str, fault: Fault) -> Iterator[str]:
    """The proxy's address, as long as the block lasts; `upstream` is the server's, both without a slash at the end."""
    numbers, over = itertools.count(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            content = self.read_body() or None
            kind = fault(next(numbers), self.path)
            if kind == "silent":
                over.wait(60)
                self.close_connection = True
                return
            if kind == "slow":
                time.sleep(0.2)
            status, headers, body = (503, {}, b"later") if kind == "error" else self.forward(content)
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def forward(self, content: bytes | None) -> tuple[int, dict[str, str], bytes]:
            changed = ("accept-encoding", "transfer-encoding", "content-length")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in changed}
            headers.setdefault("Content-Type", "application/octet-stream")  # urllib would make it a form's
            request = urllib.request.Request(upstream + self.path, content, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.status, dict(answer.headers), answer.read()
            except urllib.error.HTTPError as error:
                return error.code, dict(error.headers), error.read()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *what: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
