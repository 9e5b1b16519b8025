"""`diffad serve`: a page for people and an HTTP API for machines, over one model."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import math
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from PIL import Image

from diffad.deployment.batching import BusyError
from diffad.deployment.detector import Detector, Finding, Sent, TooLargeError, found_regions
from diffad.installation import needs_extra
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.image_files import one_large_at_a_time
from diffad.regions import can_list_regions

with needs_extra("app"):
    from anyio import to_thread
    from fastapi import FastAPI, HTTPException, Query, Request, Response, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.requests import cookie_parser

MAX_BYTES = 64 * 2**20  # of one request
MAX_IMAGES = 64  # in one request
COOKIE = "diffad_token"


def create_app(
    pipeline: Any,
    category: str | None = None,
    token: str | None = None,
    batch_size: int = 16,
    max_bytes: int = MAX_BYTES,
    max_waiting: int = 256,
    max_pixels: int = 100_000_000,
    page: bool = True,
    collect: Path | None = None,
) -> FastAPI:
    """The service, for `uvicorn`.

    Args:
        pipeline: an anomaly pipeline, on its device.
        category: of a unified model.
        token: what callers must show, as `Authorization: Bearer TOKEN`; a browser is shown the page at `/?token=TOKEN`
            and remembers it. None lets everyone in who reaches the port.
        batch_size: images in one pass of the networks, at most.
        max_bytes: of one request, else 413.
        max_waiting: images that wait or are run; those beyond get 429.
        max_pixels: of one image, else 413.
        page: whether the page is there as well, or the API alone.
        collect: a folder for images that somebody at the page calls good; None offers no such thing.
    """
    metrics = Metrics()
    detector = Detector(pipeline, category, batch_size, max_waiting, max_pixels, metrics.batches.observe)
    metrics.watch(detector)
    app = FastAPI(title="diffad", docs_url=None, redoc_url=None)

    @app.post("/predict")
    async def predict(image: list[UploadFile], mask: bool = Query(False, description="With masks, as PNG.")) -> Any:
        """What is found in one image or several."""
        if len(image) > MAX_IMAGES:
            raise HTTPException(413, f"{len(image)} images came in one request, and {MAX_IMAGES} are the most.")
        sent = []
        for i, one in enumerate(image):
            name = one.filename or f"image[{i}]"
            try:
                sent.append(await to_thread.run_sync(detector.read, name, await one.read()))
            except UnreadableImageError as error:
                raise HTTPException(422, f"Image {i} of the request: {error}") from error
            except TooLargeError as error:
                raise HTTPException(413, f"Image {i} of the request: {error}") from error
        try:
            futures = detector.submit(sent)
        except BusyError as error:
            raise HTTPException(429, f"{error} Try again.", headers={"Retry-After": "1"}) from error
        try:
            findings = await asyncio.gather(*map(asyncio.wrap_future, futures))  # in no thread, of which there are few
        except ValueError as error:  # such as scores that are NaN
            raise HTTPException(500, str(error)) from error
        metrics.images.inc(len(findings))
        metrics.anomalous.inc(sum(bool(finding.is_anomalous) for finding in findings))
        described = []
        for one, sent_one, finding in zip(image, sent, findings, strict=True):
            described.append(await to_thread.run_sync(describe, detector, one.filename, sent_one, finding, mask))
        return {"images": described}

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        """Says what is wrong; FastAPI's own answer would hold what was sent, an image's bytes among it."""
        wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        if any(one["loc"][0] == "body" for one in error.errors()):
            wrong = ["Send each image as a file with a name, in the field `image`: curl -F image=@part.png.", *wrong]
        return JSONResponse({"detail": " ".join(wrong)}, 422)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the service is up, and whether the world is still as it was calibrated."""
        drift = detector.drift
        return {"status": "ok", "drift": None if drift is None else drift.drifted_at is not None}

    @app.get("/metrics")
    async def shown_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(BoundedBody, max_bytes=max_bytes)
    if token is not None:
        if not token:
            raise ValueError("`token` must not be empty: everybody would be let in. Leave it out, or give one.")
        if not token.isascii() or not token.isprintable() or token != token.strip():
            raise ValueError("`token` must be of ASCII letters, digits and signs: a header holds no others.")
        app.add_middleware(TokenCheck, token=token)
    app.add_middleware(Measured, metrics=metrics)  # the last one added is the outermost, which sees every answer
    if page:
        from diffad.deployment.page import mount_page

        app = mount_page(app, detector, max_bytes, collect)
    return app


def describe(detector: Detector, name: str | None, sent: Sent, finding: Finding, with_mask: bool) -> dict[str, Any]:
    """What the API answers for an image: numbers, regions in the image's own pixels, and its mask where asked for."""
    answer: dict[str, Any] = {"name": name, "size": list(sent.size), "score": finding.score}
    if finding.is_anomalous is None:
        return answer
    answer |= {"p_value": finding.p_value, "is_anomalous": finding.is_anomalous}
    if can_list_regions():
        answer["regions"] = []
    if not (finding.is_anomalous or with_mask):
        return answer
    with one_large_at_a_time(math.prod(sent.size)):
        mask = np.zeros(sent.size, bool)
        if finding.is_anomalous:
            anomaly_map = detector.map_at(finding, sent, sent.size)
            threshold = float(detector.pipeline.calibration.pixel_threshold[detector.index])
            mask, regions = found_regions(anomaly_map, threshold, True, detector.smallest_area)
            if regions:  # none without SciPy
                answer["regions"] = [region._asdict() for region in regions]
        if with_mask:
            file = io.BytesIO()
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
            answer["mask_png"] = base64.b64encode(file.getvalue()).decode()
    return answer


class Metrics:
    """What Prometheus reads at `/metrics`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("diffad_requests", "Requests of /predict.", ["status"], registry=registry)
        self.images = Counter("diffad_images", "Images that were scored for /predict.", registry=registry)
        self.anomalous = Counter("diffad_anomalous_images", "Of them, those that raised an alarm.", registry=registry)
        self.seconds = Histogram("diffad_request_seconds", "From a request to its answer.", registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batches = Histogram("diffad_batch_images", "Images in a batch.", buckets=sizes, registry=registry)
        self.waiting = Gauge("diffad_waiting_images", "Images that wait or are run.", registry=registry)
        self.evidence = Gauge("diffad_drift_evidence", "Of drift; 100 is an alarm.", registry=registry)
        self.drifted = Gauge("diffad_drifted", "1 once the evidence has reached 100.", registry=registry)

    def watch(self, detector: Detector) -> None:
        """Takes from a detector what changes by itself."""
        self.waiting.set_function(lambda: detector.batcher.count)
        self.evidence.set_function(lambda: detector.evidence)
        self.drifted.set_function(lambda: bool(detector.drift and detector.drift.drifted_at is not None))


class Measured:
    """Counts every answer of `/predict`, whoever gives it, and an error that nobody turned into one as 500."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), None

        async def answer(part: Any) -> None:
            nonlocal status
            status = part.get("status", status)
            await send(part)

        try:
            await self.app(scope, receive, answer)
        except Exception:
            status = 500
            raise
        finally:
            if status is not None:  # else the caller has gone
                self.metrics.requests.labels(str(status)).inc()
                self.metrics.seconds.observe(time.perf_counter() - started)


class BoundedBody:
    """Refuses a request of more than `max_bytes` before it is read, or, where it does not say how long it is, then."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"The request has more than {self.max_bytes:,} bytes. Send fewer or smaller images."
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self.max_bytes:
            await JSONResponse({"detail": message}, 413)(scope, receive, send)
            return
        received, is_too_large = 0, False

        async def bounded() -> Any:
            nonlocal received, is_too_large
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.max_bytes:
                is_too_large = True
                return {"type": "http.disconnect"}  # nothing more is read
            return part

        async def answer(part: Any) -> None:
            if not is_too_large:
                await send(part)

        try:
            await self.app(scope, bounded, answer)
        except Exception:
            if not is_too_large:
                raise
        if is_too_large:
            await JSONResponse({"detail": message}, 413)(scope, receive, send)


class TokenCheck:
    """Lets in who shows the token: in a header, in a cookie, or once in the page's address, which sets the cookie.

    `/healthz` is open, as what looks after a service often knows no secret.
    """

    def __init__(self, app: Any, token: str):
        self.app, self.token = app, token.encode()

    def _is_token(self, shown: str) -> bool:
        return hmac.compare_digest(shown.encode(), self.token)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/healthz":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")  # a scheme's case does not count
        if (scheme.lower() == "bearer" and self._is_token(bearer.strip())) or (
            cookie is not None and self._is_token(cookie)
        ):
            await self.app(scope, receive, send)
            return
        query = scope["query_string"].decode("latin-1").replace("+", "%2B")  # in a token a plus is no blank
        shown = parse_qs(query).get("token", [""])[0]
        answer: Response = PlainTextResponse(
            "A token is needed: `Authorization: Bearer TOKEN`, or open /?token=TOKEN in a browser.", 401
        )
        if scope["type"] == "http" and scope["path"] == "/" and self._is_token(shown):
            answer = RedirectResponse(scope.get("root_path", "") + "/", 303)
            answer.set_cookie(COOKIE, shown, httponly=True, samesite="strict")
        await answer(scope, receive, send)
