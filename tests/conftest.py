"""Tiny but real components, and folders of drawn textures, for every test.

Nothing here comes from a network: the backbone is timm's own miniature with random weights.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

if threading.current_thread() is threading.main_thread():
    # whoever runs the suite in the background ignores Ctrl-C, and so would the processes that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download something fails at once
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; two workers share the cores
os.environ["ACCELERATE_USE_CPU"] = str("DIFFAD_TEST_DEVICE" not in os.environ)  # the same numbers on every machine

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from stable_diffusion import stable_diffusion  # noqa: F401 (a fixture for every test)

from diffad import AnomalyDenoisePipeline, DenoisingUNet2DModel, TimmFeatureExtractor

BACKBONE = "test_resnet"  # timm's miniature, 0.4 M parameters: 32 channels at either stride
STRIDES = (2, 4)

DEVICE = os.environ.get("DIFFAD_TEST_DEVICE", "cpu")  # of pipelines; cuda looks for what works on a CPU alone

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # three digits, and the default of a GPU's convolutions


def texture(seed: int, size: int | tuple[int, int] = 16, defect: bool = False) -> np.ndarray:
    """A striped part under noise, (H, W, 3) uint8; a defective one has a dark square on it."""
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    stripes = 0.6 + 0.2 * np.sin(2.0 * np.pi * np.arange(width) / 8.0 + rng.uniform(-0.3, 0.3))
    image = stripes[None, :, None] * np.array([1.0, 0.9, 0.7]) + 0.03 * rng.standard_normal((height, width, 3))
    if defect:
        top, left = rng.integers(1, max(2, height // 2)), rng.integers(1, max(2, width // 2))
        image[top : top + max(1, height // 3), left : left + max(1, width // 3)] = 0.0
    return (image.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def textures(count: int, size: int | tuple[int, int] = 16, first_seed: int = 0) -> list[np.ndarray]:
    return [texture(first_seed + i, size) for i in range(count)]


def write_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_folder(folder: Path, count: int, size: int = 16, first_seed: int = 0) -> Path:
    """A plain folder of good images."""
    for i, pixels in enumerate(textures(count, size, first_seed)):
        write_png(folder / f"{i:03}.png", pixels)
    return folder


def write_mvtec(
    root: Path, categories: dict[str, int] | None = None, good: int = 3, bad: int = 4, size: int = 16
) -> Path:
    """An MVTec-AD tree: `categories` maps a name to its training images; `good` and `bad` test images in each."""
    for number, (name, count) in enumerate((categories or {"tile": 8}).items()):
        seed = 1000 * number
        write_folder(root / name / "train" / "good", count, size, seed)
        write_folder(root / name / "test" / "good", good, size, seed + 500)
        for i in range(bad):
            pixels = texture(seed + 700 + i, size, defect=True)
            write_png(root / name / "test" / "hole" / f"{i:03}.png", pixels)
            mask = (pixels == 0).all(axis=2).astype(np.uint8) * 255
            write_png(root / name / "ground_truth" / "hole" / f"{i:03}_mask.png", mask)
    return root


def tiny_extractor(
    strides: tuple[int, ...] = STRIDES, image_size: int | list[int] | None = None
) -> TimmFeatureExtractor:
    torch.manual_seed(1)
    return TimmFeatureExtractor.from_backbone(BACKBONE, strides, image_size, weights="random")


def tiny_unet(sample_size: int = 16, feature_channels: int = 64, **config) -> DenoisingUNet2DModel:
    torch.manual_seed(0)
    return DenoisingUNet2DModel(
        **{
            "sample_size": sample_size,
            "feature_channels": feature_channels,
            "feature_resolution": sample_size // 2,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            **config,
        }
    ).eval()


def tiny_scheduler(**config) -> DDPMScheduler:
    return DDPMScheduler(1000, **{"beta_schedule": "linear", "variance_type": "learned_range", **config})


def tiny_pipeline(
    sample_size: int = 16, categories: list[str] | None = None, image_size: int | None = None, **config
) -> AnomalyDenoisePipeline:
    """A real pipeline of 30 thousand parameters, not trained and not calibrated."""
    num_classes = len(categories) if categories and len(categories) > 1 else None
    pipeline = AnomalyDenoisePipeline(
        unet=tiny_unet(sample_size, num_class_embeds=num_classes),
        scheduler=tiny_scheduler(),
        feature_extractor=tiny_extractor(image_size=image_size),
        categories=categories,
        **{"kl_sigma": 1.0, "feature_sigma": 1.0, **config},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(DEVICE)


def save_tiny_pipeline(folder: Path) -> Path:
    """One that is calibrated, in a folder, which is returned."""
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.save_pretrained(folder)
    return folder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in singletons: a second run in one process needs them cleared."""
    from accelerate.state import AcceleratorState, GradientState

    def clear() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    clear()  # what other tests left, whose precision is not that of a processor with bfloat16
    yield
    clear()
