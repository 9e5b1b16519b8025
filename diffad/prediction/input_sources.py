"""What a run looks at: image files and folders, here or in a store, a manifest, tars, or parquet files of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffad.prediction.image_containers import ParquetImages, TarImages
from diffad.prediction.manifest import COLUMN_NAMES, Manifest
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.image_arrays import find_value_range
from diffad.reading.image_files import read_image
from diffad.reading.input_file import Input
from diffad.reading.inputs import describe_suffixes, find_images, is_image_name
from diffad.reading.parquet_rows import image_column
from diffad.reading.remote_files import is_url, list_parquet, list_remote
from diffad.reading.remote_reader import RemoteReader

SUFFIXES = (".csv", ".parquet")
OTHER_LISTS = (".txt", ".json", ".jsonl", ".ndjson", ".tsv", ".xlsx", ".xls", ".ods")
LOOKED_AT, FAR_LOOKED_AT = 100, 5  # images that tell the range of values, where the model says nothing of it
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|taz|tlz|tar\.\w+|zip|7z|rar)$", re.IGNORECASE)


def find_inputs(images: Sequence[str | Path], output_dir: str | Path | None = None) -> list[Path | Input] | Manifest:
    """A manifest, tars, or the image files among `images` and below its folders, local (`find_images`) or by URL.

    `output_dir` is left out, as there; it may be a URL.

    Raises:
        FailedRequestsError: a store gives no list of what it has.
        FileNotFoundError: a path does not exist.
        ValueError: there are no images, a file is compressed, a manifest or a tar stands among others, or a list is no
            CSV or parquet file.
    """
    for one in images:
        is_there = os.path.isfile(one) or (is_url(one) and "::" not in os.fspath(one))  # a chain reads what is in it
        if is_there and COMPRESSED.search(os.fspath(one)):
            raise ValueError(f"`images`: {one} is compressed, and images are read by their place in a tar. Unpack it.")
    tars = [one for one in images if is_tar(one)]
    if tars and len(tars) == len(images):
        return TarImages(images)
    if tars:
        raise ValueError(f"`images`: {tars[0]} is a tar, which goes with tars alone. Give the rest a run of its own.")
    if parquet := parquet_images(images):
        return parquet
    is_list = len(images) == 1 and os.path.splitext(images[0])[1].lower() in OTHER_LISTS
    if is_list and (is_url(images[0]) or os.path.isfile(images[0])):
        raise ValueError(
            f"`images`: {images[0]} is no image. If it lists images: a manifest is a CSV or parquet file, with a "
            f"column {', '.join(COLUMN_NAMES)}."
        )
    manifests = [one for one in images if os.path.splitext(one)[1].lower() in SUFFIXES and not os.path.isdir(one)]
    if not manifests:
        local = [one for one in images if not is_url(one)]
        found: list[Path | Input] = [*find_images(local, output_dir)] if local else []
        for url in (str(one) for one in images if is_url(one)):
            listed = list_remote(url, output_dir if isinstance(output_dir, str) and is_url(output_dir) else None)
            if not listed and is_image_name(os.path.basename(url)):
                raise FileNotFoundError(f"`images`: there is no file at {url}.")
            if not listed:
                raise ValueError(f"There are no images ({describe_suffixes()}) in {url}.")
            found += listed
        return found
    if len(images) > 1:
        raise ValueError(f"`images`: the manifest {manifests[0]} must be given alone, as its lines say what is first.")
    return Manifest(manifests[0])


def parquet_images(images: Sequence[str | Path]) -> Manifest | None:
    """Parquet files that hold images, given or in a store's folder; None where there are none."""
    paths = [os.fspath(one) for one in images]
    if len(paths) == 1 and is_url(paths[0]) and not os.path.splitext(paths[0])[1]:
        paths = list_parquet(paths[0])
    are_parquet = bool(paths) and all(path.lower().endswith(".parquet") for path in paths)
    if are_parquet and (is_url(paths[0]) or os.path.isfile(paths[0])) and image_column(paths[0]) is not None:
        return ParquetImages(paths)
    return None


def range_of_inputs(paths: Sequence[Path | Input] | Manifest) -> float | None:
    """The end of the smallest range that holds images of more than 8 bits; None where there are none.

    The first lines of a manifest tell it, and the first files of a store: to look at all of them takes too long.
    """

    def images() -> Iterator[Any]:
        read, num_far = RemoteReader(), 0
        for one in paths.first(LOOKED_AT) if isinstance(paths, Manifest) else paths:
            if not isinstance(one, Input) or not isinstance(one.path, str):
                yield one.path if isinstance(one, Input) else one
            elif num_far < FAR_LOOKED_AT:
                num_far += 1
                with suppress(UnreadableImageError, OSError):
                    yield read_image(one.path, read(one))

    return find_value_range(images(), skip_unreadable=True)


def is_tar(path: str | os.PathLike) -> bool:
    return os.fspath(path).lower().endswith(".tar") and not os.path.isdir(path)
