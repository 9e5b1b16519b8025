"""A trained model at work, away from where it was trained: exported graphs, and what runs them, without torch."""

from diffad.deployment.runtime import Runtime, RuntimeOutput

__all__ = ["Runtime", "RuntimeOutput"]
