"""A DiAD pipeline for tests that only need one."""

from __future__ import annotations

import torch
from conftest import textures, tiny_extractor
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from diffad import DiADPipeline, SemanticGuidedNetwork
from diffad.models.prompt_embedding import PromptEmbedding


def tiny_diad() -> DiADPipeline:
    """A real pipeline of random weights, calibrated."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **blocks,
    )
    pipeline = DiADPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        ),
        unet=unet,
        prompt_embedding=PromptEmbedding.from_tensor(torch.randn(1, 3, 8)),
        scheduler=DDIMScheduler(),
        sg_network=SemanticGuidedNetwork.from_unet(unet, conditioning_embedding_out_channels=(4, 8)),
        feature_extractor=tiny_extractor(),
        num_inference_steps=2,
        pooling_rounds=1,
        processing_resolution=16,
    )
    pipeline.set_progress_bar_config(disable=True)
    for network in pipeline.measuring_networks:
        network.eval()  # as a loaded one is
    return pipeline.calibrate(textures(6), false_alarm_rate=0.25, generator=torch.Generator().manual_seed(0))
