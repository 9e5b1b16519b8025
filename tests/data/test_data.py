"""Every layout on a miniature tree with the published names, and pixels of every mode.

Long, as all layouts are tried on trees that they share.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from diffad.data import load_anomaly_dataset
from diffad.data.checks import check_images, without_copies
from diffad.data.masks import defects_at, mask_to_array, resize_image_and_mask
from diffad.data.parts import halve_parts, part_index
from diffad.images import image_to_rgb
from diffad.warn_once import warn_once

SIZE = (12, 8)  # width, height
COLUMNS = ["image", "mask", "label", "category", "defect", "path"]


def write_image(path: Path, value: int = 100, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", size, value).convert(mode).save(path)
    return path


def write_mask(path: Path, value: int = 255, size: tuple[int, int] = SIZE) -> Path:
    """A mask with `value` in its left 3 columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[:, :3] = value
    PIL.Image.fromarray(mask).save(path)
    return path


def write_mvtec_category(folder: Path) -> Path:
    for i in range(3):
        write_image(folder / f"train/good/{i:03}.png")
    for i in range(2):
        write_image(folder / f"test/good/{i:03}.png")
        write_image(folder / f"test/crack/{i:03}.png")
        write_mask(folder / f"ground_truth/crack/{i:03}_mask.png")
    write_image(folder / "test/hole/000.png", mode="L")
    write_mask(folder / "ground_truth/hole/000_mask.png")
    return folder


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    for category in ("bottle", "cable"):
        write_mvtec_category(tmp_path / "mvtec" / category)
    (tmp_path / "mvtec" / "license.txt").write_text("text")
    return tmp_path / "mvtec"


def defects(dataset: datasets.Dataset) -> list[str]:
    return list(dataset["defect"])


def relative(dataset: datasets.Dataset, root: Path) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in dataset["path"]]


def assert_masks_mark_the_left(dataset: datasets.Dataset) -> None:
    """Every defective row's mask marks the left 3 columns and every good row has none."""
    for row in dataset:
        if row["label"]:
            marked = mask_to_array(row["mask"])
            assert marked[:, :3].all()
            assert not marked[:, 3:].any()
        else:
            assert row["mask"] is None


# Layouts


def test_mvtec_ad(mvtec: Path):
    train, test = load_anomaly_dataset(mvtec), load_anomaly_dataset(mvtec, split="test")
    assert train.column_names == test.column_names == COLUMNS
    assert len(train) == 6
    assert set(train["label"]) == {0}
    assert set(train["defect"]) == {"good"}
    expected = ["test/crack/000.png", "test/crack/001.png", "test/good/000.png", "test/good/001.png"]
    expected.append("test/hole/000.png")
    assert relative(test, mvtec) == [f"{name}/{path}" for name in ("bottle", "cable") for path in expected]
    assert list(test["category"]) == ["bottle"] * 5 + ["cable"] * 5
    assert list(test["label"]) == [1, 1, 0, 0, 1] * 2
    assert defects(test)[:5] == ["crack", "crack", "good", "good", "hole"]
    assert_masks_mark_the_left(test)
    assert isinstance(test[0]["image"], PIL.Image.Image)
    assert test[0]["image"].size == SIZE
    assert test[4]["image"].mode == "L"


def test_images_stay_files(mvtec: Path):
    stored = load_anomaly_dataset(mvtec, "test").cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in stored] == [None] * len(stored)


def test_a_category_folder_itself(mvtec: Path, monkeypatch: pytest.MonkeyPatch):
    test = load_anomaly_dataset(mvtec / "cable", "test")
    assert len(test) == 5
    assert set(test["category"]) == {"cable"}
    monkeypatch.chdir(mvtec / "cable")
    here = load_anomaly_dataset(".", "test")
    assert here[:]["path"] == test[:]["path"]
    assert set(here["category"]) == {"cable"}


def test_categories_are_chosen_by_name(mvtec: Path):
    assert set(load_anomaly_dataset(mvtec, category="cable")["category"]) == {"cable"}
    assert len(load_anomaly_dataset(mvtec, category=["cable", "bottle"])) == 6
    for wrong in ("cabel", ["bottle", "cabel"], []):
        with pytest.raises(ValueError, match=r"`category` must be among \['bottle', 'cable'\]"):
            load_anomaly_dataset(mvtec, category=wrong)


def test_extensions_in_any_case_and_hidden_files(tmp_path: Path):
    good = tmp_path / "part/train/good"
    for name in ("b.PNG", "a.Jpg", "c.jpeg", "d.BMP", "e.TIFF", "f.webp", "g.tif"):
        write_image(good / name)
    (good / "._a.png").write_bytes(b"not an image")
    (good / "notes.txt").write_text("text")
    write_image(good / ".cache/h.png")
    names = [Path(path).name for path in load_anomaly_dataset(tmp_path / "part")["path"]]
    assert names == ["a.Jpg", "b.PNG", "c.jpeg", "d.BMP", "e.TIFF", "f.webp", "g.tif"]


def test_visa(tmp_path: Path):
    rows = []
    for name in ("candle", "pcb1"):
        for i, split in enumerate(("train", "train", "test")):
            image = f"{name}/Data/Images/Normal/{i:04}.JPG"
            write_image(tmp_path / image)
            rows.append([name, split, "normal", image, ""])
        for i in range(2):
            image, mask = f"{name}/Data/Images/Anomaly/{i:03}.JPG", f"{name}/Data/Masks/Anomaly/{i:03}.png"
            write_image(tmp_path / image)
            write_mask(tmp_path / mask, value=i + 1)  # the published masks number the kinds of defect
            rows.append([name, "test", "anomaly", image, mask])
    split_csv = tmp_path / "split_csv/1cls.csv"
    with pytest.raises(FileNotFoundError, match=r"1cls\.csv"):
        load_anomaly_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder that holds split_csv"):
        load_anomaly_dataset(tmp_path / "candle")
    split_csv.parent.mkdir()
    with split_csv.open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])

    train, test = load_anomaly_dataset(tmp_path), load_anomaly_dataset(tmp_path, "test", category="pcb1")
    assert list(train["category"]) == ["candle"] * 2 + ["pcb1"] * 2
    assert set(train["label"]) == {0}
    assert list(test["label"]) == [1, 1, 0]
    assert defects(test) == ["anomaly", "anomaly", "good"]
    assert_masks_mark_the_left(test)
    with pytest.raises(ValueError, match="no 'validation', only"):
        load_anomaly_dataset(tmp_path, "validation")
    (tmp_path / "pcb1/Data/Masks/Anomaly/001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*pcb1/Data/Images/Anomaly/001.JPG"):
        load_anomaly_dataset(tmp_path, "test")
    split_csv.write_text("object,split,label\n")
    with pytest.raises(ValueError, match=r"1cls.csv lacks the columns \['image', 'mask'\]"):
        load_anomaly_dataset(tmp_path)


def test_visa_listed_with_spaces_and_capitals(tmp_path: Path):
    for i in range(3):
        write_image(tmp_path / f"candle/{i}.JPG")
    write_mask(tmp_path / "candle/2.png")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text(
        "Object, split, label, image, mask\n"
        " candle, Train , Normal,candle/0.JPG,\n"
        "candle ,TEST,normal , candle/1.JPG , \n"
        "candle,test,Anomaly,candle/2.JPG, candle/2.png\n"
    )
    assert load_anomaly_dataset(tmp_path)["category"] == ["candle"]
    test = load_anomaly_dataset(tmp_path, "test")
    assert test["category"] == ["candle"] * 2
    assert defects(test) == ["good", "anomaly"]
    assert_masks_mark_the_left(test)


def test_mvtec_3d(tmp_path: Path):
    for name in ("bagel", "peach"):
        for place in ("train/good", "validation/good", "test/good", "test/hole"):
            for i in range(2):
                write_image(tmp_path / f"{name}/{place}/rgb/{i:03}.png")
                write_image(tmp_path / f"{name}/{place}/xyz/{i:03}.tiff", mode="F")
                if place.startswith("test"):
                    write_mask(tmp_path / f"{name}/{place}/gt/{i:03}.png", value=255 * place.endswith("hole"))
        (tmp_path / name / "calibration").mkdir()
    for split in ("train", "validation"):
        dataset = load_anomaly_dataset(tmp_path, split)
        assert relative(dataset, tmp_path)[:2] == [f"bagel/{split}/good/rgb/{i:03}.png" for i in range(2)]
        assert len(dataset) == 4
        assert set(dataset["label"]) == {0}
    test = load_anomaly_dataset(tmp_path, "test")
    assert defects(test) == ["good", "good", "hole", "hole"] * 2
    assert_masks_mark_the_left(test)
    (tmp_path / "peach/test/hole/gt/001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*peach/test/hole/rgb/001.png"):
        load_anomaly_dataset(tmp_path, "test")


def test_btad(tmp_path: Path):
    for name, extension, mask_extension in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        for place in ("train/ok", "test/ok", "test/ko"):
            for i in range(2):
                write_image(tmp_path / f"{name}/{place}/{i:04}.{extension}")
        for i in range(2):
            write_mask(tmp_path / f"{name}/ground_truth/ko/{i:04}.{mask_extension}")
    assert len(load_anomaly_dataset(tmp_path)) == 6
    test = load_anomaly_dataset(tmp_path, "test")
    assert list(test["category"]) == ["01"] * 4 + ["02"] * 4 + ["03"] * 4
    assert defects(test) == ["ko", "ko", "good", "good"] * 3
    assert list(test["label"]) == [1, 1, 0, 0] * 3
    assert_masks_mark_the_left(test)


def write_uni_medical(root: Path) -> None:
    for name in ("brain", "liver", "retinal"):
        for place in ("train/good", "test/good", "test/Ungood"):
            for i in range(2):
                write_image(root / f"{name}/{place}/scan{i}.png", mode="L")
        for i in range(2):
            write_mask(root / f"{name}/ground_truth/Ungood/label{i}.png", value=i + 1)


def test_uni_medical_pairs_by_order(tmp_path: Path):
    write_uni_medical(tmp_path)
    assert len(load_anomaly_dataset(tmp_path)) == 6
    test = load_anomaly_dataset(tmp_path, "test", category="liver")
    assert defects(test) == ["Ungood", "Ungood", "good", "good"]
    assert_masks_mark_the_left(test)
    assert [np.asarray(test[i]["mask"]).max() for i in range(2)] == [1, 2]  # the first mask to the first image
    (tmp_path / "liver/ground_truth/Ungood/label0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds 1 masks, but .*liver/test/Ungood 2 images"):
        load_anomaly_dataset(tmp_path, "test")


def test_uni_medical_meta_json(tmp_path: Path):
    write_uni_medical(tmp_path)

    def rows(name: str, place: str, masks: list[str]) -> list[dict]:
        return [
            {
                "img_path": f"{name}/{place}/scan{i}.png",
                "mask_path": mask,
                "cls_name": name,
                "specie_name": place.split("/")[1],
                "anomaly": int(bool(mask)),
            }
            for i, mask in enumerate(masks)
        ]

    meta = {"train": {}, "test": {}}
    for name in ("brain", "liver"):
        crossed = [f"{name}/ground_truth/Ungood/label{i}.png" for i in (1, 0)]  # not in sorted order
        meta["train"][name] = rows(name, "train/good", ["", ""])
        meta["test"][name] = rows(name, "test/Ungood", crossed) + rows(name, "test/good", ["", ""])
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8-sig")
    assert set(load_anomaly_dataset(tmp_path)["category"]) == {"brain", "liver"}
    test = load_anomaly_dataset(tmp_path, "test", category="brain")
    assert defects(test) == ["Ungood", "Ungood", "good", "good"]
    assert [np.asarray(test[i]["mask"]).max() for i in range(2)] == [2, 1]
    (tmp_path / "meta.json").write_text('{"train": {"brain": [{"path": "a.png"}]}}')
    with pytest.raises(ValueError, match=r"meta\.json is not as expected"):
        load_anomaly_dataset(tmp_path)


def test_elpv_labels_file(tmp_path: Path):
    lines = []
    for kind, count in (("mono", 20), ("poly", 11)):
        for i in range(count):
            probability = (0.0, 1.0, 0.0, 0.3333333333333333, 0.6666666666666666)[i % 5]
            path = write_image(tmp_path / f"images/{kind}{i:04}.png", mode="L").relative_to(tmp_path)
            lines.append(f"{path}  {probability}   {kind}\n")
    (tmp_path / "labels.csv").write_text("".join(lines))
    good = [f"mono{i:04}.png" for i in range(20) if i % 5 in (0, 2)]  # 8 of them
    order = np.random.default_rng(0).permutation(8)
    train = load_anomaly_dataset(tmp_path, category="mono")
    assert [Path(path).name for path in train["path"]] == sorted(good[i] for i in order[:5])
    test = load_anomaly_dataset(tmp_path, "test", category="mono", dataset="elpv")
    held_out = [Path(row["path"]).name for row in test if row["label"] == 0]
    assert held_out == sorted(good[i] for i in order[5:])
    assert defects(test).count("defective") == 4
    assert set(test["mask"]) == {None}
    assert set(load_anomaly_dataset(tmp_path)["category"]) == {"mono", "poly"}


@pytest.mark.skipif(not importlib.util.find_spec("elpv_dataset"), reason="needs the package elpv-dataset")
def test_elpv_package():
    train, test = load_anomaly_dataset("elpv/mono"), load_anomaly_dataset("elpv/mono", "test")
    assert (len(train), len(test), sum(test["label"])) == (411, 177 + 313, 313)
    assert set(train["category"]) == {"mono"}
    assert not set(train["path"]) & set(test["path"])
    assert train[0]["image"].size == (300, 300)
    same = load_anomaly_dataset("elpv", category="mono", dataset="elpv")
    assert same[:]["path"] == train[:]["path"]
    with pytest.raises(ValueError, match=r"\['mono', 'poly'\]"):
        load_anomaly_dataset("elpv/multi")
    with pytest.raises(ValueError, match="is 'mono' alone"):
        load_anomaly_dataset("elpv/mono", category="poly")


def test_elpv_without_the_package(monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec(name + "_which_is_not_installed"))
    with pytest.raises(ImportError, match="pip install elpv-dataset"):
        load_anomaly_dataset("elpv")


# Plain folders


def test_flat_folder_is_all_good(tmp_path: Path):
    for name in ("b.png", "a.jpg"):
        write_image(tmp_path / "parts" / name)
    train = load_anomaly_dataset(tmp_path / "parts")
    assert relative(train, tmp_path) == ["parts/a.jpg", "parts/b.png"]
    assert set(train["label"]) == {0}
    assert set(train["category"]) == {"parts"}
    with pytest.raises(ValueError, match="without labels"):
        load_anomaly_dataset(tmp_path / "parts", "test")


def test_folder_of_good_and_defects(tmp_path: Path):
    for name in ("good/1.png", "good/monday/2.png", "scratch/1.jpg", "dent/1.png", "dent/night/1.png"):
        write_image(tmp_path / name)
    assert relative(load_anomaly_dataset(tmp_path), tmp_path) == ["good/1.png", "good/monday/2.png"]
    with pytest.warns(UserWarning, match="same in both splits"):
        test = load_anomaly_dataset(tmp_path, "test")
    assert defects(test) == ["dent", "dent", "good", "good", "scratch"]
    assert set(test["mask"]) == {None}

    for name in ("scratch/1.png", "dent/1_mask.png", "dent/night/1.png"):  # either way of naming
        write_mask(tmp_path / "ground_truth" / name)
    with pytest.warns(UserWarning, match="same in both splits"):
        test = load_anomaly_dataset(tmp_path, "test")
    assert len(test) == 5
    assert_masks_mark_the_left(test)
    (tmp_path / "ground_truth/dent/night/1.png").unlink()
    with (
        pytest.warns(UserWarning, match="same in both splits"),
        pytest.raises(FileNotFoundError, match=r"no mask for .*dent/night/1\.png"),
    ):
        load_anomaly_dataset(tmp_path, "test")


def test_folder_with_loose_training_images_and_a_sorted_test(tmp_path: Path):
    for name in ("train/1.png", "train/2.png", "test/good/3.png", "test/dent/4.png"):
        write_image(tmp_path / name)
    write_mask(tmp_path / "ground_truth/dent/4.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(load_anomaly_dataset(tmp_path), tmp_path) == ["train/1.png", "train/2.png"]
        test = load_anomaly_dataset(tmp_path, "test")
    assert defects(test) == ["dent", "good"]
    assert_masks_mark_the_left(test)
    with pytest.raises(ValueError, match=r"no 'validation', only \['test', 'train'\]"):
        load_anomaly_dataset(tmp_path, "validation")


def test_folders_of_several_categories(tmp_path: Path):
    for name in ("left/good/1.png", "right/good/1.png", "right/dent/1.png"):
        write_image(tmp_path / name)
    assert list(load_anomaly_dataset(tmp_path)["category"]) == ["left", "right"]


def test_defects_are_not_taken_for_good_images(tmp_path: Path):
    for name in ("1.png", "dent/1.png"):
        write_image(tmp_path / name)
        for split in ("train", "test"):
            if name == "dent/1.png":
                with pytest.raises(ValueError, match=r"no good images: expected .*good, but there are only dent"):
                    load_anomaly_dataset(tmp_path, split)


def test_good_images_beside_folders_are_told_where_to_go(tmp_path: Path):
    for name in ("1.png", "2.png", "cam1/1.png", "cam2/1.png"):
        write_image(tmp_path / name)
    expected = rf"only cam1, cam2, and 2 images beside them\. Move what is good, with its folders, into {tmp_path}/good"
    with pytest.raises(ValueError, match=expected):
        load_anomaly_dataset(tmp_path)
    (tmp_path / "good").mkdir()
    for name in ("1.png", "2.png", "cam1", "cam2"):
        (tmp_path / name).rename(tmp_path / "good" / name)
    assert len(load_anomaly_dataset(tmp_path)) == 4


@pytest.mark.parametrize("good", ["good/", "ok/", ""])
def test_splits_may_be_called_training_and_testing(tmp_path: Path, good: str):
    for name in (f"Training/{good}1.png", f"val/{good}2.png", "testing/good/3.png", "testing/ko/4.png"):
        write_image(tmp_path / name)
    for split, names in (
        ("train", [f"Training/{good}1.png"]),
        ("validation", [f"val/{good}2.png"]),
        ("test", ["testing/good/3.png", "testing/ko/4.png"]),
    ):
        loaded = load_anomaly_dataset(tmp_path, split)
        assert relative(loaded, tmp_path) == names
        assert set(loaded["category"]) == {tmp_path.name}


def test_beside_good_images_a_folder_val_is_a_kind_of_defect(tmp_path: Path):
    for name in ("good/1.png", "scratch/2.png", "val/3.png"):
        write_image(tmp_path / name)
    assert relative(load_anomaly_dataset(tmp_path, "train"), tmp_path) == ["good/1.png"]
    assert set(load_anomaly_dataset(tmp_path, "test")["defect"]) == {"good", "scratch", "val"}


def test_categories_whose_good_images_have_other_names_are_all_read(tmp_path: Path):
    write_mvtec_category(tmp_path / "bottle")
    for name, good, bad in (
        ("cable", "ok", "ko"),
        ("screw", "Normal", "ungood"),
        ("tile", "good", "logical_anomalies"),
    ):
        for place in (f"train/{good}", f"test/{good}", f"test/{bad}"):
            write_image(tmp_path / name / place / "0.png")
        write_mask(tmp_path / name / "ground_truth" / bad / "0_mask.png")
    assert sorted(load_anomaly_dataset(tmp_path)["category"]) == ["bottle"] * 3 + ["cable", "screw", "tile"]
    test = load_anomaly_dataset(tmp_path, "test")
    assert set(test["defect"]) == {"good", "crack", "hole", "ko", "ungood", "logical_anomalies"}
    assert_masks_mark_the_left(test)
    write_image(tmp_path / "box" / "train/good/0.png")
    write_image(tmp_path / "box" / "test/good/0.png")
    write_image(tmp_path / "box" / "test/logical_anomalies/0.png")
    write_mask(tmp_path / "box" / "ground_truth/logical_anomalies/0/0.png")  # as MVTec LOCO has them
    assert_masks_mark_the_left(load_anomaly_dataset(tmp_path, "test", category="box"))
    forced = load_anomaly_dataset(tmp_path, dataset="btad", category="cable")
    assert relative(forced, tmp_path) == ["cable/train/ok/0.png"]


def test_folders_that_are_no_category_are_named(mvtec: Path):
    write_image(mvtec / "plain" / "0.png")
    write_image(mvtec / "sorted" / "good" / "0.png")
    (mvtec / "notes").mkdir()
    with pytest.warns(
        UserWarning, match=r"mvtec: plain, sorted hold images but are left out.* that bottle has"
    ) as caught:
        assert set(load_anomaly_dataset(mvtec)["category"]) == {"bottle", "cable"}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            len(load_anomaly_dataset(mvtec, category=["bottle", "cable"])) == 6
        )  # nothing that was asked for is missing


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_beside_folders_of_classes_are_told(mvtec: Path, split: str):
    for name in ("b.png", "a.png"):
        write_image(mvtec / "cable" / split / name)
    with pytest.warns(UserWarning, match=rf"2 images right in {mvtec}/cable/{split} are left out, a\.png first"):
        assert len(load_anomaly_dataset(mvtec, split)) == {"train": 6, "test": 10}[split]


@pytest.mark.parametrize("name", ["Masks", "mask", "GT", "groundtruth", "annotations"])
@pytest.mark.parametrize("place", ["test", "."])
def test_a_folder_of_masks_is_known_by_any_usual_name(tmp_path: Path, name: str, place: str):
    for image in ("train/good/0.png", "test/good/1.png", "test/dent/2.png"):
        write_image(tmp_path / image)
    write_mask(tmp_path / place / name / "dent" / "2.png")
    test = load_anomaly_dataset(tmp_path, "test")
    assert defects(test) == ["dent", "good"]
    assert_masks_mark_the_left(test)
    (tmp_path / place / name / "dent").rename(tmp_path / place / name / "bent")
    if place == "test":  # where it may be a kind of defect as well
        with pytest.warns(UserWarning, match=rf"test/{name} is left out: .* none of a defect's"):
            assert defects(load_anomaly_dataset(tmp_path, "test")) == ["dent", "good"]
        return
    with pytest.raises(FileNotFoundError, match=rf"no mask for .*test/dent/2\.png: expected .*{name}/dent/2_mask\.png"):
        load_anomaly_dataset(tmp_path, "test")


def test_a_kind_of_defect_that_is_named_as_masks_is_told(tmp_path: Path):
    for place in ("train/good", "test/good", "test/mask", "test/dent"):
        write_image(tmp_path / place / "0.png")
    write_mask(tmp_path / "ground_truth" / "dent" / "0_mask.png")
    with pytest.warns(UserWarning, match="mask is left out.*If it is a kind of defect, rename it"):
        assert set(load_anomaly_dataset(tmp_path, "test")["defect"]) == {"good", "dent"}


@pytest.mark.parametrize("own", ["test", "."])
def test_masks_that_predict_has_written_are_no_ground_truth(tmp_path: Path, own: str):
    for image in ("train/good/0.png", "test/good/1.png", "test/dent/2.png"):
        write_image(tmp_path / image)
    write_image(tmp_path / own / "masks/dent/2.png", value=255)
    for name in ("scores.csv", "settings.json"):
        (tmp_path / own / name).write_text("")
    assert list(load_anomaly_dataset(tmp_path, "test")["mask"]) == [None, None]
    write_mask(tmp_path / own / "gt/dent/2.png")
    assert_masks_mark_the_left(load_anomaly_dataset(tmp_path, "test"))


def test_a_folder_named_as_masks_is_no_kind_of_defect(tmp_path: Path):
    for image in ("train/good/0.png", "test/good/1.png", "test/dent/2.png"):
        write_image(tmp_path / image)
    (tmp_path / "test/annotations").mkdir()
    (tmp_path / "test/annotations/2.json").write_text("{}")
    assert defects(load_anomaly_dataset(tmp_path, "test")) == ["dent", "good"]
    write_mask(tmp_path / "ground_truth/dent/2.png")
    write_image(tmp_path / "test/mask/3.png")
    with pytest.warns(UserWarning, match=r"test/mask is left out: .* those in .*ground_truth\. .* rename it"):
        test = load_anomaly_dataset(tmp_path, "test")
    assert defects(test) == ["dent", "good"]
    assert_masks_mark_the_left(test)


def test_loose_images_that_have_masks_are_not_known_to_be_good(tmp_path: Path):
    write_image(tmp_path / "0.png")
    write_mask(tmp_path / "masks" / "0.png")
    with pytest.raises(ValueError, match=r"no good images: .* there are only masks"):
        load_anomaly_dataset(tmp_path)


# Choice of the layout, errors of trees


def test_forced_layout(mvtec: Path):
    assert len(load_anomaly_dataset(mvtec, dataset="mvtec_ad")) == 6
    expected = {"visa": "split_csv/1cls.csv", "mvtec_3d": "rgb", "btad": "train/ok", "uni_medical": "Ungood"}
    for name, part in expected.items():
        with pytest.raises(ValueError, match=f"`dataset`='{name}': expected {mvtec}/.*{part}"):
            load_anomaly_dataset(mvtec, dataset=name)
    with pytest.raises(ValueError, match="`dataset` must be one of"):
        load_anomaly_dataset(mvtec, dataset="mvtec")


def test_meta_json_does_not_turn_mvtec_ad_into_uni_medical(mvtec: Path):
    (mvtec / "meta.json").write_text('{"train": {}}')
    assert len(load_anomaly_dataset(mvtec)) == 6


def test_unknown_split_and_arguments(mvtec: Path):
    with pytest.raises(ValueError, match=r"`split` must be one of \['train', 'validation', 'test'\]"):
        load_anomaly_dataset(mvtec, "valid")
    with pytest.raises(ValueError, match=r"bottle has no 'validation'"):
        load_anomaly_dataset(mvtec, "validation")
    with pytest.raises(ValueError, match="`on_bad_image`"):
        load_anomaly_dataset(mvtec, on_bad_image="ignore")
    with pytest.raises(TypeError, match="revision"):
        load_anomaly_dataset(mvtec, revision="main")


def test_no_folder_and_no_images(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"no folder at {tmp_path}/nowhere"):
        load_anomaly_dataset(tmp_path / "nowhere")
    for dataset in (None, "folder", "hub"):
        with pytest.raises(FileNotFoundError, match=r"1\.png is a file. Give the folder of the images"):
            load_anomaly_dataset(write_image(tmp_path / "1.png"), dataset=dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/empty is empty"):
        load_anomaly_dataset(tmp_path / "empty")
    (tmp_path / "empty/notes.txt").write_text("text")
    with pytest.raises(ValueError, match=f"{tmp_path}/empty holds no images: expected .png"):
        load_anomaly_dataset(tmp_path / "empty")


def test_category_without_images(mvtec: Path):
    for file in (mvtec / "cable/train/good").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="cable/train/good is empty"):
        load_anomaly_dataset(mvtec)
    (mvtec / "cable/train/good").rmdir()
    with pytest.raises(ValueError, match="cable/train is empty"):
        load_anomaly_dataset(mvtec)
    assert len(load_anomaly_dataset(mvtec, category="bottle")) == 3
    (mvtec / "bottle/test/dent").mkdir()
    with pytest.raises(ValueError, match="bottle/test/dent is empty"):
        load_anomaly_dataset(mvtec, "test")


def test_missing_mask(mvtec: Path):
    (mvtec / "bottle/ground_truth/crack/001_mask.png").unlink()
    message = "no mask for .*bottle/test/crack/001.png: expected .*ground_truth/crack/001_mask.png"
    with pytest.raises(FileNotFoundError, match=message):
        load_anomaly_dataset(mvtec, "test")


def test_mask_of_another_size(mvtec: Path):
    write_mask(mvtec / "bottle/ground_truth/crack/001_mask.png", size=(8, 12))
    message = "bottle/test/crack/001.png is 12 x 8 pixels, but .*crack/001_mask.png is 8 x 12 pixels"
    for on_bad_image in ("error", "skip"):
        with pytest.raises(ValueError, match=message):
            load_anomaly_dataset(mvtec, "test", on_bad_image=on_bad_image)


def test_mask_of_a_turned_image(tmp_path: Path):
    folder = write_mvtec_category(tmp_path / "part")
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6  # a quarter turn
    PIL.Image.new("RGB", SIZE).save(folder / "test/hole/001.jpg", exif=exif)
    write_mask(folder / "ground_truth/hole/001_mask.png", size=SIZE[::-1])
    row = load_anomaly_dataset(folder, "test")[-1]
    assert row["image"].size == row["mask"].size == SIZE[::-1]


# Images that cannot be read


def damage(path: Path, how: str) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    damaged = {"empty": b"", "text": b"not an image", "cut": content[: len(content) // 2], "flipped": flipped}
    path.write_bytes(damaged[how])
    return path


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("9.png", "empty"),
        ("9.png", "text"),
        ("9.png", "cut"),
        ("9.png", "flipped"),
        ("9.jpg", "empty"),
        ("9.jpg", "cut"),
        ("9.bmp", "cut"),
        ("9.tif", "cut"),
        ("9.webp", "cut"),
    ],
)
def test_bad_image(mvtec: Path, name: str, how: str):
    bad = damage(mvtec / "cable/train/good" / name, how)
    with pytest.raises(ValueError, match=f"1 images cannot be read.*\n  {bad}: "):
        load_anomaly_dataset(mvtec)
    with pytest.warns(UserWarning, match=f"Skipped 1 images.*\n  {bad}: ") as caught:
        kept = load_anomaly_dataset(mvtec, on_bad_image="skip")
    assert len(caught) == 1
    assert len(kept) == 6
    assert str(bad) not in kept["path"]
    assert len([row["image"] for row in kept]) == 6  # all of them decode


def test_several_bad_images_and_masks(mvtec: Path):
    bad = [damage(mvtec / "cable/test/good/000.png", "cut"), damage(mvtec / "cable/test/good/001.png", "text")]
    bad.append(damage(mvtec / "bottle/ground_truth/crack/000_mask.png", "cut"))
    with pytest.raises(ValueError, match="3 images cannot be read") as error:
        load_anomaly_dataset(mvtec, "test")
    assert all(str(path) in str(error.value) for path in bad)
    with pytest.warns(UserWarning, match="Skipped 3 images") as caught:
        kept = load_anomaly_dataset(mvtec, "test", on_bad_image="skip")
    assert len(caught) == 1
    assert all(str(path) in str(caught[0].message) for path in bad)
    assert len(kept) == 7
    assert str(mvtec / "bottle/test/crack/000.png") not in kept["path"]


def test_skipping_must_leave_good_images(mvtec: Path):
    for file in (mvtec / "cable/train/good").iterdir():
        damage(file, "text")
    message = r"no good images to train on in \['cable'\]"
    with pytest.warns(UserWarning, match="Skipped 3"), pytest.raises(ValueError, match=message):
        load_anomaly_dataset(mvtec, on_bad_image="skip")


def test_check_images_finds_a_file_that_has_gone(mvtec: Path):
    dataset = load_anomaly_dataset(mvtec)
    assert check_images(dataset) is dataset
    gone = mvtec / "bottle/train/good/001.png"
    gone.unlink()
    with pytest.raises(ValueError, match=str(gone)):
        check_images(dataset)
    streamed = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=str(gone)):
        list(check_images(streamed))
    with pytest.warns(UserWarning, match=str(gone)):
        kept = list(check_images(streamed, on_bad_image="skip"))
    assert [row["image"].size for row in kept] == [SIZE] * 5


# Streaming, and data that `datasets.load_dataset` reads


def test_streaming_gives_the_same_rows(mvtec: Path):
    streamed = load_anomaly_dataset(mvtec, "test", streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    plain = load_anomaly_dataset(mvtec, "test")
    for row, expected in zip(streamed, plain, strict=True):
        assert {key: row[key] for key in COLUMNS[2:]} == {key: expected[key] for key in COLUMNS[2:]}
        assert row["image"].tobytes() == expected["image"].tobytes()
        assert (row["mask"] is None) == (expected["mask"] is None)
    shuffled = [row["path"] for row in streamed.shuffle(seed=0, buffer_size=10)]
    assert sorted(shuffled) == sorted(plain["path"])
    assert shuffled != list(plain["path"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_parquet(folder: Path, columns: dict, features: dict, split: str = "train") -> Path:
    """A data set in the layout of the Hub, with the images inside."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def pil(value: int = 100) -> PIL.Image.Image:
    return PIL.Image.new("RGB", SIZE, (value,) * 3)


def left_mask(value: int = 255) -> PIL.Image.Image:
    mask = np.zeros(SIZE[::-1], dtype=np.uint8)
    mask[:, :3] = value
    return PIL.Image.fromarray(mask)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_images_only(tmp_path: Path, streaming: bool):
    folder = write_parquet(tmp_path / "parts", {"image": [pil(1), pil(2)]}, {"image": datasets.Image()})
    rows = list(load_anomaly_dataset(folder, streaming=streaming))
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [np.asarray(row["image"])[0, 0, 0] for row in rows] == [1, 2]
    for row in rows:
        assert (row["mask"], row["label"], row["defect"], row["path"]) == (None, 0, "good", "")
        assert row["category"] == "parts"


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_all_columns(tmp_path: Path, streaming: bool):
    columns = {
        "image": [pil(), pil(), pil()],
        "mask": [None, left_mask(), left_mask(1)],
        "label": [1, 0, 0],
        "category": ["nut", "nut", "bolt"],
        "defect": ["good", "bent", "rust"],
        "serial": [7, 8, 9],
    }
    features = {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=["bad", "good"]),  # in the order of the alphabet: good is not 0
        "category": datasets.Value("string"),
        "defect": datasets.Value("string"),
        "serial": datasets.Value("int64"),
    }
    folder = write_parquet(tmp_path / "parts", columns, features, split="test")
    rows = list(load_anomaly_dataset(folder, "test", streaming=streaming))
    assert [row["label"] for row in rows] == [0, 1, 1]
    assert list(rows[0]) == COLUMNS
    assert [row["defect"] for row in rows] == ["good", "bent", "rust"]
    assert_masks_mark_the_left(rows)
    of_nuts = load_anomaly_dataset(folder, "test", category="nut", streaming=streaming)
    assert [row["category"] for row in of_nuts] == ["nut", "nut"]
    if not streaming:
        with pytest.raises(ValueError, match=r"`category` must be among \['bolt', 'nut'\]"):
            load_anomaly_dataset(folder, "test", category="screw")


@pytest.mark.parametrize(
    ("values", "feature", "defect"),
    [
        ([0, 1], datasets.Value("int64"), "defective"),
        ([False, True], datasets.Value("bool"), "defective"),
        ([0.0, 1.0], datasets.Value("float32"), "defective"),
        ([0, 1], datasets.ClassLabel(names=["0", "1"]), "defective"),
        (["Normal", "bent"], datasets.Value("string"), "bent"),
        ([" OK ", "bent "], datasets.Value("string"), "bent"),
        ([1, 0], datasets.ClassLabel(names=["bent ", " Good"]), "bent"),
        ([1, 0], datasets.ClassLabel(names=["bent", "good"]), "bent"),
        (["defect-free", "bent"], datasets.Value("string"), "bent"),
    ],
)
def test_hub_labels(tmp_path: Path, values: list, feature: datasets.Value, defect: str):
    columns, features = {"image": [pil(), pil()], "label": values}, {"image": datasets.Image(), "label": feature}
    rows = load_anomaly_dataset(write_parquet(tmp_path / "parts", columns, features))
    assert list(rows["label"]) == [0, 1]
    assert list(rows["defect"]) == ["good", defect]


def test_hub_classes_without_a_good_one(tmp_path: Path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["bent", "fine"])}
    folder = write_parquet(tmp_path / "parts", {"image": [pil()], "label": [1]}, features)
    with pytest.raises(ValueError, match=r"must be named 'good', but they are .*'fine'"):
        load_anomaly_dataset(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_labels_from_masks(tmp_path: Path, streaming: bool):
    columns = {"image": [pil()] * 3, "mask": [None, left_mask(0), left_mask(1)]}
    folder = write_parquet(tmp_path / "parts", columns, {"image": datasets.Image(), "mask": datasets.Image()})
    rows = load_anomaly_dataset(folder, streaming=streaming)
    assert [(row["label"], row["defect"]) for row in rows] == [(0, "good"), (0, "good"), (1, "defective")]


def test_hub_without_images(tmp_path: Path):
    folder = write_parquet(tmp_path / "parts", {"picture": [pil()]}, {"picture": datasets.Image()})
    with pytest.raises(ValueError, match=r"no column 'image', only \['picture'\]"):
        load_anomaly_dataset(folder)
    with pytest.raises(ValueError, match="nowhere"):
        load_anomaly_dataset(folder, "nowhere")


def test_hub_training_split_without_good_images(tmp_path: Path):
    columns = {"image": [pil()], "label": [1]}
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    with pytest.raises(ValueError, match="no good images to train on"):
        load_anomaly_dataset(write_parquet(tmp_path / "parts", columns, features))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_bad_image(tmp_path: Path, streaming: bool):
    whole = damage(tmp_path / "9.png", "flipped").read_bytes()
    columns = {"image": [{"bytes": whole, "path": "line/9.png"}, pil()]}
    folder = write_parquet(tmp_path / "parts", columns, {"image": datasets.Image()})
    if not streaming:
        with pytest.raises(ValueError, match=r"line/9\.png: "):
            load_anomaly_dataset(folder)
    with pytest.warns(UserWarning, match=r"line/9\.png: "):
        rows = list(load_anomaly_dataset(folder, on_bad_image="skip", streaming=streaming))
    assert [row["image"].size for row in rows] == [SIZE]


def test_image_folder_with_metadata(tmp_path: Path):
    for i in range(2):
        write_image(tmp_path / f"parts/train/{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "defect": name}) for i, name in enumerate(["good", "bent"])]
    (tmp_path / "parts/train/metadata.jsonl").write_text("\n".join(lines))
    rows = load_anomaly_dataset(tmp_path / "parts")
    assert defects(rows) == ["good", "bent"]
    assert list(rows["label"]) == [0, 1]
    assert relative(rows, tmp_path) == ["parts/train/0.png", "parts/train/1.png"]


def write_metadata(folder: Path, names: list[str], column: str = "label", value: str = "good") -> None:
    """Images, all of which the table in their folder lists."""
    for name in names:
        write_image(folder / name)
    (folder / "metadata.csv").write_text(f"file_name,{column}\n" + "".join(f"{name},{value}\n" for name in names))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train_0.png", "test_0.png"])
def test_names_of_labelled_images_are_no_splits(tmp_path: Path, name: str, streaming: bool):
    write_metadata(tmp_path / "parts", [name, "1.png", "2.png"])
    assert len(list(load_anomaly_dataset(tmp_path / "parts", streaming=streaming))) == 3
    with pytest.raises(ValueError, match=r"parts: .* split.*'train'.*--dataset folder"):
        load_anomaly_dataset(tmp_path / "parts", "test", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_no_table_of_labels_lists_are_told(tmp_path: Path, streaming: bool):
    write_metadata(tmp_path / "a", ["0.png", "1.png"])
    for name in ("a/2.png", "b/3.png"):
        write_image(tmp_path / name)
    with pytest.warns(UserWarning, match=r"2 of 4 .*a/2\.png first.*a/metadata\.csv.*--dataset folder"):
        assert len(list(load_anomaly_dataset(tmp_path, streaming=streaming))) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
@pytest.mark.parametrize("name", ["line[1]", "line?", "line*", "line::1"])
def test_a_folder_named_as_a_pattern_shows_no_others_images(tmp_path: Path, name: str):
    write_metadata(tmp_path / "line1", ["0.png"])
    write_metadata(tmp_path / name, ["1.png", "2.png"])
    (tmp_path / "link").symlink_to(tmp_path / name)
    for folder in (tmp_path / name, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"`path_or_hub_id`: .* takes for a pattern .*Rename that folder"):
            load_anomaly_dataset(folder)
    assert len(load_anomaly_dataset(tmp_path / name, dataset="folder")) == 2  # which looks for no patterns


def test_image_folder_with_metadata_in_splits_and_masks(tmp_path: Path):
    for folder in (tmp_path / "parts/train", tmp_path / "parts/test"):
        for name in ("0.png", "1.png"):
            write_image(folder / name)
        write_mask(folder / "masks/1.png")
        (folder / "metadata.csv").write_text("file_name,mask_file_name,defect\n0.png,,good\n1.png,masks/1.png,bent\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for split in ("train", "test"):
            rows = load_anomaly_dataset(tmp_path / "parts", split)
            assert defects(rows) == ["good", "bent"]
            assert_masks_mark_the_left(rows)


def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'some-org/no-such-data'"):
        load_anomaly_dataset("some-org/no-such-data")


# Pixels


def test_grey_and_palette_images_keep_their_values():
    grey = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for image in (grey, grey.convert("P")):
        rgb = np.asarray(image_to_rgb(image))
        assert rgb.shape == (16, 16, 3)
        assert (rgb == np.asarray(grey)[..., None]).all()
    colours = PIL.Image.new("P", (2, 1))
    colours.putpalette([10, 20, 30, 200, 100, 50])
    colours.putpixel((1, 0), 1)
    assert np.asarray(image_to_rgb(colours)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.asarray(image_to_rgb(PIL.Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]


def test_rgb_images_are_not_copied():
    image = pil()
    assert image_to_rgb(image) is image


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_images_are_scaled_and_not_clipped(tmp_path: Path, name: str):
    values = np.array([[0, 128, 129, 257, 1000], [257 * 100, 32768, 40000, 65534, 65535]], dtype=np.uint16)
    (tmp_path / "good").mkdir()
    PIL.Image.fromarray(values).save(tmp_path / "good" / name)
    image = load_anomaly_dataset(tmp_path)[0]["image"]
    assert image.mode == "I;16"
    rgb = np.asarray(image_to_rgb(image))
    assert rgb[..., 0].tolist() == [[0, 0, 1, 1, 4], [100, 128, 156, 255, 255]]
    assert (rgb == rgb[..., :1]).all()


def test_32_bit_and_float_images():
    def first_channel(values: list, dtype: type) -> list:
        return np.asarray(image_to_rgb(PIL.Image.fromarray(np.array([values], dtype=dtype))))[0, :, 0].tolist()

    assert first_channel([0, 257, 65535], np.int32) == [0, 1, 255]  # 16 bit in mode I
    assert first_channel([0, 2**30, 2**31 - 1], np.int32) == [0, 128, 255]
    assert first_channel([0.0, 0.2, 1.0], np.float32) == [0, 51, 255]
    assert first_channel([0.0, 0.6, 200.0], np.float32) == [0, 1, 200]
    assert first_channel([0.0, 257.0, 65535.0], np.float32) == [0, 1, 255]
    for values, dtype in (([-1, 5], np.int32), ([-0.5, 1.0], np.float32), ([np.nan, 1.0], np.float32)):
        with pytest.raises(ValueError, match="has values from"):
            first_channel(values, dtype)


def test_big_endian_16_bit():
    little = PIL.Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16))
    big = PIL.Image.frombytes("I;16B", little.size, np.array([[0, 25700, 65535]], dtype=">u2").tobytes())
    assert np.asarray(image_to_rgb(big))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_image(tmp_path: Path):
    colour = PIL.Image.new("RGB", SIZE, (200, 100, 50)).convert("CMYK")
    (tmp_path / "good").mkdir()
    colour.save(tmp_path / "good/a.jpg", quality=100)
    image = load_anomaly_dataset(tmp_path)[0]["image"]
    assert image.mode == "CMYK"
    assert np.abs(np.asarray(image_to_rgb(image)).astype(int) - (200, 100, 50)).max() <= 3


def test_transparency_lies_over_white(tmp_path: Path):
    rgba = PIL.Image.new("RGBA", (3, 1), (200, 100, 50, 255))
    rgba.putpixel((1, 0), (200, 100, 50, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    expected = [[[200, 100, 50], [255, 255, 255], [204, 204, 204]]]
    assert np.asarray(image_to_rgb(rgba)).tolist() == expected
    grey = PIL.Image.new("LA", (2, 1), (80, 255))
    grey.putpixel((1, 0), (80, 0))
    assert np.asarray(image_to_rgb(grey)).tolist() == [[[80] * 3, [255] * 3]]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(image_to_rgb(PIL.Image.open(tmp_path / "p.png"))).tolist() == [[[10, 20, 30], [255] * 3]]


def test_images_are_turned_upright(tmp_path: Path):
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    image = PIL.Image.new("RGB", (2, 1), "black")
    image.putpixel((0, 0), (255, 0, 0))
    image.save(tmp_path / "a.png", exif=exif)
    upright = image_to_rgb(PIL.Image.open(tmp_path / "a.png"))
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert image_to_rgb(upright).size == (1, 2)  # once is enough


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16", "I", "F"])
def test_masks_of_every_mode(mode: str):
    left = left_mask(1)
    if mode == "1":
        left = left.point(lambda value: 255 * value)
    mask = PIL.Image.fromarray(np.asarray(left).astype(np.uint16)) if mode == "I;16" else left.convert(mode)
    marked = mask_to_array(mask)
    assert marked.dtype == bool
    assert marked.shape == SIZE[::-1]
    assert marked[:, :3].all()
    assert not marked[:, 3:].any()


def disc(side: int = 96, value: int = 255) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return (((rows - 40) ** 2 + (columns - 50) ** 2 < 400) * value).astype(np.uint8)


@pytest.mark.parametrize("quality", [30, 60, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_mask_saved_as_jpeg_does_not_grow(tmp_path: Path, quality: int, mode: str):
    PIL.Image.fromarray(disc()).convert(mode).save(tmp_path / "mask.jpg", quality=quality)
    with PIL.Image.open(tmp_path / "mask.jpg") as mask:
        marked = mask_to_array(mask)
    assert abs(int(marked.sum()) / int((disc() > 0).sum()) - 1.0) < 0.02
    assert (marked != (disc() > 0)).mean() < 0.005


@pytest.mark.parametrize(("value", "quality"), [(64, 75), (128, 75), (200, 30), (255, 95)])
def test_a_grey_mask_saved_as_jpeg_does_not_grow(tmp_path: Path, value: int, quality: int):
    """Ringing makes some pixels brighter than the defect, which then is not the largest value."""
    rows, columns = np.mgrid[:200, :200]
    disk = (rows - 100) ** 2 + (columns - 100) ** 2 < 45**2
    PIL.Image.fromarray((disk * value).astype(np.uint8)).save(tmp_path / "mask.jpg", quality=quality)
    found = mask_to_array(PIL.Image.open(tmp_path / "mask.jpg"))
    assert (found != disk).sum() < 0.02 * disk.sum()


def test_a_mask_with_soft_edges_is_cut_at_half_of_its_largest_value():
    soft = PIL.Image.fromarray(disc(96)).resize((480, 480), PIL.Image.Resampling.BICUBIC)
    deep = PIL.Image.fromarray(np.asarray(soft).astype(np.uint16) * 16)  # 12 of 16 bits
    floating = PIL.Image.fromarray(np.asarray(soft).astype(np.float32) / 255.0)
    expected = np.asarray(soft) >= 128
    for mask in (soft, deep, floating):
        assert (mask_to_array(mask) == expected).all()
    assert abs(expected.sum() / 25 / (disc(96) > 0).sum() - 1.0) < 0.02


@pytest.mark.parametrize(
    "values",
    [[0, 1], [0, 255], [0, 3], [0, 1, 2, 3, 4], [0, 7, 12, 20], [0, 85, 170, 255], [0, 128, 255], [0, 240, 255]],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_mask_of_labels_marks_all_of_them(values: list[int], dtype: type):
    labels = np.repeat(np.array(values, dtype)[None], 6, axis=0)
    assert (mask_to_array(PIL.Image.fromarray(labels)) == (labels > 0)).all()


def scratch_and_blob() -> PIL.Image.Image:
    mask = PIL.Image.new("L", (160, 160))
    PIL.ImageDraw.Draw(mask).line([(10, 20), (140, 61)], fill=255, width=3)
    PIL.ImageDraw.Draw(mask).ellipse([70, 80, 117, 121], fill=255)
    return mask


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_mask_made_smaller_by_averages_does_not_grow(times: int, dtype: type):
    averaged = np.asarray(scratch_and_blob().reduce(times)).astype(dtype)
    found = mask_to_array(PIL.Image.fromarray(averaged))
    assert (found == (averaged >= 127.5)).all()
    area = (np.asarray(scratch_and_blob()) > 0).sum() / times**2
    assert abs(found.sum() / area - 1) < 0.1  # half a pixel counts
    assert (averaged > 0).sum() > 1.1 * area


@pytest.mark.parametrize("label", [64, 85, 127, 128])
def test_two_labels_that_touch_are_both_marked(label: int):
    mask = PIL.Image.new("L", (96, 96))
    for row, value in ((20, label), (21, 255)):
        PIL.ImageDraw.Draw(mask).line([(10, row), (80, row + 13)], fill=value, width=1)
    PIL.ImageDraw.Draw(mask).ellipse([20, 50, 60, 80], fill=255, outline=label, width=2)
    assert (mask_to_array(mask) == (np.asarray(mask) > 0)).all()


@pytest.mark.parametrize("order", [(85, 170, 255), (255, 85, 170), (64, 128, 191), (128, 255, 128)])
def test_labels_that_are_even_fractions_of_the_largest_are_all_marked(order: tuple[int, ...]):
    """Thin defects, or areas side by side; of a defect's edge most pixels would have a larger value beside them."""
    thin, wide = PIL.Image.new("L", (96, 96)), PIL.Image.new("L", (96, 96))
    for i, value in enumerate(order):
        PIL.ImageDraw.Draw(thin).line([(10, 10 + 25 * i), (80, 23 + 25 * i)], fill=value, width=2)
        PIL.ImageDraw.Draw(wide).rectangle([10 + 20 * i, 10, 29 + 20 * i, 40], fill=value)
    for mask in (thin, wide):
        assert (mask_to_array(mask) == (np.asarray(mask) > 0)).all()


def test_halved_masks_are_told(mvtec: Path):
    mask = scratch_and_blob().reduce(2)
    mask.save(mvtec / "bottle/ground_truth/crack/000_mask.png")
    mask.save(mvtec / "bottle/test/crack/000.png")
    with pytest.warns(UserWarning, match="1 masks have more than two values, .*crack/000_mask.png first"):
        load_anomaly_dataset(mvtec, "test")


@pytest.mark.parametrize("values", [(1, 255), (20, 255), (7, 99, 100), (10, 128, 200)])
def test_kinds_of_defect_with_values_far_apart_are_all_marked(values: tuple[int, ...]):
    mask = np.zeros((60, 60), np.uint8)
    for i, value in enumerate(values):
        mask[5 + 15 * i : 15 + 15 * i, 10:40] = value
    assert np.array_equal(mask_to_array(PIL.Image.fromarray(mask)), mask > 0)


@pytest.mark.parametrize("count", [20, 64, 99, 250])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_mask_that_numbers_many_defects_marks_all_of_them(count: int, dtype: type):
    labels = np.zeros((16 * 8, 16 * 8), dtype)
    for i in range(count):
        top, left = 8 * (i // 16), 8 * (i % 16)
        labels[top : top + 6, left : left + 1 + i % 6] = i + 1
    assert np.array_equal(mask_to_array(PIL.Image.fromarray(labels)), labels > 0)


def test_defects_in_many_colours_are_all_marked():
    colours = np.zeros((64, 64, 3), np.uint8)
    for i, colour in enumerate(np.random.default_rng(0).integers(1, 256, (36, 3))):
        colours[10 * (i // 6) + 2 : 10 * (i // 6) + 10, 10 * (i % 6) + 2 : 10 * (i % 6) + 10] = colour
    assert np.array_equal(mask_to_array(PIL.Image.fromarray(colours)), colours.max(axis=2) > 0)


def test_a_slope_so_long_that_it_has_steps_is_a_soft_edge():
    slope = np.repeat(np.linspace(0, 255, 3000).astype(np.uint8)[None], 40, axis=0)
    assert np.array_equal(mask_to_array(PIL.Image.fromarray(slope)), slope >= 128)


def test_a_palette_of_dark_colours_marks_all_but_black():
    mask = PIL.Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), mode="P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 64, 0, 255, 255, 255])
    assert mask_to_array(mask).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("ink", [(0, 0, 0), (255, 255, 255), (200, 30, 30)])
@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_defect_drawn_on_a_transparent_ground_is_the_mask(ink: tuple, ground: tuple, mode: str):
    mask = PIL.Image.new("RGBA", (8, 4), (*ground, 0))
    mask.paste((*ink, 255), (2, 1, 5, 3))
    marked = mask_to_array(mask.convert(mode))
    assert marked[1:3, 2:5].all()
    assert marked.sum() == 6


def test_a_mask_all_of_which_is_transparent_counts_by_its_values():
    mask = PIL.Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    mask.putpixel((1, 1), (255, 255, 255, 0))
    assert mask_to_array(mask).sum() == 1
    assert not mask_to_array(PIL.Image.new("RGBA", (4, 2), (0, 0, 0, 255))).any()


def test_masks_with_soft_edges_get_one_word_a_data_set(mvtec: Path):
    for number in range(2):
        mask = mvtec / f"bottle/ground_truth/crack/{number:03}_mask.png"
        values = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint8)
        PIL.Image.fromarray(values).save(mask)
    with pytest.warns(UserWarning, match=r"2 masks have more than two values, .*crack/000_mask.png first") as caught:
        load_anomaly_dataset(mvtec, "test")
    assert len(caught) == 1


def test_mask_follows_its_image():
    image = PIL.Image.new("RGB", (40, 20))
    mask = PIL.Image.new("L", (40, 20))
    for canvas, value in ((image, (255,) * 3), (mask, 1)):
        canvas.paste(value, (16, 4, 24, 8))
    resized, marked = resize_image_and_mask(image, mask, 10)
    assert resized.size == (10, 10)
    assert marked.shape == (10, 10)
    assert marked.dtype == bool
    assert marked[2:4, 4:6].all()
    assert marked.sum() == 4
    assert ((np.asarray(resized)[..., 0] > 127) == marked).all()
    resized, marked = resize_image_and_mask(image, None, (6, 9))
    assert resized.size == (9, 6)
    assert marked.shape == (6, 9)
    assert not marked.any()


def test_thin_defects_are_counted_where_they_are_resized():
    mask = PIL.Image.new("L", (64, 64))
    draw = PIL.ImageDraw.Draw(mask)
    draw.rectangle((0, 0, 15, 15), fill=255)
    assert defects_at(mask, (16, 16)) == (1, 0, 0)
    draw.line((20, 0, 20, 63), fill=255)  # between the columns that are kept
    assert defects_at(mask, (16, 16)) == (2, 1, 0)
    assert defects_at(mask, (64, 64)) == (2, 0, 0)
    draw.line((30, 0, 63, 50), fill=255)
    assert defects_at(mask, (16, 16)) == (3, 1, 1)
    inside = np.zeros((64, 64), bool)
    inside[:, 25:] = True
    assert defects_at(mask, (16, 16), inside) == (1, 0, 1)


def test_resizing_rejects_bad_input():
    with pytest.raises(ValueError, match="`mask` is"):
        resize_image_and_mask(pil(), left_mask().resize((5, 5)), 4)
    with pytest.raises(ValueError, match="`size` must be positive"):
        resize_image_and_mask(pil(), None, (0, 4))


def test_each_part_goes_to_the_smaller_half():
    paths = [
        f"lot7/{part}-view{view}.png"
        for part, views in (("a", 4), ("b", 1), ("c", 2), ("d", 1))
        for view in range(views)
    ]
    part = part_index(paths, r"(\w)-view")
    assert part.tolist() == [0, 0, 0, 0, 1, 2, 2, 3]
    assert halve_parts(part).tolist() == [False] * 4 + [True] * 4
    assert halve_parts(part_index(paths, None)).tolist() == [False, True] * 4


def test_a_part_pattern_needs_paths():
    with pytest.raises(ValueError, match=r"has none for its images\. Leave it out"):
        part_index(["a.png", ""], "a")


# Names and files that other tools and other people use


@pytest.mark.parametrize(
    "good",
    ["Good", "OK", "normal", "defect-free", "No defect", "good_parts", "OK-Images", "No Defects", "good_samples"],
)
@pytest.mark.parametrize("place", ["{}", "test/{}", "bottle/{}", "bottle/test/{}"])
def test_good_images_are_good_by_any_usual_name(tmp_path: Path, good: str, place: str):
    folder = place.format(good)
    write_image(tmp_path / folder / "1.png")
    write_image(tmp_path / Path(folder).with_name("dent") / "2.png")
    if "test" in place:
        write_image(tmp_path / folder.replace("test", "train") / "3.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test = load_anomaly_dataset(tmp_path, "test")
    assert sorted(zip(test["defect"], test["label"], strict=True)) == [("dent", 1), ("good", 0)]
    assert load_anomaly_dataset(tmp_path)["defect"] == ["good"]


def test_a_test_without_masks_says_once_which_folders_are_defects(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    for name in ("train/good/0.png", "test/good/1.png", "test/fine/2.png", "test/dent/3.png"):
        write_image(tmp_path / name)
    for _ in range(2):
        load_anomaly_dataset(tmp_path, "test")
    assert [record.getMessage() for record in caplog.records if "dent, fine" in record.getMessage()] == [
        f"{tmp_path}/test has no masks. Images in dent, fine count as defective, and those in a folder named `good` as "
        "good."
    ]
    caplog.clear()
    warn_once.cache_clear()
    for name in ("fine/2.png", "dent/3.png"):
        write_mask(tmp_path / "ground_truth" / name)
    load_anomaly_dataset(tmp_path, "test")
    assert not caplog.records


def test_two_masks_of_one_image_are_refused(tmp_path: Path):
    write_image(tmp_path / "train" / "good" / "0.png")
    for name in ("0.png", "0_mask.png", "0_GT.png"):
        write_image(tmp_path / "test" / "hole" / name)
    write_image(tmp_path / "test" / "good" / "0.png")
    with pytest.raises(ValueError, match="are masks of one image"):
        load_anomaly_dataset(tmp_path, "test")


def test_masks_of_good_images_are_no_category(tmp_path: Path):
    for place in ("good/0.png", "hole/0.png"):
        write_image(tmp_path / place)
        write_mask(tmp_path / "ground_truth" / place)
    test = load_anomaly_dataset(tmp_path, "test")
    assert test["category"] == [tmp_path.name] * 2
    assert test["defect"] == ["good", "hole"]


def test_a_table_of_categories_makes_no_defect_good(tmp_path: Path):
    for place in ("good/0.png", "good/1.png", "bent/0.png"):
        write_image(tmp_path / place)
    (tmp_path / "metadata.csv").write_text("file_name,category\ngood/0.png,a\ngood/1.png,a\nbent/0.png,a\n")
    assert load_anomaly_dataset(tmp_path, "train")["defect"] == ["good", "good"]
    assert sorted(load_anomaly_dataset(tmp_path, "test")["defect"]) == ["bent", "good", "good"]


def test_a_category_may_have_the_name_of_good_images(tmp_path: Path):
    for category in ("pass", "liver"):
        for place in ("good/0.png", "good/1.png", "bent/0.png"):
            write_image(tmp_path / category / place)
    assert sorted(load_anomaly_dataset(tmp_path, "train")["category"]) == ["liver", "liver", "pass", "pass"]


@pytest.mark.parametrize("ending", ["_mask", "_GT"])
def test_masks_beside_defective_images_are_theirs(tmp_path: Path, ending: str):
    for name in ("train/good/0", "test/good/1", "test/dent/2", "test/dent/night/2", "test/dent/a_mask"):
        write_image(tmp_path / f"{name}.bmp")
    for name in ("dent/2", "dent/night/2", "dent/a_mask"):
        write_mask(tmp_path / f"test/{name}{ending}.png")
    test = load_anomaly_dataset(tmp_path, "test")
    assert defects(test) == ["dent"] * 3 + ["good"]
    assert_masks_mark_the_left(test)
    (tmp_path / f"test/dent/night/2{ending}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*night/2\.bmp: expected 2_mask\.\* beside it"):
        load_anomaly_dataset(tmp_path, "test")


def test_masks_in_their_folder_count_more_than_those_beside_images(tmp_path: Path):
    for name in ("train/good/0.png", "test/dent/2.png", "test/dent/2_mask.png"):
        write_image(tmp_path / name)
    write_mask(tmp_path / "ground_truth/dent/2.png")
    with pytest.warns(UserWarning, match=r"1 masks beside images are left out.*2_mask\.png first.*ground_truth/dent"):
        test = load_anomaly_dataset(tmp_path, "test")
    assert len(test) == 1
    assert_masks_mark_the_left(test)


@pytest.mark.parametrize("folder", [".", "good", "train/good"])
def test_masks_beside_good_images_are_left_out(tmp_path: Path, folder: str):
    for i in range(3):
        write_image(tmp_path / folder / f"{i}.png")
        write_mask(tmp_path / folder / f"{i}_mask.png", value=0)
    write_image(tmp_path / folder / "face_mask.png")  # beside no `face`
    with pytest.warns(UserWarning, match=r"3 masks beside images are left out, .*0_mask\.png first.*count as good"):
        train = load_anomaly_dataset(tmp_path)
    assert [Path(path).name for path in train["path"]] == ["0.png", "1.png", "2.png", "face_mask.png"]


def test_two_spellings_of_good_are_both_good(tmp_path: Path):
    for name in ("train/good/0.png", "test/good/1.png", "test/Good/2.png", "test/dent/3.png"):
        write_image(tmp_path / name)
    assert sorted(load_anomaly_dataset(tmp_path, "test")["label"]) == [0, 0, 1]


def test_masks_meet_images_whose_names_are_in_another_unicode_form(tmp_path: Path):
    """MacOS keeps an accent as a letter of its own, and archives carry it elsewhere."""
    composed, decomposed = "gr\u00fcn", "gru\u0308n"
    write_image(tmp_path / "train/good/0.png")
    write_image(tmp_path / f"test/{composed}/{decomposed}.png")
    write_mask(tmp_path / f"ground_truth/{decomposed}/{composed}_mask.png")
    (row,) = load_anomaly_dataset(tmp_path, "test")
    assert (row["defect"], row["label"]) == (composed, 1)
    assert mask_to_array(row["mask"]).any()


def test_another_tools_metadata_does_not_change_a_plain_folder(tmp_path: Path):
    for i in range(6):
        write_image(tmp_path / f"{'train_' if i % 2 else ''}{i}.png")
    (tmp_path / "metadata.csv").write_text("station,operator\n1,alice\n")
    assert len(load_anomaly_dataset(tmp_path)) == 6
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"camera": 3}\n')
    assert len(load_anomaly_dataset(tmp_path)) == 6
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "good"}\n')
    assert len(load_anomaly_dataset(tmp_path, dataset="folder")) == 6  # forced
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,operator\n0.png,alice\ntrain_1.png,bob\n")
    assert len(load_anomaly_dataset(tmp_path)) == 6


def test_links_and_service_folders_in_a_data_set(tmp_path: Path):
    for name in ("good/1.png", "good/@eaDir/1.png", "good/.ipynb_checkpoints/1.png", "@eaDir/x.png", "__MACOSX/y.png"):
        write_image(tmp_path / "line" / name)
    write_image(tmp_path / "camera2/2.jfif".replace(".jfif", ".gif"))
    (tmp_path / "line/good/cam2").symlink_to(tmp_path / "camera2")
    (tmp_path / "line/good/cam2/back").symlink_to(tmp_path / "line/good")
    assert relative(load_anomaly_dataset(tmp_path / "line"), tmp_path / "line") == ["good/1.png", "good/cam2/2.gif"]


def test_copies_are_what_networks_see_as_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffad.data.checks.BAND_PIXELS", 3 * SIZE[0])  # several bands an image
    grey = PIL.Image.fromarray(np.arange(96, dtype=np.uint8).reshape(SIZE[::-1]))
    changed = grey.copy()
    changed.putpixel((11, 7), 0)
    indices = grey.convert("P")
    indices.putpalette([value for i in range(256) for value in (i, 0, 0)])
    images = {"a.png": grey, "b.bmp": grey.convert("RGB"), "c.png": changed, "d.gif": indices, "e.png": grey}
    for name, image in images.items():
        image.save(tmp_path / name, compress_level=1 if name == "e.png" else 6)
    with pytest.warns(UserWarning, match=r"Left out 2 good images that are copies of others: .*b\.bmp of .*a\.png"):
        good = without_copies(load_anomaly_dataset(tmp_path))
    assert relative(good, tmp_path) == ["a.png", "c.png", "d.gif"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", ["good", "bent", ""]),
        ("label", ["0", "1", ""]),
        ("label", ["0", "1", "-1"]),
        ("defect", ["good", "bent", "NA"]),
    ],
)
def test_a_row_that_says_nothing_is_not_good(tmp_path: Path, column: str, values: list[str], streaming: bool):
    write_metadata(tmp_path / "parts", ["0.png", "1.png", "2.png"])
    lines = [f"{i}.png,{value}\n" for i, value in enumerate(values)]
    (tmp_path / "parts/metadata.csv").write_text(f"file_name,{column}\n" + "".join(lines))
    with pytest.raises(ValueError, match=rf"parts/2\.png has no `{column}`.*take its row out"):
        list(load_anomaly_dataset(tmp_path / "parts", streaming=streaming))


def test_a_row_without_a_class_is_named_by_its_number(tmp_path: Path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["good", "bent"])}
    columns = {"image": [pil(1), pil(2)], "label": [0, -1]}
    with pytest.raises(ValueError, match=r"parts: the image of row 1 has no `label`"):
        load_anomaly_dataset(write_parquet(tmp_path / "parts", columns, features))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["Label", " label", "Label ", "DEFECT"])
def test_capitals_and_spaces_in_a_tables_header_do_not_count(tmp_path: Path, column: str, streaming: bool):
    for i, name in enumerate(["good", "bent"]):
        write_image(tmp_path / f"parts/{i}.png", i)
        with (tmp_path / "parts/metadata.csv").open("a") as file:
            file.write(f"file_name,{column}\n" * (i == 0) + f"{i}.png,{name}\n")
    rows = load_anomaly_dataset(tmp_path / "parts", streaming=streaming)
    assert [(row["label"], row["defect"]) for row in rows] == [(0, "good"), (1, "bent")]
    columns = {"image": [pil(1), pil(2)], column: ["good", "bent"]}
    write_parquet(tmp_path / "table", columns, {"image": datasets.Image(), column: datasets.Value("string")})
    rows = load_anomaly_dataset(tmp_path / "table", streaming=streaming)
    assert [(row["label"], row["defect"]) for row in rows] == [(0, "good"), (1, "bent")]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("file_name,labels", "it has the column 'labels', not 'label'"),
        ("file_name,Class", "it has the column 'class', not 'label'"),
        ("file_name,is_defect", "it has the column 'is_defect', not 'label'"),
        ("file_name;label", "its columns are not divided by commas"),
        ("filename,label", "it has no column 'file_name'"),
        ("file_name,text", None),
        ("file_name;text", None),
    ],
)
def test_labels_that_are_not_read_are_told(tmp_path: Path, header: str, reason: str | None):
    write_image(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(f"{header}\n0.png{header[9 - header.startswith('filename')]}bent\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        load_anomaly_dataset(tmp_path)
        load_anomaly_dataset(tmp_path, dataset="folder")  # asked for the files alone
    told = [str(one.message) for one in caught if "metadata.csv seems to have labels" in str(one.message)]
    assert len(told) == (reason is not None)
    assert all(reason in one and "all images count as good" in one for one in told)


def warnings_of(folder: Path, split: str = "train", **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        load_anomaly_dataset(folder, split, **options)
    return [str(one.message) for one in caught if one.category is UserWarning]


def test_columns_none_of_which_is_read_are_told_once(tmp_path: Path):
    write_metadata(tmp_path, ["0.png", "1.png"], "station,found", "3,bent")
    (told,) = warnings_of(tmp_path)
    assert "metadata.csv may have labels, but it has the columns 'found', 'station', not 'label'" in told
    assert "by the columns 'file_name' and 'label'" in told
    assert "--dataset folder" in told
    assert not warnings_of(tmp_path, dataset="folder")
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "anomalous": true, "station": 3}\n')
    (told,) = warnings_of(tmp_path)
    assert "metadata.jsonl seems to have labels, but it has the column 'anomalous', not 'label'" in told


def test_columns_beside_labels_that_are_read_are_not_told(tmp_path: Path):
    write_metadata(tmp_path / "listed", ["0.png", "1.png"], "is_defect,label", "0,good")
    assert not warnings_of(tmp_path / "listed")
    write_metadata(tmp_path / "names", ["0.png", "1.png"], "category", "nut")
    assert not warnings_of(tmp_path / "names")
    write_metadata(tmp_path / "sorted/good", ["0.png"])
    (tmp_path / "sorted/good/metadata.csv").rename(tmp_path / "sorted/labels.csv")
    write_image(tmp_path / "sorted/bent/1.png")
    assert not warnings_of(tmp_path / "sorted")
    for part in ("nut", "bolt"):
        write_image(tmp_path / f"parts/{part}/good/0.png")
    (tmp_path / "parts/labels.csv").write_text("image,label\nnut/good/0.png,good\n")
    assert not warnings_of(tmp_path / "parts")


def test_columns_beside_a_category_are_told(tmp_path: Path):
    write_metadata(tmp_path / "parts", ["0.png", "1.png"], "category,flawed", "nut,yes")
    (told,) = warnings_of(tmp_path / "parts")
    assert "parts has the column 'flawed', not 'label'. So all images count as good." in told


@pytest.mark.parametrize("name", ["labels.csv", "annotations.csv", "train_labels.csv", "Labels.jsonl"])
def test_a_table_of_labels_by_another_name_is_told(tmp_path: Path, name: str):
    write_image(tmp_path / "0.png")
    (tmp_path / name).write_text("image,label\n0.png,bent\n")
    (told,) = warnings_of(tmp_path)
    assert f"{name} seems to have labels, but a table of this name is not read. So all images count as good." in told


@pytest.mark.parametrize("labels", ["", ",good"])
def test_a_column_of_splits_is_told_to_count_for_nothing(tmp_path: Path, labels: str):
    folder, names = tmp_path / "parts", ["0.png", "1.png", "2.png"]
    write_metadata(folder, names, "split,label" if labels else "split", "train" + labels)
    assert not warnings_of(folder)
    table = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(table.replace("2.png,train", "2.png,Test"))
    (told,) = warnings_of(folder)
    assert "metadata.csv has a column 'split', which is not followed: its images of 'Test' count in 'train'" in told
    for split in ("train", "test"):  # the advice
        write_metadata(tmp_path / f"moved/{split}", ["0.png"], "split,label", f"{split},good")
    assert not warnings_of(tmp_path / "moved", "train")
    assert not warnings_of(tmp_path / "moved", "test")


def test_a_column_of_splits_that_folders_have_as_well_is_not_told(tmp_path: Path):
    rows = ["train/0.png,train", "test/good/1.png,test"]
    for row in rows:
        write_image(tmp_path / "above" / row.split(",")[0])
    (tmp_path / "above/metadata.csv").write_text("\n".join(["file_name,split", *rows]))
    assert not warnings_of(tmp_path / "above")
    folder = write_parquet(tmp_path / "table", {"image": [pil(1)]}, {"image": datasets.Image()})
    write_metadata(folder / "raw", ["0.png", "1.png"], "split", "test")
    assert not warnings_of(folder)
    for kind in ("good", "bent"):
        write_image(tmp_path / f"sorted/{kind}/{kind}.png")
    (tmp_path / "sorted/metadata.csv").write_text("file_name,split\ngood/good.png,train\nbent/bent.png,test\n")
    assert not warnings_of(tmp_path / "sorted")


@pytest.mark.parametrize("columns", ["text", "image_id,width,height", ",sha256", "caption,timestamp"])
def test_columns_that_are_no_labels_are_not_told(tmp_path: Path, columns: str):
    write_metadata(tmp_path, ["0.png", "1.png"], columns, ",".join("1" for _ in columns.split(",")))
    assert not warnings_of(tmp_path)


def test_a_data_set_saved_to_disk_is_told_to_become_parquet(tmp_path: Path):
    saved = datasets.Dataset.from_dict({"image": [pil(1)]}, features=datasets.Features({"image": datasets.Image()}))
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`load_from_disk` instead\. Or save it as parquet \(`ds\.to_parquet`\)"):
        load_anomaly_dataset(tmp_path / "saved")
    (tmp_path / "parts").mkdir()
    datasets.load_from_disk(tmp_path / "saved").to_parquet(tmp_path / "parts/train.parquet")
    assert len(load_anomaly_dataset(tmp_path / "parts")) == 1


def test_a_table_with_classes_instead_of_labels_is_told(tmp_path: Path):
    features = {"image": datasets.Image(), "class": datasets.Value("string")}
    folder = write_parquet(tmp_path / "parts", {"image": [pil()], "class": ["bent"]}, features)
    with pytest.warns(UserWarning, match="parts has the column 'class', not 'label'. So all images count as good"):
        load_anomaly_dataset(folder)
