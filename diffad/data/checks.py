"""Which images of a data set can be read, and whether masks fit them."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from datasets import Dataset, IterableDataset

from diffad.data.image_feature import ImageFile, stored_content
from diffad.grey_depth import UnreadableImageError
from diffad.image_files import check_image_file


def check_images(dataset: Dataset | IterableDataset, on_bad_image: str = "error") -> Dataset | IterableDataset:
    """Raises on, or drops, rows whose image or mask is corrupt, cut off, empty or missing.

    Files are read as `diffad.image_files.check_image_file` does. An `IterableDataset` is checked row by row, each
    time that it is read.

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

    def problems_at(index: int) -> tuple[str | None, str | None]:
        row = undecoded[index]
        return _problems(row, row["path"] or f"the image of row {index}")

    with ThreadPoolExecutor() as pool:  # checksums and decoding release the interpreter's lock
        problems = list(pool.map(problems_at, range(len(undecoded))))
    unreadable = [reason for reason, _ in problems if reason]
    _report(unreadable, [mismatch for _, mismatch in problems if mismatch], on_bad_image)
    if not unreadable:
        return dataset
    return dataset.select([index for index, (reason, _) in enumerate(problems) if reason is None])


def _is_readable(row: dict, on_bad_image: str) -> bool:
    unreadable, mismatch = _problems(row, row["path"] or "an image")
    _report([unreadable] if unreadable else [], [mismatch] if mismatch else [], on_bad_image)
    return unreadable is None


def _problems(row: dict, name: str) -> tuple[str | None, str | None]:
    """Why a file of an undecoded row cannot be read, and how its sizes differ; None where all is well."""
    if row["image"] is None:
        return f"{name}: there is none", None
    files = {name: row["image"]}
    if row["mask"] is not None:
        files[row["mask"]["path"] or f"the mask of {name}"] = row["mask"]
    sizes = {}
    for file_name, stored in files.items():
        try:
            sizes[file_name] = check_image_file(stored["path"] or file_name, stored_content(stored))
        except UnreadableImageError as error:
            return f"{file_name}: {error.reason}", None
        except OSError as error:  # it has gone, or is somewhere else and cannot be fetched
            return f"{file_name}: {error}", None
    if len(set(sizes.values())) > 1:
        return None, ", but ".join(f"{name} is {w} x {h} pixels" for name, (w, h) in sizes.items())
    return None, None


def _report(unreadable: list[str], mismatches: list[str], on_bad_image: str) -> None:
    if mismatches:
        raise ValueError("\n  ".join(["A mask must have the size of its image:", *mismatches]))
    if unreadable and on_bad_image == "error":
        advice = "Repair or remove them, or pass on_bad_image='skip':"
        raise ValueError("\n  ".join([f"{len(unreadable)} images cannot be read. {advice}", *unreadable]))
    if unreadable:
        heading = f"Skipped {len(unreadable)} images that cannot be read:"
        warnings.warn("\n  ".join([heading, *unreadable]), stacklevel=3)


def cast_images(dataset: Dataset | IterableDataset, decode: bool) -> Dataset | IterableDataset:
    """`dataset` with images and masks as PIL images, or undecoded, as {"bytes", "path"}."""
    for column in ("image", "mask"):
        dataset = dataset.cast_column(column, ImageFile(decode=decode))
    return dataset
