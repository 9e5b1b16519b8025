"""Training of DiAD: the autoencoder, then the denoiser and its guidance; killed and resumed, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BACKBONE,
    generator,
    launch,
    launch_command,
    texture,
    textures,
    tiny_extractor,
    write_folder,
    write_mvtec,
)
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from stable_diffusion import tiny_conditional_unet
from transformers import CLIPTextModel

from diffad import DiADPipeline, SemanticGuidedNetwork
from diffad.images import images_to_tensors, normalize_images
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.training import train_autoencoder, train_diad
from diffad.training.cached_encodings import CachedEncodings, choose_flips, flip
from diffad.training.data import ResizedImages, load_good_images
from diffad.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = Path(train_diad.__file__)
UNET = "unet/diffusion_pytorch_model.safetensors"
SG_NETWORK = "sg_network/diffusion_pytorch_model.safetensors"
VAE = "diffusion_pytorch_model.safetensors"


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A DiAD pipeline of ten thousand parameters to start from; its latents are half as large as images."""
    unet = tiny_conditional_unet()
    torch.manual_seed(2)
    DiADPipeline(
        vae=tiny_vae(),
        unet=unet,
        prompt_embedding=PromptEmbedding.from_tensor(torch.randn(1, 5, 12)),
        scheduler=DDIMScheduler(**train_diad.SCHEDULER),
        sg_network=SemanticGuidedNetwork.from_unet(unet, conditioning_embedding_out_channels=(4, 8)),
        feature_extractor=tiny_extractor(),
    ).save_pretrained(folder := tmp_path_factory.mktemp("tiny"))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Fifteen good images: 13 to train on, which are three batches of four, and 2 held out."""
    return write_folder(tmp_path_factory.mktemp("data") / "part", 15)


def shared_flags(data: Path, output: Path, steps: int, resolution: int) -> list[object]:
    return [
        *("--train_data_dir", data, "--output_dir", output, "--max_train_steps", steps, "--resolution", resolution),
        *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--lr_warmup_steps", 1),
        *("--learning_rate", 1e-3, "--backbone", BACKBONE, "--backbone_weights", "random", "--feature_strides", 2, 4),
    ]


def flags(data: Path, output: Path, start: Path, *more: object, steps: int = 2, resolution: int = 16) -> list[str]:
    arguments = [*shared_flags(data, output, steps, resolution), "--pretrained_model_name_or_path", start]
    arguments += ["--num_inference_steps", 2, "--sigma", 1, "--pooling_rounds", 0, "--false_alarm_rate", 0.4]
    return [str(argument) for argument in (*arguments, *more)]


def train(*args, **kwargs) -> None:
    train_diad.main(flags(*args, **kwargs))


def train_vae(data: Path, output: Path, *more: object, steps: int = 2, resolution: int = 16) -> None:
    train_autoencoder.main([str(flag) for flag in (*shared_flags(data, output, steps, resolution), *more)])


def load(output: Path) -> DiADPipeline:
    """A finished run's pipeline, checked to be calibrated and to work."""
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    category = pipeline.config.categories[0] if len(pipeline.config.categories) > 1 else None
    result = pipeline(texture(99), category=category)
    assert np.isfinite(result.anomaly_map).all()
    assert 0.0 < result.p_value[0] <= 1.0
    return pipeline


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


# -- end to end --------------------------------------------------------------------------------------------------


def test_from_a_folder_of_good_images_alone(tmp_path):
    """The presets, on images just large enough for them: an autoencoder, then DiAD in its latents."""
    data = write_folder(tmp_path / "part", 6, size=72)
    vae_path, output = tmp_path / "vae", tmp_path / "diad"
    more = ("--train_batch_size", 2)
    train_vae(data, vae_path, "--preset", "cpu-128", "--perceptual_weight", 1, *more, resolution=72)
    vae = AutoencoderKL.from_pretrained(vae_path)
    assert vae.config.scaling_factor != 0.18215
    assert json.loads((vae_path / "training.json").read_text())["held_out_l1"] > 0

    arguments = [*shared_flags(data, output, 2, 72), "--preset", "cpu-128", "--vae_path", vae_path, *more]
    arguments += ["--num_inference_steps", 2, "--pooling_size", 4, "--false_alarm_rate", 0.5, "--cache_latents"]
    arguments += ["--position_prior_images", 30]
    train_diad.main([str(argument) for argument in (*arguments, "--random_flip")])
    pipeline = load(output)
    assert type(pipeline) is DiADPipeline
    assert pipeline.config.categories == ["part"]
    assert pipeline.processing_resolution == 72
    assert pipeline.config.num_inference_steps == 2
    assert pipeline.config.pooling_size == 4
    assert pipeline.config.position_prior_images == 30
    assert pipeline.size_multiple == 8
    assert moved(vae.state_dict(), pipeline.vae.state_dict()) == set()
    assert pipeline.vae.config.scaling_factor == vae.config.scaling_factor
    assert pipeline.calibration.normal_scores.shape == (1, 1)
    # with nothing trained to keep, the encoder is trained too
    torch.manual_seed(0)
    start = train_diad.create_components(train_diad.parse_args([str(argument) for argument in arguments]))["unet"]
    assert moved(start.state_dict(), pipeline.unet.state_dict()) == set(start.state_dict())
    record = json.loads((output / "training.json").read_text())
    assert record["steps"] == 2
    assert record["arguments"]["train_whole_unet"] is True


def test_from_stable_diffusion_with_a_fine_tuned_autoencoder(good, stable_diffusion, tmp_path):
    train_vae(good, tmp_path / "vae", "--pretrained_model_name_or_path", stable_diffusion, resolution=64)
    tuned = load_file(tmp_path / "vae" / VAE)
    assert len(moved(load_file(stable_diffusion / "vae" / VAE), tuned)) > 0.9 * len(tuned)
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == 0.18215  # the denoiser's own

    more = ("--vae_path", tmp_path / "vae", "--validation_steps", 2)
    train(good, tmp_path / "run", stable_diffusion, *more, resolution=64)
    pipeline = load(tmp_path / "run")
    assert moved(tuned, pipeline.vae.state_dict()) == set()
    text_encoder = CLIPTextModel.from_pretrained(stable_diffusion / "text_encoder")
    with torch.no_grad():
        expected = text_encoder(input_ids=torch.tensor([[0, 1, 1, 1, 1]])).last_hidden_state
    torch.testing.assert_close(pipeline.prompt_embedding(), expected)
    pipeline.scheduler.set_timesteps(10)
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.scheduler.timesteps.tolist() == [*range(901, 0, -100)]
    assert list(pipeline.sg_network.config.conditioning_embedding_out_channels) == [16, 32, 96, 256]
    with Image.open(tmp_path / "run" / "validation" / "step-2.png") as sheet:
        assert sheet.width > 4 * 160  # four columns

    # the decoder alone is trained, and the guidance, which added nothing at first
    unet = load_file(stable_diffusion / UNET)
    decoder = {name for name in unet if name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))}
    assert moved(unet, pipeline.unet.state_dict()) == decoder
    assert all(convolution.weight.any() for convolution in pipeline.sg_network.controlnet_down_blocks.values())


def test_two_categories_are_one_model_with_statistics_of_each(tiny, tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 14, "cable": 7})
    train(data, tmp_path / "run", tiny, "--false_alarm_rate", 0.5, "--train_whole_unet", "--use_ema")
    pipeline = load(tmp_path / "run")
    assert pipeline.config.categories == ["cable", "tile"]
    # 15% of each is held out: 1 of 7, 2 of 14
    assert (~pipeline.calibration.normal_scores.isnan()).sum(dim=1).tolist() == [1, 2]
    cable, tile = (pipeline(texture(0), name, generator=generator()) for name in ("cable", "tile"))
    assert np.array_equal(cable.reconstruction, tile.reconstruction)
    assert not np.array_equal(cable.anomaly_map, tile.anomaly_map)
    # started from a trained one, only what was asked for is changed
    before = load_file(tiny / UNET)
    assert moved(before, pipeline.unet.state_dict()) == set(before)
    assert moved(load_file(tiny / "vae" / VAE), pipeline.vae.state_dict()) == set()


@pytest.mark.parametrize("preset", sorted(train_diad.DIAD_PRESETS))
def test_from_scratch_the_last_timestep_is_noise_alone_and_velocity_the_target(preset):
    scheduler = DDIMScheduler(**{**train_diad.SCHEDULER, **train_diad.DIAD_PRESETS[preset]["scheduler"]})
    assert scheduler.alphas_cumprod[-1] == 0.0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    latents = torch.randn(2, 4, 4, 4)

    class Perfect(torch.nn.Module):
        """Knows the image: at the last timestep, where the noisy latents tell nothing, it says minus the image."""

        def forward(self, noisy, timesteps, prompt_embeds, pixel_values):
            signal = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1).sqrt()
            noise = (noisy - signal * latents) / (1.0 - signal.square()).sqrt()
            return signal * noise - (1.0 - signal.square()).sqrt() * latents

    loss = train_diad.noise_loss(Perfect(), scheduler, latents, latents, torch.zeros(1, 1, 1), generator())
    assert float(loss) < 1e-6


def test_training_learns(good, tiny, tmp_path):
    train(
        good, tmp_path, tiny, "--learning_rate", 3e-3, "--use_ema", "--ema_decay", 0.9, "--train_whole_unet", steps=60
    )

    def loss(folder: Path) -> float:
        pipeline = DiADPipeline.from_pretrained(folder)
        images = torch.stack(images_to_tensors(textures(32, first_seed=300))) * 2.0 - 1.0
        pixel_values = normalize_images(images, pipeline.config.image_mean, pipeline.config.image_std)
        model = train_diad.GuidedDenoiser(pipeline.unet, pipeline.sg_network)
        arguments = (pipeline.encode(pixel_values), pixel_values, pipeline.prompt_embedding(), generator(7))
        with torch.no_grad():
            return float(train_diad.noise_loss(model, pipeline.scheduler, *arguments))

    assert loss(tmp_path) < 0.8 * loss(tiny)


@pytest.mark.parametrize(
    ("guidance_outputs", "fusion"),
    [
        (["none"], "instance_norm_silu"),
        (["middle"], "instance_norm_silu"),
        (["middle", "sgdb3"], "instance_norm_silu"),
        (["middle", "sgdb3", "sgdb4"], "instance_norm_silu"),
        (["middle", "sgdb4"], "batch_norm_relu"),
        (["middle", "sgdb4"], "none"),
    ],
)
def test_ablations(good, stable_diffusion, tmp_path, guidance_outputs, fusion):
    more = ("--guidance_outputs", *guidance_outputs, "--fusion", fusion)
    train(good, tmp_path, stable_diffusion, *more, resolution=64, steps=1)
    network = load(tmp_path).sg_network
    if guidance_outputs == ["none"]:
        assert network is None
        return
    assert list(network.config.guidance_outputs) == guidance_outputs
    assert network.config.fusion == (None if fusion == "none" else fusion)
    if fusion == "batch_norm_relu":  # its running statistics are saved
        assert network.feature_fusion.downsamplers[0][1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "more",
    [
        ("--mixed_precision", "bf16", "--cache_latents"),
        ("--gradient_checkpointing", "--random_flip", "--rotation_degrees", 5, "--train_whole_unet"),
    ],
)
def test_other_ways_to_run(good, tiny, tmp_path, more):
    train(good, tmp_path, tiny, *more)
    pipeline = load(tmp_path)
    assert {part.dtype for part in (pipeline.unet, pipeline.sg_network, pipeline.vae)} == {torch.float32}
    before = load_file(tiny / UNET)
    assert "up_blocks.0.resnets.0.conv1.weight" in moved(before, pipeline.unet.state_dict())


# -- cached latents ----------------------------------------------------------------------------------------------


def test_latents_are_cached_for_each_flip(good, tiny):
    args = train_diad.parse_args(flags(good, Path("unused"), tiny))
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


# -- the autoencoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start_vae(tmp_path_factory) -> Path:
    tiny_vae().save_pretrained(folder := tmp_path_factory.mktemp("vae"))
    return folder


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


# -- killed and resumed, and on two processes --------------------------------------------------------------------


def test_killed_and_resumed_it_ends_with_the_same_weights_to_the_bit(good, tiny, tmp_path):
    """With accumulation over the ends of epochs (three batches in each, two a step), EMA, and cached flips."""
    more = ("--gradient_accumulation_steps", 2, "--use_ema", "--checkpointing_steps", 4, "--random_flip")
    more += ("--cache_latents", "--train_whole_unet")
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    command = launch_command(SCRIPT, *flags(good, killed, tiny, *more, steps=24))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 240
        while not list_checkpoints(killed):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.time() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it launched
        process.wait()
    assert not (killed / "model_index.json").exists()  # in mid-run
    assert list_checkpoints(killed)[-1].name != "checkpoint-24"

    train(good, whole, tiny, *more, steps=24)
    train(good, killed, tiny, *more, "--resume_from_checkpoint", "latest", steps=24)
    assert json.loads((killed / "training.json").read_text())["steps"] == 24
    for name in ("checkpoint-24/model.safetensors", UNET, SG_NETWORK):  # raw, and averaged
        assert moved(load_file(whole / name), load_file(killed / name)) == set()
    raw, averaged = load_file(whole / "checkpoint-24" / "model.safetensors"), load_file(whole / UNET)
    assert not torch.equal(raw["unet.conv_in.weight"], averaged["conv_in.weight"])
    assert torch.equal(load(whole).calibration.normal_scores, load(killed).calibration.normal_scores)


@pytest.mark.parametrize("script", ["train_autoencoder", "train_diad"])
def test_two_processes_train_one_model(good, tiny, start_vae, tmp_path, script):
    if script == "train_diad":
        arguments = flags(good, tmp_path / "run", tiny, "--gradient_accumulation_steps", 2, "--use_ema", steps=3)
    else:
        arguments = [*shared_flags(good, tmp_path / "run", 3, 16), "--pretrained_model_name_or_path", start_vae]
    output = launch(f"diffad.training.{script}", *arguments, processes=2, cwd=tmp_path)
    assert output.count("Saved a") == 1  # after the check that both ended with the same weights
    if script == "train_diad":
        assert load(tmp_path / "run").calibration.normal_scores.shape == (1, 2)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 3
    states = {path.name for path in (tmp_path / "run" / "checkpoint-3").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}


# -- arguments ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    args = train_diad.parse_args(["--train_data_dir", "parts", "--pretrained_model_name_or_path", "sd"])
    assert (args.train_batch_size, args.gradient_accumulation_steps, args.learning_rate) == (12, 4, 1e-5)
    assert (args.lr_scheduler, args.rotation_degrees, args.backbone) == ("constant", 0.0, "resnet50")
    assert args.guidance_outputs == ["middle", "sgdb4"]
    assert args.train_whole_unet is False


@pytest.mark.parametrize("data", ["", "magnetic_tile_"])
@pytest.mark.parametrize("script", [train_autoencoder, train_diad])
def test_configurations_are_valid(script, data):
    name = "autoencoder" if script is train_autoencoder else "diad"
    name = f"{data}{name}_cpu" if data or script is train_diad else "diad_autoencoder_cpu"
    more = [] if script is train_autoencoder else ["--vae_path", "runs/autoencoder"]
    more += ["--train_data_dir", "tiles"] if data else []
    args = script.parse_args(["--config", str(SCRIPT.parent / "configs" / f"{name}.yaml"), *more])
    assert args.train_data_dir == ("tiles" if data else "elpv/mono")
    assert args.preset == "cpu-128"
    assert args.feature_strides == [4, 8, 16]
    assert args.mixed_precision == "auto"


DATA = ("--train_data_dir", "parts")
PRESET = (*DATA, "--preset", "cpu-128", "--vae_path", "vae")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (train_autoencoder, DATA, "give one of --pretrained_model_name_or_path and --preset"),
        (train_diad, DATA, "give one of --pretrained_model_name_or_path and --preset"),
        (train_diad, (*PRESET, "--pretrained_model_name_or_path", "sd"), "give one of --pretrained"),
        (train_diad, PRESET[:4], "--preset needs --vae_path: train an autoencoder with train_autoencoder.py"),
        (train_diad, (*PRESET, "--cache_latents", "--rotation_degrees", "5"), "add --rotation_degrees 0"),
        (train_diad, (*PRESET, "--guidance_outputs", "none", "middle"), "--guidance_outputs none goes with no other"),
    ],
)
def test_bad_arguments_are_named(capsys, script, arguments, words):
    with pytest.raises(SystemExit):
        script.parse_args(list(arguments))
    assert words in capsys.readouterr().err


def test_what_only_the_networks_know_is_told_before_training(good, tiny, start_vae, tmp_path):
    with pytest.raises(ValueError, match="--resolution must be a multiple of 2 for this autoencoder, not 15"):
        train(good, tmp_path, tiny, resolution=15)
    with pytest.raises(ValueError, match="--resolution must be a multiple of 2 for this autoencoder, but is 15"):
        train_vae(good, tmp_path, "--pretrained_model_name_or_path", start_vae, resolution=15)
    with pytest.raises(ValueError, match=r"`strength` of 0.1 leaves none of 2 steps"):
        train(good, tmp_path, tiny, "--strength", 0.1)
