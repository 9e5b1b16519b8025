"""Short trainings of DiAD and of its autoencoder: what several test files start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONE, texture, tiny_extractor, write_folder
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from stable_diffusion import tiny_conditional_unet

from diffad import DiADPipeline, SemanticGuidedNetwork
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.training import train_autoencoder, train_diad

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
    category = pipeline.categories[0] if len(pipeline.categories) > 1 else None
    result = pipeline(texture(99), category=category)
    assert np.isfinite(result.anomaly_map).all()
    assert 0.0 < result.p_value[0] <= 1.0
    return pipeline


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.fixture(scope="module")
def start_vae(tmp_path_factory) -> Path:
    tiny_vae().save_pretrained(folder := tmp_path_factory.mktemp("vae"))
    return folder
