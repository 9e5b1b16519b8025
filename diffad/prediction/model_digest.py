"""Tells models apart that have no thresholds to tell them by."""

from __future__ import annotations

import hashlib
from typing import Any


def model_digest(pipeline: Any) -> str:
    """Ten letters: of some values of each tensor of a pipeline, or of an exported model's file."""
    if not hasattr(pipeline, "components"):
        from diffad.deployment.runtime import graph_files

        return hashlib.sha256(b"".join(file.read_bytes() for file in graph_files(pipeline.path))).hexdigest()[:10]
    found = hashlib.sha256()
    for component in pipeline.components.values():
        tensors = component.state_dict() if hasattr(component, "state_dict") else {}
        for name, values in tensors.items():
            values = values.flatten()
            some = [] if values.is_meta else values[:: max(1, len(values) // 64)].float().tolist()
            found.update(f"{name} {some}".encode())
    return found.hexdigest()[:10]
