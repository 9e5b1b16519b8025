"""One place reads an image file, for every command: whatever is wrong with a file is one error that names it."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from diffad.reading.grey_depth import TooManyPixelsError, UnreadableImageError, check_values, is_deep
from diffad.reading.image_metadata import turn_upright, upright_size, without_metadata
from diffad.warn_once import warn_once

MAX_PIXELS = 500_000_000  # of one image: 2 GB as Pillow decodes it
LARGE_PIXELS = 2**24  # images above this are reduced where only a much smaller one is looked at
REDUCED_SIDE = 4096  # the least to which such a JPEG image is reduced while decoding, in pixels a side
PNG_DEPTH = 24  # where a PNG file says how many bits a channel has

_PILLOW_LIMIT = threading.Lock()
_LARGE_IMAGE = threading.RLock()


Result = TypeVar("Result")


def read_image(path: str | os.PathLike | None, content: bytes | None = None, reduce_large: bool = False) -> Image.Image:
    """Decodes an image file and turns it upright by its EXIF or XMP orientation.

    Metadata that cannot be read is left out, and the pixels count.

    Args:
        path: of the file.
        content: the file's bytes where they are at hand; `path` is then only its name.
        reduce_large: whether a JPEG image of more than `LARGE_PIXELS` is reduced while decoding, by 2, 4 or 8, to no
            less than `REDUCED_SIDE` a side. Other formats cannot be.

    Raises:
        FileNotFoundError: no file stands at `path`.
        UnreadableImageError: the file is empty, cut off, too large or no image, or its values are negative, not
            finite, or, in floating point, above 65535.
    """

    def decode(file: Any) -> Image.Image:
        with _open(file) as image:
            if reduce_large and image.width * image.height > LARGE_PIXELS:
                image.draft(None, (REDUCED_SIDE, REDUCED_SIDE))
            _warn_of_others(image)
            _warn_of_lost_depth(image)
            upright = turn_upright(image)
        check_values(upright)
        return upright

    return _read(decode, path, content)


def image_file_header(path: str | os.PathLike | None, content: bytes | None = None) -> tuple[tuple[int, int], str]:
    """Width and height of an image file once it is upright, and Pillow's mode, mostly without decoding.

    Raises:
        FileNotFoundError, UnreadableImageError: as `read_image`.
    """

    def look(file: Any) -> tuple[tuple[int, int], str]:
        with _open(file) as image:
            mode = image.mode
            return upright_size(image), mode

    return _read(look, path, content)


def one_large_at_a_time(num_pixels: int) -> AbstractContextManager:
    """For work on an image: of those above `LARGE_PIXELS` only one is in memory, whatever the number of threads."""
    return _LARGE_IMAGE if num_pixels > LARGE_PIXELS else nullcontext()


def _read(read: Callable[[Any], Result], path: str | os.PathLike | None, content: bytes | None) -> Result:
    """What `read` makes of a file, or, where it fails, of the file without its metadata."""
    shown = "the file" if path is None else os.fspath(path)
    try:
        if content is None and not Path(shown).is_file():
            raise FileNotFoundError(f"`image`: no file at {shown}.")
        num_bytes = Path(shown).stat().st_size if content is None else len(content)
        if num_bytes == 0:
            raise UnreadableImageError("it is empty: 0 bytes")
        try:
            return read(shown if content is None else io.BytesIO(content))
        except (MemoryError, FileNotFoundError, PermissionError, UnreadableImageError):
            raise
        except Exception as error:
            if num_bytes <= MAX_PIXELS:
                for stripped in without_metadata(Path(shown).read_bytes() if content is None else content):
                    try:
                        return read(io.BytesIO(stripped))
                    except MemoryError:
                        raise
                    except Exception:  # the first error says what is wrong with the file as it is
                        continue
            raise error
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # which one depends on the format: OSError, SyntaxError, struct.error, zlib.error, ...
        reason = str(error) or type(error).__name__
        if content is not None and isinstance(error, UnidentifiedImageError):
            reason = "cannot identify image file"  # Pillow tells where the bytes lie in memory
        kind = TooManyPixelsError if isinstance(error, TooManyPixelsError) else UnreadableImageError
        raise kind(f"`image`: {shown} cannot be read as an image ({reason}). Replace or remove it.", reason) from error


def _warn_of_others(image: Image.Image) -> None:
    """Says, once, that of a file with several images the first one counts; a camera's MPO has but copies of it."""
    if image.format in ("TIFF", "GIF", "WEBP", "PNG"):
        with suppress(Exception):  # of what stands behind the first image, which need not be whole
            if getattr(image, "is_animated", False):
                warn_once(
                    "There are files with several images (pages, frames), of which the first one counts. Save the "
                    "others as files of their own."
                )


def _warn_of_lost_depth(image: Image.Image) -> None:
    """Says, once, that Pillow reads colours, and grey with alpha, of 16 bits as 8."""
    if is_deep(image.mode):
        return
    bits: tuple[int, ...] = ()
    if image.format == "TIFF":
        bits = (getattr(image, "tag_v2", None) or {}).get(ExifTags.Base.BitsPerSample, ())
    elif image.format == "PNG" and (file := getattr(image, "fp", None)) is not None:
        place = file.tell()
        file.seek(PNG_DEPTH)
        bits = tuple(file.read(1))
        file.seek(place)
    if 16 in bits:
        warn_once(
            "There are files of 16 bits a channel in colour or with alpha, of which the upper 8 are read. Save grey "
            "images without alpha to keep all 16."
        )


def _open(file: Any) -> Image.Image:
    """Pillow's `open` with our own bound: its own warns from 89 million pixels on and ends at twice as many."""
    with _PILLOW_LIMIT:  # it is one for the whole process
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            image = Image.open(file)
        except Image.DecompressionBombError:
            reason = f"it has more than {2 * MAX_PIXELS:,} pixels, and {MAX_PIXELS:,} are the most: cut it into parts"
            raise TooManyPixelsError(reason) from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise TooManyPixelsError(f"it has {size} pixels, and {MAX_PIXELS:,} are the most: cut it into parts")
    return image
