"""Saving over a model: the old one or the new one, whole, and what else is in the folder stays."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import textures, tiny_extractor, tiny_pipeline
from diffusers import ModelMixin

from diffad import AnomalyDenoisePipeline, DDPMReconstructionPipeline, GradientDenoisingPipeline
from diffad.calibration import ScoreCalibration
from diffad.pipelines import saving
from diffad.pipelines.loading import load_pipeline
from diffad.pipelines.saving import save_whole


def pipeline_of(value: float) -> AnomalyDenoisePipeline:
    """Its weights and its calibration say which one it is."""
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(value)
        pipeline.calibration.pixel_threshold.fill_(value)
    return pipeline


def value_of(pipeline: AnomalyDenoisePipeline) -> float:
    weights = next(pipeline.unet.parameters()).detach()
    assert bool((weights == weights.flatten()[0]).all())
    assert bool((pipeline.calibration.pixel_threshold == weights.flatten()[0]).all()), "mixed"
    return float(weights.flatten()[0])


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
def test_two_that_save_at_once_mix_nothing(tmp_path):
    pipelines = [pipeline_of(value) for value in (1.0, 2.0)]
    with ThreadPoolExecutor() as pool:
        for _ in range(5):
            list(pool.map(lambda pipeline: pipeline.save_pretrained(tmp_path), pipelines))  # raises what a thread does
            assert value_of(AnomalyDenoisePipeline.from_pretrained(tmp_path)) in (1.0, 2.0)


def test_a_failure_half_way_leaves_the_old_model(tmp_path, monkeypatch):
    pipeline_of(1.0).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoint-5").mkdir()
    new = pipeline_of(2.0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ScoreCalibration, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(tmp_path)
    assert value_of(load_pipeline(tmp_path)) == 1.0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    new.save_pretrained(tmp_path)
    assert value_of(load_pipeline(tmp_path)) == 2.0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "checkpoint-5").is_dir()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


KILLED = """
import os, runpy, signal, sys
from pathlib import Path
folder, count = Path(sys.argv[1]), int(sys.argv[2])
save_whole = runpy.run_path(sys.argv[3])["save_whole"]  # without torch, in a moment
calls = 0
def hook(event, arguments):
    global calls
    if event in ("os.rename", "os.rmdir", "os.remove", "os.mkdir") and str(arguments[0]).startswith(str(folder)):
        calls += 1
        if calls > count:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with save_whole(folder) as unfinished:
    for name in ("a/weights", "b/weights", "config/new", "model_index.json"):
        (unfinished / name).parent.mkdir(exist_ok=True)
        (unfinished / name).write_text("new")
"""


def test_killed_at_any_step_it_is_the_old_model_or_the_new_one(tmp_path):
    names = ("a/weights", "b/weights", "model_index.json")
    seen = []
    for count in range(100):
        folder = tmp_path / str(count)
        for name in (*names, "a/notes", "c/mine", "report.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(count), saving.__file__])
        if (folder / "model_index.json").exists():  # what any reader would find
            assert len({(folder / name).read_text() for name in names}) == 1
        with save_whole(folder):  # whoever comes next
            pass
        state = {(folder / name).read_text() for name in names}
        assert len(state) == 1, count
        assert {(folder / name).read_text() for name in ("a/notes", "c/mine", "report.json")} == {"old"}
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        seen += state
        if done.returncode == 0:
            break
    assert seen == sorted(seen, reverse=True)  # the old one up to a step, and then the new one
    assert set(seen) == {"old", "new"}


def test_loading_completes_what_a_killed_process_left(tmp_path):
    pipeline_of(1.0).save_pretrained(tmp_path)
    pipeline_of(2.0).save_pretrained(tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / ".complete-model")
    (tmp_path / "unet").rename(tmp_path / "gone")
    (tmp_path / ".complete-model" / "unet").rename(tmp_path / "unet")
    (tmp_path / "model_index.json").unlink()
    assert value_of(load_pipeline(tmp_path)) == 2.0
    assert value_of(AnomalyDenoisePipeline.from_pretrained(tmp_path)) == 2.0


def test_weights_of_another_variant_stay(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    names = sorted(path.name for path in Path(tmp_path, "unet").glob("*.safetensors"))
    assert names == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    pipeline.save_pretrained(tmp_path, max_shard_size="50KB")
    names = sorted(path.name for path in Path(tmp_path, "unet").glob("*.safetensors"))
    assert "diffusion_pytorch_model.safetensors" not in names
    assert "diffusion_pytorch_model.fp16.safetensors" in names
    load_pipeline(tmp_path)


def test_variants_share_the_calibration_that_was_saved_last(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25).save_pretrained(tmp_path)
    half = AnomalyDenoisePipeline.from_pretrained(tmp_path, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same calibration: nothing is lost
        half.save_pretrained(tmp_path, variant="fp16")
    half.calibrate(textures(40, first_seed=100), false_alarm_rate=0.05)
    with pytest.warns(UserWarning, match="weights of no variant as well. All variants share `calibration`") as told:
        half.save_pretrained(tmp_path, variant="fp16")
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
    for options in ({}, {"variant": "fp16"}):
        loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path, **options).calibration
        assert loaded.false_alarm_rate == 0.05
        assert loaded.config.precision == half.calibration.config.precision
        assert torch.equal(loaded.normal_scores, half.calibration.normal_scores)
    with pytest.warns(UserWarning, match="weights of variant 'fp16' as well"):
        pipeline.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path, variant="fp16").calibration
    assert torch.equal(loaded.normal_scores, pipeline.calibration.normal_scores)


def test_a_variants_own_calibration_of_an_earlier_version_goes_and_is_told(tmp_path):
    pipeline = pipeline_of(1.0)
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    ModelMixin.save_pretrained(pipeline_of(2.0).calibration, tmp_path / "calibration", variant="fp16")
    with pytest.warns(UserWarning, match="variant 'fp16'"):
        pipeline.save_pretrained(tmp_path)
    assert value_of(AnomalyDenoisePipeline.from_pretrained(tmp_path, variant="fp16")) == 1.0


@pytest.mark.parametrize("variant", ["fp16", "non-ema"])
def test_shards_of_a_variant_go_with_its_other_weights(tmp_path, variant):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, variant=variant, max_shard_size="50KB")
    pipeline_of(2.0).save_pretrained(tmp_path, variant=variant)
    names = sorted(path.name for path in Path(tmp_path, "unet").glob("*.safetensors"))
    assert names == [f"diffusion_pytorch_model.{variant}.safetensors"]
    assert value_of(AnomalyDenoisePipeline.from_pretrained(tmp_path, variant=variant)) == 2.0


@pytest.mark.parametrize("variant", ["fp16.v1", "a/b", ""])
def test_a_variant_that_no_load_finds_is_refused(tmp_path, variant):
    with pytest.raises(ValueError, match="`variant` must be of letters"):
        tiny_pipeline().save_pretrained(tmp_path, variant=variant)
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_the_same_networks_does_not_replace_the_model(tmp_path):
    pipeline_of(1.0).save_pretrained(tmp_path)
    for other in (GradientDenoisingPipeline, DDPMReconstructionPipeline):
        with pytest.raises(ValueError, match="holds a AnomalyDenoisePipeline, whose calibration and settings would be"):
            other.from_pretrained(tmp_path).save_pretrained(tmp_path)
        other.from_pretrained(tmp_path).save_pretrained(tmp_path / other.__name__)
        other.from_pretrained(tmp_path / other.__name__).save_pretrained(tmp_path / other.__name__)
    assert value_of(AnomalyDenoisePipeline.from_pretrained(tmp_path)) == 1.0


def test_a_dtype_makes_no_file_larger(tmp_path):
    pipeline = AnomalyDenoisePipeline(
        None, None, tiny_extractor(image_size=32), position_trust=0.0, weights={"gaussian": 1.0, "nearest": 1.0}
    )
    pipeline.calibrate(textures(12, 32), false_alarm_rate=0.25).save_pretrained(tmp_path / "first")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path / "first", dtype=dtype)
        loaded.save_pretrained(tmp_path / "again")
        first, again = (next((tmp_path / name / "calibration").glob("*.safetensors")) for name in ("first", "again"))
        assert first.read_bytes() == again.read_bytes()


def test_reports_of_another_calibration_go(tmp_path):
    pipeline_of(1.0).save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "report.json").exists()  # the same calibration
    loaded.calibrate(textures(9), false_alarm_rate=0.25)
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / "report.json").exists()
    (tmp_path / "report.json").write_text("{}")  # of the new one
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "report.json").exists()
