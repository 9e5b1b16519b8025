"""Data that `datasets.load_dataset` reads, mapped to the record shape without a copy of the pixels."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, IterableDataset

from diffad.data.checks import cast_images, check_images
from diffad.data.image_feature import ImageFile
from diffad.data.layouts import choose_categories, require_good_images
from diffad.data.masks import mask_to_array
from diffad.data.records import FEATURES, SPLITS, is_good_name
from diffad.reading.inputs import images_below
from diffad.reading.unicode_forms import composed

TABLES = (".parquet", ".arrow")
COLUMNS = ("image", "mask", "label", "defect", "category")  # that are read
TELL_GOOD = {"label", "defect", "mask"}  # of these
LIKE_LABELS = {  # but not read
    "labels",
    "class",
    "classes",
    "defects",
    "defective",
    "is_defect",
    "is_defective",
    "anomaly",
    "anomalous",
    "is_anomaly",
    "quality",
    "target",
    "mask_file_name",
}
# which tell of an image, and not what is wrong with it
NO_LABELS = re.compile(
    r"|unnamed: \d+"
    r"|(.+_)?(id|index|text|caption|prompt|width|height|size|path|url|sha256|md5|bytes|date|time|timestamp)"
)
LABEL_TABLE = re.compile(r"(.+[-_ ])?(label|annotation)s?\.(csv|tsv|jsonl)", re.IGNORECASE)  # that nothing reads
UNLABELLED = ("", "na", "n/a", "nan", "null", "-1")  # a `ClassLabel` of no class is -1
# a part of a folder's name by which `datasets` takes what is in it for a split
SPLIT_NAME = re.compile(
    r"(^|[-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)($|[-._ 0-9])"
)
LABELS_ARE = (
    "Labels are read from metadata.csv or metadata.jsonl, by the columns 'file_name' and 'label' (0 or 'good', or a "
    "defect). If all are good, give the `dataset` 'folder' (--dataset folder)."
)
FILES_COUNT = (
    "If its tables are of another program's (.parquet, .arrow, metadata.*), and the image files count, give the "
    "`dataset` 'folder' (--dataset folder)."
)


def is_loadable(root: Path) -> bool:
    """Whether a folder holds parquet or arrow files, or metadata of an image folder with a column that is read here."""
    return holds_tables(root) or any(map(_describes_images, _visible_files(root)))


def holds_tables(root: Path) -> bool:
    """Whether a folder holds parquet or arrow files, which are then read, and no metadata."""
    return any(file.suffix in TABLES for file in _visible_files(root))


def _describes_images(file: Path) -> bool:
    """Whether metadata say more than folders do: a category alone does not, where one of the folders is `good`."""
    columns = _metadata_columns(file)
    if {"label", "defect", "mask_file_name"} & columns:
        return True
    return "category" in columns and not _has_good_folder(file.parent)


def _has_good_folder(folder: Path) -> bool:
    return any(is_good_name(one.name) for one in folder.iterdir() if one.is_dir())


def _visible_files(root: Path) -> Iterator[Path]:
    return (file for file in root.rglob("*") if not any(part.startswith(".") for part in file.relative_to(root).parts))


def _metadata_columns(file: Path) -> set[str]:
    """The columns of a table that lists images as `datasets`' image folders do; none of any other file."""
    columns = _header(file)
    return columns if any(map(_names_files, columns)) else set()


def _names_files(column: str) -> bool:
    return re.fullmatch(r"(.+_)?file_names?", column) is not None


def _header(file: Path) -> set[str]:
    """The columns of a metadata.csv or metadata.jsonl, in small letters; none of any other file."""
    columns: set[str] = set()
    if file.name not in ("metadata.csv", "metadata.jsonl"):
        return columns
    with (
        contextlib.suppress(OSError, ValueError, TypeError, csv.Error),  # what was read until then counts
        file.open(encoding="utf-8-sig", newline="") as lines,
    ):
        if file.suffix == ".csv":
            columns.update(next(csv.reader(lines), []))
        else:
            for line in lines:  # each may leave columns out
                columns.update(map(str, json.loads(line)))
    return {_plain(column) for column in columns}


def _plain(column: str) -> str:
    return column.strip().casefold()


def warn_of_unread_labels(root: Path) -> None:
    """Says of tables beside images, all of which count as good, that they may have labels, and why none is read."""
    for file in _visible_files(root):
        columns, is_label_table = _header(file), LABEL_TABLE.fullmatch(file.name) is not None
        if not columns and not is_label_table:
            continue
        if _has_good_folder(file.parent):
            continue
        if len(columns) == 1 and len(split := {_plain(one) for one in re.split("[;\t]", next(iter(columns)))}) > 1:
            columns, reason = split, "its columns are not divided by commas"
        elif is_label_table:
            reason = "a table of this name is not read"
        elif not any(map(_names_files, columns)):
            reason = "it has no column 'file_name', which names the images"
        else:
            reason = f"it has the {_named(_unread(columns))}, not 'label'"
        seems = is_label_table or columns & {*LIKE_LABELS, "label", "defect"}
        if seems or (any(map(_names_files, columns)) and _unread(columns)):
            warnings.warn(
                f"{file} {'seems to' if seems else 'may'} have labels, but {reason}. So all images count as good. "
                + LABELS_ARE,
                stacklevel=3,
            )


def _unread(columns: Iterable[str]) -> list[str]:
    """Of columns without labels that are read: those that are like labels, or else all that may be any."""
    read = {*COLUMNS, "split"}
    further = {one for one in columns if one not in read and not _names_files(one) and not NO_LABELS.fullmatch(one)}
    return sorted(LIKE_LABELS & {*columns} or further)


def _named(columns: list[str]) -> str:
    names = ", ".join(map(repr, columns[:5])) + (", ..." if len(columns) > 5 else "")
    return f"column {names}" if len(columns) == 1 else f"columns {names}"


def warn_of_other_splits(root: Path, split: str) -> None:
    """Says of tables that list images of several splits that all of these count, as only folders tell splits.

    Images in a folder named after a split are in that, and where a folder is named `good`, folders tell what counts.
    """
    names = {alias: name for name, aliases in SPLITS.items() for alias in aliases}
    wanted = {split, *(names.get(word) for word in re.findall(r"\w+", split))}  # it may be "train[:100]"
    for file in _visible_files(root):
        others = sorted(value for value in _split_values(file) if names.get(_plain(value), split) not in wanted)
        is_in_split = any(map(SPLIT_NAME.search, file.relative_to(root).parts[:-1]))
        if others and not is_in_split and not _has_good_folder(file.parent):
            warnings.warn(
                f"{file} has a column 'split', which is not followed: its images of {', '.join(map(repr, others))} "
                f"count in {split!r}, too. Move those of each split, with their rows, into a folder of that name.",
                stacklevel=3,
            )


def _split_values(file: Path) -> set[str]:
    """What the column `split` of a table that lists images holds, of those that no folder's name puts into a split."""
    values: set[str] = set()
    if "split" not in _metadata_columns(file):
        return values
    with (
        contextlib.suppress(OSError, ValueError, TypeError, AttributeError, csv.Error),  # as `_header`
        file.open(encoding="utf-8-sig", newline="") as lines,
    ):
        for row in csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines):
            named = {_plain(str(name)): str(value) for name, value in row.items()}
            folders = [part for name, value in named.items() if _names_files(name) for part in value.split("/")[:-1]]
            if not any(map(SPLIT_NAME.search, folders)):
                values.add(named.get("split", ""))
    return values


def load_hub_dataset(
    path: str,
    split: str,
    category: str | Sequence[str] | None,
    on_bad_image: str,
    streaming: bool,
    load_dataset_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """Loads a split by `datasets.load_dataset` and maps its columns; arguments as in `load_anomaly_dataset`.

    Only `image` is needed. `label` may hold classes (one of them named good, normal, ok, ...), 0 and 1, booleans
    or strings. Without it, `defect` tells which images are good, then whether `mask` is above 0 anywhere;
    with none of these, all are good. `category` defaults to the data set's name. A mask of a good image stays.
    """
    place = os.path.realpath(path)
    if os.path.isdir(path) and (glob.has_magic(place) or "::" in place):  # images of other folders, or none, were read
        raise ValueError(
            f"`path_or_hub_id`: {place} has one of *, ?, [ and :: in it, which `datasets` takes for a pattern or a "
            "chain of URLs. Rename that folder."
        )
    try:
        if os.path.isdir(path) and not load_dataset_kwargs:
            load_dataset_kwargs = _check_image_folder(Path(path))
        loaded = datasets.load_dataset(path, split=split, streaming=streaming, **load_dataset_kwargs)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"`path_or_hub_id`: there is no folder {path!r}, and no data set of that name on the Hub: {error}"
        ) from error
    except ValueError as error:
        advice = f" {FILES_COUNT}" if os.path.isdir(path) else ""
        if "`load_from_disk`" in str(error):  # of `datasets`, and no flag does it
            advice = " Or save it as parquet (`ds.to_parquet`) in a folder of its own, and give that."
        raise ValueError(f"{path}: {str(error).rstrip('.')}.{advice}") from error
    loaded = _with_plain_columns(loaded)
    features = loaded.features or {}
    if "image" not in features:
        raise ValueError(
            f"{path} has no column 'image', only {list(features)}: rename the one with images. {FILES_COUNT}"
        )
    if not TELL_GOOD & features.keys() and (others := _unread(map(_plain, features))):
        warnings.warn(
            f"{path} has the {_named(others)}, not 'label'. So all images count as good. Call what tells defects "
            "'label', with 0 or 'good' for good images; if all are, add such a column.",
            stacklevel=3,
        )
    for column in {"image", "mask"} & features.keys():
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    if streaming:
        return _stream_records(loaded, features, path, category, on_bad_image)

    describing = [column for column in _describing_columns(features) if column in features]
    rows = loaded.select_columns(describing) if describing else [{}] * len(loaded)
    stored_images = loaded.select_columns("image").with_format("arrow")[:]["image"]
    paths = [name or "" for name in pyarrow.compute.struct_field(stored_images, "path").to_pylist()]
    names = [name or f"{path}: the image of row {i}" for i, name in enumerate(paths)]
    records = [_describe(row, features, path, name) for row, name in zip(rows, names, strict=True)]
    columns = {name: [record[name] for record in records] for name in ("label", "category", "defect")}
    columns["path"] = paths
    if "mask" not in features:
        columns["mask"] = [None] * len(records)
    pixels = loaded.select_columns([column for column in ("image", "mask") if column in features])
    others = Dataset.from_dict(columns, features=Features({name: FEATURES[name] for name in columns}))
    # side by side, because `map` would write all images to disk once more
    loaded = datasets.concatenate_datasets([pixels, others], axis=1).select_columns(list(FEATURES))
    loaded = cast_images(loaded, decode=True)
    chosen = choose_categories(category, set(columns["category"]), path)
    if category is not None:
        loaded = loaded.select([i for i, name in enumerate(columns["category"]) if name in chosen])
    loaded = check_images(loaded, on_bad_image)
    if split.startswith("train"):
        require_good_images(loaded, chosen, path)
    return loaded


def _check_image_folder(root: Path) -> dict[str, Any]:
    """Arguments of `load_dataset` for a folder of images that metadata describe, none for another.

    With them no image gets a split by its own name. Warns of images in no split, as no metadata list them.
    """
    files = list(_visible_files(root))
    metadata = [file for file in files if _metadata_columns(file)]
    if not metadata or any(file.suffix in TABLES for file in files):
        return {}
    images = images_below(root)
    folders = {part for image in images for part in image.relative_to(root).parts[:-1]}
    is_split = any(map(SPLIT_NAME.search, folders)) or (root / "README.md").exists()  # a card may name splits
    arguments = {} if is_split else {"data_files": {"train": "**"}}
    used = set()
    for rows in datasets.load_dataset(str(root), streaming=True, **arguments).values():
        columns = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
        for column in columns:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        for row in rows.select_columns(columns):
            used |= {os.path.realpath(row[column]["path"]) for column in columns if row[column]}
    left_out = [image for image in images if os.path.realpath(image) not in used]
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(images)} images below {root} are left out, {left_out[0]} first: they are not "
            f"listed in {metadata[0]}, or lie in the folder of no split. {FILES_COUNT}",
            stacklevel=4,
        )
    return arguments


def _with_plain_columns(loaded: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Those of `COLUMNS` under these names, whatever their capitals and spaces."""
    features = loaded.features or {}
    renamed: dict[str, str] = {}
    for name in features:
        if (plain := _plain(name)) in COLUMNS and plain not in {*features, *renamed.values()}:
            renamed[name] = plain
    return loaded.rename_columns(renamed) if renamed else loaded


def _stream_records(
    loaded: IterableDataset,
    features: Features,
    path: str,
    category: str | Sequence[str] | None,
    on_bad_image: str,
) -> IterableDataset:
    # partial functions, unlike nested ones, can be sent to a data loader's workers
    loaded = loaded.map(partial(_record, features=features, path=path)).select_columns(list(FEATURES))
    if category is not None:
        wanted = {composed(name) for name in ([category] if isinstance(category, str) else category)}
        loaded = loaded.filter(partial(_is_wanted, wanted), input_columns="category")
    loaded = loaded.cast(FEATURES)
    return check_images(loaded, on_bad_image) if on_bad_image != "error" else loaded


def _is_wanted(wanted: set[str], category: str) -> bool:
    return composed(category) in wanted


def _record(row: dict, features: Features, path: str) -> dict[str, Any]:
    image = row["image"]
    described = _describe(row, features, path, image["path"] or f"{path}: an image")
    return {"image": image, "mask": row.get("mask"), **described, "path": image["path"] or ""}


def _describing_columns(features: Features) -> tuple[str, ...]:
    tells_good = () if {"label", "defect"} & features.keys() else ("mask",)  # only its content does then
    return ("label", "defect", "category", *tells_good)


def _describe(row: dict, features: Features, path: str, name: str) -> dict[str, Any]:
    """Label, category and defect of a row with undecoded images; errors call it `name`."""

    def text(column: str) -> str | None:
        feature, value = features.get(column), row.get(column)
        if value is None:
            return None
        return (feature.int2str(value) if isinstance(feature, ClassLabel) else str(value)).strip()

    def told(column: str) -> str | None:
        value = None if row.get(column) == -1 else text(column)
        return None if value is None or value.casefold() in UNLABELLED else value

    label, defect, mask = told("label"), told("defect"), row.get("mask")
    if label is None and defect is None and (columns := [one for one in ("label", "defect") if one in features]):
        raise ValueError(
            f"{name} has no `{columns[0]}` (it is empty, NA or -1). Write 0 or 'good' there, or 1 or the defect's "
            "name, or take its row out."
        )
    if label is not None:
        classes = getattr(features["label"], "names", None) or ["good"]
        if not any(map(_is_good, classes)):
            raise ValueError(f"{path}: a class of `label` must be named 'good', but they are {classes}.")
        good = _is_good(label)
    elif defect is not None:
        good = _is_good(defect)
    else:
        good = mask is None or not mask_to_array(ImageFile().decode_example(mask)).any()
    named = isinstance(features.get("label"), ClassLabel) or isinstance(row.get("label"), str)
    if defect is None and label and named and not label.isdigit():
        defect = label
    return {
        "label": int(not good),
        "category": text("category") or os.path.basename(path),
        "defect": "good" if good else defect or "defective",
    }


def _is_good(value: str) -> bool:
    """Of `label` or `defect`."""
    return is_good_name(value) or value.strip().casefold() in ("0", "0.0", "false")
