"""Files that each hold many images, read as streams: tars, and parquet files as data sets on the Hub have them."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffad.prediction.manifest import Manifest
from diffad.reading.inputs import describe_suffixes, is_image_name, is_input_folder
from diffad.reading.parquet_rows import image_column, row_urls
from diffad.reading.remote_files import describe_remote, is_url, open_remote
from diffad.reading.remote_reader import part_of
from diffad.warn_once import warn_once


class ImageContainers(Manifest):
    """Files that each hold many images: `entries` says where in them an image's bytes are.

    Args:
        paths: of the files, or their URLs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no images, or a local path holds `::`.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [os.fspath(path) if is_url(path) else os.path.abspath(path) for path in paths]
        for path in self.paths:
            if "::" in path and not is_url(path):  # images are read by URLs that begin with it
                raise ValueError(f"`images`: {path} has :: in it, which divides chained URLs. Rename that.")
            self._begin(path)
        if next(self.entries(), None) is None:
            raise ValueError(f"There are no images ({describe_suffixes()}) in {', '.join(map(str, paths))}.")

    def digest(self) -> str:
        """Tells the files from others, by their names, sizes and times."""
        return hashlib.sha256(repr([describe_remote(path) for path in self.paths]).encode()).hexdigest()


class TarImages(ImageContainers):
    """The images in tars, as WebDataset has them, in the order of the tars and of what is in them.

    What counts as an image, and which folders hold inputs, is as in `diffad.reading.inputs`; links are left out with a
    warning.

    Tars are read from end to end, without what the images hold; that is then read by its place in the tar.
    """

    def entries(self) -> Iterator[str]:
        """Where each image's bytes are, as `RemoteReader` reads it."""
        for path in self.paths:
            try:
                with open_remote(path) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
                    for member in tar:
                        tar.members = []  # type: ignore[attr-defined]  # which would hold all of them
                        *folders, name = member.name.split("/")
                        if not is_image_name(name) or not all(map(is_input_folder, {*folders} - {".", ".."})):
                            continue
                        if member.isfile():
                            yield part_of(path, member.offset_data, member.size, member.name)
                        elif member.islnk() or member.issym():
                            warn_once(
                                f"Links to images in {path} are left out. To have them, pack it with `tar "
                                "--dereference --hard-dereference`."
                            )
                    opened.seek(tar.offset)
                    if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
                        raise tarfile.ReadError("the block of zeros at its end is missing")
            except tarfile.TarError as error:
                raise ValueError(f"`images`: {path} is no tar, is compressed, or is not whole ({error}).") from error


class ParquetImages(ImageContainers):
    """The images in parquet files, in the order of the files and of their rows.

    A group of rows is read when its first image is needed, and two of them stay in memory.

    Raises:
        ValueError: a file has no column of images, or several of which none is called `image`.
    """

    def _begin(self, path: str | os.PathLike) -> None:
        super()._begin(path)
        if image_column(self.path) is None:
            raise ValueError(f"{path} has no column of images, with their `bytes`.")

    def entries(self) -> Iterator[str]:
        """Where each image is, as `RemoteReader` reads it."""
        for path in self.paths:
            yield from row_urls(path)
