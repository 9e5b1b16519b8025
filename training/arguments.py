"""The flags that the training scripts share."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from diffad.data.parts import check_part_pattern
from diffad.images import IMAGENET_MEAN, IMAGENET_STD
from diffad.model_folder import check_local
from diffad.precision import PRECISIONS


class FlagParser(argparse.ArgumentParser):
    """Names a flag and what it must be in one sentence, `--seed must be at least 0, but is -1`, without all the others.

    `diffad fit` and `train` pass their flags on to scripts that have many more.
    """

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)(?:/--\w+)*: must", r"\1 must", message)
        hint = " (--help lists them)" if "arguments" in message else ""
        self.exit(2, f"error: {message}{hint}\n")


def local_path(text: str) -> str:
    """Type of a flag: where something is written, which is no URL."""
    try:
        check_local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def whole_number(smallest: int = 0) -> Callable[[str], int]:
    """Type of a flag: an integer that is not below `smallest`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, but is {text!r}") from None
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, but is {value}")
        return value

    return parse


def number(
    smallest: float = -math.inf, largest: float = math.inf, without_ends: bool = False
) -> Callable[[str], float]:
    """Type of a flag: a finite number in [`smallest`, `largest`], or strictly between."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, but is {text!r}") from None
        outside = value <= smallest or value >= largest if without_ends else value < smallest or value > largest
        if (outside or not math.isfinite(value)) and largest == math.inf:
            least = "" if smallest == -math.inf else f" and {'above' if without_ends else 'at least'} {smallest:g}"
            raise argparse.ArgumentTypeError(f"must be finite{least}, but is {text}")
        if outside or not math.isfinite(value):
            ends = f"({smallest:g}, {largest:g})" if without_ends else f"[{smallest:g}, {largest:g}]"
            raise argparse.ArgumentTypeError(f"must lie in {ends}, but is {text}")
        return value

    return parse


COUNT, POSITIVE = whole_number(0), whole_number(1)
PIXELS = whole_number(8)  # of what it must be a multiple, the networks say
SEED = whole_number(0)
SHARE, RATE = number(0.0, 1.0), number(0.0, 1.0, without_ends=True)
NOT_NEGATIVE, ABOVE_ZERO = number(0.0), number(0.0, without_ends=True)
# diffusers' names, without `piecewise_constant`, which takes rules that no flag gives
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OWN_NETWORKS = "the pipeline of --pretrained_model_name_or_path has its own networks"


class OneSideOrTwo(argparse.Action):
    """One number stays one; two are height and width."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            parser.error(f"{option_string} must be one side, or height and width, but is {values}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_resolution(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument(
        "--resolution",
        type=PIXELS,
        nargs="+",
        metavar=("SIDE", "WIDTH"),
        action=OneSideOrTwo,
        help=f"side of the images in pixels, or height and width (default: {default})",
    )


class TileSize(OneSideOrTwo):
    """`none`, or as of `OneSideOrTwo`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values == ["none"]:
            setattr(namespace, self.dest, None)
            return
        try:
            super().__call__(parser, namespace, [PIXELS(value) for value in values], option_string)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option_string} {error}, or 'none'")


def add_tiles(group: Any) -> None:
    """`--tile_size`, "auto" where it is not given, and `--tile_overlap`."""
    group.add_argument(
        "--tile_size",
        nargs="+",
        action=TileSize,
        default="auto",
        metavar=("SIDE", "WIDTH"),
        help="look at images in tiles, too: pixels a side, or height and width; none: as a whole alone (default: as "
        "many pixels as the networks see, where the images' sides are three times as long)",
    )
    group.add_argument(
        "--tile_overlap", type=number(0.0, 0.75), default=0.25, help="share of a tile's sides, at least (0.25)"
    )


def add_source_arguments(data: argparse._ArgumentGroup, with_region: bool = False) -> None:
    """Which good images, and with `with_region` which of their pixels; `check_source` sees that there are some."""
    data.add_argument("--train_data_dir", metavar="DIR", help="MVTec-AD style tree or folder of good images, or 'elpv'")
    data.add_argument("--dataset_name", metavar="ID", help="data set on the Hub, instead of --train_data_dir")
    data.add_argument("--dataset", metavar="NAME", help="force a layout (mvtec_ad, visa, folder, ...)")
    data.add_argument("--category", nargs="+", help="only these categories (default: all that there are)")
    if with_region:
        data.add_argument(
            "--roi",
            metavar="PATH",
            help="which pixels count: a mask (PNG), a folder of CATEGORY.png, or polygons in COCO JSON (default: all)",
        )
    data.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help="unreadable files (error)")


def check_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give one of --train_data_dir and --dataset_name")
    folders = {args.train_data_dir, args.output_dir}
    if None not in folders and len(set(map(os.path.realpath, folders))) == 1:
        parser.error(f"--output_dir: {args.output_dir} holds the data: a model's pictures would lie between them")
    if getattr(args, "part_pattern", None) is not None:
        try:
            check_part_pattern(args.part_pattern, "--part_pattern")
        except ValueError as error:
            parser.error(str(error))


def add_shared_arguments(parser: argparse.ArgumentParser, any_ratio: bool = False, calibrates: bool = False) -> None:
    """The flags of diffusers' own training examples, and what finding anomalies adds to them.

    `any_ratio`: whether the training images may be other than square; `calibrates`: whether the model finds anomalies
    in the end, so that there is a use for `--roi`, `--false_alarm_rate` and `--num_example_images`.
    """
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}  # --no-FLAG undoes a --config
    data = parser.add_argument_group("data")
    data.add_argument("--config", metavar="FILE", help="YAML of any of these flags; the command line overrides it")
    add_source_arguments(data, with_region=calibrates)
    data.add_argument(
        "--balance_categories",
        **switch,
        help="draw every category equally often, however many images it has (default: every image)",
    )
    data.add_argument(
        "--streaming", **switch, help="read the data once as a stream, and keep only its good images on disk"
    )
    data.add_argument(
        "--calibration_fraction",
        type=RATE,
        default=0.15,
        help="share of good images held out for thresholds (0.15)",
    )
    data.add_argument(
        "--part_pattern",
        metavar="REGEX",
        help="finds the part in an image's path, at its first match: the groups in parentheses, or else all of it; all "
        "photographs of a part in a category are then held out, or none (default: every image is of another part)",
    )
    data.add_argument(
        "--value_range",
        type=ABOVE_ZERO,
        help="largest value of images of more than 8 bits, 4095 for a camera of 12; saved with the model (default: of "
        "the smallest of 8, 10, 12, 14 and 16 bits that holds all good images)",
    )
    if any_ratio:
        add_resolution(data, "as many pixels as the preset's, at the ratio of the images where they share one")
    else:
        data.add_argument(
            "--resolution", type=PIXELS, help="side of the training images in pixels (default: the preset's)"
        )
    data.add_argument(
        "--rotation_degrees",
        type=number(0.0, 180.0),
        default=5.0,
        help="rotate by up to this many degrees (%(default)s)",
    )
    data.add_argument("--random_flip", **switch, help="flip left-right")
    data.add_argument("--random_vertical_flip", **switch, help="flip upside down")
    data.add_argument("--dataloader_num_workers", type=COUNT, default=0, help="processes that read images (0)")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--output_dir",
        type=local_path,
        default="runs/model",
        help="where the pipeline and checkpoints go (%(default)s)",
    )
    run.add_argument("--seed", type=SEED, default=0, help="of weights, data order, noise and augmentation (0)")
    run.add_argument("--checkpointing_steps", type=POSITIVE, default=500, help="steps between checkpoints (500)")
    run.add_argument("--checkpoints_total_limit", type=POSITIVE, default=2, help="checkpoints kept (2)")
    run.add_argument("--resume_from_checkpoint", metavar="DIR", help="a checkpoint folder, or 'latest'")
    run.add_argument("--validation_steps", type=COUNT, default=0, help="steps between validation pictures (0: none)")
    trackers = ("all", *sorted(LOGGER_TYPE_TO_CLASS))
    run.add_argument("--report_to", choices=trackers, metavar="NAME", help="tracker: tensorboard, wandb, ... (none)")
    run.add_argument("--push_to_hub", **switch, help="upload the pipeline, its card and pictures at the end")
    if calibrates:
        run.add_argument(
            "--num_example_images", type=COUNT, default=2, help="good images saved as pictures, and pushed (2)"
        )
    run.add_argument("--hub_model_id", help="repository to push to (default: the name of --output_dir)")
    run.add_argument("--hub_token", help="Hub token (default: the one you logged in with)")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument(
        "--train_batch_size", type=POSITIVE, default=8, help="images a step and process (%(default)s)"
    )
    optimization.add_argument(
        "--gradient_accumulation_steps", type=POSITIVE, default=1, help="batches a step (%(default)s)"
    )
    optimization.add_argument(
        "--max_train_steps", type=COUNT, default=10_000, help="optimizer steps (%(default)s); 0 trains nothing"
    )
    optimization.add_argument(
        "--num_train_epochs", type=POSITIVE, help="passes over the images, instead of --max_train_steps"
    )
    optimization.add_argument("--learning_rate", type=ABOVE_ZERO, default=1e-4, help="(%(default)s)")
    optimization.add_argument(
        "--scale_lr", **switch, help="multiply the learning rate by the images a step, over all processes"
    )
    optimization.add_argument("--use_8bit_adam", **switch, help="AdamW's state in a quarter of the memory")
    optimization.add_argument(
        "--lr_scheduler", choices=LR_SCHEDULERS, default="cosine", help="diffusers' name of it (%(default)s)"
    )
    optimization.add_argument("--lr_warmup_steps", type=COUNT, default=100, help="(%(default)s)")
    optimization.add_argument("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-4, help="(%(default)s)")
    optimization.add_argument("--max_grad_norm", type=ABOVE_ZERO, default=1.0, help="(1.0)")
    optimization.add_argument("--use_ema", **switch, help="keep and save the weights' moving average")
    optimization.add_argument("--ema_decay", type=SHARE, default=0.9999, help="its largest decay (0.9999)")
    optimization.add_argument(
        "--mixed_precision", choices=PRECISIONS, help="auto is bf16 where that is fast, else no (accelerate's setting)"
    )
    optimization.add_argument("--gradient_checkpointing", **switch, help="less memory for more time")
    if calibrates:
        optimization.add_argument(
            "--false_alarm_rate", type=RATE, default=0.01, help="of good parts, at the end (0.01)"
        )


def add_diad_arguments(parser: argparse.ArgumentParser) -> None:
    """What the autoencoder's training and the denoiser's agree on: the images, and the features that judge them."""
    images = parser.add_argument_group("images")
    images.add_argument(
        "--image_mean", type=number(), nargs=3, default=[*IMAGENET_MEAN], help="of colours (AutoencoderKL: ImageNet's)"
    )
    images.add_argument(
        "--image_std", type=ABOVE_ZERO, nargs=3, default=[*IMAGENET_STD], help="of colours (AutoencoderKL: ImageNet's)"
    )
    features = parser.add_argument_group("features")
    features.add_argument("--backbone", default="resnet50", help="timm model (resnet50)")
    features.add_argument(
        "--backbone_weights", help="'timm', 'random' or a file (default: installed package, then timm)"
    )
    features.add_argument("--feature_strides", type=POSITIVE, nargs="+", default=[4, 8, 16], help="(4 8 16)")
    features.add_argument(
        "--feature_layers", type=COUNT, nargs="+", help="the backbone's layers by timm's index, instead of strides"
    )
    features.add_argument(
        "--feature_image_size", type=whole_number(8), help="pixels the backbone sees (default: the resolution)"
    )


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line over `--config`'s values over the defaults, and checks what every script takes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    early, _ = parser.parse_known_args(argv)
    if early.config:
        path = Path(early.config)
        if not path.is_file():
            parser.error(f"--config: no file at {path}")
        try:
            content = path.read_bytes()  # in UTF-8 whatever the locale
            values = yaml.safe_load(content) or {}
            written = yaml.load(content, yaml.BaseLoader)  # in which 01, a category's name, stays 01
        except yaml.YAMLError as error:
            parser.error(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        if not isinstance(values, dict):
            parser.error(f"--config: {path} must hold lines of `flag: value`")
        known = {action.dest for action in parser._actions} - {"config", "help"}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            parser.error(f"--config: {path} sets unknown flags {', '.join(unknown)}")
        # in front of the command line's, so that types and choices are checked and the later ones win
        configured: list[str] = []
        with_value = {action.dest for action in parser._actions if action.nargs != 0}
        with_one = {action.dest for action in parser._actions if action.nargs is None}
        for name, value in values.items():
            text = written.get(name, value)
            if value is False and name == "mixed_precision":  # so YAML reads `no`
                configured += ["--mixed_precision", "no"]
            elif value is False and name in ("report_to", "roi"):  # none of them, and no file called so
                continue
            elif name not in with_value and not isinstance(value, bool | None):
                parser.error(f"--config: {path}: {name} must be true or false, but is {text}")
            elif isinstance(value, list) and name in with_one:
                parser.error(f"--config: {path}: {name} takes one value, but is {value}")
            elif isinstance(value, list):
                configured += [f"--{name}", *map(str, text)]
            elif isinstance(value, bool) and name not in with_value:
                flag = f"--{name}" if value else f"--no-{name}"
                configured += [flag] if flag in parser._option_string_actions else []
            elif value is not None:
                configured.append(f"--{name}={text}")  # which may begin with a dash
        argv = [*configured, *argv]
    args = parser.parse_args(argv)
    # of --max_train_steps and --num_train_epochs the later one counts, and any flag of the command line is later than
    # those of --config
    lengths = [flag for flag in argv or sys.argv[1:] if flag.startswith(("--max_t", "--num_t"))]
    if lengths and lengths[-1].startswith("--max_t"):
        args.num_train_epochs = None
    if (
        args.max_train_steps == 0
        and args.num_train_epochs is None
        and not getattr(args, "pretrained_model_name_or_path", None)
    ):
        parser.error("--max_train_steps 0 trains nothing: give what was trained, --pretrained_model_name_or_path")
    check_source(parser, args)
    if args.push_to_hub and not args.hub_model_id:
        args.hub_model_id = Path(args.output_dir).resolve().name
    return args


def given_flags(argv: Sequence[str], names: set[str]) -> list[str]:
    """The flags of the command line that bear one of these names, as they were written.

    Example:
        >>> given_flags(["--backbone=resnet50", "--seed", "1"], {"backbone"})
        ['--backbone']
    """
    return [flag for flag in (one.split("=")[0] for one in argv) if flag.startswith("--") and flag[2:] in names]


def warn_of_overruled(given: list[str], why: str = OWN_NETWORKS) -> None:
    """Says which flags do not count and why: unless said otherwise, a trained pipeline has networks of its own."""
    if given:
        which = f"{' and '.join(given)} {'do' if given[1:] else 'does'} not count"
        warnings.warn(f"{which}: {why}.", stacklevel=3)
