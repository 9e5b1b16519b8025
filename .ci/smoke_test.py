"""Whether the package works at all with the libraries that are installed: tiny networks, no download."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import diffad  # isort: skip (first, as it must not need diffusers)
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from diffad.metrics import AnomalyMetrics
from diffad.models.prompt_embedding import PromptEmbedding

sys.path.append(str(Path(__file__).parents[1] / "tests" / "training"))
import toy_training  # isort: skip (of the tests, beside this file)

EXTRACTOR = ("test_resnet", (2, 4))
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def denoise_pipeline() -> diffad.AnomalyDenoisePipeline:
    unet = diffad.DenoisingUNet2DModel(
        sample_size=16,
        feature_channels=64,
        feature_resolution=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **BLOCKS,
    )
    scheduler = DDPMScheduler(variance_type="learned_range")
    return diffad.AnomalyDenoisePipeline(unet, scheduler, diffad.TimmFeatureExtractor(*EXTRACTOR))


def diad_pipeline() -> diffad.DiADPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **BLOCKS,
    )
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return diffad.DiADPipeline(
        vae=AutoencoderKL(down_block_types=down, up_block_types=up, **BLOCKS),
        unet=unet,
        prompt_embedding=PromptEmbedding.from_tensor(torch.randn(1, 3, 8)),
        scheduler=DDIMScheduler(),
        sg_network=diffad.SemanticGuidedNetwork.from_unet(unet, conditioning_embedding_out_channels=(4, 8)),
        feature_extractor=diffad.TimmFeatureExtractor(*EXTRACTOR),
        num_inference_steps=2,
        processing_resolution=16,
    )


def check_resuming(folder: Path) -> None:
    """A training that stops in the middle of its third epoch and goes on ends with the weights of one that does not."""
    toy_training.run(folder / "whole")
    try:
        toy_training.run(folder / "cut", on_batch=lambda n, _: signal.raise_signal(signal.SIGTERM) if n == 7 else None)
    except SystemExit:
        toy_training.run(folder / "cut", "--resume_from_checkpoint", "latest")
    else:
        raise AssertionError("It was not stopped.")
    whole, cut = (torch.load(folder / name / "weights-0.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def main() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)
    for pipeline in (denoise_pipeline(), diad_pipeline()):
        pipeline.set_progress_bar_config(disable=True)
        for network in pipeline.measuring_networks:
            network.eval()  # as a loaded one is
        pipeline.calibrate(list(images), false_alarm_rate=0.25)
        expected = pipeline(images, generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_pretrained(folder)
            loaded = DiffusionPipeline.from_pretrained(folder)
        assert type(loaded) is type(pipeline)
        output = loaded(images, generator=torch.Generator().manual_seed(0))
        np.testing.assert_array_equal(output.anomaly_map, expected.anomaly_map)
        assert output.anomaly_map.shape == output.anomaly_mask.shape == (8, 20, 24)
        metrics = AnomalyMetrics()
        metrics.update(anomaly_score=output.anomaly_score, label=np.arange(8) % 2)
        assert 0.0 <= metrics.compute()["image_auroc"] <= 1.0
    with tempfile.TemporaryDirectory() as folder:
        check_resuming(Path(folder))


if __name__ == "__main__":
    main()
