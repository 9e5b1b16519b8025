"""Good images of training: held out, resized once, balanced, augmented."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from datasets.fingerprint import get_temporary_cache_files_directory
from torch.utils.data import DataLoader, Sampler, Subset
from torch.utils.data import Dataset as TorchDataset

from diffad.data import load_anomaly_dataset
from diffad.data.checks import cast_images, dataset_value_range, without_copies
from diffad.data.image_feature import ImageFile, stored_content
from diffad.data.parts import part_index
from diffad.data.records import FEATURES
from diffad.data.regions_of_interest import read_roi
from diffad.evaluation.metric_names import check_category_names
from diffad.images import Side, as_side, as_size, images_to_tensors, resize_image
from diffad.pipelines.detection import FEW_IMAGES
from diffad.reading.image_metadata import turn_upright
from diffad.region_of_interest import hide_outside, inside_region
from diffad.tiling import MOSTLY, MUCH_LARGER, places_inside, spread_places, tile_grid, tile_views
from diffad.training.shared_map import shared_map
from diffad.training.stop_signals import ignore_stop_signals

if TYPE_CHECKING:
    from diffad.training.cached_encodings import CachedEncodings


def load_good_images(args: argparse.Namespace) -> tuple[Dataset, Dataset, list[str]]:
    """`hold_out` of `read_good_images`; `args.held_out_digest` becomes that of the images held out."""
    training, held_out, categories = hold_out(read_good_images(args), args)
    args.held_out_digest = held_out_digest(args, held_out)
    return training, held_out, categories


def held_out_digest(args: argparse.Namespace, *held_out: Dataset) -> str:
    """SHA-256 of what names the held-out images, which a checkpoint keeps (`diffad.training.checkpoints`).

    Paths are taken from the data's folder on, as that may have been moved, or be named in another way. An image without
    a path, as in parquet files, is named by its bytes.
    """
    folder = args.train_data_dir if args.train_data_dir is not None and os.path.isdir(args.train_data_dir) else None
    names = []
    for images in held_out:
        paths = images["path"]
        undecoded = images if all(paths) else cast_images(images, decode=False)
        for i, path in enumerate(paths):
            if not path:
                names.append(hashlib.sha256(stored_content(undecoded[i]["image"]) or b"").hexdigest())
            else:
                names.append(os.path.relpath(path, folder) if folder and os.path.isabs(path) else path)
    return hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "surrogateescape")).hexdigest()


def read_good_images(args: argparse.Namespace) -> Dataset:
    """All good images of the training split.

    Where `args.value_range` is None, it becomes what they say, None if none of them has more than 8 bits.
    """
    good = load_anomaly_dataset(
        args.train_data_dir or args.dataset_name,
        split="train",
        category=args.category,
        dataset=args.dataset,
        on_bad_image=args.on_bad_image,
        streaming=args.streaming,
    )
    if args.streaming:
        good = keep_good_images(good)
    check_category_names(good["category"])
    labels = np.asarray(good["label"])
    good = without_copies(good.select(np.flatnonzero(labels == 0)) if labels.any() else good)
    if args.value_range is None:
        args.value_range = dataset_value_range(good)
    return good


MAX_TRAINING_TILES = 4096  # of all images together: 0.6 GB on disk for 224 x 224 pixels
HELD_OUT_FRACTION = 0.2  # of good images, for the thresholds, where `diffad fit` holds some out
SAME_RATIO = 1.05  # as far apart sides' ratios may be, and still count as one


def common_ratio(sizes: Sequence[tuple[int, int]]) -> float:
    """The ratio of images, height over width, where it is about the same of all; else 1."""
    ratios = sorted(height / width for height, width in sizes)
    return ratios[len(ratios) // 2] if ratios[-1] <= SAME_RATIO * ratios[0] else 1.0


def choose_tile_size(
    sizes: Sequence[tuple[int, int]], input_side: Side, categories: Sequence[str]
) -> int | tuple[int, int] | None:
    """A tile of as many pixels as the networks see, where images are much larger than that; else None.

    They are where the middle one of all has sides more than `MUCH_LARGER` times as long, by their product, and there
    are enough of each category to hold some out.

    Args:
        sizes: of all images.
        input_side: what the networks see.
        categories: of the same images.
    """
    pixels = sorted(height * width for height, width in sizes)[len(sizes) // 2]
    is_much_larger = pixels > MUCH_LARGER**2 * math.prod(as_size(input_side))
    fewest = min(Counter(categories).values())
    return as_side(input_side) if is_much_larger and fewest >= FEW_IMAGES else None


def check_tile_size(tile_size: Side, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises a ValueError where a tile is larger than every image, and would show what the whole does."""
    largest = tuple(map(max, zip(*sizes, strict=True)))
    tile = as_size(tile_size)
    if tile[0] > largest[0] and tile[1] > largest[1]:
        raise ValueError(
            f"--tile_size must be smaller than the images, but is {tile[0]} x {tile[1]}, and they have "
            f"{largest[0]} x {largest[1]} pixels at most. Without it images are looked at as a whole."
        )


def load_region(
    args: argparse.Namespace, categories: Sequence[str], present: Sequence[str] | None = None
) -> torch.Tensor | None:
    """Where pixels count by `--roi`, of each category, (K, h, w) bool; None where all do.

    Of `categories`, those that the data have are `present` (default: all); in images of the others every pixel counts.
    """
    if args.roi is None:
        return None
    masks = {
        name: torch.from_numpy(read_roi(args.roi, name if len(categories) > 1 else None).copy())
        for name in categories
        if present is None or name in present
    }
    size = next(iter(masks.values())).shape
    everywhere = torch.ones(size, dtype=torch.bool)
    regions = [masks.get(name, everywhere) for name in categories]
    return torch.cat([F.adaptive_max_pool2d(one[None].float(), size) > 0.5 for one in regions])  # as calibration does


def hold_out(good: Dataset, args: argparse.Namespace) -> tuple[Dataset, Dataset, list[str]]:
    """Good images for training, good images held out of it, and the categories' names.

    The same share of every category is held out, by the seed; of a part, all of the category's images or none, and no
    more than that share unless every part is larger. A model knows parts that it has been trained on, and thresholds
    from other photographs of these would not hold for new parts.

    Raises:
        ValueError: a category has too few good images or parts, or too few are left by `--calibration_fraction`, or
            `--part_pattern` is not in an image's path.
    """
    of_image = np.asarray(good["category"])
    part = part_index(good["path"], args.part_pattern, "--part_pattern")
    categories = sorted(set(of_image.tolist()))
    training, held_out = [], []
    for number, category in enumerate(categories):
        images = np.flatnonzero(of_image == category)
        parts, num_photographs = np.unique(part[images], return_counts=True)
        fraction = args.calibration_fraction or HELD_OUT_FRACTION
        left = max(1, round(fraction * len(images)))
        chosen: list[int] = []
        for one in np.random.default_rng([args.seed, number]).permutation(len(parts)):
            if num_photographs[one] <= left:
                chosen.append(one)
                left -= num_photographs[one]
        is_held_out = np.isin(part[images], parts[chosen or [int(num_photographs.argmin())]])
        if (~is_held_out).sum() < 2:
            of_parts = "" if args.part_pattern is None else f", and of parts by --part_pattern {len(parts)}"
            has = f"{category!r} of {args.train_data_dir or args.dataset_name} has {len(images)} good images{of_parts}"
            if len(images) - num_photographs.min() >= 2:
                raise ValueError(
                    f"--calibration_fraction {fraction:g} leaves too few to train: category {has}, and it takes 2 that "
                    f"are not held out. Give a smaller fraction, such as {HELD_OUT_FRACTION}."
                )
            raise ValueError(
                f"Category {has}: too few to train and to calibrate. It takes 3, of 2 parts, and deserves 100."
            )
        held_out.extend(images[is_held_out].tolist())
        training.extend(images[~is_held_out].tolist())
    return good.select(sorted(training)), good.select(sorted(held_out)), categories


def hold_out_for_choice(training: Dataset, args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """Good images for training, and others for a choice after it; None where images or parts are too few for that."""
    if min(Counter(training["category"]).values()) < FEW_IMAGES:
        return training, None
    try:
        rest, held_out, _ = hold_out(training, args)
    except ValueError:  # of fewer than three parts
        return training, None
    return rest, held_out


def keep_good_images(stream: IterableDataset) -> Dataset:
    """The good images of a stream, kept on disk as they come, encoded as they are: one pass in constant memory."""
    stream = stream.cast_column("image", ImageFile(decode=False))

    def good_records() -> Iterator[dict[str, Any]]:
        for record in stream:
            if record["label"] == 0:
                image = record["image"]
                image = {**image, "bytes": stored_content(image)}  # of an image folder only the address came
                yield {**record, "image": image, "mask": None}

    return Dataset.from_generator(
        good_records,
        features=FEATURES,
        cache_dir=get_temporary_cache_files_directory(),
        fingerprint=uuid.uuid4().hex,  # its own would hash the stream
    )


class ResizedImages(TorchDataset):
    """Images of a data set, decoded and resized once a machine and then read from a memory-mapped table.

    An item is (tensor (3, R, R'), category index), the tensor uint8 or, where images have more than 8 bits, float32 in
    [0, 1], kept with 16 bits; `to_pixel_values` takes both. And `category_index` holds the latter of all images.
    Decoding again in every epoch would cost more than a small network's step; keeping tensors in memory would grow
    with the data set.

    Args:
        dataset: rows with an image and its category's name.
        resolution: the side R = R', or both.
        categories: the names, in the order of their indices.
        value_range: of images of more than 8 bits.
        tile_size, tile_overlap: of an image, tiles follow the whole, each an item of its own; of all images together
            about `MAX_TRAINING_TILES`, spread over them. None for no tiles.
        region: of each category, (K, h, w) bool, outside of which pixels are hidden.
    """

    def __init__(
        self,
        dataset: Dataset,
        resolution: Side,
        categories: Sequence[str],
        value_range: float | None = None,
        tile_size: tuple[int, int] | None = None,
        tile_overlap: float = 0.0,
        region: torch.Tensor | None = None,
    ):
        self.size = size = as_size(resolution)
        self.dtype = dtype = np.uint8 if value_range is None else np.uint16
        index = {name: i for i, name in enumerate(categories)}

        tiles_an_image = max(1, MAX_TRAINING_TILES // len(dataset))

        def resize(records: dict[str, Any], numbers: list[int]) -> dict[str, Any]:  # one record, to one row or several
            image, of_category = turn_upright(records["image"][0]), index[records["category"][0]]
            number = torch.tensor([of_category])
            views = hide_outside(resize_image(image, size, value_range), inside_region(region, number, size))
            if tile_size is not None:
                grid = tile_grid((image.height, image.width), tile_size, size, tile_overlap)
                inside = inside_region(region, number, (grid.rows, grid.columns))
                inside = None if inside is None else inside[0]
                places = spread_places(places_inside(grid, inside, MOSTLY), tiles_an_image, numbers[0])
                tiles = tile_views(image, grid, places, len(places), size, value_range, inside)
                views = torch.cat([views, next(tiles) / 2.0 + 0.5])
            pixels = (views.clamp(0.0, 1.0) * np.iinfo(dtype).max).round().numpy().astype(dtype)  # (N, 3, R, R')
            return {"pixels": [one.tobytes() for one in pixels], "index": [of_category] * len(pixels)}

        self.table = shared_map(
            dataset,
            resize,
            with_indices=True,
            batched=True,
            batch_size=1,
            remove_columns=dataset.column_names,
            desc="Reading images",
            writer_batch_size=64,
        )  # not as numpy: it would cut zeros off the end of a black image's bytes
        self.category_index = np.asarray(self.table["index"][:])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row = self.table[i]
        pixels = np.frombuffer(row["pixels"], dtype=self.dtype).reshape(3, *self.size)
        if self.dtype == np.uint16:
            return torch.from_numpy(pixels.astype(np.float32) / np.float32(65535.0)), int(row["index"])
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


def create_data_loader(images: ResizedImages | CachedEncodings, args: argparse.Namespace) -> DataLoader:
    """Shuffled batches of `train_batch_size`, or of as many images as there are for each process.

    `images` may be any data set with a `category_index`.
    """
    return DataLoader(
        images,
        batch_size=min(args.train_batch_size, len(images) // PartialState().num_processes),
        shuffle=not args.balance_categories,
        sampler=BalancedSampler(images.category_index, args.seed) if args.balance_categories else None,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
    )


def spread_batches(
    images: ResizedImages, count: int, device: torch.device, shared: bool = False
) -> Iterator[torch.Tensor]:
    """About `count` images, evenly spread, in batches (16, 3, R, R) in [-1, 1]; `shared`: this process's share."""
    chosen = range(0, len(images), max(1, len(images) // count))
    if shared:
        chosen = chosen[PartialState().process_index :: PartialState().num_processes]
    for pixels, _ in DataLoader(Subset(images, chosen), 16):
        yield to_pixel_values(pixels.to(device))


def to_pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """`ResizedImages`' pixels, (N, 3, R, R) uint8 or float32 in [0, 1], as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels * 2.0 - 1.0


def augment(pixels: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Rotates and flips a batch of `ResizedImages`, to float32 in [-1, 1]; one resampling for both."""
    images = to_pixel_values(pixels)
    count, device = len(images), images.device

    def uniform() -> torch.Tensor:
        return torch.rand(count, generator=generator, device=device)

    angle = (uniform() * 2.0 - 1.0) * math.radians(args.rotation_degrees)
    horizontal = torch.where((uniform() < 0.5) & args.random_flip, -1.0, 1.0)
    vertical = torch.where((uniform() < 0.5) & args.random_vertical_flip, -1.0, 1.0)
    if not (args.rotation_degrees or args.random_flip or args.random_vertical_flip):
        return images
    zero = torch.zeros_like(angle)
    height_of_width = images.shape[2] / images.shape[3]  # the grid's coordinates go from -1 to 1 along either side
    matrix = torch.stack(
        [
            angle.cos() * horizontal,
            -angle.sin() * vertical * height_of_width,
            zero,
            angle.sin() * horizontal / height_of_width,
            angle.cos() * vertical,
            zero,
        ],
        dim=1,
    ).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def load_pictures(dataset: Dataset, count: int, value_range: float | None = None) -> list[torch.Tensor]:
    """The first few images, for validation pictures."""
    rows = [dataset[i]["image"] for i in range(min(count, len(dataset)))]
    return images_to_tensors(rows, value_range=value_range)
