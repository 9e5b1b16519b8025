"""Good training images with drawn defects, from which a network learns to rebuild what is behind them.

Networks for anomaly detection learn from drawn defects in Zavrtanik et al., "DRAEM" (ICCV 2021), diffusion models in
Yao et al., "GLAD" (ECCV 2024).
"""

from __future__ import annotations

import numpy as np
import torch

from diffad.data.synthetic_defects import add_defect


def draw_defects(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Draws one defect onto some of a batch of good images; the others, and what is passed, stay as they are.

    Args:
        images: (N, 3, H, W) in [-1, 1], sides from 32 up. Textures are taken from each other.
        share: how likely an image is to get one, in [0, 1]; at 0 nothing is drawn of `generator`.
        generator: all that is random comes from it.

    Returns:
        (N, 3, H, W) in [-1, 1], on the device of `images`.

    Example:
        >>> guiding = draw_defects(images, 0.5, torch.Generator().manual_seed(0))
    """
    if not share:
        return images
    count, device = len(images), images.device
    chosen = torch.rand(count, generator=generator, device=device) < share
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    pictures = list((images / 2.0 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1).cpu().numpy())  # (H, W, 3) each
    drawn = images.clone()
    for i in chosen.nonzero().flatten().tolist():
        defect = add_defect(pictures[i], pictures[:i] + pictures[i + 1 :], np.random.default_rng(seeds[i]))
        drawn[i] = torch.from_numpy(defect.image).permute(2, 0, 1) * 2.0 - 1.0
    return drawn
