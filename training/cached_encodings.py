"""What a frozen network makes of training images, computed once: latents of an autoencoder, features of a backbone."""

from __future__ import annotations

import argparse
import itertools
import uuid
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from diffad.training.data import ResizedImages, to_pixel_values
from diffad.training.shared_map import shared_map


def flip_pairs(args: argparse.Namespace) -> list[tuple[bool, bool]]:
    """The flips that augmentation chooses from, (left-right, upside down), the image as it is first."""
    return list(
        itertools.product([False, True][: 1 + args.random_flip], [False, True][: 1 + args.random_vertical_flip])
    )


class CachedEncodings(TorchDataset):
    """`ResizedImages`, and encodings of each image and its flips, computed once a machine and kept on disk.

    An item is (tensor (3, R, R) as of `ResizedImages`, encodings (F, *shape) of `dtype`, category index) for F flips.

    Args:
        images: what to encode.
        encode: (N, 3, R, R) in [-1, 1] to (N, *shape).
        flips: F pairs of left-right and upside down.
        shape: of one encoding.
        dtype: in which encodings are kept.
    """

    def __init__(
        self,
        images: ResizedImages,
        encode: Callable[[torch.Tensor], torch.Tensor],
        flips: Sequence[tuple[bool, bool]],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ):
        self.images = images
        self.category_index = images.category_index
        self.shape, self.dtype = (len(flips), *shape), dtype

        def encode_flips(indices: list[int]) -> dict[str, list[bytes]]:
            scaled = to_pixel_values(torch.stack([images[i][0] for i in indices]))
            encodings = torch.stack([encode(flip(scaled, [pair] * len(scaled))) for pair in flips], dim=1)
            return {"encodings": [one.tobytes() for one in encodings.to(dtype).cpu().numpy()]}

        self.table = shared_map(
            Dataset.from_dict({"index": range(len(images))}),
            encode_flips,
            input_columns="index",
            remove_columns="index",
            batched=True,
            batch_size=16,
            desc="Encoding images",
            new_fingerprint=uuid.uuid4().hex,  # its own would hash the network
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        pixels, index = self.images[i]
        encodings = torch.frombuffer(bytearray(self.table[i]["encodings"]), dtype=self.dtype).view(self.shape)
        return pixels, encodings, index


def flip(images: torch.Tensor, pairs: Sequence[tuple[bool, bool]] | torch.Tensor) -> torch.Tensor:
    """Flips each of (N, C, H, W) images by its pair, (left-right, upside down)."""
    across, down = torch.as_tensor(pairs, device=images.device).view(-1, 2, 1, 1, 1).unbind(dim=1)  # (N, 1, 1, 1)
    images = torch.where(across, images.flip(3), images)
    return torch.where(down, images.flip(2), images)


def choose_flips(
    pixels: torch.Tensor, encodings: torch.Tensor, flips: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the cached flips for each image.

    Args:
        pixels: (N, 3, R, R), as of `ResizedImages`.
        encodings: (N, F, ...).
        flips: (F, 2) bool, as in `CachedEncodings`.
        generator: of the choice.

    Returns:
        Images (N, 3, R, R) in [-1, 1], and their encodings (N, ...).
    """
    choice = torch.randint(len(flips), (len(pixels),), generator=generator, device=pixels.device)
    images = flip(to_pixel_values(pixels), flips[choice])
    return images, encodings[torch.arange(len(encodings), device=encodings.device), choice]
