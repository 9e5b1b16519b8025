"""Calibration over several processes, and what its maps and thresholds promise."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, texture, textures, tiny_pipeline
from launching import launch

from diffad import AnomalyDenoisePipeline
from diffad.calibration.conformal import threshold_rank
from diffad.warn_once import warn_once

SCRIPT = """
import sys
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import textures
from diffad import AnomalyDenoisePipeline

accelerator = Accelerator()
source, target, count = sys.argv[1:]
pipe = AnomalyDenoisePipeline.from_pretrained(source)
pipe.set_progress_bar_config(disable=True)
pipe.calibrate(
    textures(int(count)),
    statistics_images=textures(int(count), first_seed=100),
    false_alarm_rate=0.3,
    batch_size=4,
    generator=torch.Generator().manual_seed(0),
    accelerator=accelerator,
)
pipe.save_pretrained(f"{target}-{accelerator.process_index}")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def calibrations(tmp_path, monkeypatch, count: int) -> list[dict[str, torch.Tensor]]:
    """Buffers as one process finds them, and as each of two does."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    tiny_pipeline().save_pretrained(tmp_path / "source")
    script = tmp_path / "calibrate.py"
    script.write_text(SCRIPT)
    for processes in (1, 2):
        arguments = (tmp_path / "source", tmp_path / f"of-{processes}", count)
        launch(script, *arguments, processes=processes, cwd=tmp_path)
    folders = ("of-1-0", "of-2-0", "of-2-1")
    loaded = [AnomalyDenoisePipeline.from_pretrained(tmp_path / folder).calibration for folder in folders]
    return [dict(calibration.named_buffers()) for calibration in loaded]


def test_two_processes_find_the_calibration_of_one(tmp_path, monkeypatch):
    one, first, second = calibrations(tmp_path, monkeypatch, 9)
    for name, buffer in one.items():
        torch.testing.assert_close(first[name], buffer, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])


def test_a_process_without_an_image_takes_part(tmp_path, monkeypatch):
    one, first, second = calibrations(tmp_path, monkeypatch, 1)
    for name, buffer in one.items():
        torch.testing.assert_close(first[name], buffer, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])


def test_maps_of_new_good_images_have_deviation_one():
    pipe = tiny_pipeline().calibrate(textures(200), false_alarm_rate=0.05, generator=generator())
    maps = pipe(textures(200, first_seed=1000), generator=generator(1)).anomaly_map
    assert 0.95 < maps.std() < 1.05


def test_an_image_without_an_alarm_has_an_empty_mask():
    pipe = tiny_pipeline(score_fraction=0.2).calibrate(textures(60), false_alarm_rate=0.3, generator=generator())
    output = pipe(textures(60, first_seed=500), generator=generator(1))
    above = (output.anomaly_map > pipe.calibration.pixel_threshold.item()).any(axis=(1, 2))
    assert (above & ~output.is_anomalous).any()  # alone, the pixels' threshold would add alarms
    assert not output.anomaly_mask[~output.is_anomalous].any()
    assert output.anomaly_mask[output.is_anomalous].any()


def test_precision_and_settings_are_recorded(tmp_path):
    pipe = tiny_pipeline(alpha=0.25).calibrate(textures(12), false_alarm_rate=0.3, generator=generator())
    pipe.save_pretrained(tmp_path)
    config = AnomalyDenoisePipeline.from_pretrained(tmp_path).calibration.config
    assert config.precision == "float32"
    assert config.settings["alpha"] == 0.25
    assert config.settings["timesteps"] == [5, 50, 100]


def test_another_precision_at_use_warns(caplog):
    pipe = tiny_pipeline().calibrate(textures(12), false_alarm_rate=0.3, generator=generator())
    warn_once.cache_clear()  # "once" is once a process
    with caplog.at_level(logging.WARNING):
        pipe(texture(0))
        assert "calibrated in" not in caplog.text
        with torch.autocast("cpu", torch.bfloat16):
            pipe(texture(0))
        pipe.to(dtype=torch.bfloat16)(texture(0))
    told = [record for record in caplog.records if "calibrated in float32 and runs in bfloat16" in record.message]
    assert len(told) == 1
    caplog.clear()
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        pipe.calibrate(textures(12), false_alarm_rate=0.3, generator=generator())(texture(0))
    assert "calibrated in" not in caplog.text


def test_an_image_whose_map_is_not_finite_sets_no_threshold(monkeypatch):
    pipe = tiny_pipeline()
    join_maps = pipe.join_maps

    def broken(maps: torch.Tensor, *rest: object) -> torch.Tensor:
        joined = join_maps(maps, *rest)
        joined[0, 0, 0] = float("nan")
        return joined

    pipe.join_maps = broken
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        pipe.calibrate(textures(12), false_alarm_rate=0.3, generator=generator())
    assert pipe.calibration is None


def test_images_of_the_thresholds_are_as_good_as_their_scores_say():
    good = textures(40)
    pipe = tiny_pipeline().calibrate(good[::2], good[1::2], false_alarm_rate=0.1)
    output = pipe(good[::2], batch_size=3)
    assert output.is_anomalous.sum() == 20 - threshold_rank(20, 0.1)  # the one that set the threshold does not alarm
    expected = [(1 + (output.anomaly_score >= score).sum()) / 21 for score in output.anomaly_score]
    assert np.allclose(output.p_value, expected)


def test_other_settings_at_use_warn(caplog, tmp_path):
    tiny_pipeline(alpha=0.25).calibrate(textures(12), false_alarm_rate=0.3, generator=generator()).save_pretrained(
        tmp_path
    )
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        AnomalyDenoisePipeline.from_pretrained(tmp_path)(texture(0))
        assert "other settings" not in caplog.text
        AnomalyDenoisePipeline.from_pretrained(tmp_path, alpha=0.75)(texture(0))
        assert "calibrated with other settings (alpha)" in caplog.text
        AnomalyDenoisePipeline.from_pretrained(tmp_path)(texture(0), processing_resolution=32)
    assert "calibrated with other settings (processing_resolution)" in caplog.text
