"""Lower triangles of matrices, stored row by row, (K, P, C (C + 1) / 2): as matrices, and as a graph's constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PARTS = 4  # in which an exported graph multiplies by a triangle


def identity_triangle(num_channels: int) -> torch.Tensor:
    """The lower triangle of an identity matrix, row by row: (C (C + 1) / 2,)."""
    return torch.eye(num_channels)[torch.ones(num_channels, num_channels).tril().bool()]


def dense_triangles(packed: torch.Tensor, num_channels: int) -> torch.Tensor:
    """(P, C (C + 1) / 2) as matrices, (P, C, C) float32."""
    packed = packed.float()
    lower = torch.ones(num_channels, num_channels, dtype=torch.bool, device=packed.device).tril()
    return packed.new_zeros(len(packed), num_channels, num_channels).masked_scatter_(lower, packed)


def triangle_parts(packed: torch.Tensor, num_channels: int) -> list[torch.Tensor]:
    """The triangles a few rows at a time, and of these the columns that they have, transposed: (K, P, c, r) each.

    They take 5/8 of the matrices' space, and a product with them as much of its time: an exported graph neither
    unpacks them when it is loaded nor when it runs.
    """
    places = torch.full((num_channels, num_channels), packed.shape[2], device=packed.device)
    rows, columns = torch.tril_indices(num_channels, num_channels, device=packed.device)
    places[rows, columns] = torch.arange(packed.shape[2], device=packed.device)
    padded = F.pad(packed, (0, 1))  # above the diagonal stands 0
    step = -(-num_channels // PARTS)
    starts = range(0, num_channels, step)
    ends = [min(start + step, num_channels) for start in starts]
    return [
        padded[:, :, places[start:end, :end].mT.flatten()].unflatten(2, (end, end - start)).contiguous()
        for start, end in zip(starts, ends, strict=True)
    ]


def multiply_parts(parts: list[torch.Tensor], category: int | torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The product of one category's `triangle_parts` with vectors (P, C, N), of the same shape."""
    rows = vectors.mT  # (P, N, C)
    products = [rows[:, :, : part.shape[2]] @ part[category].float() for part in parts]  # (P, N, r) each
    return torch.cat(products, dim=2).mT
