"""What a file says of its image beside the pixels: which way is up. Broken metadata never costs the pixels."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

XMP_KEYS = ("xmp", "XML:com.adobe.xmp", "Raw profile type xmp")  # where Pillow puts it, by format


EXIF_KEYS = ("exif", "Raw profile type exif")


TIFF_NAMESPACE = r"http://ns\.adobe\.com/tiff/1\.0/"


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


# the tags of a TIFF file that its pixels depend on (TIFF 6.0, and the sample format's, tiles' and JPEG tables')
TIFF_PIXEL_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 340, 341, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532),
}


def orientation(image: Image.Image) -> int:
    """How an image is to be turned, 1 to 8 as in EXIF: by its EXIF data, else by its XMP data; 1 where neither says.

    Metadata that cannot be read says nothing. Of a file that is opened and not yet decoded, only the metadata in front
    of the pixels counts.
    """
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own would decode the pixels
    except MemoryError:
        raise
    except Exception:  # which one depends on what is broken: SyntaxError, struct.error, ValueError, ...
        value = None
    if isinstance(value, int) and 1 <= value <= 8:
        return value
    return next((found for key in XMP_KEYS if (found := _xmp_orientation(image.info.get(key)))), 1)


def _xmp_orientation(xmp: str | bytes | None) -> int | None:
    """As an attribute or an element, in either quotes, under any prefix, in UTF-8, UTF-16 or UTF-32."""
    if not xmp:
        return None
    text = xmp if isinstance(xmp, str) else bytes(xmp).replace(b"\0", b"").decode("latin-1")
    if text.lstrip().startswith("xmp") and "<" not in text:  # ImageMagick's "Raw profile": a length and hexadecimals
        try:
            text = bytes.fromhex("".join(text.split()[2:])).replace(b"\0", b"").decode("latin-1")
        except ValueError:
            return None
    declared = re.search(rf"xmlns:([\w.-]+)\s*=\s*[\"']{TIFF_NAMESPACE}[\"']", text)
    prefix = re.escape(declared[1]) if declared else "tiff"
    match = re.search(rf"\b{prefix}:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\s*[\"'<]", text)
    return int(match[1]) if match else None


def turn_upright(image: Image.Image) -> Image.Image:
    """Applies the orientation of an image's EXIF or XMP data; an upright image is returned as it is."""
    tags = getattr(image, "tag_v2", None) or {}
    is_turned = tags.get(ExifTags.Base.Orientation) in TURNS  # by Pillow, while it decodes TIFF
    image.load()  # metadata may stand behind the pixels
    turn = None if is_turned else TURNS.get(orientation(image))
    if turn is None and not is_turned:
        return image
    turned = image if turn is None else image.transpose(turn)
    for key in (*EXIF_KEYS, *XMP_KEYS):  # so that nobody turns it again
        turned.info.pop(key, None)
    return turned


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned upright, without decoding where that is possible."""
    fp = getattr(image, "fp", None)
    if image.format == "PNG" and fp is not None and _has_metadata_behind_pixels(fp):
        return turn_upright(image).size
    turn = orientation(image)
    tags = getattr(image, "tag_v2", None) or {}
    if image.format == "TIFF" and fp is not None and tags.get(ExifTags.Base.Orientation, 1) == turn:
        return image.size  # Pillow has swapped them by the tag
    return image.size[::-1] if turn >= 5 else image.size


def _has_metadata_behind_pixels(file: BinaryIO) -> bool:
    place = file.tell()
    try:
        file.seek(0)
        kinds = [kind for kind, _, _ in png_chunks(file)]
    finally:
        file.seek(place)
    behind = kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else []
    return any(kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt") for kind in behind)


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, place of the content and its length of each chunk of a PNG file, up to where the file ends."""
    file.seek(len(PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, file.tell(), length
        file.seek(length + 4, 1)  # and the checksum
        if kind == b"IEND":
            return


def without_metadata(content: bytes) -> Iterator[bytes]:
    """A PNG, JPEG or TIFF file without the parts that its pixels do not depend on, the gentlest cut first."""
    try:
        if content.startswith(PNG_SIGNATURE):
            yield _png_pixels(content)
        elif content.startswith(b"\xff\xd8\xff"):
            yield _jpeg_pixels(content, keep_exif=True)
            yield _jpeg_pixels(content, keep_exif=False)
        elif content[:4] in (b"II*\0", b"MM\0*"):
            yield _tiff_pixels(content)
    except (struct.error, IndexError):  # more than the metadata is broken
        return


def _png_pixels(content: bytes) -> bytes:
    parts, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunk = content[place : place + 12 + length]
        kind = chunk[4:8]
        whole = len(chunk) == 12 + length and struct.pack(">I", zlib.crc32(chunk[4:-4])) == chunk[-4:]
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and whole):  # upper case: needed to show the image
            parts.append(chunk)
        place += 12 + length
    return b"".join(parts)


def _jpeg_pixels(content: bytes, keep_exif: bool) -> bytes:
    parts, place = [content[:2]], 2
    while content[place] == 0xFF and content[place + 1] != 0xDA:  # the scan: what follows are pixels
        if content[place + 1] == 0xFF:  # fill
            place += 1
            continue
        marker, length = content[place + 1], struct.unpack_from(">H", content, place + 2)[0]
        segment = content[place : place + 2 + length]
        is_exif = marker == 0xE1 and segment[4:8] == b"Exif"
        # APP0 and Adobe's APP14 say how colours are stored; other APPn and comments do not matter
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE or (is_exif and keep_exif):
            parts.append(segment)
        place += 2 + length
    return b"".join([*parts, content[place:]])


def _tiff_pixels(content: bytes) -> bytes:
    order = "<" if content[:2] == b"II" else ">"
    (place,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, place)
    entries = [content[place + 2 + 12 * i : place + 14 + 12 * i] for i in range(count)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in TIFF_PIXEL_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # and no further image
    return content[:place] + directory + content[place + len(directory) :]
