"""Where maps of an evaluation go."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from diffad.evaluation.detectors import name_maps, split_by_category


def test_maps_are_named_by_the_data_sets_own_relative_path():
    paths = ["/d/tile/test/good/000.png", "/d/tile/test/hole/000.png", "/d/tile/test/hole/night/000.png"]
    assert name_maps(paths, ["good", "hole", "hole"], "tile") == [
        "tile/test/good/000.tiff",
        "tile/test/hole/000.tiff",
        "tile/test/hole/night/000.tiff",
    ]


def test_no_two_images_share_a_map():
    names = name_maps(["/d/hole/0.png", "/d/hole/0.jpg", "", "", "/d/hole/" + "x" * 250 + ".png"], ["hole"] * 5, "tile")
    assert len(set(names)) == 5
    assert all(len(part.encode()) <= 200 for name in names for part in name.split("/"))


@pytest.mark.parametrize("label", ["../../../x", "..", "/etc", "a/b", "..\\x", ""])
def test_labels_and_paths_lead_nowhere_else(label):
    for name in name_maps(["../../x.png", "/d/../../y.png"], [label, label], label):
        assert len(name.split("/")) >= 4
        assert not {"", ".", ".."} & set(name.split("/"))
        assert "\\" not in name


def test_a_category_cannot_be_named_as_the_mean_is():
    with pytest.raises(ValueError, match=r"category is named 'mean'.*Rename it"):
        split_by_category(Dataset.from_dict({"category": np.array(["mean", "tile"])}))
