"""Pipelines saved by version 0.1, whose `model_index.json` was another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffad.registration import COMPONENTS, PIPELINES

CODE_FILE = "pipeline.py"
CODE_COMMENT = "# For `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` without `import diffad`."


def upgrade_index(index: dict[str, Any]) -> dict[str, Any]:
    """What `model_index.json` holds, as it is written today.

    Version 0.1 named a file of code beside the class, listed its components as diffusers' own, and put the categories'
    names into a list in a list:

        {"_class_name": ["pipeline", "DiADPipeline"], "sg_network": ["diffusers", "SemanticGuidedNetwork"],
         "categories": [["mono", "poly"]]}

    Settings that are gone are left out where they did nothing, or have done all in the calibration. An index that is up
    to date comes back equal.
    """
    upgraded = {}
    for name, value in index.items():
        if (name == "suppression" and not value) or name == "position_prior_images":
            continue
        if name == "_class_name" and isinstance(value, list) and value[0] == "pipeline" and value[1] in PIPELINES:
            value = value[1]
        elif name == "categories" and isinstance(value, list):
            names = value[0] if value and isinstance(value[0], list) else value
            value = {str(i): category for i, category in enumerate(names)}
        elif isinstance(value, list) and len(value) == 2 and value[0] == "diffusers" and value[1] in COMPONENTS:
            value = ["diffad", value[1]]
        upgraded[name] = value
    return upgraded


def remove_code(folder: str | os.PathLike) -> None:
    """Removes the file of code that version 0.1 wrote into a folder; a file of another's making stays."""
    path = Path(folder, CODE_FILE)
    if path.is_file() and path.read_text(encoding="utf-8").startswith(CODE_COMMENT):
        path.unlink()
