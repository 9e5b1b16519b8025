"""Saved pipelines in the form in which version 0.1 left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffad.pipelines.version_0_1 import CODE_COMMENT


def as_version_0_1(folder: Path, **settings: Any) -> Path:
    """Rewrites a saved pipeline's `model_index.json`, with more `settings`, and adds the file of code.

    That version's code only imported diffad; this one fails, as nothing should run it.
    """
    index = json.loads((folder / "model_index.json").read_text())
    for name, value in index.items():
        if isinstance(value, list) and value[:1] == ["diffad"]:
            index[name] = ["diffusers", value[1]]
    if isinstance(index["categories"], dict):
        index["categories"] = [list(index["categories"].values())]
    if isinstance(index["_class_name"], str):
        index["_class_name"] = ["pipeline", index["_class_name"]]
    index |= settings
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "pipeline.py").write_text(f"{CODE_COMMENT}\nraise RuntimeError('a saved model ran its code')\n")
    return folder
