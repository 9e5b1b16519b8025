"""TAEF2 as published, and what the pipeline makes of latents without a scale."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_taef2 import save_as_published, tiny_taef2

from diffad.conversion import load_taef2
from diffad.latents import decode_latents, encode_latents, latent_statistics
from diffad.models.autoencoder_taef2 import AutoencoderTAEF2


@pytest.fixture
def vae():
    return tiny_taef2()


def conv(hidden, weights, layer, stride=1):
    bias = weights.get(f"{layer}.bias")
    return F.conv2d(hidden, weights[f"{layer}.weight"], bias, stride, padding=weights[f"{layer}.weight"].shape[-1] // 2)


def block(hidden, weights, layer):
    if f"{layer}.pool.0.weight" in weights:
        pooled = conv(hidden, weights, f"{layer}.pool.0")
        pooled = F.group_norm(pooled, 4, weights[f"{layer}.pool.1.weight"], weights[f"{layer}.pool.1.bias"])
        hidden = hidden + conv(pooled.relu(), weights, f"{layer}.pool.3")
    inner = conv(conv(hidden, weights, f"{layer}.conv.0").relu(), weights, f"{layer}.conv.2").relu()
    return (conv(inner, weights, f"{layer}.conv.4") + hidden).relu()


def part_of(vae, part):
    return {name.removeprefix(f"{part}."): w for name, w in vae.state_dict().items() if name.startswith(f"{part}.")}


def test_it_computes_what_is_published_layer_by_layer(vae):
    images = torch.rand(2, 3, 16, 24)  # in [0, 1], as published
    weights, hidden = part_of(vae, "encoder"), images
    hidden = block(conv(hidden, weights, 0), weights, 1)
    for first in (2, 6):
        hidden = conv(hidden, weights, first, stride=2)
        for layer in range(first + 1, first + 4):
            hidden = block(hidden, weights, layer)
    latents = conv(hidden, weights, 10)
    torch.testing.assert_close(vae.encode(images * 2 - 1).latents, latents, rtol=1e-4, atol=1e-5)

    weights, hidden = part_of(vae, "decoder"), torch.tanh(latents / 3) * 3
    hidden = conv(hidden, weights, 0).relu()
    for first in (2, 7):
        for layer in range(first, first + 3):
            hidden = block(hidden, weights, layer)
        hidden = conv(F.interpolate(hidden, scale_factor=2), weights, first + 4)
    expected = conv(block(hidden, weights, 12), weights, 13) * 2 - 1
    torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)


def test_published_weights_are_read_saved_and_loaded(vae, tmp_path):
    save_as_published(vae.half().float(), tmp_path)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    read = load_taef2(tmp_path)
    torch.testing.assert_close(read(images).sample, vae(images).sample)
    read.save_pretrained(tmp_path / "saved")
    loaded = AutoencoderTAEF2.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(images).sample, read(images).sample)


def test_what_is_no_taef2_is_refused_with_the_reason(vae, tmp_path):
    save_as_published(vae, tmp_path)
    (tmp_path / "taef2_decoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"taef2_decoder\.safetensors"):
        load_taef2(tmp_path)
    save_file({"1.weight": torch.zeros(8, 6, 3, 3)}, tmp_path / "taef2_decoder.safetensors")
    with pytest.raises(ValueError, match=r"of another shape, the first 'decoder\.0\.bias'"):
        load_taef2(tmp_path)
    (tmp_path / "taef2_decoder.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"taef2_decoder\.safetensors is damaged"):
        load_taef2(tmp_path)
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "taef2_decoder.safetensors")
    with pytest.raises(ValueError, match=r"'head\.weight', where names begin with a layer's number"):
        load_taef2(tmp_path)
    save_file({"1.weight": torch.zeros(8, 6, 3, 3)}, tmp_path / "taef2_decoder.safetensors")
    save_file({"1.weight": torch.zeros(8, 6, 3, 3)}, tmp_path / "taef2_encoder.safetensors")
    with pytest.raises(ValueError, match="does not hold TAEF2: its encoder's first or last convolution is missing"):
        load_taef2(tmp_path)
    with pytest.raises(ValueError, match=r"`block_out_channels` must be one width.*\(8, 16\)"):
        AutoencoderTAEF2(block_out_channels=(8, 16))


def test_latents_are_normalised_by_channel_and_back(vae):
    batches = [torch.rand(4, 3, 16, 16) * 2 - 1 for _ in range(3)]
    mean, std = latent_statistics(vae, batches)
    latents = encode_latents(vae, torch.cat(batches), mean, std)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(6), rtol=1e-3, atol=0)
    expected = vae(torch.cat(batches)).sample
    torch.testing.assert_close(decode_latents(vae, latents, mean, std), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode_latents(vae, batches[0]), vae.encode(batches[0]).latents)  # its own scale is 1
