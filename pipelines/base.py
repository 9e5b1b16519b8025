"""What all pipelines share: names of categories, saving and sharing."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError

from diffad.float32_part import Float32Part
from diffad.model_card import has_report_before, remove_reports
from diffad.pipelines.checks import category_indices
from diffad.pipelines.saving import SHARED_PARTS, finish_saving, save_whole
from diffad.pipelines.sharing import add_records_and_card, records_folder, remove_local_paths
from diffad.pipelines.version_0_1 import remove_code, upgrade_index
from diffad.plain_values import plain_value
from diffad.registration import PIPELINES

if TYPE_CHECKING:
    from typing_extensions import Self

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


class AnomalyPipeline(DiffusionPipeline):
    """Base of the pipelines: names of categories, saving and sharing. A call does not pass through here."""

    calibrated_at = 0.0  # seconds since the epoch, if since it was loaded: earlier reports are of another calibration

    @property
    def categories(self) -> list[str]:
        """Names of a unified model's categories, in the order of their indices; empty for a model of one."""
        return category_names(self.config.categories)

    @property
    def tile_size(self) -> tuple[int, int] | None:
        """Height and width of a tile in pixels of the images; None where images are looked at as a whole."""
        return None

    @property
    def region(self) -> torch.Tensor | None:
        """Which pixels of each category's images count, (K, h, w) bool; None where all do."""
        return None

    @property
    def has_thresholds(self) -> bool:
        """Whether calls give masks, alarms and p-values: the pipeline is calibrated, and by more than two images."""
        calibration = getattr(self, "calibration", None)
        return calibration is not None and calibration.has_thresholds

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's precision, or the first network's; statistics of good images are float32 in any case."""
        parts = [vars(self).get("unet"), *vars(self).values()]
        networks: list[Any] = [
            part for part in parts if isinstance(part, torch.nn.Module) and not isinstance(part, Float32Part)
        ]
        return networks[0].dtype if networks else super().dtype

    def register_to_config(self, **settings: Any) -> None:
        """Keeps settings for `config` and the saved model; NumPy's numbers become Python's, as JSON has no others."""
        super().register_to_config(**{name: plain_value(value) for name, value in settings.items()})

    def category_index(self, category: str | int | None) -> int:
        """A category's index; a model of one category asks for nothing.

        Raises:
            ValueError: a wrong or missing name; the message lists the right ones.
        """
        return int(category_indices(category, self.categories, 1)[0])

    @property
    def value_range(self) -> float | None:
        """Of images of more than 8 bits: the pipeline's own, that which its calibration found, or None."""
        calibration = getattr(self, "calibration", None)
        found = None if calibration is None else calibration.config.value_range
        return self.config.value_range if self.config.value_range is not None else found

    def share_components(self, pipeline_class: type[Pipeline]) -> Pipeline:
        """Another pipeline of the same components and settings. Unlike `from_pipe` it casts nothing."""
        private = {name[1:]: value for name, value in self.config.items() if name.startswith("_")}  # `from_pipe` keeps
        values = {**private, **self.config, **self.components}  # there what a pipeline has no use for
        values["value_range"] = self.value_range
        shared = {name: values[name] for name in inspect.signature(pipeline_class).parameters if name in values}
        pipeline = pipeline_class(**shared)
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline

    # -- saving and sharing --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or the Hub: diffusers' own, but never from a pickle.

        Raises:
            ValueError: it holds a pipeline of other networks; the message names its class.
            HfHubHTTPError: what the Hub says when it refuses, such as `RepositoryNotFoundError`.
        """
        if os.path.isdir(pretrained_model_name_or_path):
            finish_saving(pretrained_model_name_or_path)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        except OSError as error:
            # diffusers only says that the model is not cached
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from None
            raise

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Another pipeline of the same components and settings: diffusers' own, which casts them to `dtype`.

        Where it takes no calibration, it keeps the range of pixel values that the calibration found.
        """
        if isinstance(pipeline, AnomalyPipeline) and "calibration" not in inspect.signature(cls).parameters:
            kwargs.setdefault("value_range", pipeline.value_range)
        return super().from_pipe(pipeline, **kwargs)

    def to_json_string(self) -> str:
        """`model_index.json`, without the path that the pipeline was loaded from: it tells another reader nothing."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # where diffusers reads `model_index.json`, from a folder and from the Hub, before any weights
        index = upgrade_index(super()._dict_from_json_file(json_file))
        own = {base.__name__ for base in cls.__mro__} & {*PIPELINES}
        found = index.get("_class_name")
        # all others are made of the same networks, and load from each other's folders
        if own and found in PIPELINES and (found == "DiADPipeline") != ("DiADPipeline" in own):
            raise ValueError(
                f"`pretrained_model_name_or_path` holds a {found}, and {cls.__name__} takes other networks: load it "
                f"with `{found}.from_pretrained`."
            )
        return index

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves a folder that `from_pretrained` loads. A model that is there stays until the new one is complete.

        Other files there stay, too (see `diffad.pipelines.saving`), but for reports of another calibration.

        Args:
            save_directory: the folder.
            safe_serialization: always True: weights are saved in safetensors.
            variant: of the weights' file names, such as "fp16". All variants in a folder share the calibration that was
                saved last.
            max_shard_size: larger weights are split, as in diffusers.
            push_to_hub: uploads it as well; `kwargs` are those of `push_to_hub`, whose `repo_id` is the folder's name
                unless given.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code. Leave it out.")
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise ValueError(f"`variant` must be of letters, digits, - and _, such as 'fp16', but is {variant!r}.")
        self._check_is_of_this_class(save_directory)
        with save_whole(save_directory, variant) as unfinished:
            super().save_pretrained(unfinished, variant=variant, max_shard_size=max_shard_size)
        remove_code(save_directory)
        if has_report_before(save_directory, self.calibrated_at):
            remove_reports(save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=variant, **{"folder": save_directory, **kwargs})

    def _check_is_of_this_class(self, folder: str | os.PathLike) -> None:
        """Raises a ValueError where a pipeline's folder would lose what one of the same networks has no place for."""
        try:
            index = json.loads(Path(folder, self.config_name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is no model
            return
        found, own = index.get("_class_name"), type(self).__name__
        if "calibration" in index and "calibration" not in inspect.signature(type(self)).parameters:
            raise ValueError(
                f"`save_directory` {folder} holds a {found}, whose calibration and settings would be lost: a {own} has "
                f"no place for them. Save it in a folder of its own, or save the {found}, of which `fit_gaussian` is "
                "a method as well."
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        folder: str | os.PathLike | None = None,
        license: str | None = None,
    ) -> CommitInfo:
        """Uploads everything that a repository on the Hub needs, and creates the repository where there is none.

        That is: weights in safetensors, configurations, calibration and feature extractor, and from `folder`
        `training.json`, `report.json` (paths of this machine cut down to their last part) and pictures (`*.png`). The
        model card is `folder`'s `README.md` if it has one. Else it is rendered (see `diffad.model_card`), unless
        `folder` has neither record and the repository a card: then that one stays. An interrupted upload goes on where
        it stopped when it is called again.

        Args:
            repo_id: "org/name", or "name" for your own account.
            commit_message: of the commit.
            private: whether a new repository is private; None takes the account's default.
            token: of the Hub; None takes the one you logged in with.
            create_pr: opens a pull request instead of a commit to `main`.
            safe_serialization: always True, as in `save_pretrained`.
            variant: of the weights' file names, such as "fp16" after `pipe.to(torch.float16)`. The repository keeps its
                other weights, and all share this calibration.
            folder: where the records and pictures are; None takes the folder that the pipeline was loaded from.
            license: of the weights, as the Hub names it, for the card; None takes that of the training data where it
                is known and binds what is made from them, else the card states none.

        Returns:
            The commit, with `commit_url` and `pr_url`.

        Raises:
            FileNotFoundError: no folder stands at `folder`.
        """
        records = records_folder(self, folder)
        with_report = records is None or not has_report_before(records, self.calibrated_at)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as staging:
            self.save_pretrained(staging, safe_serialization, variant)
            remove_local_paths(staging)
            add_records_and_card(self, staging, records, repo_id, token, license, with_report)
            return upload_folder(
                repo_id=repo_id,
                folder_path=staging,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
                # a variant's own calibration, as version 0.1 pushed it, would be loaded in the place of the shared one
                delete_patterns=[f"{part}/*.safetensors" for part in SHARED_PARTS],
            )


def register_categories(categories: Sequence[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    """Names of categories in the form that a configuration holds, `{"0": "bottle"}`, as `DiTPipeline`'s `id2label`.

    Raises:
        ValueError: they are not distinct names.
    """
    names = [] if isinstance(categories, str) else category_names(categories)
    if isinstance(categories, str) or len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"`categories` must list distinct names, such as ['bottle', 'cable'], but is {categories!r}.")
    return {str(i): name for i, name in enumerate(names)} or None


def category_names(categories: Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """Names in the order of their indices. A saved configuration has its keys sorted as text: "0", "1", "10", "2".

    Raises:
        ValueError: the keys are not 0 to K - 1.
    """
    if not isinstance(categories, Mapping):
        return list(categories or ())
    categories = {str(i): name for i, name in categories.items()}
    if sorted(categories) != sorted(map(str, range(len(categories)))):
        raise ValueError(f"`categories` must be numbered from 0 on, but its keys are {list(categories)}.")
    return [categories[str(i)] for i in range(len(categories))]
