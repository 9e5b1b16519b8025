"""Every generator of random numbers: of an image, of a training step, of a call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor


def step_generator(seed: int, batch_number: int, accelerator: Accelerator) -> torch.Generator:
    """Randomness of one batch on one process, from numbers alone: a resumed run draws what the other would have."""
    mixed = np.random.SeedSequence([seed, batch_number, accelerator.process_index]).generate_state(1, np.uint64)[0]
    return torch.Generator(accelerator.device).manual_seed(int(mixed >> np.uint64(1)))


def image_generator(seed: int, index: int) -> torch.Generator:
    """Randomness of one image, from the run's seed and the image's place among the others.

    Mixed, because torch's generator on the CPU takes no more than the lowest 32 bits of a seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))


def model_noise() -> torch.Generator:
    """Of the noise that a model has: in calibrations and calls that name no generator, and in exported graphs.

    It is the same for every image, so calls repeat and equal the graph, and statistics of good images know it.
    """
    return torch.Generator().manual_seed(0)


def image_seeds(generator: torch.Generator | None, num_images: int) -> list[int]:
    """A seed for each image, so that no image's noise depends on which others are in its batch."""
    device = None if generator is None else generator.device
    return torch.randint(2**62, (num_images,), generator=generator, device=device).tolist()


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator | None] | None, num_images: int
) -> list[torch.Generator | None]:
    """A generator for each image: those given, or of seeds from the one given. None stays, for the model's noise."""
    if isinstance(generator, torch.Generator):
        return [torch.Generator().manual_seed(seed) for seed in image_seeds(generator, num_images)]
    return [None] * num_images if generator is None else list(generator)


def noise_generators(generators: Sequence[torch.Generator | None]) -> list[torch.Generator]:
    """The generators, and `model_noise` for each None."""
    return [one or model_noise() for one in generators]


def draw_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator | None], device: torch.device | str
) -> torch.Tensor:
    """Standard normal noise (N, *shape) float32 on `device`: each image's from its own generator, in their order.

    None is `model_noise`. Nothing but an image's generator decides its noise: neither the batch nor, where generators
    lie on the CPU, the device.
    """
    drawing = noise_generators(generators)
    options = {"device": torch.device(device), "dtype": torch.float32}  # of another precision it would be other noise
    return torch.stack([randn_tensor(tuple(shape), generator=one, **options) for one in drawing])
