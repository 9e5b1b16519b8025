"""Pipelines that version 0.1 saved: they load by their class, and through diffusers once they were saved again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import generator, textures, tiny_pipeline
from diffusers import DiffusionPipeline
from version_0_1 import as_version_0_1

from diffad import AnomalyDenoisePipeline
from diffad.pipelines.loading import load_pipeline

CATEGORIES = ["zebra", "apple"]  # not in alphabetical order


def maps(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(textures(2, first_seed=90), category="apple", generator=generator(), output_type="pt")
    return output.anomaly_map


@pytest.fixture
def pipeline() -> AnomalyDenoisePipeline:
    new = tiny_pipeline(categories=CATEGORIES, alpha=0.25)
    return new.calibrate(textures(8), category="apple", false_alarm_rate=0.25, generator=generator())


@pytest.fixture
def saved(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "old")
    return as_version_0_1(tmp_path / "old")


@pytest.mark.parametrize("load", [AnomalyDenoisePipeline.from_pretrained, load_pipeline])
def test_it_loads_by_its_class_and_runs_no_code(load, saved, pipeline):
    loaded = load(saved)
    assert type(loaded) is AnomalyDenoisePipeline
    assert loaded.categories == CATEGORIES
    assert loaded.config.alpha == 0.25
    assert loaded.gaussian is None
    assert torch.equal(maps(loaded), maps(pipeline))


def test_saved_again_it_loads_through_diffusers(saved, pipeline, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "pipeline.py").write_text("# of the folder's owner\n")
    loaded = AnomalyDenoisePipeline.from_pretrained(saved)
    for folder in (saved, tmp_path / "new"):
        loaded.save_pretrained(folder)
        assert torch.equal(maps(DiffusionPipeline.from_pretrained(folder)), maps(pipeline))
    assert not (saved / "pipeline.py").exists()
    assert (tmp_path / "new" / "pipeline.py").exists()
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "AnomalyDenoisePipeline"
    assert index["unet"] == ["diffad", "DenoisingUNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["gaussian"] == [None, None]
    assert index["categories"] == {"0": "zebra", "1": "apple"}


def test_a_setting_that_is_gone_is_named(saved, pipeline, caplog):
    loaded = AnomalyDenoisePipeline.from_pretrained(as_version_0_1(saved, old_setting=3))
    assert "'old_setting': 3" in caplog.text
    assert torch.equal(maps(loaded), maps(pipeline))


def test_settings_that_are_gone_and_did_nothing_are_no_word_worth(saved, caplog):
    AnomalyDenoisePipeline.from_pretrained(as_version_0_1(saved, suppression=0.0, position_prior_images=8.0))
    assert "not expected" not in caplog.text
    AnomalyDenoisePipeline.from_pretrained(as_version_0_1(saved, suppression=0.4))
    assert "'suppression': 0.4" in caplog.text


def test_a_model_of_one_category_has_no_names(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert AnomalyDenoisePipeline.from_pretrained(as_version_0_1(tmp_path)).categories == []


def test_another_librarys_pipeline_is_not_loaded(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match=r"holds a DDPMPipeline, which is none of diffad's.*Load it by its own class"):
        load_pipeline(tmp_path)
