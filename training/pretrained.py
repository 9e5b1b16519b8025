"""Which kind of model stands where a script starts from, said with the flag's name before anything is loaded."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from diffad.pipelines.base import AnomalyPipeline
from diffad.pipelines.saving import finish_saving
from diffad.registration import PIPELINES

# by the class of a pipeline, what trains it
SCRIPTS = {"AnomalyDenoisePipeline": "train_ddpm.py", "DiADPipeline": "train_diad.py"}


def check_there(name_or_path: str, flag: str) -> None:
    """Raises a FileNotFoundError, which names `flag`, where what can only be a folder is not there."""
    folder = Path(name_or_path)
    if folder.is_dir():
        finish_saving(folder)
        return
    others = [one.name for one in folder.parent.iterdir()] if folder.parent.is_dir() else []
    alike = difflib.get_close_matches(folder.name, others, n=1)
    may_be_of_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path) and not alike  # org/name
    if not may_be_of_hub:
        meant = f" Did you mean {folder.parent / alike[0]}?" if alike else ""
        raise FileNotFoundError(
            f"{flag}: there is no folder {name_or_path}.{meant} Give a saved model's folder, or its id on the Hub, "
            "org/name."
        )


def pipeline_class(name_or_path: str, flag: str, revision: str | None = None) -> str:
    """The name of the class of the pipeline in a folder or a repository of the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or no pipeline in it.
        OSError: the Hub does not give it.
    """
    check_there(name_or_path, flag)
    if Path(name_or_path).is_dir() and not Path(name_or_path, "model_index.json").is_file():
        raise FileNotFoundError(f"{flag}: {name_or_path} holds no pipeline (no model_index.json there).")
    try:
        return AnomalyPipeline.load_config(name_or_path, revision=revision)["_class_name"]
    except OSError as error:
        raise OSError(f"{flag}: {name_or_path} is no folder, and the Hub does not give it. ({error})") from error


def check_method(name_or_path: str, flag: str, wanted: str, revision: str | None = None) -> str:
    """The name of a pipeline's class, which is of the wanted method, or none of this package's.

    Args:
        name_or_path: a folder or a Hub id.
        flag: that gives it.
        wanted: AnomalyDenoisePipeline or DiADPipeline.
        revision: on the Hub.

    Raises:
        OSError: as of `pipeline_class`.
        ValueError: it is of the other method.
    """
    found = pipeline_class(name_or_path, flag, revision)
    is_diad = found == "DiADPipeline"
    if found in PIPELINES and is_diad != (wanted == "DiADPipeline"):
        script = f", which {SCRIPTS[found]} trains" if found in SCRIPTS else ""
        raise ValueError(
            f"{flag}: {name_or_path} holds a pipeline of the class {found}{script}. Give one of the class {wanted}."
        )
    return found
