"""What keeps statistics of good images exact, whatever the precision of the networks beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


class Float32Part:
    """A part of a pipeline that is float32 in every variant: it follows a move to a device, not to a dtype.

    All variants in a folder share one set of its weights, as its configuration goes with one. It stands before
    diffusers' `ModelMixin`, on whose moving and saving it builds.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            device = fn(tensor.new_empty(0)).device
            return fn(tensor) if device.type == "meta" or tensor.is_meta else tensor.to(device)

        return super()._apply(moved, recurse)  # type: ignore[misc]

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, max_shard_size: int | str = "10GB", **options: Any
    ) -> None:
        """As of every network, but without a variant."""
        options["variant"] = None
        super().save_pretrained(save_directory, *args, max_shard_size=max_shard_size, **options)  # type: ignore[misc]
