"""Images as users have them: every mode, type and shape, and everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import texture, write_png
from PIL import Image, ImageFile, PngImagePlugin

from diffad.images import (
    ImageSequence,
    image_to_rgb,
    images_to_pixel_values,
    images_to_tensors,
    read_image,
    resize_images,
)

HEIGHT, WIDTH = 5, 7


@pytest.fixture
def rgb() -> Image.Image:
    return Image.fromarray(texture(0, (HEIGHT, WIDTH)))


def one(image, **kwargs) -> torch.Tensor:
    """The only tensor that an image becomes, checked for what every one must be."""
    tensors = images_to_tensors(image, **kwargs)
    assert len(tensors) == 1
    assert tensors[0].dtype == torch.float32
    assert tensors[0].shape[0] == 3
    assert 0.0 <= tensors[0].min() <= tensors[0].max() <= 1.0
    return tensors[0]


# -- PIL images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "LA", "La", "1", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_keeps_its_place_and_brightness(mode):
    grey = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    grey[1, 2:] = 255  # black and white survive every mode
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255.0)
    elif mode == "HSV":
        image = Image.fromarray(grey).convert("RGB").convert("HSV")
    elif mode == "La":
        image = Image.fromarray(grey).convert("LA").convert("La")
    else:
        image = Image.fromarray(grey).convert(mode)
    assert image.mode == mode
    tensor = one(image)
    assert tensor.shape == (3, HEIGHT, WIDTH)
    expected = torch.from_numpy(grey).float().expand(3, -1, -1) / 255.0
    torch.testing.assert_close(tensor, expected, atol=2.0 / 255.0, rtol=0.0)


def test_rgb_pixels_are_exact(rgb):
    expected = torch.from_numpy(np.array(rgb)).permute(2, 0, 1) / 255.0
    assert torch.equal(one(rgb), expected)


def test_palette_and_cmyk_keep_their_colours():
    red = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0))
    for image in (red.quantize(4), red.convert("CMYK")):
        assert one(image)[:, 2, 3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_over_white(mode):
    image = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 255))
    image.putpixel((3, 2), (0, 0, 0, 0))
    if mode == "P":
        opaque = Image.new("P", (WIDTH, HEIGHT), 1)
        opaque.putpalette([255, 0, 0, 0, 0, 0])
        opaque.putpixel((3, 2), 0)
        opaque.info["transparency"] = 0
        image = opaque
    else:
        image = image.convert(mode)
    tensor = one(image)
    assert tensor[:, 2, 3].tolist() == [1.0, 1.0, 1.0]
    assert tensor.sum() == 3.0  # black everywhere else


def test_sixteen_bit_png_spans_the_full_range(tmp_path):
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").mode == "I;16"
    expected = torch.tensor(values / 65535.0, dtype=torch.float32).expand(3, 1, 5)
    torch.testing.assert_close(one(tmp_path / "deep.png"), expected, rtol=1e-6, atol=0.0)


def test_mode_i_holds_sixteen_or_thirty_two_bits():
    sixteen = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.int32))
    thirty_two = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))
    for image in (sixteen, thirty_two):
        assert (one(image)[0, 0] * 255.0).round().tolist() == [0.0, 128.0, 255.0]


@pytest.mark.parametrize("largest", [1.0, 255.0, 65535.0])
def test_mode_f_takes_the_range_that_holds_its_values(largest):
    image = Image.fromarray(np.array([[0.0, 0.6 * largest, largest]], dtype=np.float32))
    assert (one(image)[0, 0] * 255.0).round().tolist() == [0.0, 153.0, 255.0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 70000.0])
def test_mode_f_beyond_every_range_is_refused(value):
    image = Image.fromarray(np.array([[0.0, value]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"`image`.*mode 'F'"):
        images_to_tensors(image)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_orientation_turns_the_image_upright(tmp_path, suffix):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # the left end as stored: the top, once turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / f"phone{suffix}", exif=exif)
    tensor = one(tmp_path / f"phone{suffix}")
    assert tensor.shape == (3, 32, 16)
    assert tensor[:, :7].min() > 0.9
    assert tensor[:, 9:].max() < 0.1


def test_an_upright_rgb_image_is_not_copied(rgb):
    assert image_to_rgb(rgb) is rgb


# -- arrays and tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [
        ((5, 7), 1, (5, 7)),
        ((5, 7, 1), 1, (5, 7)),
        ((5, 7, 3), 1, (5, 7)),
        ((2, 5, 7, 1), 2, (5, 7)),
        ((2, 5, 7, 3), 2, (5, 7)),
        ((1, 1), 1, (1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.float16, np.float32, np.float64])
def test_arrays_of_every_shape_and_type(shape, count, size, dtype):
    values = np.random.default_rng(0).uniform(size=shape)
    dtype = np.dtype(dtype)
    scale = np.iinfo(dtype).max if dtype.kind == "u" else 1
    array = (values * scale).astype(dtype)
    tensors = images_to_tensors(array)
    assert len(tensors) == count
    last = array[-1] if array.ndim == 4 else array
    expected = np.broadcast_to(last.reshape(*size, -1).astype(np.float64) / scale, (*size, 3)).transpose(2, 0, 1)
    assert tensors[-1].dtype == torch.float32
    np.testing.assert_allclose(tensors[-1].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "count"), [((5, 7), 1), ((1, 5, 7), 1), ((3, 5, 7), 1), ((2, 1, 5, 7), 2), ((2, 3, 5, 7), 2)]
)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_tensors_of_every_shape_and_type(shape, count, dtype):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.iinfo(dtype).max if not dtype.is_floating_point else 1
    tensor = (values * scale).to(dtype)
    tensors = images_to_tensors(tensor)
    assert len(tensors) == count
    last = tensor[-1] if tensor.ndim == 4 else tensor
    expected = (last.double() / scale).reshape(-1, 5, 7).expand(3, -1, -1).float()
    torch.testing.assert_close(tensors[-1], expected, rtol=1e-6, atol=1e-7)


def test_one_image_in_every_form_is_the_same_tensor(rgb, tmp_path):
    array = np.array(rgb)
    path = write_png(tmp_path / "one.png", array)
    forms = [rgb, array, torch.from_numpy(array).permute(2, 0, 1), path, str(path), array[:, ::-1][:, ::-1]]
    expected = one(rgb)
    for form in forms:
        assert torch.equal(one(form), expected)
    assert all(torch.equal(tensor, expected) for tensor in images_to_tensors(forms))


def test_lists_keep_order_and_sizes(tmp_path):
    path = write_png(tmp_path / "one.png", texture(0, (4, 6)))
    tensors = images_to_tensors([path, texture(1, (8, 3)), np.stack([texture(2, 5), texture(3, 5)])])
    assert [tuple(t.shape) for t in tensors] == [(3, 4, 6), (3, 8, 3), (3, 5, 5), (3, 5, 5)]


def test_a_read_only_array_is_taken_without_a_warning(recwarn):
    array = texture(0)
    array.flags.writeable = False
    assert torch.equal(one(array), one(texture(0)))
    assert not recwarn.list


@pytest.mark.parametrize("end", [-2e-7, 1.0 + 2.4e-7])
def test_what_resizing_leaves_beyond_the_range_is_cut_off(end):
    image = np.full((5, 7), end, np.float32)
    tensor = images_to_tensors(image)[0]
    assert float(tensor.min()) == float(tensor.max()) == round(end)
    assert image[0, 0] == np.float32(end)  # the caller's own stays


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([], "empty list"),
        (None, "NoneType"),
        (5, "int"),
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((1, 1, 1, 1, 3)), r"\(1, 1, 1, 1, 3\)"),
        (np.zeros((3, 5, 7)), "channels last"),
        (np.zeros((5, 7, 4), np.uint8), "1 or 3 channels, but has 4"),
        (torch.zeros(5, 7, 3), "channels first"),
        (torch.zeros(2, 5, 7), "1 or 3 channels, but has 2"),
        (torch.zeros(3), r"\(3,\)"),
        (np.zeros((0, 7, 3)), "no pixels"),
        (np.zeros((5, 0)), "no pixels"),
        (np.zeros((0, 5, 7, 3)), "no pixels"),
        (torch.zeros(3, 0, 7), "no pixels"),
        (torch.zeros(3, 5, 0), "no pixels"),
        (torch.zeros(0, 5), "no pixels"),
        (torch.zeros(0, 3, 5, 7), "no pixels"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (np.full((5, 7), np.nan), "NaN or infinity"),
        (torch.full((3, 5, 7), float("nan")), "NaN or infinity"),
        (torch.tensor([[0.0, float("inf")]]), "NaN or infinity"),
        (np.full((5, 7, 3), 128.0), r"\[0, 1\].*Divide by 255"),
        (torch.full((3, 5, 7), -0.5), r"\[0, 1\]"),
        (np.zeros((5, 7), np.int64), "int64"),
        (np.zeros((5, 7), np.uint32), "uint32"),
        (np.zeros((5, 7), bool), "bool"),
        (np.array([["a"]]), "<U1"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), "int64"),
        (torch.zeros(5, 7, dtype=torch.bool), "bool"),
        (torch.zeros(5, 7, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, words):
    with pytest.raises(ValueError, match=f"(?s)`image`.*{words}"):
        images_to_tensors(image)


def test_a_bad_item_of_a_list_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"`pages\[1\]` holds NaN"):
        images_to_tensors([texture(0), np.full((5, 7), np.nan)], name="pages")


def test_one_nan_in_a_batch_is_found():
    batch = torch.zeros(3, 3, 5, 7)
    batch[2, 1, 4, 6] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        images_to_tensors(batch)


def test_bad_files_are_refused_by_path(tmp_path: Path):
    whole = write_png(tmp_path / "whole.png", texture(0, 64)).read_bytes()
    files = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no picture at all", "head": whole[:10]}
    for name, content in files.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"`image`.*{name}.png"):
            images_to_tensors([str(path)])
    with pytest.raises(ValueError, match="0 bytes"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(FileNotFoundError, match=r"`image`.*missing\.png"):
        images_to_tensors(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="`image`"):
        images_to_tensors(tmp_path)  # a folder is no image


def test_a_lazily_opened_file_that_is_cut_off_is_refused(tmp_path):
    path = write_png(tmp_path / "whole.png", texture(0, 64))
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as lazy, pytest.raises(ValueError, match="`image` cannot be read"):
        images_to_tensors(lazy)


def test_read_image_leaves_no_file_open(tmp_path):
    path = write_png(tmp_path / "one.png", texture(0))
    image = read_image(path)
    path.unlink()
    assert np.array_equal(np.asarray(image), texture(0))


# -- sizes and ranges --------------------------------------------------------------------------------------------


def test_pixel_values_are_one_batch_in_the_networks_range():
    images = images_to_tensors([np.zeros((4, 6)), np.ones((9, 3))])
    batch = images_to_pixel_values(images, (8, 8))
    assert batch.shape == (2, 3, 8, 8)
    torch.testing.assert_close(batch[0], torch.full((3, 8, 8), -1.0))
    torch.testing.assert_close(batch[1], torch.full((3, 8, 8), 1.0))


def test_files_are_decoded_when_their_batch_comes(tmp_path, monkeypatch):
    """Memory goes with the batch: before it only headers are read, and after it nothing is kept."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.fromarray(texture(i, (20, 30))).save(path)
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load", lambda image: decoded.append(image.filename) or load(image)
    )
    images = ImageSequence(paths)
    assert (images.sizes, decoded) == ([(20, 30)] * 6, [])
    for start in (0, 2, 4):
        images_to_pixel_values(images[start : start + 2], (8, 8))
        assert {Path(name).name for name in decoded} == {f"{i}.png" for i in range(start + 2)}


def test_resizing_averages_and_keeps_what_fits():
    checkers = torch.zeros(1, 1, 16, 16)
    checkers[..., ::2, ::2] = 1.0
    checkers[..., 1::2, 1::2] = 1.0
    small = resize_images(checkers, (4, 4))
    torch.testing.assert_close(small, torch.full((1, 1, 4, 4), 0.5), atol=0.1, rtol=0.0)  # antialiased
    assert resize_images(checkers, (16, 16)) is checkers
