"""Published checkpoints as pipelines, where it has always been: see `diffad.pipelines.conversion`."""

from diffad.pipelines.conversion import load_diad_checkpoint, load_diad_components

__all__ = ["load_diad_checkpoint", "load_diad_components"]
