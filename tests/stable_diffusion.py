"""A text-to-image model as Stable Diffusion 1.5 is saved, of ten thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tiny_conditional_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    """A text-to-image model of ten thousand parameters, as Stable Diffusion 1.5 is saved."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    torch.manual_seed(3)
    tokenizer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [], model_max_length=5)
    config = CLIPTextConfig(
        vocab_size=2,
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
    )
    scheduler = PNDMScheduler(
        1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {
        "vae": vae,
        "unet": tiny_conditional_unet(),
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(config),
        "scheduler": scheduler,
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
