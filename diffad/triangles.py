"""Inverse Cholesky factors of covariances, stored as lower triangles row by row, and products with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PARTS = 4  # in which a product with a triangle is taken


def identity_triangle(num_channels: int) -> torch.Tensor:
    """The lower triangle of an identity matrix, row by row: (C (C + 1) / 2,)."""
    return pack_triangle(torch.eye(num_channels))


def inverse_factor(covariance: torch.Tensor) -> torch.Tensor:
    """W, lower triangular, for which W^T W is the inverse of a covariance (..., C, C): of its Cholesky factor.

    Raises:
        ValueError: the covariance holds NaN or infinity.
    """
    if not covariance.isfinite().all():
        raise ValueError(
            "What the networks make of a good image holds NaN or infinity: run them in float32 (`dtype`). Where they "
            "are, their weights are damaged."
        )
    factor = torch.linalg.cholesky(covariance)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def pack_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangles (..., C (C + 1) / 2) of matrices (..., C, C), row by row."""
    return matrix[..., torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).tril()]


def unpack_triangle(packed: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The matrix (C, C) float32 of a lower triangle (C (C + 1) / 2,); 0 above the diagonal."""
    rows, columns = torch.tril_indices(num_channels, num_channels, device=packed.device)
    matrix = packed.new_zeros(num_channels, num_channels, dtype=torch.float32)
    matrix[rows, columns] = packed.float()
    return matrix


def triangle_parts(packed: torch.Tensor, num_channels: int) -> list[torch.Tensor]:
    """The triangles (..., P, C (C + 1) / 2) a few rows at a time, and of these the columns that they have, transposed.

    The parts, (..., P, c, r) each, take 5/8 of the matrices' space, and a product with them as much arithmetic.
    """
    places = torch.full((num_channels, num_channels), packed.shape[-1], device=packed.device)
    rows, columns = torch.tril_indices(num_channels, num_channels, device=packed.device)
    places[rows, columns] = torch.arange(packed.shape[-1], device=packed.device)
    padded = F.pad(packed, (0, 1))  # above the diagonal stands 0
    step = -(-num_channels // PARTS)
    starts = range(0, num_channels, step)
    ends = [min(start + step, num_channels) for start in starts]
    return [
        padded[..., places[start:end, :end].mT.flatten()].unflatten(-1, (end, end - start)).contiguous()
        for start, end in zip(starts, ends, strict=True)
    ]


def multiply_parts(parts: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """The product of `triangle_parts` (P, c, r) with vectors, given as rows (P, N, C): their parts (P, N, r)."""
    return [rows[:, :, : part.shape[1]] @ part.float() for part in parts]
