import torch

from diffad.training.drawn_defects import draw_defects


def images(count=16):
    """Smooth pictures, (count, 3, 64, 64) in [-1, 1], each of its own colours."""
    colours = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(colours, size=64, mode="bilinear")


def draw(good, share, seed=0):
    return draw_defects(good, share, torch.Generator().manual_seed(seed))


def test_about_the_share_gets_a_defect_and_the_others_stay():
    good = images(64)
    kept = good.clone()
    drawn = draw(good, 0.5)
    torch.testing.assert_close(good, kept, rtol=0, atol=0)
    differs = (drawn != good).flatten(1).any(dim=1)
    assert 16 <= differs.sum() <= 48
    assert drawn.abs().max() <= 1.0
    changed = ((drawn - good).abs().amax(dim=1) > 0.01).flatten(1).float().mean(dim=1)[differs]  # of each image
    assert changed.min() > 0.0
    assert changed.mean() < 0.25


def test_every_or_none():
    good = images()
    assert (draw(good, 1.0) != good).flatten(1).any(dim=1).all()
    assert torch.equal(draw(good, 0.0), good)


def test_the_generator_decides():
    good = images()
    assert torch.equal(draw(good, 0.5), draw(good, 0.5))
    assert not torch.equal(draw(good, 0.5), draw(good, 0.5, seed=1))


def test_a_single_image_gets_its_own_textures():
    good = images(1)
    assert not torch.equal(draw(good, 1.0), good)
