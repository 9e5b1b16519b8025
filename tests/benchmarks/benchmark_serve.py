"""The load that `diffad serve` takes: many clients at once, images of many sizes, some of them broken.

    python tests/benchmarks/benchmark_serve.py runs/parts --images good_parts

Every request must be answered with what belongs to its image, and every broken one with a 4xx that gives a reason. Once
with batches, once with one image a pass. Clients and service are processes of one machine and share its cores.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from diffad.reading.inputs import find_images

SIDES = (64, 160, 224, 256, 384, 512, 640, 800)


def encode(picture: Image.Image, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    picture.resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


def contents(pictures: list[Image.Image], count: int) -> list[tuple[bytes, tuple[int, int] | None]]:
    """Each request's file and its height and width; None where it is broken, as one of 20 is."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        width, height = rng.choice(SIDES), rng.choice(SIDES)
        content = encode(pictures[i % len(pictures)], (width, height))
        if i % 20 == 19:
            made.append(((b"", content[: len(content) // 3], b"no image")[i // 20 % 3], None))
        else:
            made.append((content, (height, width)))
    return made


def measure(command: list[str], requests: list[tuple[bytes, tuple[int, int] | None]], clients: int) -> dict[int, float]:
    """Starts the service, sends all, prints what came of it; the scores by request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, seconds, memory = f"http://127.0.0.1:{port}", [0.0] * len(requests), []
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    httpx.get(f"{url}/healthz").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            resident = psutil.Process(process.pid).memory_info
            with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=clients)) as client:
                client.post(f"{url}/predict", files={"image": ("warm.jpg", requests[0][0])})

                def send(i: int) -> httpx.Response:
                    started = time.perf_counter()
                    answer = client.post(f"{url}/predict", files={"image": (f"{i}.jpg", requests[i][0])})
                    seconds[i] = time.perf_counter() - started
                    if i % 20 == 0:
                        memory.append(resident().rss / 2**20)
                    return answer

                started = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    answers = list(pool.map(send, range(len(requests))))
                took = time.perf_counter() - started
        finally:
            process.kill()
    scores = {}
    for i, (answer, (_, size)) in enumerate(zip(answers, requests, strict=True)):
        if size is None:
            assert 400 <= answer.status_code < 500, answer.text
            assert answer.json()["detail"], "no reason"
        else:
            assert answer.status_code == 200, answer.text
            [found] = answer.json()["images"]
            assert (found["name"], found["size"]) == (f"{i}.jpg", list(size)), "mixed up"
            scores[i] = found["score"]
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    quarters = ", ".join(f"{np.median(part):.0f}" for part in np.array_split(memory, 4))
    print(
        f"{len(requests)} requests from {clients} clients, {len(scores)} scored, {len(requests) - len(scores)} broken "
        f"and answered with 4xx: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, "
        f"{len(requests) / took:.1f} images/s; resident memory, median of each quarter: {quarters} MiB",
        flush=True,
    )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--images", type=Path, required=True, help="folder of images to send, again and again")
    parser.add_argument("--count", type=int, default=2000, help="requests (2000)")
    parser.add_argument("--clients", type=int, default=32, help="at once (32)")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 1], help="at most, in turn (16 1)")
    args = parser.parse_args()
    pictures = [Image.open(path).convert("RGB") for path in find_images([args.images])[:40]]
    requests = contents(pictures, args.count)
    print(f"{os.cpu_count()} cores; images of {SIDES[0]} to {SIDES[-1]} px a side")
    by_size = {}
    for batch_size in args.batch_size:
        print(f"at most {batch_size} a batch: ", end="")
        command = [sys.executable, "-m", "diffad.cli", "serve", args.model, "--batch-size", str(batch_size)]
        by_size[batch_size] = measure(command, requests, args.clients)
    if len(by_size) > 1:
        scores = np.array([[of_size[i] for i in sorted(of_size)] for of_size in by_size.values()])
        apart = np.abs(scores / scores[-1] - 1.0).max()
        print(f"between batches of these sizes, no score differs by more than {apart:.1e} of itself")


if __name__ == "__main__":
    main()
