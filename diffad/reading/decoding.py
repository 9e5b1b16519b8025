"""Image files, decoded and resized for the networks while these look at the batch before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffad.image_sizes import Side, as_size
from diffad.reading.grey_depth import UnreadableImageError, check_known_range, value_range_of
from diffad.reading.image_arrays import WITHOUT_TORCH, image_to_rgb, pil_to_array
from diffad.reading.image_files import LARGE_PIXELS, image_file_header, one_large_at_a_time, read_image
from diffad.reading.input_file import Input
from diffad.resizing import Resizing

PREFETCH_BYTES = 2**29  # of images that are decoded ahead


class Decoded(NamedTuple):
    """An input that could be read.

    Attributes:
        size: (H, W) of the file.
        pixels: (h, w, 3) uint8, what its overlay is drawn on: of this size or, where it is large, reduced; None where
            nobody draws one.
        network_input: (R, R', 3) in [0, 1], what the networks see; or the image as it is, of which they see tiles.
    """

    size: tuple[int, int]
    pixels: np.ndarray | None
    network_input: np.ndarray | Image.Image


def decoding_of(pipeline: Any, batch_size: int) -> tuple[Side | None, int]:
    """To what size images are resized when they are decoded, and how many are one batch.

    Tiles are cut from the whole image, and a batch is then of one image's tiles.
    """
    return (None, 1) if pipeline.tile_size else (pipeline.input_resolution, batch_size)


def decoded_batches(
    todo: Iterable[tuple[int, Input]],
    side: Side | None,
    batch_size: int,
    pool: ThreadPoolExecutor,
    value_range: float | None,
    resizing: Resizing = WITHOUT_TORCH,
    with_pixels: bool = True,
    by_slot: bool = False,
    read: Callable[[Input], bytes | None] = lambda one: None,
    ahead: int = 0,
    refuse_unknown_range: bool = False,
) -> Iterator[list[tuple[int, Input, Decoded | Exception]]]:
    """Decoded images, or the error of reading them, with one batch decoded ahead, or less where that is large.

    Args:
        todo: places and inputs.
        side: to which images are resized; None leaves them as they are.
        batch_size: images of a batch, at most.
        pool: decodes them.
        value_range: of images of more than 8 bits.
        resizing: of images.
        with_pixels: whether overlays will be drawn.
        by_slot: whether no two images of a batch have the same place modulo `batch_size`.
        read: the bytes of an input's file, where that is not a local one.
        ahead: images that are decoded ahead, if more than a batch: as many as `pool` has threads for slow stores.
        refuse_unknown_range: whether an image of more than 8 bits is an error without a `value_range`; else it has its
            own.
    """

    def decode(one: Input) -> Decoded | Exception:
        try:
            if not one.file:
                raise FileNotFoundError("`image`: this line of the manifest names none.")
            content = read(one)
            (width, height), mode = image_file_header(one.path, content)
            if refuse_unknown_range:
                check_known_range(mode, value_range)
            with one_large_at_a_time(width * height):
                image = read_image(one.path, content, reduce_large=side is not None)
                network_input = _network_input(image, side, value_range, resizing)
                pixels = np.asarray(image_to_rgb(_reduce(image), value_range)) if with_pixels else None
        except (UnreadableImageError, OSError) as error:
            return error
        return Decoded((height, width), pixels, network_input)

    entries = iter(todo)
    waiting: deque[tuple[int, Input, Future]] = deque()
    batch: list[tuple[int, Input, Decoded | Exception]] = []
    slots: set[int] = set()  # of the batch
    largest = 1  # bytes of a decoded image
    while True:
        room = PREFETCH_BYTES // largest
        while len(waiting) <= min(max(batch_size, ahead), room) and (entry := next(entries, None)) is not None:
            waiting.append((*entry, pool.submit(decode, entry[1])))
        if not waiting:
            break
        i, one, future = waiting.popleft()
        if by_slot and i % batch_size in slots:
            yield batch
            batch, slots = [], set()
        slots.add(i % batch_size)
        batch.append((i, one, future.result()))
        largest = max(largest, _num_bytes(batch[-1][2]))
        if len(batch) == batch_size:
            yield batch
            batch, slots = [], set()
    if batch:
        yield batch


def _num_bytes(decoded: Decoded | Exception) -> int:
    """What a decoded image takes in memory, about; 1 at least."""
    if not isinstance(decoded, Decoded):
        return 1
    pixels = 0 if decoded.pixels is None else decoded.pixels.nbytes
    if isinstance(decoded.network_input, np.ndarray):
        return max(1, pixels + decoded.network_input.nbytes)
    return max(1, pixels + 4 * math.prod(decoded.size))


def _network_input(
    image: Image.Image, side: Side | None, value_range: float | None, resizing: Resizing
) -> np.ndarray | Image.Image:
    if side is None:
        return image if value_range_of(image) is None else pil_to_array(image, value_range)
    return resizing.image(image, as_size(side), value_range).clip(0.0, 1.0)  # rounding may have left the range


def _reduce(image: Image.Image) -> Image.Image:
    """A large image by the smallest whole factor that leaves no more than `LARGE_PIXELS`; others as they are."""
    factor = math.ceil(math.sqrt(image.width * image.height / LARGE_PIXELS))
    if factor == 1:
        return image
    if image.mode.startswith("I;"):
        image = image.convert("I")
    elif image.mode in ("1", "P"):  # whose values have no mean
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)
