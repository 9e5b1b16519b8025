#!/usr/bin/env python
"""DiAD at the paper's size, Stable Diffusion 1.5's, with random weights: arithmetic, memory, and images a minute.

```bash
python tests/benchmarks/benchmark_full_size_diad.py --device cuda --dtype float16 --steps 10 2
python tests/benchmarks/benchmark_full_size_diad.py --device meta                       # counts alone, no memory taken
python tests/benchmarks/benchmark_full_size_diad.py --device meta --save runs/random-sd  # a folder to train from
```

Counted on the meta device: parameters, what a training step keeps of them, GFLOP an image. Timed in turns in one run:
the published loop (He et al.'s code), with two passes of both networks a step, one for each prompt, the conditioning
image encoded in each, 10 steps, one image at a time; and `DiADPipeline` with as many steps as asked for, in batches.
Both are this package's networks and decode and compare features alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffad import DiADPipeline, SemanticGuidedNetwork, TimmFeatureExtractor
from diffad.files import write_text_whole
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.training.diad_presets import SCHEDULER
from diffad.training.train_diad import choose_trained

RESOLUTION, PUBLISHED_STEPS, GUIDANCE_SCALE, REPEATS = 256, 10, 7.5, 3
GIB = 2**30


def full_size_autoencoder() -> AutoencoderKL:
    """Stable Diffusion 1.5's."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )


def full_size_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def full_size_pipeline(device: torch.device, dtype: torch.dtype, backbone: str) -> DiADPipeline:
    """Random weights, made on the device; on "meta" none at all."""
    with device:
        unet, vae, prompt = full_size_unet(), full_size_autoencoder(), PromptEmbedding()
        # on the device meta there are no weights to copy
        guide = SemanticGuidedNetwork.from_unet(unet, load_weights_from_unet=device.type != "meta")
    extractor = TimmFeatureExtractor(backbone, (4, 8, 16))
    pipeline = DiADPipeline(vae, unet, prompt, DDIMScheduler(**SCHEDULER), guide, extractor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device.type == "meta" else pipeline.to(device, dtype)


def count(pipeline: DiADPipeline) -> dict[str, float]:
    """Of a pipeline on the meta device: parameters, GiB that a training step keeps of them, GFLOP an image."""
    networks = {"denoiser": pipeline.unet, "semantic-guided network": pipeline.sg_network, "autoencoder": pipeline.vae}
    numbers = {
        f"{name}, M parameters": sum(p.numel() for p in one.parameters()) / 1e6 for name, one in networks.items()
    }
    choose_trained(pipeline.unet, pipeline.sg_network, whole_unet=False)
    both = [*pipeline.unet.parameters(), *pipeline.sg_network.parameters()]
    trained = sum(p.numel() for p in both if p.requires_grad)
    kept = sum(p.numel() for p in [*both, *pipeline.vae.parameters()])
    numbers["trained, M parameters"] = trained / 1e6
    # float32 weights and gradients; AdamW's two moments take 4 bytes each, or 1 with --use_8bit_adam
    numbers["training step, GiB before activations"] = (4 * kept + 12 * trained) / GIB
    numbers["training step with 8-bit Adam, GiB before activations"] = (4 * kept + 6 * trained) / GIB
    side = RESOLUTION // pipeline.size_multiple
    sample = torch.empty(1, pipeline.vae.config.latent_channels, side, side, device="meta")
    pixels = torch.empty(1, 3, RESOLUTION, RESOLUTION, device="meta")
    prompt, timestep = pipeline.prompt_embedding(), torch.ones(1, device="meta")
    guide = pipeline.sg_network
    embedding = torch.empty(1, guide.config.block_out_channels[0], side, side, device="meta")
    for name, run in {
        "pass of the denoiser": lambda: pipeline.unet(sample, timestep, prompt),
        "pass of the guide": lambda: guide(sample, timestep, prompt, conditioning_embedding=embedding),
        "embedding of the image": lambda: guide.embed_condition(pixels),
        "decoder": lambda: pipeline.vae.decode(sample),
    }.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        numbers[f"{name}, GFLOP"] = counter.get_total_flops() / 1e9
    return numbers


def gflop_an_image(numbers: dict[str, float], steps: int, published: bool) -> float:
    passes = numbers["pass of the denoiser, GFLOP"] + numbers["pass of the guide, GFLOP"]
    embedding = numbers["embedding of the image, GFLOP"]
    reverse = steps * 2 * (passes + embedding) if published else steps * passes + embedding
    return reverse + numbers["decoder, GFLOP"]


@torch.no_grad()
def published_loop(pipeline: DiADPipeline, images: torch.Tensor) -> None:
    """One image at a time; at each step both networks for the prompt and again for the negative one, both empty."""
    dtype, scheduler = pipeline.unet.dtype, pipeline.scheduler
    prompt = pipeline.prompt_embedding().to(dtype)
    for image in images.split(1):
        pixels = (image * 2.0 - 1.0).to(dtype)  # (1, 3, R, R)
        scheduler.set_timesteps(PUBLISHED_STEPS, device=image.device)
        side = RESOLUTION // pipeline.size_multiple
        latents = torch.randn(1, pipeline.vae.config.latent_channels, side, side, device=image.device)
        for timestep in scheduler.timesteps:
            predictions = []
            for _ in ("prompt", "negative prompt"):
                down, middle = pipeline.sg_network(
                    latents.to(dtype), timestep, prompt, pixel_values=pixels, return_dict=False
                )
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                predictions.append(pipeline.unet(latents.to(dtype), timestep, prompt, **residuals).sample.float())
            conditional, unconditional = predictions
            noise = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        pipeline.compare(image * 2.0 - 1.0, pipeline.decode(latents))


def images_a_minute(run: Callable[[], object], count: int, device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 60.0 * count / (time.perf_counter() - started)


def save_stable_diffusion(folder: Path, dtype: torch.dtype) -> None:
    """A text-to-image model of Stable Diffusion 1.5's sizes and random weights, as diffusers saves it."""
    # two words are enough for the empty prompt
    tokenizer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [], model_max_length=77)
    text = CLIPTextConfig(vocab_size=2, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    schedule = {name: value for name, value in SCHEDULER.items() if name != "clip_sample"}
    parts = {
        "unet": full_size_unet().to(dtype),
        "vae": full_size_autoencoder().to(dtype),
        "text_encoder": CLIPTextModel(text).to(dtype),
        "tokenizer": tokenizer,
        "scheduler": PNDMScheduler(**schedule, skip_prk_steps=True),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0"}
    write_text_whole(folder / "model_index.json", json.dumps(index) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or meta for the counts alone (cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[10, 2], help="of the pipeline's reverse process (10 2)"
    )
    parser.add_argument("--images", type=int, default=4, help="timed (4)")
    parser.add_argument("--batch_size", type=int, default=4, help="of the pipeline (4)")
    parser.add_argument("--backbone", default="resnet50", help="of the features, with random weights (resnet50)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write a text-to-image model of this size there")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if args.save is not None:
        save_stable_diffusion(args.save, dtype)
    numbers = count(full_size_pipeline(torch.device("meta"), dtype, args.backbone))
    numbers["published loop, 10 steps, GFLOP an image"] = gflop_an_image(numbers, PUBLISHED_STEPS, published=True)
    for steps in args.steps:
        numbers[f"DiADPipeline, {steps} steps, GFLOP an image"] = gflop_an_image(numbers, steps, published=False)
    if device.type != "meta":
        torch.manual_seed(0)
        pipeline = full_size_pipeline(device, dtype, args.backbone)
        images = torch.rand(args.images, 3, RESOLUTION, RESOLUTION)
        runs: dict[str, Callable[[], object]] = {
            "published loop, 10 steps": lambda: published_loop(pipeline, images.to(device))
        }
        for steps in args.steps:
            runs[f"DiADPipeline, {steps} steps"] = lambda steps=steps: pipeline(
                images, num_inference_steps=steps, batch_size=args.batch_size
            )
        rates: dict[str, list[float]] = {name: [] for name in runs}
        # on a GPU a first round, which picks kernels, does not count
        for round_number in range(REPEATS + 1 if device.type == "cuda" else 1):
            for name, run in runs.items():
                rate = images_a_minute(run, args.images, device)
                if round_number or device.type != "cuda":
                    rates[name].append(rate)
        published = max(rates["published loop, 10 steps"])
        for name, values in rates.items():
            numbers[f"{name}, images a minute"] = max(values)
            numbers[f"{name}, times the published loop"] = max(values) / published
        if device.type == "cuda":
            numbers["highest memory, GiB"] = torch.cuda.max_memory_allocated() / GIB
    for name, value in numbers.items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
