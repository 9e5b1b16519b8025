"""The published directory layouts: which categories a tree holds, and the records of a split.

A layout is two functions and a line for error messages. `find` takes the root and returns each category's
name with what `read` needs of it, or nothing where the tree has another layout. `read` yields a record for
each image. This file is long so that all layouts stand in one place.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from diffad.data.kolektor import find_kolektor, find_kolektor_2, read_kolektor, read_kolektor_2
from diffad.data.real_iad import find_real_iad
from diffad.data.records import SPLITS, check_split, is_good_name, make_record, read_listed
from diffad.reading.inputs import describe_suffixes, images_below, list_folder, subfolders
from diffad.reading.unicode_forms import composed, same_name
from diffad.warn_once import warn_once

MASK_FOLDERS = ("ground_truth", "groundtruth", "masks", "mask", "gt", "annotations")  # in any case; the first counts
MASK_NAME = re.compile(r"(.+)_(mask|gt)", re.IGNORECASE)  # of a mask that lies beside its image


def _child(folder: Path, *names: str) -> Path:
    """The folder in a folder that has one of these names, in any case; by the first of them where there is none."""
    exact = next((folder / name for name in names if (folder / name).is_dir()), None)
    if exact is None and folder.is_dir():
        exact = _called(subfolders(folder), *names)
    return exact or folder / names[0]


def _called(folders: Iterable[Path], *names: str) -> Path | None:
    """The first of `folders` that has one of these names, in any case."""
    wanted = {composed(name) for name in names}
    return next((one for one in folders if composed(one.name.casefold()) in wanted), None)


def _split_child(folder: Path, split: str) -> Path:
    return _child(folder, *SPLITS[split])


def _good_folders(folder: Path) -> list[Path]:
    return [one for one in subfolders(folder) if is_good_name(one.name)] if folder.is_dir() else []


def _has_folder(folder: Path, marker: str) -> bool:
    """Whether a folder has one at `marker`, a path in lower case, whatever its case; `good` is any of its names."""
    for name in marker.split("/"):
        good = _good_folders(folder) if name == "good" else []
        folder = good[0] if good else _child(folder, *SPLITS.get(name, (name,)))
    return folder.is_dir()


def no_images(folder: Path) -> ValueError:
    reason = "is empty" if folder.is_dir() and not any(folder.iterdir()) else "holds no images"
    return ValueError(f"{folder} {reason}: expected {describe_suffixes()} files.")


def choose_categories(category: str | Sequence[str] | None, found: Iterable[str], where: Path | str) -> list[str]:
    """The names asked for, checked against those found."""
    if category is None:
        return sorted(found)
    one_or_more: Any = category
    is_one = isinstance(category, str) or not hasattr(category, "__iter__")
    chosen = [one_or_more] if is_one else list(dict.fromkeys(one_or_more))
    known = [same_name(name, found) if isinstance(name, str) else None for name in chosen]
    if not known or None in known:
        raise ValueError(f"`category` must be among {sorted(found)}, those of {where}, but is {category!r}.")
    return list(dict.fromkeys(name for name in known if name is not None))


def require_good_images(dataset: Dataset, categories: Iterable[str], where: Path | str) -> None:
    """Raises if one of `categories` has no row with label 0."""
    rows = zip(dataset["category"], dataset["label"], strict=True)
    without = sorted(set(categories) - {category for category, label in rows if label == 0})
    if without:
        raise ValueError(f"{where} has no good images to train on in {without}.")


def _split_folder(folder: Path, split: str) -> Path:
    """`folder/split`; where no split has a folder, `folder` itself, which is then both train and test."""
    # beside good images, `val` is a kind of defect as any other name is
    child = _child if _good_folders(folder) else _split_child
    available = [name for name in SPLITS if child(folder, name).is_dir()]
    check_split(split, available or ("train", "test"), folder)
    return child(folder, split) if available else folder


def _is_mask_folder(folder: Path) -> bool:
    return folder.name.casefold() in MASK_FOLDERS


def _find_masks(folder: Path, base: Path, defects: Sequence[Path]) -> Path | None:
    """The folder of masks in a category's folder, or in `base`, in which those of its classes stand.

    One by another name than `ground_truth` must hold images, as annotations are often of another kind, and in `base`
    those of one of the `defects`, as a kind of defect may be called "mask". What `predict` has written is none.
    """
    for place in (folder, base):
        others = subfolders(place)
        for name in MASK_FOLDERS:
            if (masks := _called(others, name)) is None:
                continue
            inside = [_child(masks, one.name, one.name.casefold()) for one in defects] if place == base else [masks]
            if name == MASK_FOLDERS[0] or any(map(images_below, inside)):
                return masks
    return None


def _warn_of_unused_masks(base: Path, used: Path | None) -> None:
    """A folder with the name of masks is no kind of defect; where its images are not the masks, either, say so."""
    for folder in subfolders(base):
        if _is_mask_folder(folder) and folder != used and images_below(folder):
            where = "it has none of a defect's" if used is None else f"the masks are those in {used}"
            warnings.warn(
                f"{folder} is left out: its name is one of masks, and {where}. If it is a kind of defect, rename it. "
                "Masks go into a folder for each kind of defect, ground_truth/DEFECT.",
                stacklevel=3,
            )


def _warn_of_loose_images(base: Path) -> None:
    loose = list_folder(base).files if base.is_dir() else []
    if loose:
        warnings.warn(
            f"{len(loose)} images right in {base} are left out, {loose[0].name} first: they lie beside the folders "
            "of classes. Move each into the folder of its class.",
            stacklevel=3,
        )


def _find_categories(root: Path, markers: Sequence[str]) -> dict[str, Path]:
    """`root`, if one of the folders `markers` is in it; otherwise those of its subfolders that have one."""
    for candidates in ([root], subfolders(root)):
        found = {f.name: f for f in candidates if any(_has_folder(f, marker) for marker in markers)}
        if found:
            return found
    return {}


def has_plain_category(root: Path, found: dict[str, Any]) -> bool:
    """Whether an MVTec-AD tree has categories beside those that another layout found in its folders."""
    in_folders = all(isinstance(source, Path) for source in found.values())
    return in_folders and not _find_categories(root, MVTEC_AD_MARKERS).keys() <= found.keys()


def warn_of_other_folders(root: Path, found: dict[str, Any]) -> None:
    """Names the folders beside those of the categories that hold images, too."""
    categories = [source for source in found.values() if isinstance(source, Path)]
    if not categories or root in categories:
        return
    others = [one for one in subfolders(root) if one not in categories and images_below(one)]
    if others:
        names = ", ".join(one.name for one in others)
        warnings.warn(
            f"{root}: {names} hold images but are left out, as they lack the folders of a category. Give them those "
            f"that {categories[0].name} has, or load them on their own.",
            stacklevel=3,
        )


def _masks_by_name(images: list[Path], image_folder: Path, mask_folder: Path) -> list[Path]:
    """Masks named as their images, or with `_mask` behind the name; extensions and Unicode forms may differ."""
    masks = {str(mask.relative_to(mask_folder).with_suffix("")): mask for mask in images_below(mask_folder)}
    by_name = {composed(name): mask for name, mask in masks.items()}
    paired = []
    for image in images:
        stem = str(image.relative_to(image_folder).with_suffix(""))
        names = (f"{stem}_mask", stem)
        mask = next((masks[name] for name in names if name in masks), None)
        mask = mask or next((by_name[composed(name)] for name in names if composed(name) in by_name), None)
        if mask is None and images_below(mask_folder / stem):  # a mask for each defect, as MVTec LOCO has them
            mask = mask_folder / stem
        if mask is None:
            raise FileNotFoundError(
                f"There is no mask for {image}: expected {mask_folder / names[0]}.png (or .../{stem}.png)"
            )
        paired.append(mask)
    return paired


def _masks_by_order(images: list[Path], image_folder: Path, mask_folder: Path) -> list[Path]:
    masks = images_below(mask_folder)
    if len(masks) != len(images):
        raise FileNotFoundError(
            f"{mask_folder} holds {len(masks)} masks, but {image_folder} {len(images)} images: there must be "
            "as many, because they are paired by their order."
        )
    return masks


def _mask_folders(images: list[Path], image_folder: Path, mask_folder: Path) -> list[Path]:
    """A folder of masks for each image, one for each defect, named as the image."""
    folders = [mask_folder / image.relative_to(image_folder).with_suffix("") for image in images]
    for image, folder in zip(images, folders, strict=True):
        if not images_below(folder):
            raise FileNotFoundError(f"There are no masks for {image}: expected one for each defect in {folder}.")
    return folders


def _set_masks_apart(images: list[Path]) -> tuple[list[Path], dict[Path, Path]]:
    """Images, and apart from them the masks `X_mask.*` beside `X.*`, by the image's path without its suffix."""
    stems = {image.with_suffix("") for image in images}
    others: list[Path] = []
    masks: dict[Path, Path] = {}
    for image in images:
        named = MASK_NAME.fullmatch(image.stem)
        if named and (stem := image.with_name(named[1])) in stems:
            if stem in masks:
                raise ValueError(f"{masks[stem]} and {image} are masks of one image. Leave one of them.")
            masks[stem] = image
        else:
            others.append(image)
    return others, masks


def _masks_beside(images: list[Path], masks: dict[Path, Path]) -> list[Path]:
    for image in images:
        if image.with_suffix("") not in masks:
            raise FileNotFoundError(
                f"There is no mask for {image}: expected {image.stem}_mask.* beside it, as other images have one."
            )
    return [masks[image.with_suffix("")] for image in images]


def _warn_of_masks_beside(masks: dict[Path, Path], reason: str) -> None:
    if masks:
        first = next(iter(masks.values()))
        warnings.warn(f"{len(masks)} masks beside images are left out, {first} first. {reason}", stacklevel=3)


def _tell_defects(base: Path, defects: list[Path]) -> None:
    names = ", ".join(one.name for one in defects)
    warn_once(f"{base} has no masks. Images in {names} count as defective, and those in a folder named `good` as good.")


def _read_class(
    category: str,
    defect: str,
    image_folder: Path,
    mask_folder: Path | None,
    pair: Callable = _masks_by_name,
) -> Iterator[dict]:
    images, beside = _set_masks_apart(images_below(image_folder))
    if not images:
        raise no_images(image_folder)
    masks: Sequence[Path | None] = [None] * len(images)
    if defect == "good":
        _warn_of_masks_beside(beside, "The images count as good, whatever their masks show.")
    elif mask_folder is not None:
        masks = pair(images, image_folder, mask_folder)
        _warn_of_masks_beside(beside, f"The masks are those in {mask_folder}.")
    elif beside:
        masks = _masks_beside(images, beside)
    for image, mask in zip(images, masks, strict=True):
        yield make_record(image, category, defect, mask)


def _read_tree(category: str, folder: Path, split: str, pair: Callable = _masks_by_name) -> Iterator[dict]:
    """A folder for each class, in a folder for each split; masks in `ground_truth`: MVTec-AD and the like."""
    base = _split_folder(folder, split)
    good = _good_folders(base)
    defects = [f for f in subfolders(base) if f not in good and not _is_mask_folder(f)]
    for one in good:
        yield from _read_class(category, "good", one, None)
    if not good and (split != "test" or base == folder or not defects):
        yield from _read_unsorted(category, base, split, defects)
        return
    _warn_of_loose_images(base)
    if split != "test":
        return
    ground_truth = _find_masks(folder, base, defects)
    _warn_of_unused_masks(base, ground_truth)
    if base == folder:
        warnings.warn(
            f"{folder} has no train/ and test/ in it, so its good images are the same in both splits: a "
            "model that was trained on them scores better on this test than on new parts.",
            stacklevel=2,
        )
    records: list[dict] = []
    for defect in defects:
        masks = _child(ground_truth, defect.name, defect.name.casefold()) if ground_truth else None
        records += _read_class(category, defect.name, defect, masks, pair)
    if records and not any(record["mask"] for record in records):
        _tell_defects(base, defects)
    yield from records


def _read_unsorted(category: str, base: Path, split: str, defects: list[Path]) -> Iterator[dict]:
    """Images right in a folder, with no folder of good ones beside them: all good."""
    classes = [*defects, *(f for f in subfolders(base) if _is_mask_folder(f))]  # what has a mask is defective
    if any(images_below(f) for f in classes):  # they may be defects, so nothing here is known to be good
        others, loose = ", ".join(f.name for f in classes), len(list_folder(base).files)
        raise ValueError(
            f"{base} has no good images: expected {base / 'good'}, but there are only {others}"
            + (f", and {loose} images beside them" if loose else "")
            + f". Move what is good, with its folders, into {base / 'good'}."
        )
    images, beside = _set_masks_apart([image for image in images_below(base) if image.parent == base])
    if not images:
        raise no_images(base)
    if split == "test":
        raise ValueError(
            f"{base} holds images without labels: for a test sort them into {base / 'good'} and a folder for "
            "each kind of defect."
        )
    _warn_of_masks_beside(beside, "The images count as good, whatever their masks show.")
    for image in images:
        yield make_record(image, category, "good", None)


def _find_folder(root: Path) -> dict[str, Path]:
    if not images_below(root):
        return {}
    good = _good_folders(root)
    if good and not any(map(_good_folders, good)):  # else it is a category called `pass`, say, with its own `good`
        return {root.name: root}
    return {folder.name: folder for folder in subfolders(root) if _good_folders(folder)} or {root.name: root}


def _read_mvtec_3d(category: str, folder: Path, split: str) -> Iterator[dict]:
    base = _split_folder(folder, split)
    good = _good_folders(base)
    classes = subfolders(base) if split == "test" else good or [base / "good"]
    has_ground_truth = any(_child(f, "gt").is_dir() for f in classes)
    _warn_of_loose_images(base)
    if not has_ground_truth and (defects := [f for f in classes if f not in good and f.is_dir()]):
        _tell_defects(base, defects)
    for f in classes:
        defect = "good" if f in good else f.name
        yield from _read_class(category, defect, _child(f, "rgb"), _child(f, "gt") if has_ground_truth else None)


def _find_visa(root: Path) -> dict[str, Any]:
    path = root / "split_csv" / "1cls.csv"
    if not path.is_file():
        if _find_categories(root, ["data/images"]):
            raise FileNotFoundError(
                f"{root} has the folders of VisA, but there is no {path}. Give the folder that holds "
                "split_csv/, and one category of it by `category`."
            )
        return {}
    found: dict[str, Any] = {}
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        rows.fieldnames = [name.strip().casefold() for name in rows.fieldnames or ()]
        missing = {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {sorted(missing)}.")
        for row in rows:
            if None in row.values():
                raise ValueError(f"Line {rows.line_num} of {path} has too few columns: it takes {rows.fieldnames}.")
            defect = "good" if is_good_name(row["label"]) else "anomaly"
            mask = root / row["mask"].strip() if row["mask"] else None
            category, split = row["object"].strip(), row["split"].strip().casefold()
            record = make_record(root / row["image"].strip(), category, defect, mask)
            found.setdefault(category, {}).setdefault(split, []).append(record)
    return found


def _read_mvtec_ad_2(category: str, folder: Path, split: str) -> Iterator[dict]:
    """The test is the public one: the labels of the private ones are not published."""
    if split != "test":
        check_split(split, [name for name in ("train", "validation") if _split_child(folder, name).is_dir()], folder)
        base = _split_child(folder, split)
        _warn_of_loose_images(base)
        good = _good_folders(base) or [base / "good"]
        for one in good:
            yield from _read_class(category, "good", one, None)
        return
    base = _child(folder, "test_public")
    classes = [one for one in subfolders(base) if not _is_mask_folder(one)]
    ground_truth = _find_masks(base, base, classes) or base / "ground_truth"
    _warn_of_loose_images(base)
    _warn_of_unused_masks(base, ground_truth)
    for one in subfolders(base):
        if not _is_mask_folder(one):
            defect = "good" if is_good_name(one.name) else one.name
            yield from _read_class(category, defect, one, _child(ground_truth, one.name, one.name.casefold()))


def _find_uni_medical(root: Path) -> dict[str, Any]:
    trees, path = _find_categories(root, ["test/ungood"]), root / "meta.json"
    if not path.is_file() or (not trees and _find_categories(root, MVTEC_AD_MARKERS)):
        return trees  # other tools put a meta.json into an MVTec-AD tree, too
    found: dict[str, Any] = {}
    try:
        for split, categories in json.loads(path.read_text(encoding="utf-8-sig")).items():
            for category, rows in categories.items():
                for row in rows:
                    defect = row["specie_name"] if row["anomaly"] else "good"
                    mask = root / row["mask_path"] if row["mask_path"] else None
                    record = make_record(root / row["img_path"], category, defect, mask)
                    found.setdefault(category, {}).setdefault(split.strip().casefold(), []).append(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not as expected ({error!r}): `train` and `test`, in each a list for every category, "
            "of img_path, mask_path, cls_name, specie_name and anomaly."
        ) from error
    return found


def _read_uni_medical(category: str, source: Path | dict, split: str) -> Iterator[dict]:
    if isinstance(source, dict):
        return read_listed(category, source, split)
    return _read_tree(category, source, split, pair=_masks_by_order)


def _find_elpv(root: Path) -> dict[str, Any]:
    """The data set has no split of its own. Of each kind of cell, 70% of the good ones (defect probability 0)
    are for training; the others and those of probability 1 for the test. Those between are in neither.
    """
    labels = root / "labels.csv"
    lines = labels.read_text(encoding="utf-8", errors="replace").splitlines() if labels.is_file() else []
    rows = [line.split() for line in lines if line.strip()]
    if not all(len(row) == 3 and row[2] in ("mono", "poly") for row in rows):
        return {}
    found = {}
    for category in sorted({kind for _, _, kind in rows}):
        cells = [(root / path, float(probability)) for path, probability, kind in rows if kind == category]
        good = [make_record(path, category, "good", None) for path, probability in cells if probability == 0]
        bad = [make_record(path, category, "defective", None) for path, probability in cells if probability == 1]
        order, num_train = np.random.default_rng(0).permutation(len(good)), int(0.7 * len(good))
        train, held_out = [good[i] for i in order[:num_train]], [good[i] for i in order[num_train:]]
        found[category] = {"train": train, "test": held_out + bad}
    return found


def installed_elpv() -> Path:
    """The folder of labels.csv in the installed package elpv-dataset."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ImportError("The ELPV solar cells come in a package of their own: pip install elpv-dataset")
    return Path(spec.origin).parent / "data"


class Layout(NamedTuple):
    find: Callable[[Path], dict[str, Any]]
    read: Callable[[str, Any, str], Iterator[dict]]
    expected: str  # what `find` looks for, below the root
    is_told_by_class: bool = False  # the name of a class tells it, which a category of MVTec-AD's layout may have, too


MVTEC_AD_MARKERS = ("train/good", "test/good")
MVTEC_3D_MARKERS = ("train/good/rgb", "test/good/rgb")
BTAD_MARKERS = ("train/ok", "test/ok")
MVTEC_AD_2_MARKERS = ("test_public/good", "test_public/bad")
MVTEC_LOCO_MARKERS = ("test/logical_anomalies", "test/structural_anomalies")

LAYOUTS = {  # in the order in which they are tried
    "visa": Layout(_find_visa, read_listed, "split_csv/1cls.csv"),
    "mvtec_3d": Layout(
        partial(_find_categories, markers=MVTEC_3D_MARKERS), _read_mvtec_3d, "[CATEGORY/]train/good/rgb/"
    ),
    "btad": Layout(
        partial(_find_categories, markers=BTAD_MARKERS),
        _read_tree,
        "[CATEGORY/]train/ok/",
        is_told_by_class=True,
    ),
    "mvtec_ad_2": Layout(
        partial(_find_categories, markers=MVTEC_AD_2_MARKERS), _read_mvtec_ad_2, "[CATEGORY/]test_public/good/"
    ),
    "mvtec_loco": Layout(
        partial(_find_categories, markers=MVTEC_LOCO_MARKERS),
        partial(_read_tree, pair=_mask_folders),
        "[CATEGORY/]test/logical_anomalies/",
        is_told_by_class=True,
    ),
    "real_iad": Layout(find_real_iad, read_listed, "realiad_jsons/CATEGORY.json beside realiad_1024/ (or 512, 256)"),
    "kolektor_sdd": Layout(find_kolektor, read_kolektor, "kos01/Part0_label.bmp"),
    "kolektor_sdd_2": Layout(find_kolektor_2, read_kolektor_2, "train/10000_GT.png"),
    "uni_medical": Layout(
        _find_uni_medical, _read_uni_medical, "[CATEGORY/]test/Ungood/, or meta.json", is_told_by_class=True
    ),
    "mvtec_ad": Layout(partial(_find_categories, markers=MVTEC_AD_MARKERS), _read_tree, "[CATEGORY/]train/good/"),
    "elpv": Layout(_find_elpv, read_listed, "labels.csv (or pass just 'elpv', for the installed package)"),
    "folder": Layout(_find_folder, _read_tree, "an image"),
}
