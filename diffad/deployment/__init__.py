"""Models outside of torch: exported graphs, and what runs them. Importing this needs no torch."""

from diffad.deployment.runtime import Runtime, RuntimeOutput

__all__ = ["Runtime", "RuntimeOutput"]
