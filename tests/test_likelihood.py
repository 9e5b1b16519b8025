"""Parity with the published implementation's values, and the identities that the terms must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import relative_error, tiny_scheduler
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from diffad.likelihood import (
    decoder_nll_map,
    gaussian_kl,
    kl_divergence_map,
    posterior_mean_log_variance,
    predicted_clean_sample,
    predicted_mean_log_variance,
    variational_bound,
)

REFERENCE = load_file(Path(__file__).parent / "fixtures" / "kl_dev.safetensors")
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # the reference's names, diffusers' names


def reference(schedule: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of one schedule, as arguments of `kl_divergence_map`, and which rows have t >= 1."""
    values = {key.removeprefix(f"{schedule}."): v for key, v in REFERENCE.items() if key.startswith(schedule)}
    assert values["timesteps"].tolist() == [0, 1, 5, 50, 100, 500, 999]
    return values, values["timesteps"] >= 1


def sample_inputs(
    dtype: torch.dtype = torch.float32, timesteps: tuple[int, ...] = (0, 5, 50, 999)
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = len(timesteps)
    clean = torch.rand(count, 3, 4, 6, generator=generator) * 2.0 - 1.0
    noise = torch.randn(count, 3, 4, 6, generator=generator)
    t = torch.tensor(timesteps)
    variance = torch.rand(count, 3, 4, 6, generator=generator) * 2.0 - 1.0
    estimate = noise + 0.3 * torch.randn(count, 3, 4, 6, generator=generator)
    return {
        "model_output": torch.cat([estimate, variance], dim=1).to(dtype),
        "noisy_sample": tiny_scheduler().add_noise(clean, noise, t).to(dtype),
        "clean_sample": clean.to(dtype),
        "timesteps": t,
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_matches_the_reference(schedule):
    values, later = reference(schedule)
    scheduler = tiny_scheduler(beta_schedule=SCHEDULES[schedule])
    mean, log_variance = posterior_mean_log_variance(scheduler, values["x0"], values["xt"], values["timesteps"])
    assert relative_error(mean[later], values["posterior_mean"][later]) < 1e-4
    assert relative_error(mean[~later], values["posterior_mean"][~later]) < 1e-4
    assert relative_error(log_variance, values["posterior_log_variance"]) < 1e-4


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_model_terms_match_the_reference(schedule, clip_sample):
    values, later = reference(schedule)
    prefix = "clip" if clip_sample else "noclip"
    scheduler = tiny_scheduler(beta_schedule=SCHEDULES[schedule])
    arguments = (scheduler, values["model_output"], values["xt"])

    mean, log_variance = predicted_mean_log_variance(*arguments, values["timesteps"], clip_sample)
    assert relative_error(mean[later], values[f"{prefix}.model_mean"][later]) < 1e-4
    assert relative_error(log_variance, values[f"{prefix}.model_log_variance"]) < 1e-4

    kl = kl_divergence_map(*arguments, values["x0"], values["timesteps"], clip_sample)
    assert kl.shape == values["x0"].shape
    assert relative_error(kl[later], values[f"{prefix}.kl_nats"][later]) < 1e-4

    nll = decoder_nll_map(mean, log_variance, values["x0"])
    assert relative_error(nll[~later], values[f"{prefix}.decoder_nll_nats"][~later]) < 1e-4

    bound = variational_bound(*arguments, values["x0"], values["timesteps"], clip_sample)
    assert relative_error(bound[later], values[f"{prefix}.vb_bits_per_dim"][later]) < 1e-4
    assert relative_error(bound[~later], values[f"{prefix}.vb_bits_per_dim"][~later]) < 1e-4


def test_clip_sample_none_takes_the_schedulers_setting():
    values, _ = reference("linear")
    for setting in (True, False):
        scheduler = tiny_scheduler(clip_sample=setting)
        arguments = (scheduler, values["model_output"], values["xt"], values["x0"], values["timesteps"])
        assert torch.equal(kl_divergence_map(*arguments), kl_divergence_map(*arguments, clip_sample=setting))
    limited = tiny_scheduler(clip_sample_range=0.5)
    clean = predicted_clean_sample(limited, values["model_output"][:, :3], values["xt"], values["timesteps"])
    assert clean.abs().max() == 0.5


def test_gaussian_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, other_mean, log_variance, other_log_variance = torch.randn(4, 50, generator=generator)
    expected = kl_divergence(
        Normal(mean, (0.5 * log_variance).exp()), Normal(other_mean, (0.5 * other_log_variance).exp())
    )
    torch.testing.assert_close(gaussian_kl(mean, log_variance, other_mean, other_log_variance), expected)


def test_kl_of_equal_posteriors_is_zero():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 1000, generator=generator) * 5.0
    assert torch.equal(gaussian_kl(mean, log_variance, mean, log_variance), torch.zeros(1000))

    # a model that knows the noise and puts the variance at the posterior's end (v = -1) predicts the posterior
    clean = torch.rand(6, 3, 4, 4, generator=generator) * 2.0 - 1.0
    noise = torch.randn(6, 3, 4, 4, generator=generator)
    timesteps = torch.tensor([1, 5, 50, 100, 500, 999])
    scheduler = tiny_scheduler(clip_sample=False)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    knowing = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    assert kl_divergence_map(scheduler, knowing, noisy, clean, timesteps).abs().max() < 1e-4
    # and any other does not
    assert kl_divergence_map(scheduler, knowing.roll(1, dims=0), noisy, clean, timesteps).mean() > 1e-2


def test_the_variance_interpolates_between_posterior_and_beta():
    inputs = sample_inputs()
    scheduler, t = tiny_scheduler(), inputs["timesteps"]
    arguments = (inputs["noisy_sample"], t)
    ends = [
        predicted_mean_log_variance(scheduler, torch.full((4, 6, 4, 6), v), *arguments)[1][:, 0, 0, 0] for v in (-1, 1)
    ]
    _, posterior = posterior_mean_log_variance(scheduler, inputs["clean_sample"], *arguments)
    torch.testing.assert_close(ends[0], posterior[:, 0, 0, 0])
    torch.testing.assert_close(ends[1], scheduler.betas[t].log())


def test_at_the_first_timestep_the_posterior_is_the_clean_image():
    inputs = sample_inputs(timesteps=(0, 0))
    mean, _ = posterior_mean_log_variance(
        tiny_scheduler(), inputs["clean_sample"], inputs["noisy_sample"], inputs["timesteps"]
    )
    torch.testing.assert_close(mean, inputs["clean_sample"])


def test_decoder_probabilities_of_all_grey_levels_add_up_to_one():
    levels = torch.arange(256) / 127.5 - 1.0
    clean = levels.view(256, 1, 1, 1)
    mean = torch.full_like(clean, 0.21)
    for log_variance in (-9.0, -4.0, 0.0):
        probability = torch.exp(-decoder_nll_map(mean, torch.full_like(clean, log_variance), clean))
        assert float(probability.sum()) == pytest.approx(1.0, abs=1e-3)


def test_the_bound_is_the_decoder_term_first_and_the_kl_later():
    inputs = sample_inputs()
    scheduler = tiny_scheduler()
    bound = variational_bound(scheduler, **inputs)
    kl = kl_divergence_map(scheduler, **inputs).mean(dim=(1, 2, 3)) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(bound[1:], kl[1:])
    assert not torch.isclose(bound[0], kl[0])


@pytest.mark.parametrize("function", [kl_divergence_map, variational_bound])
def test_autocast_changes_nothing(function):
    inputs = sample_inputs()
    expected = function(tiny_scheduler(), **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = function(tiny_scheduler(), **inputs)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [kl_divergence_map, variational_bound])
def test_half_precision_inputs_give_finite_float32(function, dtype):
    result = function(tiny_scheduler(), **sample_inputs(dtype))
    assert result.dtype == torch.float32
    assert result.isfinite().all()


def test_half_precision_inputs_cost_only_their_own_rounding():
    rounded = {k: v.float() if v.is_floating_point() else v for k, v in sample_inputs(torch.bfloat16).items()}
    half = kl_divergence_map(tiny_scheduler(), **sample_inputs(torch.bfloat16))
    assert torch.equal(half, kl_divergence_map(tiny_scheduler(), **rounded))


def test_gradients_are_finite():
    inputs = sample_inputs()
    inputs["model_output"].requires_grad_()
    variational_bound(tiny_scheduler(), **inputs).sum().backward()
    gradient = inputs["model_output"].grad
    assert gradient.isfinite().all()
    assert (gradient != 0).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("function", [kl_divergence_map, variational_bound])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model_output", torch.zeros(4, 3, 4, 6), "6 channels"),
        ("model_output", torch.zeros(4, 6, 4, 5), r"\(4, 6, 4, 5\)"),
        ("model_output", torch.zeros(2, 6, 4, 6), r"\(2, 6, 4, 6\)"),
        ("clean_sample", torch.zeros(4, 3, 4, 5), r"\(4, 3, 4, 5\)"),
        ("clean_sample", torch.zeros(3, 4, 6), r"\(N, C, H, W\)"),
        ("clean_sample", torch.zeros(4, 1, 4, 6), r"\(4, 1, 4, 6\)"),
        ("noisy_sample", torch.zeros(2, 3, 4, 6), r"\(2, 3, 4, 6\)"),
        ("noisy_sample", torch.zeros(6), r"\(N, C, H, W\)"),
        ("timesteps", torch.zeros(4), "integer"),
        ("timesteps", torch.zeros(3, dtype=torch.long), r"\(4,\)"),
        ("timesteps", torch.tensor(5), r"\(4,\)"),
        ("timesteps", torch.tensor([0, 1, 2, 1000]), r"\[0, 999\]"),
        ("timesteps", torch.tensor([0, 1, 2, -1]), r"\[0, 999\]"),
    ],
)
def test_wrong_arguments_are_named(function, name, value, words):
    with pytest.raises(ValueError, match=f"(?s)`{name}`.*{words}|{words}.*`{name}`"):
        function(tiny_scheduler(), **{**sample_inputs(), name: value})


def test_noise_alone_tells_no_image():
    scheduler = tiny_scheduler(rescale_betas_zero_snr=True)
    inputs = sample_inputs()
    last = torch.full_like(inputs["timesteps"], scheduler.config.num_train_timesteps - 1)
    with pytest.raises(ValueError, match=r"`timesteps` are .*leaves noise alone"):
        kl_divergence_map(scheduler, **{**inputs, "timesteps": last})
    assert kl_divergence_map(scheduler, **{**inputs, "timesteps": last - 1}).isfinite().all()


def test_a_scheduler_that_never_clips_is_taken_as_it_is():
    inputs = sample_inputs()
    euler, same = EulerDiscreteScheduler(), DDPMScheduler(clip_sample=False)
    torch.testing.assert_close(kl_divergence_map(euler, **inputs), kl_divergence_map(same, **inputs))


def test_only_epsilon_prediction_is_taken():
    with pytest.raises(ValueError, match=r"`scheduler`.*epsilon.*v_prediction"):
        kl_divergence_map(tiny_scheduler(prediction_type="v_prediction"), **sample_inputs())
