"""The end of a training: calibration, the saved pipeline, its pictures and its record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from PIL import Image

from diffad.files import write_text_whole, write_whole
from diffad.images import image_to_rgb
from diffad.model_card import SECRETS, TRAINING_NAME, remove_reports
from diffad.visualization import beside_overlay

MAX_STATISTICS_IMAGES = 512  # of a category


def finish(
    pipeline: Any,
    training: Dataset,
    held_out: Dataset,
    categories: Sequence[str],
    args: argparse.Namespace,
    record: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Calibrates a pipeline on good images, saves it and, where asked, pushes it.

    Every process calls this: all share the calibration's images, and the main one saves what came of them. Per-position
    statistics come from up to `MAX_STATISTICS_IMAGES` images of training, which are many; thresholds and p-values from
    the held-out ones, which no network has seen. Where no denoiser runs, all serve both, as in `diffad fit`. It
    calibrates in float32, as the saved weights are loaded, whatever the precision of training was. `record` goes into
    `training.json`.
    """
    for category in categories:

        def images_of(dataset: Dataset, category: str = category) -> Any:
            return dataset.select(np.flatnonzero(np.asarray(dataset["category"]) == category))

        statistics, for_thresholds = images_of(training), images_of(held_out)
        leave_one_out = args.part_pattern is None and pipeline.leaves_each_out(len(statistics) + len(for_thresholds))
        if leave_one_out:
            accelerator.print("No denoiser runs: each good image is left out in turn for the thresholds.")
            for_thresholds, statistics = concatenate_datasets([statistics, for_thresholds]), None
        elif len(statistics) > MAX_STATISTICS_IMAGES:
            statistics = statistics.shuffle(seed=args.seed).select(range(MAX_STATISTICS_IMAGES))
        pipeline.calibrate(
            for_thresholds["image"],
            statistics_images=None if statistics is None else statistics["image"],
            false_alarm_rate=args.false_alarm_rate,
            category=category if len(pipeline.categories) > 1 else None,  # a trained one may know more
            accelerator=accelerator,
            leave_one_out=leave_one_out,
            roi=args.roi,
        )
    if accelerator.is_main_process:
        remove_reports(args.output_dir)  # they speak of the weights that were here before
        pipeline.save_pretrained(args.output_dir)
        save_examples(pipeline, held_out, args)
        save_record(args, {"categories": list(categories), **record})
    accelerator.wait_for_everyone()  # for what is saved; an upload takes longer than a collective may
    if args.push_to_hub and accelerator.is_main_process:
        with told_how_to_upload(f"The model is saved; `diffad push {args.output_dir} {args.hub_model_id}` uploads it."):
            pipeline.push_to_hub(args.hub_model_id, token=args.hub_token, folder=args.output_dir)


@contextmanager
def told_how_to_upload(advice: str) -> Iterator[None]:
    """Where `--push_to_hub` fails, its error says what uploads the saved model without another training.

    Raises:
        RuntimeError: the upload failed.
    """
    try:
        yield
    except Exception as error:  # the network has errors of its own
        raise RuntimeError(f"--push_to_hub: the upload failed ({error}). {advice}") from error


def save_examples(pipeline: Any, held_out: Dataset, args: argparse.Namespace) -> None:
    """Good images beside their overlays, for the model's card: nothing should light up, least of all where the
    statistics know them (no denoiser runs).
    """
    for earlier in Path(args.output_dir).glob("good-*.png"):  # of another model, and maybe of other parts
        if earlier.stem.removeprefix("good-").isdecimal():
            earlier.unlink()
    for i in range(min(args.num_example_images, len(held_out))):
        image = held_out[i]["image"]
        picture = np.asarray(image_to_rgb(image, pipeline.value_range))
        category = held_out[i]["category"] if len(pipeline.categories) > 1 else None
        output = pipeline(image, category=category)
        threshold, mask = None, None
        if pipeline.has_thresholds:
            threshold = float(pipeline.calibration.pixel_threshold[pipeline.category_index(category)])
            mask = output.anomaly_mask[0]
        sheet = beside_overlay(picture, output.anomaly_map[0], mask, threshold)
        with write_whole(Path(args.output_dir, f"good-{i + 1}.png")) as unfinished:
            Image.fromarray(sheet).save(unfinished)


def save_record(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Writes `training.json` beside the model: arguments, what came of them, and what of the Hub it started from."""
    arguments = {name: value for name, value in vars(args).items() if name not in SECRETS}
    starts = [arguments.get(name) for name in ("pretrained_model_name_or_path", "vae_path")]
    published = [name for name in starts if name and not Path(name).exists()]  # what is no folder came from the Hub
    record = {"arguments": arguments, **({"base_model": published} if published else {}), **record}
    write_text_whole(Path(args.output_dir, TRAINING_NAME), json.dumps(record, indent=2, default=str) + "\n")
