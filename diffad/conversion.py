"""Published checkpoints as pipelines, where it has always been: see `diffad.pipelines.conversion`."""

from diffad.pipelines.conversion import load_diad_checkpoint, load_diad_components, load_taef2

__all__ = ["load_diad_checkpoint", "load_diad_components", "load_taef2"]
