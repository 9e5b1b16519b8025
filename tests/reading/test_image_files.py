"""One place reads image files: broken metadata costs nothing, and all else that is wrong is one error with the path."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import texture, write_folder, write_png
from PIL import Image, ImageFile, PngImagePlugin

from diffad.data import load_anomaly_dataset, mask_to_array
from diffad.images import image_to_rgb, images_to_tensors
from diffad.reading.image_files import (
    MAX_PIXELS,
    UnreadableImageError,
    image_file_header,
    read_image,
)
from diffad.reading.image_metadata import PNG_SIGNATURE
from diffad.warn_once import warn_once

XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:{prefix}="http://ns.adobe.com/tiff/1.0/"{attribute}>{element}</rdf:Description>
</rdf:RDF></x:xmpmeta>"""


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def insert(png: bytes, chunk: bytes, before: bytes) -> bytes:
    place = png.index(before) - 4
    return png[:place] + chunk + png[place:]


def broken_metadata() -> dict[str, bytes]:
    """Files of one image, 24 x 16 pixels, each with metadata that Pillow cannot read."""
    image = Image.fromarray(texture(0, (16, 24)))
    png, jpeg = encode(image, "PNG"), encode(image, "JPEG", quality=95)
    text = png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      9\nnothexadecimal")
    damaged = bytearray(png_chunk(b"tEXt", b"Comment\0as it was"))
    damaged[10] ^= 0xFF  # the checksum no longer fits
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))
    tiff = bytearray(encode(image, "TIFF", tiffinfo={34665: 8, 34853: 10**6}))
    mpo = bytearray(encode(image, "MPO", save_all=True, append_images=[image]))
    mpo[mpo.index(b"MPF\0") + 12 : mpo.index(b"MPF\0") + 40] = bytes(range(200, 228))
    return {
        "profile.png": insert(png, text, b"IDAT"),
        "profile_behind.png": insert(png, text, b"IEND"),
        "exif.png": insert(png, png_chunk(b"eXIf", b"garbage!"), b"IDAT"),
        "exif_behind.png": insert(png, png_chunk(b"eXIf", b"II*\0\xff\xff\xff"), b"IEND"),
        "checksum.png": insert(png, bytes(damaged), b"IDAT"),
        "text_bomb.png": insert(png, bomb, b"IDAT"),
        "exif.jpg": encode(image, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\xff\xff"),
        "exif.webp": encode(image, "WEBP", lossless=True, exif=b"no EXIF at all"),
        "pointer.tif": bytes(tiff),
        "index.mpo": bytes(mpo),
        "xmp.jpg": jpeg[:2] + b"\xff\xe1\x00\x24http://ns.adobe.com/xap/1.0/\0\xff\xfe<<" + b"" + jpeg[2:],
    }


@pytest.mark.parametrize("name", broken_metadata())
def test_broken_metadata_is_left_out_and_the_pixels_count(tmp_path, name):
    content = broken_metadata()[name]
    path = tmp_path / name
    path.write_bytes(content)
    image = read_image(path)
    assert image.size == image_file_header(path)[0] == (24, 16)
    difference = np.asarray(image_to_rgb(image)).astype(int) - texture(0, (16, 24))
    assert np.abs(difference).mean() < 12.0  # JPEG's
    assert np.array_equal(np.asarray(read_image(None, content)), np.asarray(image))


def test_training_takes_an_image_of_broken_metadata(tmp_path):
    folder = write_folder(tmp_path / "part", 3)
    for name, content in broken_metadata().items():
        if not name.endswith(".mpo"):
            (folder / name).write_bytes(content)
    dataset = load_anomaly_dataset(folder)
    assert len(dataset) == 13
    assert {row["image"].size for row in dataset} == {(16, 16), (24, 16)}


def test_an_orientation_that_is_none_turns_nothing(tmp_path):
    for value in (0, 9, 300):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(texture(0, (16, 24))).save(tmp_path / "odd.png", exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / "odd.png")), texture(0, (16, 24)))


@pytest.mark.parametrize("error", [SyntaxError, struct.error, ValueError, TypeError, EOFError, zlib.error, KeyError])
def test_whatever_a_format_raises_is_one_error_with_the_path(tmp_path, error):
    class Odd(ImageFile.ImageFile):
        format = f"ODD_{error.__name__}"

        def _open(self):
            self._size, self._mode = (4, 4), "L"

        def load(self):
            raise error("odd")

    Image.register_open(Odd.format, Odd, lambda prefix: prefix.startswith(Odd.format.encode()))
    path = tmp_path / "odd.png"
    path.write_bytes(Odd.format.encode() + bytes(64))
    for read in (read_image, images_to_tensors):
        with pytest.raises(UnreadableImageError, match=r"`image`: .*odd.png cannot be read as an image \('?odd"):
            read(path)


def test_bytes_that_are_no_image_have_one_message_wherever_they_lie():
    messages = set()
    for content in (b"no image", b"no image either"):
        with pytest.raises(UnreadableImageError) as caught:
            read_image("a.png", content)
        messages.add(str(caught.value))
    (message,) = messages  # so that tables of several runs and processes are equal
    assert "BytesIO" not in message


def test_cut_and_changed_files_are_read_or_refused_in_one_way(tmp_path):
    rng = random.Random(0)
    image = Image.fromarray(texture(0, (16, 24)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    with_exif = {"exif": exif}
    kinds = [
        ("PNG", with_exif),
        ("JPEG", with_exif),
        ("WEBP", with_exif),
        ("TIFF", with_exif),
        ("BMP", {}),
        ("GIF", {}),
    ]
    outcomes = set()
    for number in range(240):
        kind, options = kinds[number % len(kinds)]
        content = bytearray(encode(image, kind, **options))
        if number % 4 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(min(len(content), 300))] = rng.randrange(256) if content else 0
        path = tmp_path / "changed"
        path.write_bytes(content)
        try:
            size = read_image(path).size
            assert image_file_header(path)[0] == size
        except UnreadableImageError:
            size = None
        outcomes.add(size is None)
    assert outcomes == {True, False}


def test_an_image_of_192_million_pixels_is_read_and_a_larger_one_refused(tmp_path, recwarn):
    def white(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        pixels = zlib.compress((b"\0" + b"\xff" * ((width + 7) // 8)) * height, 1)
        return b"".join(
            [PNG_SIGNATURE, png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")]
        )

    (tmp_path / "large.png").write_bytes(white(16_000, 12_000))
    assert read_image(tmp_path / "large.png").size == (16_000, 12_000)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS < 10**8  # Pillow's own bound stays what it was
    (tmp_path / "huge.png").write_bytes(white(30_000, MAX_PIXELS // 30_000 + 1))
    with pytest.raises(UnreadableImageError, match=r"huge.png.*30000 x 16667 pixels.*cut it into parts"):
        read_image(tmp_path / "huge.png")


def test_values_that_are_no_numbers_are_skipped_where_skipping_was_asked_for(tmp_path):
    folder = write_folder(tmp_path / "part", 3)
    values = np.ones((16, 16), np.float32)
    values[3, 4] = np.inf
    Image.fromarray(values).save(folder / "infinite.tif")
    with pytest.raises(ValueError, match=r"infinite.tif: an image of mode 'F' has values from 1.0 to inf"):
        load_anomaly_dataset(folder)
    with pytest.warns(UserWarning, match="Skipped 1 images"):
        assert len(load_anomaly_dataset(folder, on_bad_image="skip")) == 3


# -- orientation -------------------------------------------------------------------------------------------------


def with_xmp(pixels: np.ndarray, kind: str, xmp: bytes) -> bytes:
    image = Image.fromarray(pixels)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode("latin-1"))
        return encode(image, kind, pnginfo=info)
    if kind == "TIFF":
        return encode(image, kind, tiffinfo={700: xmp})
    return encode(image, kind, xmp=xmp, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("prefix", "attribute", "element"),
    [
        ("tiff", ' tiff:Orientation="6"', ""),
        ("tiff", " tiff:Orientation = '6'", ""),
        ("tiff", "", "<tiff:Orientation>\n 6 </tiff:Orientation>"),
        ("t", ' t:Orientation="6" other:Orientation="3"', ""),
    ],
)
def test_xmp_turns_images_and_masks_as_exif_does(kind, prefix, attribute, element):
    stored = np.zeros((16, 32), np.uint8)
    stored[:, :8] = 255  # the left end as stored: the top, once turned clockwise
    content = with_xmp(stored, kind, XMP.format(prefix=prefix, attribute=attribute, element=element).encode())
    image = read_image(None, content)
    assert image.size == image_file_header(None, content)[0] == (16, 32)
    for one in (image, Image.open(io.BytesIO(content))):  # read by us, or opened by a user
        tensor = images_to_tensors(one)[0]
        assert tensor.shape == (3, 32, 16)
        assert tensor[:, :7].min() > 0.9
        assert tensor[:, 9:].max() < 0.1
        mask = mask_to_array(one)
        assert mask.shape == (32, 16)
        assert mask[:7].all()
        assert not mask[9:].any()


@pytest.mark.parametrize("xmp", ["<x xmlns:t='{}' t:Orientation='6'/>", "<x xmlns:tiff='{}' tiff:Orientation=\"6\"/>"])
def test_a_tiff_that_says_its_orientation_twice_is_turned_once(tmp_path, xmp):
    xmp = xmp.format("http://ns.adobe.com/tiff/1.0/").encode()
    Image.fromarray(texture(0, (20, 30))).save(tmp_path / "a.tif", tiffinfo={274: 6, 700: xmp})
    assert read_image(tmp_path / "a.tif").size == image_file_header(tmp_path / "a.tif")[0] == (20, 30)
    assert images_to_tensors(Image.open(tmp_path / "a.tif"))[0].shape == (3, 30, 20)


def test_a_png_whose_checksums_hide_broken_pixels_is_skipped_where_asked(tmp_path):
    folder = write_folder(tmp_path / "part", 3)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in texture(1)))
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows[: len(rows) // 2]), png_chunk(b"IEND", b"")]
    (folder / "broken.png").write_bytes(b"".join([PNG_SIGNATURE, *chunks]))
    with pytest.warns(UserWarning, match=r"Skipped 1 images.*\n.*broken.png"):
        assert len(load_anomaly_dataset(folder, on_bad_image="skip")) == 3


def test_exif_comes_before_xmp():
    exif = Image.Exif()
    exif[0x0112] = 1
    xmp = XMP.format(prefix="tiff", attribute=' tiff:Orientation="6"', element="").encode()
    content = encode(Image.fromarray(texture(0, (16, 24))), "JPEG", exif=exif, xmp=xmp)
    assert read_image(None, content).size == (24, 16)


def test_a_mask_fits_an_image_that_xmp_turns(tmp_path):
    xmp = XMP.format(prefix="tiff", attribute=' tiff:Orientation="8"', element="").encode()
    root = tmp_path / "tile"
    write_folder(root / "train" / "good", 2)
    (root / "test" / "hole").mkdir(parents=True)
    (root / "test" / "hole" / "000.jpg").write_bytes(with_xmp(texture(0, (16, 24)), "JPEG", xmp))
    mask: Path = root / "ground_truth" / "hole" / "000_mask.png"
    write_png(mask, np.full((24, 16), 255, np.uint8))  # upright
    row = load_anomaly_dataset(root, "test")[0]
    assert row["image"].size == row["mask"].size == (16, 24)
    write_png(mask, np.full((16, 24), 255, np.uint8))  # as stored
    with pytest.raises(ValueError, match="A mask must have the size of its image"):
        load_anomaly_dataset(root, "test")
    mask.write_bytes(with_xmp(np.full((16, 24), 255, np.uint8), "PNG", xmp))
    assert load_anomaly_dataset(root, "test")[0]["mask"].size == (16, 24)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "MPO"])
def test_of_several_images_in_a_file_the_first_counts_and_it_is_said(kind, caplog):
    warn_once.cache_clear()
    first, second = (Image.fromarray(texture(seed, (24, 16))) for seed in range(2))
    content = encode(first, kind, save_all=True, append_images=[second])
    assert read_image("pages", content).size == (16, 24)
    assert ("several images (pages, frames)" in caplog.text) == (kind != "MPO")
    caplog.clear()
    warn_once.cache_clear()
    read_image("page", encode(first, kind))
    assert not caplog.text


def tiff_of_16_bits(values: np.ndarray) -> bytes:
    """An RGB image (H, W, 3), which Pillow does not write; the shortest form of TIFF 6.0."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    short, long = 3, 4
    tags = [(256, short, width), (257, short, height), (258, short, 8), (259, short, 1), (262, short, 2)]
    tags += [(273, long, 14), (277, short, 3), (278, short, height), (279, long, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 3 if tag == 258 else 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<IHHH", 14 + len(data), 16, 16, 16)
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def png_of_16_bits(values: np.ndarray, colour_type: int) -> bytes:
    """(H, W, channels); Pillow writes grey alone."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return PNG_SIGNATURE + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def test_a_depth_that_is_not_read_is_told(caplog):
    values = np.arange(24 * 16 * 3, dtype=np.uint16).reshape(16, 24, 3)
    deep = {
        "rgb.png": png_of_16_bits(values, 2),
        "grey_and_alpha.png": png_of_16_bits(values[..., :2], 4),
        "rgb.tif": tiff_of_16_bits(values),
    }
    for name, content in deep.items():
        warn_once.cache_clear()
        caplog.clear()
        assert np.array_equal(np.asarray(read_image(name, content))[..., 0], values[..., 0] >> 8)
        assert "16 bits a channel in colour or with alpha, of which the upper 8 are read" in caplog.text
    warn_once.cache_clear()
    caplog.clear()
    grey = Image.fromarray(values[..., 0])
    assert np.array_equal(np.asarray(read_image("grey.png", encode(grey, "PNG"))), values[..., 0])
    for kind in ("PNG", "TIFF", "JPEG", "BMP"):
        read_image("8 bits", encode(Image.fromarray(texture(0)), kind))
        read_image("8 bits", encode(Image.fromarray(texture(0)).convert("1"), kind))
    assert not caplog.text
