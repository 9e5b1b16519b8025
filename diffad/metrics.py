"""`AnomalyMetrics`, where it has always been: see `diffad.evaluation.metrics`."""

from diffad.evaluation.metrics import AnomalyMetrics

__all__ = ["AnomalyMetrics"]
