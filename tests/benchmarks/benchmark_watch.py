"""`diffad watch` over a thousand files, written slowly, renamed into place and written anew, and killed on the way.

    python tests/benchmarks/benchmark_watch.py runs/parts --images good_parts --count 1000 --kills 10

Each image of each file must stand in scores.csv once.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from diffad.reading.inputs import find_images


def rows_of(output: Path) -> list[dict[str, str]]:
    """Of scores.csv as it is now; its last line may be broken off."""
    if not (output / "scores.csv").is_file():
        return []
    with open(output / "scores.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["modified"]]


def write(folder: Path, output: Path, pictures: list[Image.Image], count: int, events: Counter[str]) -> None:
    """A third of the files in pieces, a third under another name first; a tenth of all is written anew in the end.

    Anew only what has been scored: of a file that changes before, its first content need not be seen.
    """
    rng = random.Random(0)
    for i in range(count):
        content = io.BytesIO()
        pictures[i % len(pictures)].save(content, "JPEG", quality=80 + i % 15)
        path = folder / f"{i:04}.jpg"
        if i % 3 == 0:
            with open(path, "wb") as file:
                for start in range(0, len(content.getvalue()), 4096):
                    file.write(content.getvalue()[start : start + 4096])
                    file.flush()
                    time.sleep(0.005)
        elif i % 3 == 1:
            aside = path.with_suffix(".tmp")
            aside.write_bytes(content.getvalue())
            aside.rename(path)
        else:
            path.write_bytes(content.getvalue())
        events[path.name] += 1
        time.sleep(rng.uniform(0.0, 0.1))
    anew = {f"{i:04}.jpg" for i in range(0, count, 10)}
    while anew:
        time.sleep(0.5)
        for name in sorted(anew & {Path(row["path"]).name for row in rows_of(output)}):
            rng.choice(pictures).save(folder / name, "JPEG", quality=70)
            events[name] += 1
            anew.remove(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--images", type=Path, required=True, help="folder of images to write, again and again")
    parser.add_argument("--count", type=int, default=1000, help="files (1000)")
    parser.add_argument("--kills", type=int, default=10, help="times that the process gets SIGKILL (10)")
    args = parser.parse_args()
    pictures = [Image.open(path).convert("RGB").resize((256, 256)) for path in find_images([args.images])[:50]]
    with tempfile.TemporaryDirectory() as work:
        folder, output = Path(work, "in"), Path(work, "out")
        folder.mkdir()
        events: Counter[str] = Counter()
        writer = threading.Thread(target=write, args=(folder, output, pictures, args.count, events), daemon=True)
        writer.start()
        command = [
            sys.executable,
            "-m",
            "diffad.cli",
            "watch",
            args.model,
            str(folder),
            "--output",
            str(output),
            "--json",
        ]
        started, rng = time.monotonic(), random.Random(1)
        for _ in range(args.kills):
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                for _ in range(rng.randrange(5, 2 * args.count // (3 * args.kills))):
                    process.stdout.readline()
                time.sleep(rng.uniform(0.0, 0.3))
                process.kill()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            threading.Thread(target=process.stdout.read, daemon=True).start()  # type: ignore[union-attr]
            writer.join()
            deadline = time.monotonic() + 300.0
            while len(rows_of(output)) < sum(events.values()) and time.monotonic() < deadline:
                time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            code = process.wait()
        rows = rows_of(output)
        found = Counter(Path(row["path"]).name for row in rows)
        unlike = {name: (found[name], events[name]) for name in found | events if found[name] != events[name]}
        verdicts = dict(Counter(row["verdict"] for row in rows))
        print(
            f"{args.count} files, {sum(events.values())} images in them, {args.kills} kills, "
            f"{time.monotonic() - started:.0f} s: {len(rows)} rows ({verdicts}); files with another number of "
            f"rows than of images: {unlike or 'none'}. Ctrl-C ended it with {code}."
        )


if __name__ == "__main__":
    main()
