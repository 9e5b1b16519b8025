"""Training of DiAD: the denoiser and its guidance; killed and resumed, and on two processes."""

# ruff: noqa: F811 (tests take the imported fixtures by their names)

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_pipeline, write_folder, write_mvtec, write_png
from diad_runs import (  # noqa: F401 (fixtures)
    SG_NETWORK,
    UNET,
    VAE,
    flags,
    good,
    load,
    moved,
    shared_flags,
    start_vae,
    tiny,
    tiny_vae,
    train,
    train_vae,
)
from diffusers import AutoencoderKL, DDIMScheduler
from launching import launch, launch_command
from PIL import Image
from safetensors.torch import load_file
from tiny_taef2 import tiny_taef2
from transformers import CLIPTextModel

from diffad import DiADPipeline
from diffad.images import ImageSequence, images_to_pixel_values, images_to_tensors, normalize_images
from diffad.models.autoencoder_taef2 import AutoencoderTAEF2
from diffad.training import train_autoencoder, train_diad
from diffad.training.checkpoints import list_checkpoints
from diffad.training.diad_presets import DIAD_PRESETS, SCHEDULER

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = Path(train_diad.__file__)


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
    arguments += ["--position_trust", 0.5, "--contrast", 0.2, "--feature_weight", 0.5]
    train_diad.main([str(argument) for argument in (*arguments, "--random_flip")])
    pipeline = load(output)
    assert type(pipeline) is DiADPipeline
    assert pipeline.categories == ["part"]
    assert pipeline.processing_resolution == 72
    assert pipeline.config.num_inference_steps == 2
    assert pipeline.config.pooling_size == 4
    assert (pipeline.config.position_trust, pipeline.config.contrast) == (0.5, 0.2)
    assert pipeline.weights == {"reconstruction": 0.5, "gaussian": 0.375, "nearest": 0.125}
    assert pipeline.feature_extractor.channel_std.min() < 0.9  # of good images, by which channels count alike
    assert pipeline.size_multiple == 8
    assert moved(vae.state_dict(), pipeline.vae.state_dict()) == set()
    assert pipeline.vae.config.scaling_factor == vae.config.scaling_factor
    assert pipeline.calibration.normal_scores.shape == (1, 1)
    # with nothing trained to keep, the encoder is trained too
    torch.manual_seed(0)
    start = train_diad.create_components(train_diad.parse_args([str(argument) for argument in arguments]))
    assert moved(start["unet"].state_dict(), pipeline.unet.state_dict()) == set(start["unet"].state_dict())
    # and the guidance does not begin at nothing
    assert all(conv.weight.any() for conv in start["sg_network"].controlnet_down_blocks.values())
    arguments.append("--zero_convolutions")
    start = train_diad.create_components(train_diad.parse_args([str(argument) for argument in arguments]))
    assert not any(conv.weight.any() for conv in start["sg_network"].controlnet_down_blocks.values())
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


@pytest.fixture
def other(tiny, tmp_path):
    """Saves the tiny pipeline with other settings or components, and returns the folder."""

    def save(**changed) -> Path:
        DiADPipeline.from_pretrained(tiny, **changed).save_pretrained(folder := tmp_path / "start")
        return folder

    return save


def test_what_is_outside_of_the_region_is_hidden_in_training(good, tiny, tmp_path, monkeypatch):
    for path in good.glob("*.png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:, :8] = 255
        write_png(tmp_path / "part" / path.name, pixels)
    roi = write_png(tmp_path / "roi.png", np.repeat(np.uint8([0] * 8 + [255] * 8)[None], 16, axis=0))
    seen = []

    def looking(pixels, *more):
        seen.append(augment(pixels, *more))
        return seen[-1]

    augment = train_diad.augment
    monkeypatch.setattr(train_diad, "augment", looking)
    train(tmp_path / "part", tmp_path / "run", tiny, "--roi", roi, steps=1)
    outside = seen[0][..., :8]
    assert outside.max() < 0.9  # of 1, white
    assert outside.flatten(2).std(dim=2).max() < 0.01


def test_the_size_of_a_trained_pipeline_stays_unless_another_is_given(good, other, tmp_path):
    start = other(processing_resolution=16)
    arguments = flags(good, tmp_path / "own", start, steps=1)
    at = arguments.index("--resolution")
    train_diad.main([*arguments[:at], *arguments[at + 2 :]])
    assert load(tmp_path / "own").processing_resolution == 16
    train(good, tmp_path / "given", start, resolution=24, steps=1)
    assert load(tmp_path / "given").processing_resolution == 24


def test_the_latents_and_colours_that_a_trained_pipeline_knows_stay_with_its_autoencoder(
    good, other, start_vae, tmp_path
):
    known = {"latents_mean": [1.0] * 4, "latents_std": [3.0] * 4, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    start = other(**known)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "--vae_path")
        train(good, tmp_path / "same", start, "--vae_path", start_vae, steps=1)
    assert {name: load(tmp_path / "same").config[name] for name in known} == known
    vae = AutoencoderKL.from_pretrained(start_vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.1
    vae.register_to_config(scaling_factor=None)  # so that good images must tell it
    vae.save_pretrained(tmp_path / "vae")
    with pytest.warns(UserWarning, match=r"--vae_path: .*vae is not the autoencoder of .*latents_mean.* taken anew"):
        train(good, tmp_path / "other", start, "--vae_path", tmp_path / "vae", steps=1)
    config = load(tmp_path / "other").config
    assert config.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert len(config.latents_mean) == 4
    assert config.latents_mean != known["latents_mean"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_trained_pipelines_scheduler_stays_and_its_noise_is_trained_on(
    good, other, tmp_path, monkeypatch, name, prediction
):
    config = {**SCHEDULER, "prediction_type": prediction}
    for of_ddim in ("clip_sample", "set_alpha_to_one"):
        del config[of_ddim]
    start = other(scheduler=getattr(diffusers, name)(**config))
    seen = []

    def noise_loss(model, scheduler, *others):
        seen.append(scheduler)
        return of_script(model, scheduler, *others)

    of_script = train_diad.noise_loss
    monkeypatch.setattr(train_diad, "noise_loss", noise_loss)
    train(good, tmp_path / "run", start, steps=1)
    assert seen[0].config.prediction_type == prediction
    latents, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    expected = DDIMScheduler(**SCHEDULER).add_noise(latents, noise, torch.tensor([999]))
    torch.testing.assert_close(seen[0].add_noise(latents, noise, torch.tensor([999])), expected)
    assert type(load(tmp_path / "run").scheduler).__name__ == name


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDIMScheduler(**{**SCHEDULER, "prediction_type": "sample"}), "DDIMScheduler has the prediction_type 'sample'"),
        (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler has the prediction_type None"),
    ],
)
def test_a_denoiser_that_predicts_neither_noise_nor_velocity_is_refused(good, other, tmp_path, scheduler, named):
    with pytest.raises(ValueError, match=f"{named}, and only epsilon and v_prediction are trained"):
        train(good, tmp_path / "run", other(scheduler=scheduler))


def test_two_categories_are_one_model_with_statistics_of_each(tiny, tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 14, "cable": 7})
    train(data, tmp_path / "run", tiny, "--false_alarm_rate", 0.5, "--train_whole_unet", "--use_ema")
    pipeline = load(tmp_path / "run")
    assert pipeline.categories == ["cable", "tile"]
    # 15% of each is held out: 1 of 7, 2 of 14
    assert (~pipeline.calibration.normal_scores.isnan()).sum(dim=1).tolist() == [1, 2]
    cable, tile = (pipeline(texture(0), name, generator=generator()) for name in ("cable", "tile"))
    assert np.array_equal(cable.reconstruction, tile.reconstruction)
    assert not np.array_equal(cable.anomaly_map, tile.anomaly_map)
    # started from a trained one, only what was asked for is changed
    before = load_file(tiny / UNET)
    assert moved(before, pipeline.unet.state_dict()) == set(before)
    assert moved(load_file(tiny / "vae" / VAE), pipeline.vae.state_dict()) == set()


def test_latents_without_a_scale_are_normalised_by_good_images_and_stay_so(tmp_path):
    """Of a new denoiser. One that goes on from it keeps the latents that it knows."""
    data = write_folder(tmp_path / "part", 6, size=128)
    vae = tiny_taef2(levels=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    more = ["--num_inference_steps", 1, "--false_alarm_rate", 0.5, "--train_batch_size", 2]
    flags = [*shared_flags(data, tmp_path / "first", 1, 128), *more]
    train_diad.main([str(f) for f in (*flags, "--preset", "cpu-256", "--vae_path", tmp_path / "vae")])
    first = load(tmp_path / "first")
    assert type(first.vae) is AutoencoderTAEF2
    assert first.config.image_mean == first.config.image_std == [0.5, 0.5, 0.5]  # [-1, 1], as it takes them
    assert moved(vae.state_dict(), first.vae.state_dict()) == set()
    latents = first.encode(images_to_pixel_values(ImageSequence([*data.glob("*.png")]), (128, 128)))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.2)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0.2, atol=0)

    flags = [*shared_flags(data, tmp_path / "second", 1, 128), *more]
    train_diad.main([str(f) for f in (*flags, "--pretrained_model_name_or_path", tmp_path / "first")])
    second = load(tmp_path / "second")
    for name in ("latents_mean", "latents_std", "image_mean", "image_std"):
        assert second.config[name] == first.config[name]


def test_statistics_of_latents_are_taken_anew_where_no_checkpoint_was_left(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "part", 6, size=128)
    vae = tiny_taef2(levels=4, latent_channels=4)

    def killed(*args):
        raise KeyboardInterrupt

    def statistics(output: str, *more: object) -> dict:
        flags = [*shared_flags(data, tmp_path / output, 1, 128), "--train_batch_size", 2, "--preset", "cpu-256"]
        with pytest.raises(KeyboardInterrupt):
            train_diad.main([str(f) for f in (*flags, "--vae_path", tmp_path / "vae", *more)])
        return json.loads((tmp_path / output / train_diad.STATISTICS_NAME).read_text())

    monkeypatch.setattr(train_diad, "train", killed)
    vae.save_pretrained(tmp_path / "vae")
    first = statistics("run")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.3)
    vae.save_pretrained(tmp_path / "vae")
    second = statistics("run", "--resume_from_checkpoint", "latest")
    assert second != first
    assert second == statistics("another")
    # with a checkpoint, those that it was trained with count, also in another folder
    (checkpoint := tmp_path / "run" / "checkpoint-1").mkdir()
    tiny_taef2(levels=4, latent_channels=4).save_pretrained(tmp_path / "vae")
    assert statistics("elsewhere", "--resume_from_checkpoint", checkpoint) == second


@pytest.mark.parametrize("preset", sorted(DIAD_PRESETS))
def test_from_scratch_the_last_timestep_is_noise_alone_and_velocity_the_target(preset):
    scheduler = DDIMScheduler(**{**SCHEDULER, **DIAD_PRESETS[preset]["scheduler"]})
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


@pytest.mark.parametrize("cache", [(), ("--cache_latents",)])
def test_defects_are_drawn_on_the_guiding_images_and_not_on_the_target(good, tiny, tmp_path, monkeypatch, cache):
    seen = []

    def noise_loss(model, scheduler, latents, pixel_values, *others):
        seen.append((latents.clone(), pixel_values.clone()))
        return of_script(model, scheduler, latents, pixel_values, *others)

    of_script = train_diad.noise_loss
    monkeypatch.setattr(train_diad, "noise_loss", noise_loss)
    for share in (0.0, 1.0):
        train(good, tmp_path / str(share), tiny, *cache, "--defect_share", share, resolution=32, steps=1)
    (target, image), (same_target, guiding) = seen
    torch.testing.assert_close(same_target, target)
    assert (guiding != image).flatten(1).any(dim=1).all()


def test_defects_need_an_image_large_enough(good, tiny, tmp_path):
    with pytest.raises(ValueError, match="--defect_share needs a --resolution of 32 or more, not 16"):
        train(good, tmp_path, tiny, "--defect_share", 0.5, resolution=16)


def test_defects_need_a_guidance(good, other, tmp_path):
    start = other(sg_network=None)
    with pytest.raises(ValueError, match="--defect_share draws on what guides, and this pipeline has no `sg_network`"):
        train(good, tmp_path / "run", start, "--defect_share", 0.5, resolution=32)


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


def test_two_processes_train_one_model(good, tiny, tmp_path):
    arguments = flags(good, tmp_path / "run", tiny, "--gradient_accumulation_steps", 2, "--use_ema", steps=3)
    output = launch("diffad.training.train_diad", *arguments, processes=2, cwd=tmp_path)
    assert output.count("Saved a calibrated pipeline") == 1  # after the check that both ended with the same weights
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


def test_the_configuration_for_256_px_is_valid():
    args = train_diad.parse_args(
        ["--config", str(SCRIPT.parent / "configs" / "diad_256_cpu.yaml"), "--train_data_dir", "parts"]
    )
    assert (args.preset, args.vae_path, args.cache_latents) == ("cpu-256", "runs/taef2", True)
    preset = DIAD_PRESETS[args.preset]
    unet = preset["unet"]
    # the guiding skips of the coarsest decoder level stand at 4 x 4, as in the paper
    assert preset["resolution"] // 8 // 2 ** (len(unet["block_out_channels"]) - 1) == 4


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
        (
            train_diad,
            (*PRESET, "--guidance_outputs", "none", "--defect_share", "0.5"),
            "none guides by nothing: make it 0",
        ),
        (train_diad, (*PRESET, "--revision", "v1"), "--revision and --variant are of --pretrained_model_name_or_path"),
    ],
)
def test_bad_arguments_are_named(capsys, script, arguments, words):
    with pytest.raises(SystemExit):
        script.parse_args(list(arguments))
    assert words in capsys.readouterr().err


def test_flags_that_a_pretrained_pipeline_overrules_are_named(tmp_path, tiny):
    start = ("--train_data_dir", "parts", "--pretrained_model_name_or_path", str(tiny))
    with pytest.warns(UserWarning, match="--guidance_outputs and --backbone do not count: the pipeline of"):
        train_diad.parse_args([*start, "--guidance_outputs", "middle", "--backbone=resnet18"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_diad.parse_args([*start, "--sigma", "2"])


def test_what_only_the_networks_know_is_told_before_training(good, tiny, start_vae, tmp_path):
    with pytest.raises(ValueError, match="--resolution must be a multiple of 2 for this autoencoder, not 15"):
        train(good, tmp_path, tiny, resolution=15)
    with pytest.raises(ValueError, match="--resolution must be a multiple of 2 for this autoencoder, but is 15"):
        train_vae(good, tmp_path, "--pretrained_model_name_or_path", start_vae, resolution=15)
    with pytest.raises(ValueError, match="--num_inference_steps must be at most 1000 here, but is 2000"):
        train(good, tmp_path, tiny, "--num_inference_steps", 2000)
    with pytest.raises(ValueError, match=r"`strength` of 0.1 leaves none of 2 steps"):
        train(good, tmp_path, tiny, "--strength", 0.1)


def test_what_is_no_model_to_start_from_is_told_with_its_flag(good, tiny, tmp_path):
    tiny_pipeline().save_pretrained(other := tmp_path / "other")
    start = "--pretrained_model_name_or_path"
    with pytest.raises(ValueError, match=rf"{start}: .* AnomalyDenoisePipeline, which train_ddpm.py trains"):
        train(good, tmp_path / "run", other)
    with pytest.raises(FileNotFoundError, match=rf"{start}: there is no folder .*ohter. Did you mean .*other\?"):
        train(good, tmp_path / "run", tmp_path / "ohter")
    with pytest.raises(FileNotFoundError, match=rf"{start}: there is no folder /typo"):
        train_vae(good, tmp_path / "run", start, "/typo")
    for vae, words in (
        (other, "AnomalyDenoisePipeline, which has no autoencoder. Give what train_autoencoder.py has saved"),
        (good, "holds no autoencoder .neither config.json nor vae/config.json there"),
        (tmp_path / "no_such", "no folder .*no_such"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"--vae_path: .*{words}"):
            train(good, tmp_path / "run", tiny, "--vae_path", vae)


def test_a_resumed_run_has_the_loss_that_it_began_with(good, tiny, start_vae, tmp_path):
    more = ("--resume_from_checkpoint", "latest")
    train(good, tmp_path / "diad", tiny)
    with pytest.raises(ValueError, match=r"--train_whole_unet is True, but .*checkpoint-2 was trained with False"):
        train(good, tmp_path / "diad", tiny, *more, "--train_whole_unet", steps=3)
    train(good, tmp_path / "diad", tiny, *more, "--sigma", 2, steps=3)
    with torch.no_grad():
        (vae := tiny_vae()).encoder.conv_in.weight.mul_(1.1)
    vae.save_pretrained(tmp_path / "other_vae")
    with (
        pytest.warns(UserWarning, match="is not the autoencoder of"),
        pytest.raises(ValueError, match=r"another autoencoder.* than .*checkpoint-3 was trained with\. Give what"),
    ):
        train(good, tmp_path / "diad", tiny, *more, "--vae_path", tmp_path / "other_vae", steps=4)
    train(good, tmp_path / "diad", shutil.copytree(tiny, tmp_path / "moved"), *more, steps=4)
    start = ("--pretrained_model_name_or_path", start_vae)
    train_vae(good, tmp_path / "vae", *start)
    with pytest.raises(ValueError, match=r"--kl_weight is 0.5, but .*checkpoint-2 was trained with 1e-06"):
        train_vae(good, tmp_path / "vae", *start, *more, "--kl_weight", 0.5, steps=3)
    train_vae(good, tmp_path / "vae", *start, *more, "--backbone", "resnet18", steps=3)  # of no loss here
