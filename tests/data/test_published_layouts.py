"""Data sets on miniature trees, from their published descriptions: none of these was read from the real files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import SIZE, write_image, write_mask, write_mvtec_category

from diffad.data import load_anomaly_dataset


def names(dataset, root: Path) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in dataset["path"]]


def test_mvtec_ad_2_takes_the_public_test(tmp_path: Path):
    can = tmp_path / "can"
    for i in range(3):
        write_image(can / f"train/good/{i:03}_regular.png")
        write_image(can / f"test_private/{i:03}_regular.png")
        write_image(can / f"test_private_mixed/{i:03}_mixed.png")
    write_image(can / "validation/good/000_regular.png")
    write_image(can / "test_public/good/000_regular.png")
    write_image(can / "test_public/bad/000_overexposed.png")
    write_mask(can / "test_public/ground_truth/bad/000_overexposed_mask.png")
    assert len(load_anomaly_dataset(tmp_path, "train")) == 3
    assert names(load_anomaly_dataset(tmp_path, "validation"), can) == ["validation/good/000_regular.png"]
    test = load_anomaly_dataset(tmp_path, "test")
    assert names(test, can) == ["test_public/bad/000_overexposed.png", "test_public/good/000_regular.png"]
    assert test["label"] == [1, 0]
    assert set(test["category"]) == {"can"}
    assert (np.asarray(test[0]["mask"])[:, :3] == 255).all()
    (can / "test_public/ground_truth/bad/000_overexposed_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*000_overexposed\.png"):
        load_anomaly_dataset(can, "test")


@pytest.fixture
def loco(tmp_path: Path) -> Path:
    """A category as published, with two masks of the one image and one of the other."""
    category = tmp_path / "loco" / "pushpins"
    for i in range(3):
        write_image(category / f"train/good/{i:03}.png")
    write_image(category / "validation/good/000.png")
    write_image(category / "test/good/000.png")
    for defect in ("logical_anomalies", "structural_anomalies"):
        write_image(category / f"test/{defect}/000.png")
    first = category / "ground_truth/logical_anomalies/000"
    write_mask(first / "000.png", 255)
    second = np.zeros(SIZE[::-1], np.uint8)
    second[:, 2:5] = 254  # overlaps the first by a column
    Image.fromarray(second).save(first / "001.png")
    write_mask(category / "ground_truth/structural_anomalies/000/000.png", 253)
    return category.parent


def test_mvtec_loco_has_a_folder_of_masks_for_each_image(loco: Path):
    assert len(load_anomaly_dataset(loco, "train")) == 3
    assert len(load_anomaly_dataset(loco, "validation")) == 1
    test = load_anomaly_dataset(loco, "test")
    assert test["defect"] == ["good", "logical_anomalies", "structural_anomalies"]
    assert test[0]["mask"] is None
    for row, columns in ((test[1], 5), (test[2], 3)):
        mask = np.asarray(row["mask"])
        assert (mask[:, :columns] == 255).all()
        assert not mask[:, columns:].any()
    streamed = load_anomaly_dataset(loco, "test", streaming=True)
    assert np.array_equal(np.asarray(list(streamed)[1]["mask"]), np.asarray(test[1]["mask"]))


def test_wrong_masks_in_a_folder_are_named(loco: Path):
    folder = loco / "pushpins/ground_truth/logical_anomalies/000"
    write_mask(folder / "001.png", size=(5, 5))
    with pytest.raises(ValueError, match=r"001\.png has another size"):
        load_anomaly_dataset(loco, "test")
    write_mask(folder / "000.png", size=(5, 5))
    with pytest.raises(ValueError, match="A mask must have the size of its image"):
        load_anomaly_dataset(loco, "test")
    for mask in folder.iterdir():
        mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"no masks for .*logical_anomalies/000\.png"):
        load_anomaly_dataset(loco, "test")


def write_real_iad(root: Path, nested: bool, resolution: int = 1024) -> Path:
    folder = root / f"realiad_{resolution}" / "audiojack"
    lists = root / "realiad_jsons" / ("realiad_jsons" if nested else "")
    lists.mkdir(parents=True, exist_ok=True)
    train, test = [], []
    for sample in range(2):
        for view in range(1, 6):
            path = f"OK/S{sample:04}/audiojack_{sample:04}_OK_C{view}_20230101.jpg"
            write_image(folder / path)
            row = {"category": "audiojack", "anomaly_class": "OK", "image_path": path, "mask_path": None}
            (train if sample == 0 else test).append(row)
    path = "NG/HS/S0002/audiojack_0002_NG_C1_20230101"
    write_image(folder / f"{path}.jpg")
    write_mask(folder / f"{path}_mask.png")
    test.append({"anomaly_class": "HS", "image_path": f"{path}.jpg", "mask_path": f"{path}_mask.png"})
    content = {"meta": {"normal_class": "OK", "prefix": "audiojack/"}, "train": train, "test": test}
    # with a byte order mark, as some editors write it
    (lists / "audiojack.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (lists / "zipper.json").write_text(json.dumps(content))  # listed, and not downloaded
    return lists / "audiojack.json"


@pytest.mark.parametrize("nested", [True, False])
def test_real_iad_is_listed_in_json(tmp_path: Path, nested: bool):
    listed = write_real_iad(tmp_path, nested)
    train = load_anomaly_dataset(tmp_path, "train")
    assert len(train) == 5
    assert set(train["category"]) == {"audiojack"}
    test = load_anomaly_dataset(tmp_path, "test")
    assert sorted(test["defect"]) == ["HS", *["good"] * 5]
    (defective,) = [row for row in test if row["label"]]
    assert (np.asarray(defective["mask"])[:, :3] == 255).all()
    listed.write_text(json.dumps({"train": [{"image": "a.jpg"}], "test": []}))
    with pytest.raises(ValueError, match=r"audiojack\.json is not as expected"):
        load_anomaly_dataset(tmp_path, "train", dataset="real_iad")


def test_mpdd_has_the_folders_of_mvtec_ad(tmp_path: Path):
    write_mvtec_category(tmp_path / "MPDD" / "bracket_black")
    assert len(load_anomaly_dataset(tmp_path / "MPDD", "train")) == 3
    test = load_anomaly_dataset(tmp_path / "MPDD", "test")
    assert (len(test), sum(test["label"])) == (5, 3)


def test_kolektor_sdd_is_split_by_items(tmp_path: Path):
    for item in range(1, 11):
        for part in range(3):
            folder = tmp_path / f"kos{item:02}"
            write_image(folder / f"Part{part}.jpg")
            write_mask(folder / f"Part{part}_label.bmp", value=255 if part == 1 else 0)
    train = load_anomaly_dataset(tmp_path, "train")
    assert not any(train["label"])
    assert len(train) == 7 * 2
    test = load_anomaly_dataset(tmp_path, "test")
    assert sum(test["label"]) == 10
    assert len(test) == 3 * 3 + 7
    good = {Path(row["path"]).parent for row in test if not row["label"]}
    assert not good & {Path(path).parent for path in train["path"]}
    assert all(np.asarray(row["mask"]).any() for row in test if row["label"])
    assert set(test["category"]) == {tmp_path.name}
    with pytest.raises(ValueError, match="has no 'validation'"):
        load_anomaly_dataset(tmp_path, "validation")
    (tmp_path / "kos03" / "Part2_label.bmp").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*Part2\.jpg: expected Part2_label\.\*"):
        load_anomaly_dataset(tmp_path, "train")


def test_kolektor_sdd_2_has_a_mask_beside_every_image(tmp_path: Path):
    for split, first in (("train", 10000), ("test", 20000)):
        for i in range(4):
            write_image(tmp_path / split / f"{first + i}.png")
            write_mask(tmp_path / split / f"{first + i}_GT.png", value=255 if i == 0 else 0)
    train = load_anomaly_dataset(tmp_path, "train")
    assert names(train, tmp_path) == ["train/10001.png", "train/10002.png", "train/10003.png"]
    test = load_anomaly_dataset(tmp_path, "test")
    assert test["label"] == [1, 0, 0, 0]
    assert np.asarray(test[0]["mask"]).any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_mask_that_cannot_be_read_is_named_or_skipped(tmp_path: Path, split: str):
    """Only the mask says whether the image is good, so it is taken for neither."""
    for i in range(3):
        write_image(tmp_path / split / f"{i}.png")
        write_mask(tmp_path / split / f"{i}_GT.png", value=0)
    (tmp_path / split / "1_GT.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"1 images cannot be read[\s\S]*1_GT\.png"):
        load_anomaly_dataset(tmp_path, split)
    with pytest.warns(UserWarning, match=r"1_GT\.png"):
        kept = load_anomaly_dataset(tmp_path, split, on_bad_image="skip")
    assert names(kept, tmp_path) == [f"{split}/0.png", f"{split}/2.png"]


def test_lists_that_are_no_utf_8_or_cut_off_are_named(tmp_path: Path):
    listed = write_real_iad(tmp_path / "iad", nested=False)
    listed.write_bytes(b'{"train": [], "test": ["\xff"]}')
    with pytest.raises(ValueError, match=r"audiojack\.json is not as expected"):
        load_anomaly_dataset(tmp_path / "iad", "train")
    table = tmp_path / "visa" / "split_csv" / "1cls.csv"
    table.parent.mkdir(parents=True)
    write_image(tmp_path / "visa" / "a.png")
    table.write_text("object,split,label,image,mask\ncandle,train,normal,a.png,\ncandle,train\n")
    with pytest.raises(ValueError, match=r"Line 3 of .*1cls\.csv has too few columns"):
        load_anomaly_dataset(tmp_path / "visa", "train")


def test_case_does_not_make_masks_or_defects_of_images(tmp_path: Path):
    sdd2, iad, ad2 = tmp_path / "sdd2", tmp_path / "iad", tmp_path / "can"
    for split in ("Train", "Test"):
        for i in range(3):
            write_image(sdd2 / split / f"{i}.png")
            write_mask(sdd2 / split / f"{i}_gt.png", value=255 if i == 0 else 0)
    assert names(load_anomaly_dataset(sdd2, "train"), sdd2) == ["Train/1.png", "Train/2.png"]
    assert load_anomaly_dataset(sdd2, "test")["label"] == [1, 0, 0]
    listed = write_real_iad(iad, nested=False)
    listed.write_text(listed.read_text().replace('"OK"', '"ok"'))
    assert len(load_anomaly_dataset(iad, "train")) == 5
    write_image(ad2 / "test_public/good/000.png")
    write_image(ad2 / "test_public/Bad/000.png")
    write_mask(ad2 / "test_public/Ground_Truth/bad/000_mask.png")
    assert sorted(load_anomaly_dataset(ad2, "test", dataset="mvtec_ad_2")["label"]) == [0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 there")
def test_a_name_that_is_no_utf_8_is_named_or_skipped(tmp_path: Path):
    write_image(tmp_path / "good" / "0.png")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "good") + b"/1\xff.png"))
    write_image(tmp_path / "good" / "2.png").rename(odd)
    with pytest.raises(ValueError, match=r"1 images cannot be read[\s\S]*1\\xff\.png: its name is no UTF-8"):
        load_anomaly_dataset(tmp_path)
    with pytest.warns(UserWarning, match="its name is no UTF-8"):
        kept = load_anomaly_dataset(tmp_path, on_bad_image="skip")
    assert names(kept, tmp_path) == ["good/0.png"]
