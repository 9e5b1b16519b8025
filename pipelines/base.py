"""What all pipelines share: names of categories, saving and sharing."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo, create_repo, file_exists
from huggingface_hub.errors import HfHubHTTPError

from diffad.model_card import CARD_NAME, copy_records, render_model_card
from diffad.pipelines.checks import category_indices

logger = logging.get_logger(__name__)


# A saved pipeline brings this file, and its `model_index.json` names it: who loads it through `DiffusionPipeline` and
# has not imported diffad can do so with `trust_remote_code=True`.
PIPELINE_MODULE = "pipeline"


PIPELINE_CODE = """# For `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` without `import diffad`.
from diffad import {class_name}
"""


Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


class AnomalyPipeline(DiffusionPipeline):
    """Base of the pipelines: names of categories, saving and sharing. A call does not pass through here."""

    @property
    def categories(self) -> list[str]:
        """Names of a unified model's categories, in the order of their indices; empty for a model of one."""
        return list((self.config.categories or {}).values())

    def category_index(self, category: str | int | None) -> int:
        """A category's index; a model of one category asks for nothing.

        Raises:
            ValueError: a wrong or missing name; the message lists the right ones.
        """
        return int(category_indices(category, self.categories, 1)[0])

    def share_components(self, pipeline_class: type[Pipeline]) -> Pipeline:
        """Another pipeline of the same components and settings. Unlike `from_pipe` it casts nothing."""
        values = {**self.config, **self.components}
        shared = {name: values[name] for name in inspect.signature(pipeline_class).parameters if name in values}
        pipeline = pipeline_class(**shared)
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline

    # -- saving and sharing --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> AnomalyPipeline:
        """Loads a pipeline from a folder or the Hub: diffusers' own, but never from a pickle.

        Raises:
            HfHubHTTPError: what the Hub says when it refuses, such as `RepositoryNotFoundError`.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        except OSError as error:
            # diffusers only says that the model is not cached
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from None
            raise

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves a folder that `from_pretrained` loads.

        Args:
            save_directory: the folder.
            safe_serialization: always True: weights are saved in safetensors.
            variant: of the weights' file names, such as "fp16".
            max_shard_size: larger weights are split, as in diffusers.
            push_to_hub: uploads it as well; `kwargs` are those of `push_to_hub`, whose `repo_id` is the folder's name
                unless given.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code. Leave it out.")
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        if _is_registered(type(self).__module__, type(self).__name__):
            code = PIPELINE_CODE.format(class_name=type(self).__name__)
            Path(save_directory, f"{PIPELINE_MODULE}.py").write_text(code, encoding="utf-8")
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=variant, **{"folder": save_directory, **kwargs})

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
        `training.json`, `report.json` (absolute paths cut down to their last part) and pictures (`*.png`). The model
        card is `folder`'s `README.md` if it has one. Else it is rendered (see `diffad.model_card`), unless `folder` has
        neither record and the repository a card: then that one stays. An interrupted upload goes on where it stopped
        when it is called again.

        Args:
            repo_id: "org/name", or "name" for your own account.
            commit_message: of the commit.
            private: whether a new repository is private; None takes the account's default.
            token: of the Hub; None takes the one you logged in with.
            create_pr: opens a pull request instead of a commit to `main`.
            safe_serialization: always True, as in `save_pretrained`.
            variant: of the weights' file names, such as "fp16" after `pipe.to(torch.float16)`. The repository keeps its
                other weights.
            folder: where the records and pictures are; None takes the folder that the pipeline was loaded from.
            license: of the weights, as the Hub names it, for the card; None takes that of the training data where it
                is known and binds what is made from them, else the card states none.

        Returns:
            The commit, with `commit_url` and `pr_url`.

        Raises:
            FileNotFoundError: no folder stands at `folder`.
        """
        if folder is None:
            folder = self.config.get("_name_or_path")
        elif not Path(folder).is_dir():
            raise FileNotFoundError(f"`folder`: no folder at {folder}.")
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as staging:
            self.save_pretrained(staging, safe_serialization, variant)
            for path in Path(staging).glob("*/config.json"):
                config = json.loads(path.read_text())
                config.pop("_name_or_path", None)  # a path on this machine tells another reader nothing
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            training, report, pictures = None, None, []
            if folder is not None and Path(folder).is_dir():
                training, report, pictures = copy_records(folder, staging)
            card = Path(staging, CARD_NAME)
            recorded = training is not None or report is not None
            if not card.exists() and (recorded or not file_exists(repo_id, CARD_NAME, token=token)):
                render_model_card(self, training, report, repo_id, license=license, pictures=pictures).save(card)
            return self._upload_folder(
                staging, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )

    def to_json_string(self) -> str:
        """`model_index.json`, in a form that diffusers also loads from the Hub.

        There it looks up every list that starts with a string as a component, by library and class, and it imports no
        library but its own and a few others. So this package's classes stand as diffusers', where `import diffad` puts
        them, and a list of names (of categories) as the only item of a list.
        """
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        components = self._get_signature_keys(self)[0]
        for name, value in index.items():
            if name in components:
                library, class_name = value  # both None without the component
                if library is not None and _is_registered(library, class_name):
                    index[name] = ["diffusers", class_name]
            elif _is_list_of_names(value):
                index[name] = [value]
        if _is_registered(type(self).__module__, type(self).__name__):
            index["_class_name"] = [PIPELINE_MODULE, type(self).__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Reads what `to_json_string` wrote."""
        config_dict = {
            name: value[0] if isinstance(value, list) and len(value) == 1 and _is_list_of_names(value[0]) else value
            for name, value in config_dict.items()
        }
        return super().extract_init_dict(config_dict, **kwargs)


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], str)


def _is_registered(module: str, class_name: str) -> bool:
    """Whether `import diffad` makes this class known to diffusers; a class that a user derived from one is not."""
    return getattr(getattr(diffusers, class_name, None), "__module__", None) == module


def _read_configuration(cls: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A configuration file's content; a `_class_name` that names `pipeline.py` becomes the installed class's name.

    diffusers would ask for `trust_remote_code=True` as soon as a repository brings a file of code. Where diffad is
    imported there is no need to run it: it would only import diffad.
    """
    config = _diffusers_read_configuration(cls, *args, **kwargs)
    class_name = config.get("_class_name")
    if isinstance(class_name, list) and class_name[:1] == [PIPELINE_MODULE]:
        installed = getattr(diffusers, class_name[1], None)
        if isinstance(installed, type) and issubclass(installed, AnomalyPipeline):
            config["_class_name"] = class_name[1]
    return config


# For `DiffusionPipeline.from_pretrained` itself, which knows no other place to hook into.
_diffusers_read_configuration = DiffusionPipeline._dict_from_json_file.__func__


DiffusionPipeline._dict_from_json_file = classmethod(_read_configuration)


def register_categories(categories: Sequence[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    """Names of categories in the form that a configuration holds, `{"0": "bottle"}`, as `DiTPipeline`'s `id2label`."""
    names = list(categories.values() if isinstance(categories, Mapping) else categories or ())
    return {str(i): name for i, name in enumerate(names)} or None
