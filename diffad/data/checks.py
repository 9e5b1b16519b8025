"""Which images of a data set can be read, and whether masks fit them."""

from __future__ import annotations

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from PIL import Image

from diffad.data.image_feature import ImageFile, read_stored, stored_content
from diffad.data.masks import has_soft_edges
from diffad.reading.grey_depth import BAND_PIXELS, UnreadableImageError, is_deep, value_range_of
from diffad.reading.image_arrays import image_to_rgb
from diffad.reading.image_files import image_file_header, one_large_at_a_time, read_image

MOST_DIGESTS = 100_000  # that are kept, some 30 MB
_digests: dict[tuple[str, int, int], bytes] = {}  # of good images' files: decoding them again would take as long
SOFT_MASKS = "pixels from half of a mask's largest value on count as defect. Save masks as PNG, 0 and 255."


def check_images(dataset: Dataset | IterableDataset, on_bad_image: str = "error") -> Dataset | IterableDataset:
    """Raises on, or drops, rows whose image or mask is corrupt, cut off, empty or missing.

    Files are decoded to their end. An `IterableDataset` is checked row by row, each time that it is read.

    Args:
        dataset: as `load_anomaly_dataset` returns it.
        on_bad_image: `"error"` raises; `"skip"` drops the rows, with a warning that lists them.

    Raises:
        ValueError: lists the files that cannot be read, each with the reason; or, also under `"skip"`, the
            masks of another size than their image.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"`on_bad_image` must be 'error' or 'skip', but is {on_bad_image!r}.")
    undecoded = cast_images(dataset, decode=False)
    if isinstance(dataset, IterableDataset):
        # an empty `map` forgets the undecoded type, which a cast of a filtered stream would not change
        return undecoded.filter(partial(_is_readable, on_bad_image=on_bad_image)).map().cast(dataset.features)

    def problems_at(index: int) -> Problems:
        row = undecoded[index]
        return _problems(row, row["path"] or f"the image of row {index}")

    with ThreadPoolExecutor() as pool:  # checksums and decoding release the interpreter's lock
        problems = list(pool.map(problems_at, range(len(undecoded))))
    unreadable = [one.unreadable for one in problems if one.unreadable]
    _report(unreadable, [one.mismatch for one in problems if one.mismatch], on_bad_image)
    soft = [one.soft_mask for one in problems if one.soft_mask]
    if soft:
        warnings.warn(f"{len(soft)} masks have more than two values, {soft[0]} first: {SOFT_MASKS}", stacklevel=2)
    if not unreadable:
        return dataset
    return dataset.select([index for index, one in enumerate(problems) if one.unreadable is None])


def check_names(records: list[dict[str, Any]], on_bad_image: str) -> list[dict[str, Any]]:
    """Records whose paths and labels a table can hold, which is in UTF-8; others raise or are dropped, as unreadable.

    Raises:
        ValueError: lists them, under `"error"`.
    """
    odd = [any(isinstance(value, str) and not _is_utf_8(value) for value in record.values()) for record in records]
    shown = [os.fsencode(record["path"]).decode("utf-8", "backslashreplace") for record in records]
    names = [f"{name}: its name is no UTF-8" for name, is_odd in zip(shown, odd, strict=True) if is_odd]
    _report(names, [], on_bad_image)
    return [record for record, is_odd in zip(records, odd, strict=True) if not is_odd]


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Problems(NamedTuple):
    """Of a row: why a file cannot be read, how its sizes differ, and its mask if that has soft edges."""

    unreadable: str | None = None
    mismatch: str | None = None
    soft_mask: str | None = None


def _is_readable(row: dict, on_bad_image: str) -> bool:
    found = _problems(row, row["path"] or "an image")
    _report([found.unreadable] if found.unreadable else [], [found.mismatch] if found.mismatch else [], on_bad_image)
    if found.soft_mask:
        warnings.warn(f"Masks have more than two values: {SOFT_MASKS}", stacklevel=2)  # the same text for all rows
    return found.unreadable is None


def _problems(row: dict, name: str) -> Problems:
    """What is wrong with the files of an undecoded row."""
    if row["image"] is None:
        return Problems(unreadable=f"{name}: there is none")
    mask_name = None if row["mask"] is None else row["mask"]["path"] or f"the mask of {name}"
    file_name, soft_mask = name, None
    try:
        size = _decoded_size(row["image"], name, is_good=row.get("label") == 0)
        if mask_name is None:
            return Problems()
        file_name = mask_name
        mask = read_stored(row["mask"], mask_name)
        soft_mask = mask_name if has_soft_edges(mask) else None
    except UnreadableImageError as error:
        return Problems(unreadable=f"{file_name}: {error.reason}")
    except OSError as error:  # it has gone, or is somewhere else and cannot be fetched
        return Problems(unreadable=f"{file_name}: {error}")
    if size != mask.size:
        sizes = {name: size, mask_name: mask.size}
        mismatch = ", but ".join(f"{one} is {w} x {h} pixels" for one, (w, h) in sizes.items())
        return Problems(mismatch=mismatch, soft_mask=soft_mask)
    return Problems(soft_mask=soft_mask)


def _decoded_size(stored: dict, name: str, is_good: bool) -> tuple[int, int]:
    """Width and height of an image whose pixels can be read; they are let go at once.

    Of a good image's file a digest of the pixels stays, for `without_copies`.
    """
    path, content = stored["path"] or name, stored_content(stored)
    (width, height), _ = image_file_header(path, content)
    with one_large_at_a_time(width * height):
        image = read_image(path, content)
        if is_good and content is None and len(_digests) < MOST_DIGESTS:
            _digests[_file_key(path)] = _digest_of(image)
        return image.size


def _file_key(path: str) -> tuple[str, int, int]:
    """Tells a file, as it is now, from others."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


def _report(unreadable: list[str], mismatches: list[str], on_bad_image: str) -> None:
    if mismatches:
        raise ValueError("\n  ".join(["A mask must have the size of its image:", *mismatches]))
    if unreadable and on_bad_image == "error":
        advice = "Repair or remove them, or give `on_bad_image` 'skip':"
        raise ValueError("\n  ".join([f"{len(unreadable)} images cannot be read. {advice}", *unreadable]))
    if unreadable:
        heading = f"Skipped {len(unreadable)} images that cannot be read:"
        warnings.warn("\n  ".join([heading, *unreadable]), stacklevel=3)


def dataset_value_range(dataset: Dataset) -> float | None:
    """The end of the smallest range that holds all images of a data set; None where none has more than 8 bits.

    Only images with more than 8 bits are decoded.
    """
    undecoded = cast_images(dataset, decode=False)

    def range_at(index: int) -> float | None:
        stored = undecoded[index]["image"]
        path, content = stored["path"], stored_content(stored)
        (width, height), mode = image_file_header(path, content)
        if not is_deep(mode):
            return None
        with one_large_at_a_time(width * height):
            return value_range_of(read_image(path, content))

    with ThreadPoolExecutor() as pool:
        return max((one for one in pool.map(range_at, range(len(undecoded))) if one is not None), default=None)


def good_of_one_category(dataset: Dataset, what: str, why: str) -> Dataset:
    """The good images of a data set that has one category; ValueError "`what` holds a, b, and `why`" of several."""
    good = dataset.filter(lambda label: label == 0, input_columns="label")
    if len(names := sorted(set(good["category"]))) > 1:
        raise ValueError(f"{what} holds {', '.join(names)}, and {why}")
    return good


def without_copies(good: Dataset) -> Dataset:
    """Good images less copies of others of their category; a warning counts them and names one.

    An image whose copy is among the statistics is no new one: its score says nothing of a new part's. Pixels are
    compared, as a program that saves an image anew changes its file alone.
    """
    undecoded = cast_images(good, decode=False)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda i: _pixel_digest(undecoded[i]["image"]), range(len(undecoded))))
    first: dict[tuple[str, bytes], int] = {}
    of_first = [first.setdefault(key, i) for i, key in enumerate(zip(good["category"], digests, strict=True))]
    copies = [i for i, of in enumerate(of_first) if of != i]
    if not copies:
        return good
    one, other = (good["path"][i] or f"the image of row {i}" for i in (copies[0], of_first[copies[0]]))
    warnings.warn(f"Left out {len(copies)} good images that are copies of others: {one} of {other}.", stacklevel=2)
    return good.select(sorted({*range(len(good))} - {*copies}))


def _pixel_digest(stored: dict) -> bytes:
    """The same for images of an undecoded row that networks see as the same, whatever their files' format."""
    path, content = stored["path"], stored_content(stored)
    if content is None and (known := _digests.get(_file_key(path))) is not None:
        return known
    (width, height), _ = image_file_header(path, content)
    with one_large_at_a_time(width * height):
        return _digest_of(read_image(path, content))


def _digest_of(image: Image.Image) -> bytes:
    """Of an image's pixels, as RGB where they have 8 bits: indices of a palette are no colours."""
    if not is_deep(image.mode):
        image = image_to_rgb(image)
    found = hashlib.sha256(f"{image.mode} {image.size}".encode())
    rows = max(1, BAND_PIXELS // image.width)  # Pillow holds two copies of what it gives as bytes
    for top in range(0, image.height, rows):
        found.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return found.digest()


def dataset_sizes(dataset: Dataset) -> list[tuple[int, int]]:
    """Height and width of each image of a data set, upright; mostly none is decoded."""
    undecoded = cast_images(dataset, decode=False)

    def size_at(index: int) -> tuple[int, int]:
        stored = undecoded[index]["image"]
        (width, height), _ = image_file_header(stored["path"], stored_content(stored))
        return height, width

    with ThreadPoolExecutor() as pool:
        return list(pool.map(size_at, range(len(undecoded))))


def cast_images(dataset: Dataset | IterableDataset, decode: bool) -> Dataset | IterableDataset:
    """`dataset` with images and masks as PIL images, or undecoded, as {"bytes", "path"}."""
    for column in ("image", "mask"):
        dataset = dataset.cast_column(column, ImageFile(decode=decode))
    return dataset
