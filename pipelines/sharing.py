"""What a repository on the Hub shows beside a pipeline's weights: records, pictures and a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from huggingface_hub import create_repo, file_exists, upload_folder

from diffad.model_card import CARD_NAME, copy_records, render_autoencoder_card, render_model_card

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from diffad.pipelines.base import AnomalyPipeline


def records_folder(pipeline: AnomalyPipeline, folder: str | os.PathLike | None) -> Path | None:
    """Where a pipeline's records are: `folder`, or the one it was loaded from, if there is one.

    Raises:
        FileNotFoundError: no folder stands at `folder`.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"`folder`: no folder at {folder}.")
    folder = pipeline.config.get("_name_or_path") if folder is None else folder
    return Path(folder) if folder is not None and Path(folder).is_dir() else None


def remove_local_paths(staging: str | os.PathLike) -> None:
    """Removes from a saved pipeline's configurations where its parts were loaded from: a path on this machine."""
    for path in [*Path(staging).glob("*.json"), *Path(staging).glob("*/*.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_records_and_card(
    pipeline: AnomalyPipeline,
    staging: str | os.PathLike,
    folder: Path | None,
    repo_id: str,
    token: str | None = None,
    license: str | None = None,
    with_report: bool = True,
) -> None:
    """Puts beside a saved pipeline what `AnomalyPipeline.push_to_hub` says of `folder`, and a card if one is due.

    `with_report`: whether the folder's report is of this calibration.
    """
    training, report, pictures = (None, None, []) if folder is None else copy_records(folder, staging, with_report)
    card = Path(staging, CARD_NAME)
    recorded = training is not None or report is not None
    if not card.exists() and (recorded or not file_exists(repo_id, CARD_NAME, token=token)):
        render_model_card(pipeline, training, report, repo_id, license=license, pictures=pictures).save(card)


def push_autoencoder(vae: AutoencoderKL, folder: str | os.PathLike, repo_id: str, token: str | None = None) -> None:
    """Uploads an autoencoder, the record that `folder` holds of it and a card, without paths of this machine."""
    repo_id = create_repo(repo_id, token=token, exist_ok=True).repo_id
    with TemporaryDirectory() as staging:
        vae.save_pretrained(staging)
        remove_local_paths(staging)
        training, _, _ = copy_records(folder, staging, with_report=False)
        if not Path(staging, CARD_NAME).exists():
            render_autoencoder_card(training or {}, repo_id).save(Path(staging, CARD_NAME))
        upload_folder(repo_id=repo_id, folder_path=staging, token=token, commit_message="Upload AutoencoderKL")
