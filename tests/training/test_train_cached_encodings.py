"""Latents and features computed once, of each image and its flips."""

# ruff: noqa: F811 (tests take the imported fixtures by their names)

from __future__ import annotations

from pathlib import Path

import ddpm_runs
import diad_runs
import torch
from conftest import generator, tiny_extractor
from ddpm_runs import good  # noqa: F401 (fixture)
from diad_runs import tiny  # noqa: F401 (fixture)

from diffad import DiADPipeline
from diffad.training import train_ddpm, train_diad
from diffad.training.cached_encodings import CachedEncodings, choose_flips, flip
from diffad.training.data import ResizedImages, load_good_images


def test_cached_features_are_those_of_the_flipped_images(good, tmp_path):
    args = train_ddpm.parse_args(ddpm_runs.flags(good, tmp_path))
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)
    extractor = tiny_extractor(image_size=[16, 24])
    pairs = [(False, False), (True, False)]
    cached = CachedEncodings(images, lambda x: extractor(x, (8, 8)), pairs, (128, 8, 8), torch.float16)
    pixels, features = (torch.stack(column) for column in zip(*(cached[i][:2] for i in range(8)), strict=True))
    assert features.dtype == torch.float16
    flipped, chosen = choose_flips(pixels, features, torch.tensor(pairs), generator())
    torch.testing.assert_close(chosen.float(), extractor(flipped, (8, 8)), rtol=2e-3, atol=2e-3)


def test_latents_are_cached_for_each_flip(good, tiny):
    args = train_diad.parse_args(diad_runs.flags(good, Path("unused"), tiny))
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)
    pipeline = DiADPipeline.from_pretrained(tiny)
    pairs = [(False, False), (False, True), (True, False), (True, True)]
    cached = CachedEncodings(images, pipeline.encode, pairs, (4, 8, 8))
    assert len(cached) == len(images) == 13
    pixels, latents, index = cached[12]
    assert torch.equal(pixels, images[12][0])
    assert latents.shape == (4, 4, 8, 8)
    assert index == 0
    assert cached.table.cache_files  # on disk, not in memory
    assert images.table.cache_files
    scaled = pixels[None].float() / 127.5 - 1.0
    for pair, expected in zip(pairs, (scaled, scaled.flip(2), scaled.flip(3), scaled.flip(2, 3)), strict=True):
        assert torch.equal(flip(scaled, [pair]), expected)
        torch.testing.assert_close(latents[pairs.index(pair)], pipeline.encode(expected)[0], rtol=1e-4, atol=1e-5)

    batch = [torch.stack(column) for column in zip(*(cached[i][:2] for i in range(13)), strict=True)]
    flipped, chosen = choose_flips(*batch, torch.tensor(pairs), generator())
    torch.testing.assert_close(chosen, pipeline.encode(flipped), rtol=1e-4, atol=1e-5)
    originals = batch[0].float() / 127.5 - 1.0
    kinds = {tuple(torch.equal(flipped[i], flip(originals[i : i + 1], [p])[0]) for p in pairs) for i in range(13)}
    assert len(kinds) > 2  # not all flipped alike
