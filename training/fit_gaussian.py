#!/usr/bin/env python
"""Adds to a saved AnomalyDenoise pipeline the Gaussian of good images' features, whose gradient `reconstruct` descends.

    accelerate launch training/fit_gaussian.py --model runs/mine --train_data_dir DIR

Any number of processes share the images, and the result does not depend on it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from diffad import AnomalyDenoisePipeline
from diffad.cores import limit_threads
from diffad.data import load_anomaly_dataset
from diffad.pipelines.saving import save_whole
from diffad.reading.unicode_forms import same_name
from diffad.training.arguments import (
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    FlagParser,
    add_source_arguments,
    check_source,
    local_path,
)
from diffad.training.pretrained import check_method


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description="Fits the Gaussian of good images' features.")
    parser.add_argument("--model", required=True, help="folder or Hub id of an AnomalyDenoise pipeline")
    parser.add_argument(
        "--output_dir", type=local_path, help="save the whole pipeline here (default: add to --model's folder)"
    )
    data = parser.add_argument_group("data")
    add_source_arguments(data)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--image_size", type=POSITIVE, help="pixels the backbone sees (default: as the pipeline's extractor)"
    )
    model.add_argument(
        "--feature_size", type=POSITIVE, help="side of the grid of positions (default: --image_size / 4)"
    )
    model.add_argument("--num_channels", type=POSITIVE, help="channels drawn at random (default: 100)")
    model.add_argument("--epsilon", type=NOT_NEGATIVE, help="regularisation, as a share of the features' variance")
    parser.add_argument("--batch_size", type=POSITIVE, default=32, help="images in one pass (32)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the noise (0)")
    args = parser.parse_args(argv)
    check_source(parser, args)
    if args.output_dir is None and not Path(args.model).is_dir():
        parser.error(f"--model: no folder at {args.model}; to add to a pipeline from the Hub, give --output_dir")
    return args


def save(pipeline: AnomalyDenoisePipeline, args: argparse.Namespace) -> None:
    """Saves the pipeline, or adds to its folder what is new in it."""
    if args.output_dir is not None:
        pipeline.save_pretrained(args.output_dir)
        return
    with save_whole(args.model) as unfinished:
        pipeline.gaussian.save_pretrained(unfinished / "gaussian")
        pipeline.save_config(unfinished)  # model_index.json


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    limit_threads()
    accelerator = Accelerator(mixed_precision="no")
    started = time.time()

    # 1. The pipeline, and good images of its categories
    check_method(args.model, "--model", "AnomalyDenoisePipeline")
    pipeline = AnomalyDenoisePipeline.from_pretrained(args.model).to(accelerator.device)
    data = args.train_data_dir or args.dataset_name
    good = load_anomaly_dataset(
        data, split="train", category=args.category, dataset=args.dataset, on_bad_image=args.on_bad_image
    )
    labels, of_image = np.asarray(good["label"]), np.asarray(good["category"])
    known = pipeline.categories
    if len(known) > 1:
        unknown = sorted(name for name in {*of_image.tolist()} if same_name(name, known) is None)
        if unknown:
            raise ValueError(
                f"{data} holds {', '.join(unknown)}, which the pipeline does not know: it knows {', '.join(known)}. "
                "Choose with --category."
            )
        names = sorted(set(of_image.tolist()))
    else:
        names = [None]  # one category, whatever it is called

    # 2. One pass over each category
    options = {name: getattr(args, name) for name in ("image_size", "feature_size", "num_channels", "epsilon")}
    options = {name: value for name, value in options.items() if value is not None}
    for name in names:
        images = good.select(np.flatnonzero((labels == 0) & ((of_image == name) if name else True)))
        pipeline.fit_gaussian(
            images["image"],
            category=name,
            batch_size=args.batch_size,
            accelerator=accelerator,
            generator=torch.Generator().manual_seed(args.seed),
            **options,
        )
        accelerator.print(f"{name or data}: {len(images)} good images")

    # 3. Save
    if accelerator.is_main_process:
        save(pipeline, args)
        size = 4 * sum(buffer.numel() for buffer in pipeline.gaussian.buffers(recurse=False)) / 1e6
        print(f"Saved to {args.output_dir or args.model}: {size:.0f} MB, {time.time() - started:.0f} s.")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
