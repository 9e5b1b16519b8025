"""Saved pipelines of any class."""

from __future__ import annotations

import os
from typing import Any

import diffad
from diffad.pipelines.base import AnomalyPipeline
from diffad.pipelines.saving import finish_saving
from diffad.registration import PIPELINES


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> AnomalyPipeline:
    """Loads a pipeline by the class that its `model_index.json` names.

    `DiffusionPipeline.from_pretrained` does so as well, but not for pipelines that version 0.1 saved.

    Args:
        pretrained_model_name_or_path: a folder or a Hub id.
        kwargs: as in `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: the class is none of this package's.
    """
    if os.path.isdir(pretrained_model_name_or_path):
        finish_saving(pretrained_model_name_or_path)
    class_name = AnomalyPipeline.load_config(pretrained_model_name_or_path, **kwargs)["_class_name"]
    if not isinstance(class_name, str) or class_name not in PIPELINES:
        raise ValueError(
            f"{pretrained_model_name_or_path} holds a {class_name}, which is none of diffad's pipelines "
            f"({', '.join(PIPELINES)}). Load it by its own class."
        )
    return getattr(diffad, class_name).from_pretrained(pretrained_model_name_or_path, **kwargs)
