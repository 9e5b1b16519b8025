"""Whether a folder may get results: nothing of another program's is replaced, and results of two models never mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffad.files import write_text_whole
from diffad.prediction.journal import JOURNAL_NAME, check_scores
from diffad.prediction.part_verdicts import PART_VERDICTS_NAME
from diffad.prediction.region_files import REGION_FILES
from diffad.reading.inputs import LOCK_NAME, PICTURE_FOLDERS, SHEET_NAME

SETTINGS_NAME = "settings.json"
OURS = {LOCK_NAME, SETTINGS_NAME, JOURNAL_NAME}  # one of them stands in every output
REPLACED = (*PICTURE_FOLDERS, SHEET_NAME, *REGION_FILES, PART_VERDICTS_NAME)


def check_output(output_dir: Path) -> None:
    """Raises where pictures would go into links, or between or over files of another program's."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, but {output_dir} is a file.")
    for name in REPLACED:
        path = output_dir / name
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and nothing is written outside the output. Give another `output_dir`.")
    known = [output_dir / name for name in (*OURS, *REPLACED)]
    check_names({path.name for path in known if path.is_file() or (path.is_dir() and any(path.iterdir()))}, output_dir)
    check_scores(output_dir)


def check_names(names: set[str], place: Path | str) -> None:
    """Raises where one of ours is another program's, as nothing of ours stands beside it.

    Args:
        names: of the files in the output, and of its folders that are not empty.
        place: of the output, for the message.
    """
    if taken := [] if names & OURS else [name for name in REPLACED if name in names]:
        raise ValueError(
            f"{place}/{taken[0]} exists, but {place} holds no results of diffad's: it would be written to. Give "
            "another `output_dir`."
        )


def check_settings(settings: dict[str, Any], output_dir: Path) -> str | None:
    """The folder that the names of an earlier run's outputs start from; None where there was none.

    Raises:
        ValueError: the earlier run's results and new ones would not fit together.
    """
    path = output_dir / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        root = earlier["root"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of diffad's, and would be replaced. Give another `output_dir`.") from error
    # as an earlier version said it
    earlier.setdefault("command", "watch" if earlier.get("seed") == "of each event" else "predict")
    earlier.setdefault("precision", settings.get("precision"))  # of which it said nothing
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        values = ", ".join(f"{name} {earlier.get(name)} there and {settings[name]} now" for name in changed)
        raise ValueError(
            f"{output_dir} holds results of another {' and '.join(changed)} ({values}). Give another `output_dir`, "
            "or remove that one."
        )
    return root


def begin_settings(settings: dict[str, Any], root: str, output_dir: Path) -> str:
    """Writes down what later runs must agree in, and the folder that the outputs' names start from; returns that."""
    write_text_whole(output_dir / SETTINGS_NAME, json.dumps({"root": root, **settings}, indent=2) + "\n")
    return root
