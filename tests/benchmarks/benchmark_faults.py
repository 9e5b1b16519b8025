"""What odd files and killed processes leave: nothing lost, nothing mixed.

    python tests/benchmarks/benchmark_faults.py

First 500 image files, most of them cut off or changed at random places, go through one `predict`. Then `predict`, a
training, a calibration and the saving of a model are each killed with SIGKILL at 20 random moments, run again, and
compared with a run that nobody disturbed. Everything on a model of a few thousand parameters, on Linux or macOS.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import texture, textures, tiny_pipeline, write_folder

from diffad import cli
from diffad.commands.models import load_pipeline
from diffad.predict import find_images, predict_files
from diffad.training import train_ddpm

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF")
SETTLE = 0.02  # s between two looks at what a job has written


# -- odd files ---------------------------------------------------------------------------------------------------


def encode(kind: str, seed: int) -> bytes:
    image, buffer = Image.fromarray(texture(seed, (48, 64))), io.BytesIO()
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    if kind in ("PNG", "JPEG", "MPO", "WEBP", "TIFF"):
        options["exif"] = exif = Image.Exif()
        exif[0x0112], exif[0x010F] = seed % 8 + 1, "maker"
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Cut off, changed at a few places of its head or of all of it, or with a piece left out or doubled."""
    changed = bytearray(content)
    how = rng.randrange(5)
    if how == 0:
        del changed[rng.randrange(len(changed)) :]
    elif how in (1, 2):
        end = min(len(changed), 400) if how == 1 else len(changed)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(end)] = rng.randrange(256)
    else:
        start = rng.randrange(len(changed))
        piece = changed[start : start + rng.randrange(1, 64)]
        changed[start : start + len(piece)] = piece * 2 if how == 3 else b""
    return bytes(changed)


def run_mutations(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Rows of one `predict` over `count` files, every tenth of them as its program wrote it."""
    rng, parts = random.Random(seed), folder / "parts"
    parts.mkdir(parents=True)
    for number in range(count):
        kind, whole = FORMATS[number % len(FORMATS)], number % 10 == 0
        content = encode(kind, number)
        name = f"{number:03}-{'whole' if whole else 'changed'}.{kind.lower()}"
        (parts / name).write_bytes(content if whole else mutate(content, rng))
    paths = find_images([parts])
    predict_files(calibrated_pipeline(0), paths, folder / "out")
    with open(folder / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    unreadable = [Path(row["path"]).name for row in rows if row["verdict"] == "unreadable"]
    return {
        "files": count,
        "rows": len({row["path"] for row in rows}),
        "changed files that are unreadable": len(unreadable),
        "unchanged files that are unreadable": sum("whole" in name for name in unreadable),
    }


# -- killed processes --------------------------------------------------------------------------------------------


def calibrated_pipeline(seed: int):
    """Pipelines of other seeds differ in weights and in calibration."""
    pipeline = tiny_pipeline()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    pipeline.calibrate(textures(12, first_seed=seed), false_alarm_rate=0.25)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def files_below(folder: Path, *ignored: str) -> dict[str, str]:
    """A digest of each file, without hidden ones and those of `ignored` names."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not any(part.startswith(".") or part in ignored for part in Path(name).parts)
    }


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """Names, times and sizes of all that is below a folder in which another process works."""
    found = set()
    for parent, folders, files in os.walk(folder):  # which passes over what is gone by now
        for path in (Path(parent, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.add((str(path), status.st_mtime_ns, status.st_size))
    return found


def parameters(model: Path) -> dict[str, str]:
    """A digest of all tensors of a saved pipeline's components, as it is loaded."""
    pipeline = load_pipeline(model, "cpu")
    digests = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            tensors = [tensor.numpy().tobytes() for _, tensor in sorted(component.state_dict().items())]
            digests[name] = hashlib.sha256(b"".join(tensors)).hexdigest()
    return digests


def run_quietly(job: Callable[[Path], None], output: Path) -> None:
    """In a process of its own; what ends it is shown."""
    shown = sys.stderr
    sys.stdout = sys.stderr = io.StringIO()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked process has no others
    try:
        job(output)
    except Exception:
        traceback.print_exc(file=shown)
        raise


def run_kills(
    job: Callable[[Path], None],
    prepare: Callable[[Path], None],
    state: Callable[[Path], dict[str, str]],
    folder: Path,
    kills: int,
    seed: int = 0,
    survives: bool = False,
) -> collections.Counter:
    """Kills a job at random moments between its first sign of work and its end, and runs it again.

    Args:
        job: writes to the folder that it is given.
        prepare: makes that folder.
        state: what of the folder counts.
        folder: for all of it.
        kills: how many times.
        seed: of the moments.
        survives: whether what was there before must be whole after a kill, as long as the new is not.
    """
    fork = multiprocessing.get_context("fork")  # the libraries are loaded once

    def start(output: Path) -> multiprocessing.Process:
        process = fork.Process(target=run_quietly, args=(job, output))
        process.start()
        return process

    undisturbed = folder / "undisturbed"
    prepare(undisturbed)
    before = state(undisturbed) if survives else {}
    seen, started = listing(undisturbed), time.perf_counter()
    process = start(undisturbed)
    while process.is_alive() and listing(undisturbed) == seen:
        time.sleep(SETTLE)
    first = time.perf_counter() - started
    process.join()
    last = time.perf_counter() - started
    if process.exitcode:
        raise RuntimeError(f"the undisturbed run ended with {process.exitcode}")
    expected, outcomes, rng = state(undisturbed), collections.Counter(), random.Random(seed)
    for number in range(10 * kills):
        output = folder / f"killed-{number}"
        prepare(output)
        process, started = start(output), time.perf_counter()
        process.join(rng.uniform(0.5 * min(first, last), last))
        if not process.is_alive():  # it was faster than on a machine that was busy: so are the next
            last = min(last, time.perf_counter() - started)
            shutil.rmtree(output)
            continue
        process.kill()
        process.join()
        outcomes["killed"] += 1
        if survives:
            left = state(output)
            outcomes["old" if left == before else "new" if left == expected else "MIXED"] += 1
        process = start(output)
        process.join()
        outcomes["equal" if state(output) == expected and not process.exitcode else "DIFFERENT"] += 1
        shutil.rmtree(output)
        if outcomes["killed"] == kills:
            break
    return outcomes


def predict_job(folder: Path, count: int = 60) -> tuple:
    model, parts = folder / "model", write_folder(folder / "parts", count, size=48)
    calibrated_pipeline(0).save_pretrained(model)

    def predict(output: Path) -> None:
        predict_files(load_pipeline(model, "cpu"), find_images([parts]), output, batch_size=4)

    return predict, lambda output: output.mkdir(), lambda output: files_below(output)


def training_job(folder: Path, steps: int = 8) -> tuple:
    parts, start = write_folder(folder / "good", 15), folder / "start"
    tiny_pipeline().save_pretrained(start)
    flags = ["--train_data_dir", parts, "--pretrained_model_name_or_path", start, "--max_train_steps", steps]
    flags += ["--train_batch_size", 4, "--lr_warmup_steps", 1, "--false_alarm_rate", 0.4, "--checkpointing_steps", 1]
    flags += ["--checkpoints_total_limit", 2, "--resume_from_checkpoint", "latest"]

    def train(output: Path) -> None:
        train_ddpm.main([str(flag) for flag in (*flags, "--output_dir", output)])

    return train, lambda output: output.mkdir(), parameters


def calibration_job(folder: Path) -> tuple:
    good, old = write_folder(folder / "good", 40, first_seed=50), calibrated_pipeline(0)

    def calibrate(output: Path) -> None:
        cli.calibrate(str(output), str(good), false_alarm_rate=0.3)

    return calibrate, old.save_pretrained, parameters


def saving_job(folder: Path) -> tuple:
    old, new = calibrated_pipeline(0), calibrated_pipeline(1)
    return new.save_pretrained, old.save_pretrained, parameters


JOBS = {  # whether an old model must outlive a kill
    "predict": (predict_job, False),
    "training": (training_job, False),
    "calibrate": (calibration_job, True),
    "saving": (saving_job, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="image files (500)")
    parser.add_argument("--kills", type=int, default=20, help="of each job (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes and moments (0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run_mutations(Path(name, "mutations"), args.count, args.seed)
        print(f"one predict, {time.perf_counter() - started:.0f} s: {result}")
        for title, (make, survives) in JOBS.items():
            started, folder = time.perf_counter(), Path(name, title)
            folder.mkdir()
            outcomes = run_kills(*make(folder), folder, args.kills, args.seed, survives)
            print(f"{title}, {time.perf_counter() - started:.0f} s: {dict(outcomes)}")


if __name__ == "__main__":
    main()
