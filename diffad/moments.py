"""Running means, variances and covariances of a stream, shrunk where few images were seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from diffad.triangles import inverse_factor

# Shrinkage: how many images the average over all positions counts for, see `MomentSums.standard_deviation`.
PRIOR_IMAGES = 8.0


class MomentSums:
    """Mean and variance per position from running sums, in one pass and constant memory.

    Sums are float64, and add up across processes (`reduce`).
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = self.total_of_squares = torch.zeros((), dtype=torch.float64)

    def update(self, values: torch.Tensor) -> None:
        """Adds a batch, (N, ...); the statistics have the shape (...)."""
        values = (values.cpu() if values.device.type == "mps" else values).double()  # MPS knows no float64
        self.count += values.shape[0]
        self.total = self.total + values.sum(dim=0)
        self.total_of_squares = self.total_of_squares + values.square().sum(dim=0)

    def reduce(self, accelerator: Accelerator | None) -> None:
        """Makes the sums those of all processes together; None where there is one alone."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        self.count = int(accelerator.reduce(torch.tensor(self.count, device=accelerator.device)))
        self.total, self.total_of_squares = (
            accelerator.reduce(sums.to(accelerator.device)).to(sums.device)
            for sums in (self.total, self.total_of_squares)
        )

    def replace_positions(self, index: torch.Tensor) -> None:
        """Gives each position, of the last two dimensions, the sums of another, (P,)."""
        size = self.total.shape[-2:]
        self.total, self.total_of_squares = (
            sums.flatten(-2)[..., index.to(sums.device)].unflatten(-1, size)
            for sums in (self.total, self.total_of_squares)
        )

    def mean(self) -> torch.Tensor:
        return self.total / self.count

    def variance(self) -> torch.Tensor:
        return (self.total_of_squares / self.count - self.mean().square()).clamp(min=0.0)

    def standard_deviation(self, prior_images: float = PRIOR_IMAGES) -> torch.Tensor:
        """Per position over the last two dimensions, its variance shrunk towards the average over all positions."""
        variance = self.variance()
        if self.count == 1:  # one image cannot say how images differ: how its places differ stands in for that
            variance = self.mean().var(dim=(-2, -1), correction=0, keepdim=True).expand_as(variance)
        return shrink(variance, self.count, prior_images).sqrt()


def shrink(variance: torch.Tensor, count: int, prior_images: float) -> torch.Tensor:
    """Shrinks (..., H, W) variances towards their average over H and W, which counts for `prior_images` images.

    With n images, a variance at one position is uncertain by a factor of about sqrt(2 / n): with three images some
    positions look almost constant by chance, and dividing by their deviation would make every new image a defect there.
    A weighted mean of the two, n : `prior_images`, is the posterior mean of a normal's variance under a conjugate
    prior. A prior worth 8 images leaves 100 images almost alone (7%) and makes 3 images nearly uniform (73%).
    """
    average = variance.mean(dim=(-2, -1), keepdim=True)
    shrunk = (count * variance + prior_images * average) / (count + prior_images)
    # nothing varies at all (constant images): any positive floor will do, as no score can come out of it
    return shrunk.clamp(min=1e-12)


POSITIONS_AT_ONCE = 196  # exchanged and measured in parts: copies of a part, not of everything
FACTORED_BYTES = 2**24  # of covariances; pages of arrays over 32 MiB, which glibc maps anew, cost twice the arithmetic


class FeatureMoments:
    """Sums of features and of their outer products at each position: mean and covariance in one pass.

    Sums are float64 and take P C (C + 1) * 8 bytes, however many images there are (251 MB for 56 x 56 positions and
    100 channels). They add up across processes (`reduce`).

    Args:
        num_positions: P.
        num_channels: C.
        device: where to sum; the CPU where the device has no float64.
    """

    def __init__(self, num_positions: int, num_channels: int, device: torch.device | str = "cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device
        self.count = 0
        self.total = torch.zeros(num_positions, num_channels, dtype=torch.float64, device=device)
        self.total_of_products = torch.zeros(
            num_positions, num_channels, num_channels, dtype=torch.float64, device=device
        )

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch of features, (N, C, P)."""
        features = features.permute(2, 0, 1)  # (P, N, C)
        features = features.to(self.total.device, torch.float64, memory_format=torch.contiguous_format)
        self.count += features.shape[1]
        self.total += features.sum(dim=1)
        # in place: a product of its own would cost another 8 P C^2 bytes and twice the time
        self.total_of_products.baddbmm_(features.mT, features)

    def reduce(self, accelerator: Accelerator | None) -> None:
        """Makes the sums those of all processes together; None where there is one alone."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        device = accelerator.device
        self.count = int(accelerator.reduce(torch.tensor(self.count, device=device)))
        for sums in (self.total, self.total_of_products):
            for part in sums.split(POSITIONS_AT_ONCE):
                part.copy_(accelerator.reduce(part.to(device)))

    def replace_positions(self, index: torch.Tensor) -> None:
        """Gives each position the sums of another, (P,); those that stand in for others keep their own."""
        index = index.to(self.total.device)
        changed = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        for sums in (self.total, self.total_of_products):
            for part in changed.split(POSITIONS_AT_ONCE):
                sums[part] = sums[index[part]]

    def rescale(self, factor: torch.Tensor, offset: torch.Tensor) -> None:
        """Makes the sums those of `factor * features + offset`, each (C,)."""
        factor, offset = (values.to(self.total) for values in (factor, offset))
        for part in torch.arange(len(self.total)).split(POSITIONS_AT_ONCE):
            total = self.total[part] * factor  # (P', C)
            mixed = total[:, :, None] * offset  # (P', C, C)
            products = self.total_of_products[part] * factor[:, None] * factor
            self.total_of_products[part] = products + mixed + mixed.mT + self.count * offset[:, None] * offset
            self.total[part] = total + self.count * offset

    def over_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each channel over all images and positions, (C,) float64 each."""
        values = self.count * len(self.total)
        mean = self.total.sum(dim=0) / values
        square = self.total_of_products.diagonal(dim1=1, dim2=2).sum(dim=0) / values
        return mean, (square - mean.square()).clamp(min=0.0)

    def mean(self) -> torch.Tensor:
        """(P, C) float64."""
        return self.total / self.count

    def variance(self) -> torch.Tensor:
        """Unbiased variance of each channel, (P, C) float64."""
        mean_square = self.total_of_products.diagonal(dim1=1, dim2=2) / self.count
        return (mean_square - self.mean().square()) * (self.count / (self.count - 1))

    def whitening_parts(self, ridge: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Inverse Cholesky factors (P', C, C) float64 of the covariances + ridge * I, and their positions, in parts."""
        identity = torch.eye(self.total.shape[1], dtype=torch.float64, device=self.total.device)
        step = max(1, FACTORED_BYTES // (8 * identity.numel()))
        for start in range(0, len(self.total), step):
            positions = slice(start, start + step)
            yield positions, inverse_factor(self.covariance(positions) + ridge * identity)

    def covariance(self, positions: slice = slice(None)) -> torch.Tensor:
        """Unbiased covariance at some positions, (P', C, C) float64."""
        mean, degrees = self.total[positions] / self.count, self.count - 1
        return torch.baddbmm(  # in one pass over the products
            self.total_of_products[positions],
            mean[:, :, None],
            mean[:, None, :],
            beta=1.0 / degrees,
            alpha=-self.count / degrees,
        )
