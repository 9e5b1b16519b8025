"""The choice among maps by synthetic defects, and a training that needs nothing but data and a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import generator, textures, tiny_pipeline, write_folder
from datasets import Dataset
from ddpm_runs import flags
from diffusers import DiffusionPipeline

from diffad import AnomalyDenoisePipeline
from diffad.cli import app
from diffad.data import load_anomaly_dataset
from diffad.pipelines.checks import MAP_NAMES
from diffad.training import train_ddpm
from diffad.training.choice import (
    CategoryMaps,
    choose_settings,
    describe_choice,
    errors_by_luck,
    rank_settings,
    rate_setting,
    simplex,
    standard_error,
    take_statistics,
)
from diffad.training.duration import FEWEST_STEPS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_weights_are_all_multiples_that_add_up():
    found = list(simplex(3, 4))
    assert len(found) == len(set(found)) == 15
    assert all(sum(weights) == 1.0 for weights in found)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Dataset:
    return load_anomaly_dataset(str(write_folder(tmp_path_factory.mktemp("choice") / "part", 24, size=64)))


@pytest.fixture(scope="module")
def ranking(good) -> list[dict]:
    pipeline = tiny_pipeline(timesteps=[100])
    statistics, unseen = good.select(range(16)), good.select(range(16, 24))
    return choose_settings(pipeline, statistics, unseen, [good[0]["category"]], 0, Accelerator(cpu=True))


def test_every_map_alone_is_ranked_by_what_it_reaches(ranking):
    objectives = [one["objective"] for one in ranking[1:]]
    assert objectives == sorted(objectives, reverse=True)
    alone = [one["weights"] for one in ranking if 1.0 in one["weights"].values()]
    assert {max(weights, key=weights.get) for weights in alone} == {"kl", "feature_error", "gaussian", "nearest"}
    assert all(0.0 <= one[name] <= 1.0 for one in ranking for name in ("image_auroc", "pixel_ap", "pixel_pro"))


def drawn_maps(seed: int, shown: float = 0.0) -> CategoryMaps:
    """Maps of 20 images, with a defect and without, of four kinds in turn.

    The features' maps show it, the KL by as much as `shown`.
    """
    maps = torch.randn(40, 4, 16, 16, generator=generator(seed))
    maps[20:] = maps[:20]  # a defect lies in an image whose other pixels are the same
    masks = np.zeros((40, 16, 16), dtype=bool)
    masks[20:, 4:8, 4:8] = True
    maps[20:, :, 4:8, 4:8] += torch.tensor([shown, 0.0, 0.75, 0.5])[:, None, None]
    kind = np.array([""] * 20 + ["blur", "crack", "spot", "stain"] * 5)
    return CategoryMaps(maps, np.arange(40) < 20, masks, np.arange(40) % 20, kind)


@pytest.fixture(scope="module")
def measured() -> AnomalyDenoisePipeline:
    pipeline = tiny_pipeline(timesteps=[100], weights=dict.fromkeys(MAP_NAMES, 1.0), position_trust=0.0)
    take_statistics(pipeline, textures(8, 16), 0, 0, Accelerator(cpu=True))
    return pipeline


def test_the_weights_of_fit_stay_unless_a_map_is_clearly_better(measured):
    by_luck, clearly = (rank_settings(measured, [drawn_maps(3, shown)])[0] for shown in (0.0, 6.0))
    assert by_luck["weights"] == {"kl": 0.0, "feature_error": 0.0, "gaussian": 0.75, "nearest": 0.25}
    assert (by_luck["kl_sigma"], by_luck["feature_sigma"]) == (1.0, 1.0)
    assert clearly["weights"]["kl"] >= 0.5
    assert clearly["lead"] > 3.0 * clearly["standard_error"] > 0.0
    assert by_luck["lead"] > by_luck["standard_error"]  # of no map that shows more than those of `diffad fit`


@pytest.mark.parametrize("num_settings", [1, 40])
def test_the_best_of_many_is_ahead_by_luck_in_one_of_twenty_cases(num_settings):
    best = torch.randn(20_000, num_settings, generator=generator(0)).amax(dim=1)
    assert (best > errors_by_luck(num_settings)).float().mean() == pytest.approx(0.05, abs=0.005)


def test_a_lead_that_one_kind_of_defect_makes_is_not_clear(measured):
    drawn = drawn_maps(3)
    drawn.maps[torch.from_numpy(drawn.kind == "spot"), 0, 4:8, 4:8] += 6.0
    others = torch.from_numpy(~drawn.is_good & (drawn.kind != "spot"))
    drawn.maps[others, 2:, 4:8, 4:8] += 4.0  # all maps are enough for these
    chosen = rank_settings(measured, [drawn])[0]
    assert chosen["weights"]["gaussian"] == 0.75
    assert 0.05 < chosen["lead"] < chosen["standard_error"]


def test_a_standard_error_is_no_less_than_the_deviation_among_sets_of_images(measured):
    one, other = (
        {"weights": {"gaussian": share, "nearest": 1.0 - share}, "kl_sigma": 1.0, "feature_sigma": 1.0}
        for share in (1.0, 0.5)
    )
    for setting in (one, other):
        setting["weights"] = {name: setting["weights"].get(name, 0.0) for name in MAP_NAMES}
    differences, errors = [], []
    for seed in range(12):
        maps = [drawn_maps(seed)]
        first, second = (rate_setting(measured, maps, tuple(it["weights"].values()), 1.0, 1.0) for it in (one, other))
        differences.append(first["objective"] - second["objective"])
        errors.append(standard_error(measured, maps, one, other))
    # what each defect adds is in its image's block and in its kind, and so counted twice
    assert 1.0 < np.mean(errors) / np.std(differences) < 2.5


def test_what_lies_outside_a_region_does_not_choose():
    region = torch.zeros(1, 16, 16, dtype=torch.bool)
    region[:, :, :10] = True
    pipeline = tiny_pipeline(timesteps=[100], weights=dict.fromkeys(MAP_NAMES, 1.0), position_trust=0.0)
    take_statistics(pipeline, textures(8, 16), 0, 0, Accelerator(cpu=True), region)
    drawn, cluttered = drawn_maps(0), drawn_maps(0)
    cluttered.maps[:, :, :, 10:] += 9.0 * torch.rand(40, 4, 16, 6, generator=generator(1))
    cluttered.masks[20:, :, 12:] = True
    for smoothing in (0.5, 2.0):
        one, other = (rate_setting(pipeline, [it], (0.0, 0.0, 0.5, 0.5), 1.0, smoothing) for it in (drawn, cluttered))
        assert one == other
        assert one["objective"] > 0.6


def test_where_too_little_is_known_no_error_is_told(measured):
    maps = drawn_maps(0)
    one, other = rank_settings(measured, [maps])[:2]
    of_one_image = CategoryMaps(*(values[[0, 20]] for values in maps[:3]), np.zeros(2, dtype=int), maps.kind[[0, 20]])
    kept = np.arange(40) < 21  # one image alone has a defect, as a region of interest may leave it
    of_one_defect = CategoryMaps(*(values[kept] for values in maps))
    for few in (of_one_image, of_one_defect):
        assert standard_error(measured, [few], one, other) is None
    without = CategoryMaps(*(values[:20] for values in maps))
    assert rank_settings(measured, [without]) == []


def test_it_is_repeatable(good, ranking):
    statistics, unseen = good.select(range(16)), good.select(range(16, 24))
    again = choose_settings(
        tiny_pipeline(timesteps=[100]), statistics, unseen, [good[0]["category"]], 0, Accelerator(cpu=True)
    )
    assert again == ranking


def test_what_it_says_fits_a_screen(ranking):
    lines = describe_choice(ranking).splitlines()
    assert lines[0].startswith("Chosen by synthetic defects: ")
    assert [line.split()[0] for line in lines[2:3]] == ["chosen"]
    assert "of `diffad fit`" in lines[-1]
    assert len(lines) < 10


def run(data: Path, output: Path, *more: object) -> dict:
    train_ddpm.main([*flags(data, output, *more), "--choose"])
    return json.loads((output / "training.json").read_text())


def test_the_choice_is_saved_and_recorded(tmp_path):
    data = write_folder(tmp_path / "part", 30, size=64)
    record = run(data, tmp_path / "run", "--resolution", 32, "--timesteps", 100)
    chosen = record["choice"][0]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.weights == chosen["weights"]
    assert (pipeline.config.kl_sigma, pipeline.config.feature_sigma) == (chosen["kl_sigma"], chosen["feature_sigma"])
    output = pipeline(textures(2, 64))
    assert np.isfinite(output.anomaly_map).all()
    assert output.p_value is not None
    num_for_thresholds = 6 if pipeline.runs_denoiser else 30  # each left out in turn, where no denoiser runs
    assert pipeline.calibration.num_good_images(0) == num_for_thresholds


def test_a_denoiser_without_weight_does_not_run(tmp_path, monkeypatch):
    pipeline = tiny_pipeline(weights={"gaussian": 3, "nearest": 1}, image_size=32)
    pipeline.calibrate(textures(12, 32), false_alarm_rate=0.3)
    assert pipeline.calibration.config.residual_shape is None
    monkeypatch.setattr(pipeline.unet, "forward", None)  # a call would fail
    assert pipeline(textures(2, 32)).anomaly_map.shape == (2, 32, 32)


def test_minutes_are_steps_that_repeat_the_run(tmp_path, capsys):
    data = write_folder(tmp_path / "part", 30, size=64)
    first = flags(data, tmp_path / "timed", "--minutes", 0.001)
    del first[first.index("--max_train_steps") : first.index("--max_train_steps") + 2]
    train_ddpm.main(first)
    assert f"{FEWEST_STEPS} steps: --max_train_steps repeats it" in capsys.readouterr().out
    train_ddpm.main(flags(data, tmp_path / "again", steps=FEWEST_STEPS))
    one, two = (DiffusionPipeline.from_pretrained(tmp_path / name).unet.state_dict() for name in ("timed", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("weights", [{"gaussian": -1.0}, {"kl": 0.0}, {"nearest": float("nan")}])
def test_weights_without_sense_are_an_error(weights):
    with pytest.raises(ValueError, match="`weights` must be finite, not negative and not all 0"):
        tiny_pipeline(weights=weights)


def test_a_weight_of_no_map_is_an_error():
    with pytest.raises(ValueError, match=r"`weights` must be of kl, feature_error, gaussian, nearest, but names klt"):
        tiny_pipeline(weights={"klt": 1.0})


def test_without_a_preset_the_automatic_configuration_holds(tmp_path):
    args = train_ddpm.parse_args(["--train_data_dir", "parts", "--output_dir", str(tmp_path)])
    assert (args.preset, args.minutes, args.choose) == ("cpu-64", 20.0, True)
    assert args.feature_image_size == "auto"
    args = train_ddpm.parse_args(["--train_data_dir", "parts", "--output_dir", "x", "--max_train_steps", "7"])
    assert (args.minutes, args.max_train_steps) == (None, 7)
    args = train_ddpm.parse_args(["--train_data_dir", "parts", "--output_dir", "x", "--preset", "cpu-128"])
    assert (args.preset, args.minutes, args.choose) == ("cpu-128", None, False)


def test_the_command_says_what_it_takes():
    from typer.testing import CliRunner

    assert "--minutes" in CliRunner().invoke(app, ["train", "--help"]).output
