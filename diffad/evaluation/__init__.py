"""Measuring a detector on a test split: metrics, baselines on the same images, speed, and the report of it all."""
