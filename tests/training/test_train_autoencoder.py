"""Training of DiAD's autoencoder."""

# ruff: noqa: F811 (tests take the imported fixtures by their names)

from __future__ import annotations

import json

import pytest
import torch
from conftest import textures, tiny_extractor, write_folder
from diad_runs import VAE, good, moved, shared_flags, start_vae, tiny_vae, train_vae  # noqa: F401 (fixtures)
from diffusers import AutoencoderKL
from launching import launch
from PIL import Image
from safetensors.torch import load_file

from diffad.images import images_to_tensors, normalize_images
from diffad.training import train_autoencoder
from diffad.training.data import ResizedImages, load_good_images, spread_batches

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_autoencoder_learns(good, start_vae, tmp_path):
    more = ("--pretrained_model_name_or_path", start_vae, "--learning_rate", 1e-2, "--use_ema", "--ema_decay", 0.9)
    train_vae(good, tmp_path, *more, "--rotation_degrees", 0, "--validation_steps", 60, steps=60)
    args = train_autoencoder.parse_args([str(flag) for flag in (*shared_flags(good, tmp_path, 1, 16), *more)])
    _, held_out, _ = load_good_images(args)
    before, after = (
        train_autoencoder.held_out_error(AutoencoderKL.from_pretrained(path), held_out, args, torch.device("cpu"))
        for path in (start_vae, tmp_path)
    )
    assert after < 0.6 * before
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["held_out_l1"] == pytest.approx(after, abs=1e-4)
    with Image.open(tmp_path / "validation" / "step-60.png") as sheet:
        assert sheet.width > 3 * 160  # three columns


@torch.no_grad()
def test_latents_of_a_new_autoencoder_are_scaled_to_unit_variance(good):
    vae = tiny_vae()
    images = torch.stack(images_to_tensors(textures(8))) * 2.0 - 1.0
    scale = train_autoencoder.latent_scale(vae, images.split(3))
    latents = vae.encode(images).latent_dist.mode()
    assert scale == pytest.approx(1.0 / float(latents.std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_perceptual_loss(good, start_vae, tmp_path, kind):
    extractor = tiny_extractor()
    images = torch.stack(images_to_tensors(textures(2))) * 2.0 - 1.0
    other = images.roll(3, dims=3).requires_grad_()
    assert float(train_autoencoder.perceptual_distance(extractor, images, images, kind)) == pytest.approx(0, abs=1e-5)
    distance = train_autoencoder.perceptual_distance(extractor, images, other, kind)
    assert distance.item() > 1e-4
    distance.backward()
    assert other.grad.any()
    more = ("--pretrained_model_name_or_path", start_vae, "--perceptual_weight", 1, "--perceptual_loss", kind)
    train_vae(good, tmp_path, *more, "--reconstruction_loss", "l2", "--kl_weight", 1e-2, "--gradient_checkpointing")
    assert moved(load_file(start_vae / VAE), load_file(tmp_path / VAE))


def test_autoencoder_resumes_to_the_bit(good, start_vae, tmp_path):
    more = ("--pretrained_model_name_or_path", start_vae, "--checkpointing_steps", 2, "--use_ema", "--random_flip")
    train_vae(good, tmp_path / "whole", *more, steps=5)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "part" / "checkpoint-4")
    train_vae(good, tmp_path / "part", *more, "--resume_from_checkpoint", "latest", steps=5)
    assert moved(load_file(tmp_path / "whole" / VAE), load_file(tmp_path / "part" / VAE)) == set()


def test_two_processes_train_one_autoencoder_and_share_what_is_measured_of_it(tmp_path):
    data = write_folder(tmp_path / "part", 24, size=72)  # 4 held out, 20 trained on: a share of 10 for each process
    more = ("--preset", "cpu-128", "--train_batch_size", 2)
    arguments = [*shared_flags(data, tmp_path / "run", 3, 72), *more]
    output = launch("diffad.training.train_autoencoder", *arguments, processes=2, cwd=tmp_path)
    assert output.count("Saved an autoencoder") == 1  # after the check that both ended with the same weights
    states = {path.name for path in (tmp_path / "run" / "checkpoint-3").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}

    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["steps"] == 3
    args = train_autoencoder.parse_args([str(argument) for argument in arguments])
    training, held_out, categories = load_good_images(args)
    vae = AutoencoderKL.from_pretrained(tmp_path / "run")
    error = train_autoencoder.held_out_error(vae, held_out, args, torch.device("cpu"))
    assert record["held_out_l1"] == pytest.approx(error, abs=2e-6)
    images = spread_batches(ResizedImages(training, 72, categories), 512, torch.device("cpu"))
    normalized = [normalize_images(batch, args.image_mean, args.image_std) for batch in images]
    assert sum(map(len, normalized)) == 20
    assert vae.config.scaling_factor == pytest.approx(train_autoencoder.latent_scale(vae, normalized), rel=1e-5)
