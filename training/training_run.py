"""What the training scripts share: arguments, data, augmentation, checkpoints that resume, and the end of a run."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from datasets import Dataset, IterableDataset
from datasets.fingerprint import get_temporary_cache_files_directory
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from diffad.data import FEATURES, check_part_pattern, load_anomaly_dataset, part_index
from diffad.images import image_to_rgb, images_to_tensors, resize_images
from diffad.model_card import SECRETS, TRAINING_NAME, remove_reports
from diffad.pipelines.pipeline_diad import IMAGENET_MEAN, IMAGENET_STD
from diffad.precision import PRECISIONS, resolve_precision
from diffad.visualization import beside_overlay

logger = get_logger(__name__)


# -- arguments ---------------------------------------------------------------------------------------------------


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of diffusers' own training examples, and what finding anomalies adds to them."""
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}  # --no-FLAG undoes a --config
    data = parser.add_argument_group("data")
    data.add_argument("--config", metavar="FILE", help="YAML of any of these flags; the command line overrides it")
    data.add_argument("--train_data_dir", metavar="DIR", help="MVTec-AD style tree or folder of good images, or 'elpv'")
    data.add_argument("--dataset_name", metavar="ID", help="data set on the Hub, instead of --train_data_dir")
    data.add_argument("--category", nargs="+", help="train on these categories only (default: all that there are)")
    data.add_argument(
        "--balance_categories",
        **switch,
        help="draw every category equally often, however many images it has (default: every image)",
    )
    data.add_argument(
        "--streaming", **switch, help="read the data once as a stream, and keep only its good images on disk"
    )
    data.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help="unreadable files (error)")
    data.add_argument(
        "--calibration_fraction",
        type=float,
        default=0.15,
        help="share of good images held out for thresholds (0.15)",
    )
    data.add_argument(
        "--part_pattern",
        metavar="REGEX",
        help="finds the part in an image's path, at its first match: the groups in parentheses, or else all of it; all "
        "photographs of a part in a category are then held out, or none (default: every image is of another part)",
    )
    data.add_argument("--resolution", type=int, help="side of the training images in pixels (default: the preset's)")
    data.add_argument(
        "--rotation_degrees", type=float, default=5.0, help="rotate by up to this many degrees (%(default)s)"
    )
    data.add_argument("--random_flip", **switch, help="flip left-right")
    data.add_argument("--random_vertical_flip", **switch, help="flip upside down")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that read images (0)")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="runs/model", help="where the pipeline and checkpoints go (%(default)s)")
    run.add_argument("--seed", type=int, default=0, help="of weights, data order, noise and augmentation (0)")
    run.add_argument("--checkpointing_steps", type=int, default=500, help="steps between checkpoints (500)")
    run.add_argument("--checkpoints_total_limit", type=int, default=2, help="checkpoints kept (2)")
    run.add_argument("--resume_from_checkpoint", metavar="DIR", help="a checkpoint folder, or 'latest'")
    run.add_argument("--validation_steps", type=int, default=0, help="steps between validation pictures (0: none)")
    run.add_argument("--report_to", default=None, help="tracker: tensorboard, wandb, ... (none)")
    run.add_argument("--push_to_hub", **switch, help="upload the pipeline, its card and pictures at the end")
    run.add_argument(
        "--num_example_images", type=int, default=2, help="held-out good images saved as pictures, and pushed (2)"
    )
    run.add_argument("--hub_model_id", help="repository to push to (default: the name of --output_dir)")
    run.add_argument("--hub_token", help="Hub token (default: the one you logged in with)")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--train_batch_size", type=int, default=8, help="images a step and process (%(default)s)")
    optimization.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches a step (%(default)s)")
    optimization.add_argument("--max_train_steps", type=int, default=10_000, help="optimizer steps (%(default)s)")
    optimization.add_argument("--learning_rate", type=float, default=1e-4, help="(%(default)s)")
    optimization.add_argument("--lr_scheduler", default="cosine", help="diffusers' name of it (%(default)s)")
    optimization.add_argument("--lr_warmup_steps", type=int, default=100, help="(%(default)s)")
    optimization.add_argument("--adam_weight_decay", type=float, default=1e-4, help="(%(default)s)")
    optimization.add_argument("--max_grad_norm", type=float, default=1.0, help="(1.0)")
    optimization.add_argument("--use_ema", **switch, help="keep and save the weights' moving average")
    optimization.add_argument("--ema_decay", type=float, default=0.9999, help="its largest decay (0.9999)")
    optimization.add_argument(
        "--mixed_precision", choices=PRECISIONS, help="auto is bf16 where that is fast, else no (accelerate's setting)"
    )
    optimization.add_argument("--gradient_checkpointing", **switch, help="less memory for more time")
    optimization.add_argument("--false_alarm_rate", type=float, default=0.01, help="of good parts, at the end (0.01)")


def add_diad_arguments(parser: argparse.ArgumentParser) -> None:
    """What the autoencoder's training and the denoiser's agree on: the images, and the features that judge them."""
    images = parser.add_argument_group("images")
    images.add_argument("--image_mean", type=float, nargs=3, default=[*IMAGENET_MEAN], help="of colours (ImageNet's)")
    images.add_argument("--image_std", type=float, nargs=3, default=[*IMAGENET_STD], help="of colours (ImageNet's)")
    features = parser.add_argument_group("features")
    features.add_argument("--backbone", default="resnet50", help="timm model (resnet50)")
    features.add_argument(
        "--backbone_weights", help="'timm', 'random' or a file (default: installed package, then timm)"
    )
    features.add_argument("--feature_strides", type=int, nargs="+", default=[4, 8, 16], help="(4 8 16)")
    features.add_argument("--feature_image_size", type=int, help="pixels the backbone sees (default: the resolution)")


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line over `--config`'s values over the defaults, and checks what every script takes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    early, _ = parser.parse_known_args(argv)
    if early.config:
        path = Path(early.config)
        if not path.is_file():
            parser.error(f"--config: no file at {path}")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            parser.error(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        if not isinstance(values, dict):
            parser.error(f"--config: {path} must hold lines of `flag: value`")
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(values) - known)
        if unknown:
            parser.error(f"--config: {path} sets unknown flags {', '.join(unknown)}")
        # in front of the command line's, so that types and choices are checked and the later ones win
        configured: list[str] = []
        for name, value in values.items():
            if value is False and name == "mixed_precision":  # so YAML reads `no`
                configured += ["--mixed_precision", "no"]
            elif value is True:
                configured.append(f"--{name}")
            elif value is False and f"--no-{name}" in parser._option_string_actions:
                configured.append(f"--no-{name}")
            elif value is not None and value is not False:
                configured += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
        argv = [*configured, *argv]
    args = parser.parse_args(argv)
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give one of --train_data_dir and --dataset_name")
    if not 0.0 < args.calibration_fraction < 1.0:
        parser.error(
            "--calibration_fraction must lie in (0, 1): thresholds need good images that training has not seen"
        )
    if args.part_pattern is not None:
        try:
            check_part_pattern(args.part_pattern, "--part_pattern")
        except ValueError as error:
            parser.error(str(error))
    if not 0.0 < args.false_alarm_rate < 1.0:
        parser.error("--false_alarm_rate must lie in (0, 1)")
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate, with a data order that the seed and the epoch alone decide, so that a resumed run sees the same."""
    accelerator = Accelerator(
        # Every step takes as many batches, also where an epoch ends: a step's batches follow from its number alone.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=resolve_precision(args.mixed_precision),
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    args.mixed_precision = accelerator.mixed_precision  # also where accelerate's own settings say so
    set_seed(args.seed)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.report_to:
        scalars = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool)) and k not in SECRETS}
        accelerator.init_trackers("diffad", config=scalars)
    return accelerator


# -- data --------------------------------------------------------------------------------------------------------


def load_good_images(args: argparse.Namespace) -> tuple[Dataset, Dataset, list[str]]:
    """Good images for training, good images held out of it, and the categories' names.

    The same share of every category is held out, by the seed; of a part, all of the category's images or none, and no
    more than that share unless every part is larger. A model knows parts that it has been trained on, and thresholds
    from other photographs of these would not hold for new parts.

    Raises:
        ValueError: a category has too few good images or parts, or `--part_pattern` is not in an image's path.
    """
    good = load_anomaly_dataset(
        args.train_data_dir or args.dataset_name,
        split="train",
        category=args.category,
        on_bad_image=args.on_bad_image,
        streaming=args.streaming,
    )
    if args.streaming:
        good = keep_good_images(good)
    labels = np.asarray(good["label"])
    good = good.select(np.flatnonzero(labels == 0)) if labels.any() else good
    of_image = np.asarray(good["category"])
    part = part_index(good["path"], args.part_pattern, "--part_pattern")
    categories = sorted(set(of_image.tolist()))
    training, held_out = [], []
    for number, category in enumerate(categories):
        images = np.flatnonzero(of_image == category)
        parts, num_photographs = np.unique(part[images], return_counts=True)
        left = max(1, round(args.calibration_fraction * len(images)))
        chosen: list[int] = []
        for one in np.random.default_rng([args.seed, number]).permutation(len(parts)):
            if num_photographs[one] <= left:
                chosen.append(one)
                left -= num_photographs[one]
        is_held_out = np.isin(part[images], parts[chosen or [num_photographs.argmin()]])
        if (~is_held_out).sum() < 2:
            of_parts = "" if args.part_pattern is None else f", and of parts by --part_pattern {len(parts)}"
            raise ValueError(
                f"Category {category!r} of {args.train_data_dir or args.dataset_name} has {len(images)} good images"
                f"{of_parts}: too few to train and to calibrate. It takes 3, of 2 parts, and deserves 100."
            )
        held_out.extend(images[is_held_out].tolist())
        training.extend(images[~is_held_out].tolist())
    return good.select(sorted(training)), good.select(sorted(held_out)), categories


def keep_good_images(stream: IterableDataset) -> Dataset:
    """The good images of a stream, kept on disk as they come, encoded as they are: one pass in constant memory."""
    stream = stream.cast_column("image", datasets.Image(decode=False))

    def good_records() -> Iterator[dict[str, Any]]:
        for record in stream:
            if record["label"] == 0:
                image = record["image"]
                if image["bytes"] is None and "://" in image["path"]:  # of an image folder only the address came
                    with fsspec.open(image["path"], "rb") as file:
                        image = {**image, "bytes": file.read()}
                yield {**record, "image": image, "mask": None}

    return Dataset.from_generator(
        good_records,
        features=FEATURES,
        cache_dir=get_temporary_cache_files_directory(),
        fingerprint=uuid.uuid4().hex,  # its own would hash the stream
    )


def temporary_table() -> str:
    """Path for a table of a `datasets.Dataset`, removed when the process ends."""
    return str(Path(get_temporary_cache_files_directory(), f"{uuid.uuid4().hex}.arrow"))


class ResizedImages(TorchDataset):
    """Images of a data set, decoded and resized once and then read from a memory-mapped table.

    An item is (uint8 tensor (3, R, R), category index), and `category_index` holds the latter of all images. Decoding
    again in every epoch would cost more than a small network's step; keeping tensors in memory would grow with the
    data set.
    """

    def __init__(self, dataset: Dataset, resolution: int, categories: Sequence[str]):
        self.resolution = resolution
        index = {name: i for i, name in enumerate(categories)}

        def resize(record: dict[str, Any]) -> dict[str, Any]:
            tensor = images_to_tensors(record["image"])[0]
            resized = resize_images(tensor[None], (resolution, resolution))[0]
            pixels = (resized * 255.0).round().to(torch.uint8)  # (3, R, R)
            return {"pixels": pixels.numpy().tobytes(), "index": index[record["category"]]}

        self.table = dataset.map(
            resize,
            remove_columns=dataset.column_names,
            desc="Reading images",
            writer_batch_size=64,
            # a data set in memory would keep this one there too; one on disk has a place for it, and finds it again
            cache_file_name=None if dataset.cache_files else temporary_table(),
        ).with_format("numpy")
        self.category_index = np.asarray(self.table["index"][:])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row = self.table[i]
        pixels = np.frombuffer(row["pixels"], dtype=np.uint8).reshape(3, self.resolution, self.resolution)
        return torch.from_numpy(pixels.copy()), int(row["index"])


class BalancedSampler(Sampler[int]):
    """Image indices in which every category comes equally often.

    An epoch has as many images of each category as the largest one holds. It is made of rounds, each with one image of
    every category in random order, so that a batch is balanced as well. A category's images are gone through again and
    again, shuffled anew each time and across the ends of epochs: none comes up more often than another. The order
    follows from seed and epoch alone.

    Args:
        category_index: (N,) integers.
        seed: of all orders.
    """

    def __init__(self, category_index: np.ndarray, seed: int):
        self.members = [np.flatnonzero(category_index == category) for category in np.unique(category_index)]
        self.rounds = max(len(members) for members in self.members)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls this through its data loader's own `set_epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rounds * len(self.members)

    def __iter__(self) -> Iterator[int]:
        drawn = []
        for number, members in enumerate(self.members):
            # this epoch's part of an endless row of permutations
            start = self.epoch * self.rounds
            first, last = start // len(members), (start + self.rounds - 1) // len(members)
            shuffled = [
                np.random.default_rng([self.seed, number, i]).permutation(members) for i in range(first, last + 1)
            ]
            drawn.append(np.concatenate(shuffled)[start - first * len(members) :][: self.rounds])
        order = np.random.default_rng([self.seed, len(self.members), self.epoch])
        yield from order.permuted(np.stack(drawn, axis=1), axis=1).flatten().tolist()  # (rounds, categories)


def create_data_loader(images: ResizedImages, args: argparse.Namespace) -> DataLoader:
    """Shuffled batches of `train_batch_size`, or of as many images as there are for each process.

    `images` may be any data set with a `category_index`.

    Raises:
        ValueError: there are fewer images than processes.
    """
    images_a_process = len(images) // PartialState().num_processes
    if not images_a_process:
        raise ValueError(f"{len(images)} training images are too few for {PartialState().num_processes} processes.")
    return DataLoader(
        images,
        batch_size=min(args.train_batch_size, images_a_process),
        shuffle=not args.balance_categories,
        sampler=BalancedSampler(images.category_index, args.seed) if args.balance_categories else None,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def augment(pixels: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Rotates and flips a batch, (N, 3, R, R) uint8 to float32 in [-1, 1]; one resampling for both."""
    images = pixels.float() / 127.5 - 1.0
    count, device = len(images), images.device

    def uniform() -> torch.Tensor:
        return torch.rand(count, generator=generator, device=device)

    angle = (uniform() * 2.0 - 1.0) * math.radians(args.rotation_degrees)
    horizontal = torch.where((uniform() < 0.5) & args.random_flip, -1.0, 1.0)
    vertical = torch.where((uniform() < 0.5) & args.random_vertical_flip, -1.0, 1.0)
    if not (args.rotation_degrees or args.random_flip or args.random_vertical_flip):
        return images
    zero = torch.zeros_like(angle)
    matrix = torch.stack(
        [
            angle.cos() * horizontal,
            -angle.sin() * vertical,
            zero,
            angle.sin() * horizontal,
            angle.cos() * vertical,
            zero,
        ],
        dim=1,
    ).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def step_generator(seed: int, batch_number: int, accelerator: Accelerator) -> torch.Generator:
    """Randomness of one batch on one process, from numbers alone: a resumed run draws what the other would have."""
    mixed = np.random.SeedSequence([seed, batch_number, accelerator.process_index]).generate_state(1, np.uint64)[0]
    return torch.Generator(accelerator.device).manual_seed(int(mixed >> np.uint64(1)))


def training_batches(
    data_loader: DataLoader, accelerator: Accelerator, first: int, last: int
) -> Iterator[tuple[int, Any]]:
    """Numbered batches [first, last), epoch after epoch; a resumed run skips without reading images."""
    number = first
    while number < last:
        epoch, offset = divmod(number, len(data_loader))
        data_loader.set_epoch(epoch)
        loader = accelerator.skip_first_batches(data_loader, offset) if offset else data_loader
        for batch in loader:
            yield number, batch
            number += 1
            if number == last:
                return


# -- optimizer, EMA, checkpoints ---------------------------------------------------------------------------------


def create_optimizer(
    parameters: Sequence[torch.nn.Parameter], args: argparse.Namespace, accelerator: Accelerator
) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.adam_weight_decay, fused=True)
    # accelerate steps the schedule once for every process
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    return optimizer, schedule


def create_ema(parameters: Sequence[torch.nn.Parameter], args: argparse.Namespace) -> EMAModel | None:
    """Diffusers' EMA; the warm-up's power suits runs of a thousand steps as well as of a million."""
    if not args.use_ema:
        return None
    return EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, step: int) -> None:
    """Saves `checkpoint-STEP`: written under another name and renamed, so a killed run leaves no half checkpoint."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit or None]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Loads the checkpoint asked for and returns its step; 0 where there is none yet."""
    if not args.resume_from_checkpoint:
        return 0
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(args.output_dir)
        if not checkpoints:
            accelerator.print(f"No checkpoint in {args.output_dir} yet: starting anew.")
            return 0
        folder = checkpoints[-1]
    else:
        folder = Path(args.resume_from_checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint: no folder at {folder}. Give one, or 'latest'.")
    accelerator.load_state(str(folder))
    step = int(folder.name.removeprefix("checkpoint-"))
    accelerator.print(f"Resuming from {folder}, step {step}.")
    return step


def check_replicas(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Every process must have come to the same weights.

    Raises:
        RuntimeError: they differ, so gradients were not exchanged.
    """
    checksum = sum(p.detach().double().abs().sum() for p in model.parameters()).reshape(1)
    gathered = accelerator.gather(checksum.float() if checksum.device.type == "mps" else checksum)
    if not torch.equal(gathered, gathered[:1].expand_as(gathered)):
        raise RuntimeError(f"Processes ended with different weights (sums {gathered.tolist()}).")


# -- the end of a run --------------------------------------------------------------------------------------------


def finish(
    pipeline: Any,
    training: Dataset,
    held_out: Dataset,
    categories: Sequence[str],
    args: argparse.Namespace,
    record: dict[str, Any],
    max_statistics_images: int = 512,
) -> None:
    """Calibrates a pipeline on good images, saves it and, where asked, pushes it; on the main process.

    Per-position statistics come from up to `max_statistics_images` images of training, which are many; thresholds and
    p-values from the held-out ones, which no network has seen. `record` goes into `training.json`.
    """
    generator = torch.Generator().manual_seed(args.seed)
    for category in categories:

        def images_of(dataset: Dataset, category: str = category) -> Any:
            return dataset.select(np.flatnonzero(np.asarray(dataset["category"]) == category))

        statistics = images_of(training)
        if len(statistics) > max_statistics_images:
            statistics = statistics.shuffle(seed=args.seed).select(range(max_statistics_images))
        pipeline.calibrate(
            images_of(held_out)["image"],
            statistics_images=statistics["image"],
            false_alarm_rate=args.false_alarm_rate,
            category=category if len(categories) > 1 else None,
            generator=generator,
        )
    remove_reports(args.output_dir)  # they speak of the weights that were here before
    pipeline.save_pretrained(args.output_dir)
    save_examples(pipeline, held_out, args)
    save_record(args, {"categories": list(categories), **record})
    if args.push_to_hub:
        repo_id = args.hub_model_id or Path(args.output_dir).name
        pipeline.push_to_hub(repo_id, token=args.hub_token, folder=args.output_dir)


def save_examples(pipeline: Any, held_out: Dataset, args: argparse.Namespace) -> None:
    """Held-out images beside their overlays, for the model's card: on good ones nothing should light up."""
    for i in range(min(args.num_example_images, len(held_out))):
        picture = np.asarray(image_to_rgb(held_out[i]["image"]))
        category = held_out[i]["category"] if len(pipeline.config.categories or []) > 1 else None
        output = pipeline(picture, category=category, generator=torch.Generator().manual_seed(args.seed))
        threshold = float(pipeline.calibration.pixel_threshold[pipeline.category_index(category, 1)[0]])
        sheet = beside_overlay(picture, output.anomaly_map[0], output.anomaly_mask[0], threshold)
        Image.fromarray(sheet).save(Path(args.output_dir, f"good-{i + 1}.png"))


def save_record(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Writes `training.json` beside the model: the arguments, and what came of them."""
    arguments = {name: value for name, value in vars(args).items() if name not in SECRETS}
    record = {"arguments": arguments, **record}
    Path(args.output_dir, TRAINING_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n")


def load_pictures(dataset: Dataset, count: int) -> list[torch.Tensor]:
    """The first few images, for validation pictures."""
    return images_to_tensors([dataset[i]["image"] for i in range(min(count, len(dataset)))])
