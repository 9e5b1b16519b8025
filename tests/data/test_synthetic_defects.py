from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffad.data import synthetic_defects
from diffad.data.synthetic_defects import KINDS, VISIBLE, SyntheticDefect, add_defect, add_defects, foreground


def textured(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Stripes with a smooth pattern across, in colour: the whole image is the part."""
    rng = np.random.default_rng(seed)
    stripes = 0.5 + 0.15 * np.sin(np.arange(width) * 0.8 + rng.uniform(0.0, 6.0))
    image = stripes[None, :, None] * np.array([1.0, 0.8, 0.6]) + 0.01 * rng.standard_normal((height, width, 3))
    image += 0.1 * ndimage.gaussian_filter(rng.standard_normal((height, width)), 3.0)[..., None] * 10.0
    return image.clip(0.0, 1.0).astype(np.float32)


def on_plain_ground(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A textured disc with a hole of the ground's colour, on a light ground, and where the disc is."""
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 34) ** 2 + (columns - 30) ** 2 < 20**2
    hole = (rows - 34) ** 2 + (columns - 30) ** 2 < 5**2
    ground = 0.95 + 0.005 * np.random.default_rng(seed).standard_normal((64, 64, 3))
    return np.where((disc & ~hole)[..., None], textured(seed), ground).clip(0.0, 1.0).astype(np.float32), disc


def equal(one: SyntheticDefect, other: SyntheticDefect) -> bool:
    return one.kind == other.kind and np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)


IMAGES = [textured(seed) for seed in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_shows_in_its_mask_and_nowhere_else(kind):
    kept = 0
    for seed in range(6):
        image = textured(seed, *((64, 64) if seed % 2 else (48, 80)))
        before = image.copy()
        defect = add_defect(image, IMAGES, np.random.default_rng(seed), kind)
        assert np.array_equal(image, before)  # the good image is left as it is
        assert defect.image.shape == image.shape
        assert defect.image.dtype == np.float32
        assert np.isfinite(defect.image).all()
        assert defect.image.min() >= 0.0
        assert defect.image.max() <= 1.0
        assert defect.mask.shape == image.shape[:2]
        assert defect.mask.dtype == bool
        assert 0.0 < defect.mask.mean() <= 0.5
        change = np.abs(defect.image - image).max(axis=2)
        assert change[defect.mask].max() > VISIBLE
        assert change[~defect.mask].max() <= VISIBLE
        kept += defect.kind == kind
    assert kept >= 5  # another kind stands in only where one does not show


@pytest.mark.parametrize("kind", KINDS)
def test_defects_lie_on_the_part(kind):
    image, disc = on_plain_ground(0)
    near = ndimage.binary_dilation(disc, iterations=2)
    for seed in range(6):
        defect = add_defect(image, [], np.random.default_rng(seed), kind)
        # a part that is turned or out of its place covers some ground
        assert (defect.mask & disc).any()
        if kind not in ("shift", "turn"):
            assert not (defect.mask & ~near).any()


def test_foreground_of_a_part_on_a_plain_ground_has_no_holes():
    image, disc = on_plain_ground(1)
    found = foreground(image)
    assert (found & disc).sum() / (found | disc).sum() > 0.93


def test_foreground_is_everything_where_no_background_is():
    assert foreground(textured(0)).all()
    assert foreground(np.full((40, 50, 3), 0.5, dtype=np.float32)).all()
    speck = np.full((64, 64, 3), 0.5, dtype=np.float32)
    speck[10:14, 10:14] = 0.0
    assert foreground(speck).all()


def test_defects_depend_on_the_seed_and_not_on_how_many_are_drawn():
    few, many = list(add_defects(IMAGES, 2, seed=5)), list(add_defects(IMAGES, 5, seed=5))
    assert [i for i, _ in many] == [0] * 5 + [1] * 5 + [2] * 5
    firsts = [many[5 * i + number] for i in range(3) for number in range(2)]
    assert all(equal(one, other) for (_, one), (_, other) in zip(few, firsts, strict=True))
    others = list(add_defects(IMAGES, 2, seed=6))
    assert not any(equal(one, other) for (_, one), (_, other) in zip(few, others, strict=True))


def test_all_kinds_occur_equally_often():
    drawn = Counter(defect.kind for _, defect in add_defects(IMAGES * 4, len(KINDS) // 2))
    assert set(drawn) == set(KINDS)
    assert max(drawn.values()) - min(drawn.values()) <= 4  # 6 of each, but for those that do not show


def test_few_defects_of_few_images_are_of_many_kinds():
    assert len({defect.kind for _, defect in add_defects(IMAGES, 3)}) >= 6


def test_strengths_and_sizes_go_from_subtle_to_obvious():
    image = np.full((96, 96, 3), 0.5, dtype=np.float32)
    spots = [add_defect(image, [], np.random.default_rng(seed), "spot") for seed in range(40)]
    strengths = [np.abs(spot.image - image).max() for spot in spots]
    assert min(strengths) < 0.08
    assert max(strengths) > 0.4
    areas = [spot.mask.sum() for spot in spots]
    assert max(areas) > 10 * min(areas)


def test_a_grey_image_stays_grey():
    grey = np.repeat(textured(0)[..., :1], 3, axis=2)
    for kind in KINDS:
        changed = add_defect(grey, IMAGES, np.random.default_rng(0), kind).image
        np.testing.assert_allclose(changed, np.repeat(changed[..., :1], 3, axis=2), atol=1e-6)


def test_another_kind_stands_in_where_one_cannot_show():
    smooth = np.full((64, 64, 3), 0.5, dtype=np.float32)
    defect = add_defect(smooth, [], np.random.default_rng(0), "blur")
    assert defect.kind != "blur"
    assert defect.mask.any()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_defects_show_on_black_and_white(level):
    image = np.full((32, 40, 3), level, dtype=np.float32)
    for seed in range(6):
        defect = add_defect(image, [], np.random.default_rng(seed))
        assert 0 < defect.mask.sum() <= 32 * 40 / 2


def test_others_may_be_of_other_sizes():
    for seed in range(6):
        defect = add_defect(IMAGES[0], [textured(9, 40, 200)], np.random.default_rng(seed), "stain")
        assert defect.image.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64), dtype=np.float32), r"`image` must be \(H, W, 3\) float32"),
        (np.zeros((64, 64, 3), dtype=np.uint8), r"`image` must be \(H, W, 3\) float32"),
        (np.full((64, 64, 3), 255.0, dtype=np.float32), r"`image` must lie in \[0, 1\]"),
        (np.full((64, 64, 3), np.nan, dtype=np.float32), r"`image` must lie in \[0, 1\]"),
        (np.zeros((64, 31, 3), dtype=np.float32), r"`image` must have sides from 32 up"),
    ],
)
def test_bad_images_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        foreground(image)
    with pytest.raises(ValueError, match=message):
        add_defect(image, [], np.random.default_rng(0))
    with pytest.raises(ValueError, match=message.replace("image", r"others\[0\]", 1)):
        add_defect(IMAGES[0], [image], np.random.default_rng(0))
    with pytest.raises(ValueError, match=message.replace("image", r"images\[1\]", 1)):
        list(add_defects([IMAGES[0], image], 1))


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match=r"`kind` must be one of scratch, .* but is 'dent'"):
        add_defect(IMAGES[0], [], np.random.default_rng(0), kind="dent")
    with pytest.raises(ValueError, match="`per_image` must be at least 1, but is 0"):
        add_defects(IMAGES, 0)  # at once, not at the first defect
    with pytest.raises(ValueError, match="`seed` must be at least 0, but is -1"):
        add_defects(IMAGES, 1, seed=-1)


def test_the_command_writes_a_sheet(tmp_path):
    for i, image in enumerate(IMAGES[:2]):
        Image.fromarray((image * 255.0).astype(np.uint8)).save(tmp_path / f"{i}.png")
    sheet = tmp_path / "sheets" / "sheet.png"
    synthetic_defects.main([str(tmp_path), "--output", str(sheet), "--per_kind", "2", "--resolution", "48"])
    with Image.open(sheet) as drawn:
        assert drawn.width > 4 * 48
        assert drawn.height >= len(KINDS) * 48


def test_the_command_names_a_bad_flag(capsys):
    with pytest.raises(SystemExit):
        synthetic_defects.main(["good", "--output", "sheet.png", "--resolution", "16"])
    assert "--resolution must be at least 32, but is 16" in capsys.readouterr().err
