"""One function that loads a split of any data set that is known here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from diffad.data.checks import check_images, check_names
from diffad.data.hub import holds_tables, is_loadable, load_hub_dataset, warn_of_other_splits, warn_of_unread_labels
from diffad.data.layouts import (
    LAYOUTS,
    choose_categories,
    has_plain_category,
    installed_elpv,
    no_images,
    require_good_images,
    warn_of_other_folders,
)
from diffad.data.records import FEATURES, SPLITS


def load_anomaly_dataset(
    path_or_hub_id: str | os.PathLike,
    split: str = "train",
    category: str | Sequence[str] | None = None,
    dataset: str | None = None,
    on_bad_image: str = "error",
    streaming: bool = False,
    **load_dataset_kwargs: Any,
) -> Dataset | IterableDataset:
    """Loads one split of an anomaly detection data set.

    Args:
        path_or_hub_id: a folder; `"elpv"`, `"elpv/mono"` or `"elpv/poly"`; a Hub data set, `"org/name"`.
        split: `"train"` (in every local layout good images only), `"test"`, or `"validation"` where there is
            one. A plain folder without train/ and test/ in it shows the same good images in both, with a
            warning in the test split.
        category: a name, several, or None for all.
        dataset: forces a layout (see the list in `diffad.data`); None finds it from the tree.
        on_bad_image: `"error"` raises if there are images that cannot be read, `"skip"` drops them with one
            warning that lists them (see `check_images`). A streamed Hub data set is only checked under
            `"skip"`, while it is read.
        streaming: returns an `IterableDataset`, in the same order.
        load_dataset_kwargs: passed on to `datasets.load_dataset` (`name`, `revision`, `token`, ...).

    Returns:
        Columns `image`, `mask`, `label`, `category`, `defect` and `path`. Rows are sorted by path, or in
        their own order if they come from `datasets.load_dataset`.

    Raises:
        FileNotFoundError: there is no such folder, data set or mask.
        ValueError: an unknown category, split or layout, no (good) images, images that cannot be read, a mask
            of another size than its image, or tables in a folder that `datasets` takes for a pattern.
        ImportError: `"elpv"` without the package elpv-dataset.
    """
    name = os.fspath(path_or_hub_id)
    if not name:
        raise ValueError("`path_or_hub_id` is empty. Is a variable of the shell not set?")
    root = Path(os.path.abspath(os.path.expanduser(name)))
    if dataset not in (None, "hub", *LAYOUTS):
        raise ValueError(f"`dataset` must be one of {[*LAYOUTS, 'hub']} or None, but is {dataset!r}.")
    if dataset in (None, "elpv") and re.fullmatch("elpv(/.*)?", name) and not root.exists():
        subset = name.partition("/")[2]
        if subset and category not in (None, subset, [subset]):
            raise ValueError(f"`category` is {category!r}, but {name!r} is {subset!r} alone.")
        dataset, root, category = "elpv", installed_elpv(), subset or category
    elif dataset is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not root.parent.exists():
        dataset = "hub"
    elif root.is_file():
        raise FileNotFoundError(
            f"`path_or_hub_id`: {root} is a file. Give the folder of the images: unpack an archive, and of a parquet "
            "file give the folder."
        )
    elif dataset != "hub" and not root.is_dir():
        raise FileNotFoundError(
            f"`path_or_hub_id`: there is no folder at {root}. For a Hub data set pass dataset='hub'."
        )
    if dataset is None:
        dataset, found = _find_layout(root)
        if dataset == "folder":
            warn_of_other_splits(root, split)
        if dataset == "folder" and [*found.values()] == [root]:  # else each category's folders tell what is good
            warn_of_unread_labels(root)
    elif dataset != "hub":
        found = LAYOUTS[dataset].find(root)
        if not found:
            raise ValueError(f"`dataset`={dataset!r}: expected {root / LAYOUTS[dataset].expected}")
    if dataset == "hub":
        loadable = str(root) if root.is_dir() else name
        if root.is_dir() and not holds_tables(root):
            warn_of_other_splits(root, split)
        return load_hub_dataset(loadable, split, category, on_bad_image, streaming, load_dataset_kwargs)

    if load_dataset_kwargs:
        raise TypeError(f"{sorted(load_dataset_kwargs)} are for `datasets.load_dataset`, not for {root}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but is {split!r}.")
    chosen = choose_categories(category, found, root)
    if category is None:
        warn_of_other_folders(root, found)
    records = [record for name in chosen for record in LAYOUTS[dataset].read(name, found[name], split)]
    records.sort(key=lambda record: record["path"])
    if on_bad_image in ("error", "skip"):
        records = check_names(records, on_bad_image)
    columns = {column: [record[column] for record in records] for column in FEATURES}
    loaded = check_images(Dataset.from_dict(columns, features=FEATURES), on_bad_image)
    if split != "test":
        require_good_images(loaded, chosen, root)
    return loaded.to_iterable_dataset(num_shards=min(len(loaded), 64)) if streaming else loaded


def is_plain_folder(path: str | os.PathLike) -> bool:
    """Whether a folder holds images of one category that nothing names but the folder itself."""
    root = Path(os.path.abspath(os.path.expanduser(path)))
    if not root.is_dir():
        return False
    layout, found = _find_layout(root)
    return layout == "folder" and [*found] == [root.name]


def _find_layout(root: Path) -> tuple[str, dict[str, Any]]:
    for name, layout in LAYOUTS.items():
        if name == "folder" and is_loadable(root):
            return "hub", {}
        found = layout.find(root)
        if found and not (layout.is_told_by_class and has_plain_category(root, found)):
            return name, found
    raise no_images(root)
