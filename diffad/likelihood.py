"""Likelihood terms of a Gaussian diffusion process with learned variance.

Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), equations 6-7 for the forward posterior;
Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (ICML 2021), equation 15 for the
learned-range variance; Lu et al., "Removing Anomalies as Noises for Industrial Defect Localization" (ICCV 2023),
section 3.2, for the KL divergence per pixel as an anomaly map.

Every function takes a diffusers scheduler for its betas. The schedule's coefficients are computed in float64,
because 1 - alpha_bar cancels at the first timesteps: in float32 the KL there is off by 6e-4. The maps themselves are
float32, also inside an autocast region and for half-precision inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin


def _at(coefficients: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Picks the coefficients of `timesteps` and shapes them (N, 1, 1, 1), float32, on the sample's device."""
    # Indexed on the CPU: some accelerators have no float64.
    picked = coefficients[timesteps.cpu()].to(device=sample.device, dtype=torch.float32)
    return picked.view(-1, 1, 1, 1)


class _Tables(NamedTuple):
    """What the functions below take of a schedule at each timestep, (num_train_timesteps,) float64 on the CPU.

    clean_weight, noisy_weight: of x_0 and x_t in the posterior's mean (DDPM eq. 7).
    log_variance: log beta~_t (eq. 7); t = 0 takes that of t = 1: its own is log 0.
    log_beta: log beta_t.
    inverse_signal, noise_ratio: of x_t and epsilon in the predicted x_0 (eq. 15).
    """

    clean_weight: torch.Tensor
    noisy_weight: torch.Tensor
    log_variance: torch.Tensor
    log_beta: torch.Tensor
    inverse_signal: torch.Tensor
    noise_ratio: torch.Tensor


# by scheduler: its betas, which may be replaced, and the tables. Made once, so that an exported graph has the numbers
# and not the products that lead to them.
_KNOWN: WeakKeyDictionary[SchedulerMixin, tuple[torch.Tensor, _Tables]] = WeakKeyDictionary()


def _tables(scheduler: SchedulerMixin) -> _Tables:
    known = _KNOWN.get(scheduler)
    if known is not None and known[0] is scheduler.betas:
        return known[1]
    betas = scheduler.betas.detach().to("cpu", torch.float64)
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)  # alpha_bar_t
    alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])  # alpha_bar_{t-1}
    variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    tables = _Tables(
        clean_weight=betas * alphas_cumprod_prev.sqrt() / (1.0 - alphas_cumprod),
        noisy_weight=(1.0 - alphas_cumprod_prev) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod),
        log_variance=torch.log(torch.cat([variance[1:2], variance[1:]])),
        log_beta=betas.log(),
        inverse_signal=alphas_cumprod.rsqrt(),
        noise_ratio=(1.0 / alphas_cumprod - 1.0).sqrt(),
    )
    _KNOWN[scheduler] = (scheduler.betas, tables)
    return tables


def _check(scheduler: SchedulerMixin, timesteps: torch.Tensor, **samples: torch.Tensor) -> None:
    shapes = {name: tuple(sample.shape) for name, sample in samples.items()}
    first_name, first = next(iter(shapes.items()))
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(f"`{name}` must have shape (N, C, H, W), but has shape {shape}.")
        if name == "model_output" and shape != (first[0], 2 * first[1], *first[2:]):
            raise ValueError(
                f"`model_output` of shape {shape} must have {2 * first[1]} channels (epsilon and variance) for "
                f"`{first_name}` of shape {first}, and its N, H and W. Train the network with learned variance."
            )
        if name != "model_output" and shape != first:
            raise ValueError(f"`{name}` of shape {shape} and `{first_name}` of shape {first} must have the same shape.")
    if timesteps.shape != (first[0],) or timesteps.is_floating_point():
        raise ValueError(
            f"`timesteps` must be an integer tensor of shape ({first[0]},), one for each sample, but is "
            f"{timesteps.dtype} of shape {tuple(timesteps.shape)}."
        )
    last = scheduler.config.num_train_timesteps - 1
    if torch.compiler.is_compiling():
        return  # a graph has no values yet
    if timesteps.numel() and (int(timesteps.min()) < 0 or int(timesteps.max()) > last):
        raise ValueError(f"`timesteps` must lie in [0, {last}], but are {timesteps.tolist()}.")


def posterior_mean_log_variance(
    scheduler: SchedulerMixin, clean_sample: torch.Tensor, noisy_sample: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of q(x_{t-1} | x_t, x_0) (DDPM eqs. 6-7).

    Args:
        scheduler: any diffusers scheduler with `betas` (`DDPMScheduler`).
        clean_sample: x_0, (N, C, H, W), in [-1, 1].
        noisy_sample: x_t, (N, C, H, W).
        timesteps: t, (N,) integers.

    Returns:
        Mean and log variance, each (N, C, H, W) float32. At t = 0, where the posterior has no variance, the log
        variance is that of t = 1.
    """
    _check(scheduler, timesteps, clean_sample=clean_sample, noisy_sample=noisy_sample)
    tables = _tables(scheduler)
    clean, noisy = clean_sample.float(), noisy_sample.float()
    mean = _at(tables.clean_weight, timesteps, clean) * clean + _at(tables.noisy_weight, timesteps, noisy) * noisy
    log_variance = _at(tables.log_variance, timesteps, clean).expand_as(mean)
    return mean, log_variance


def predicted_clean_sample(
    scheduler: SchedulerMixin,
    noise_prediction: torch.Tensor,
    noisy_sample: torch.Tensor,
    timesteps: torch.Tensor,
    clip_sample: bool | None = None,
) -> torch.Tensor:
    """x_0 from a prediction of epsilon (DDPM eq. 15), (N, C, H, W) float32.

    `clip_sample` clips it to `[-r, r]`, r the scheduler's `clip_sample_range`, 1 where it has none; None takes the
    scheduler's setting.

    Raises:
        ValueError: a timestep at which the schedule leaves noise alone (zero SNR), so that epsilon tells no x_0.
    """
    _check(scheduler, timesteps, noise_prediction=noise_prediction, noisy_sample=noisy_sample)
    tables, noisy = _tables(scheduler), noisy_sample.float()
    if not torch.compiler.is_compiling() and not bool(tables.inverse_signal[timesteps.cpu()].isfinite().all()):
        raise ValueError(
            f"`timesteps` are {timesteps.tolist()}, and at the last one this `scheduler` leaves noise alone "
            "(rescale_betas_zero_snr), of which a predicted epsilon tells no image. Take earlier ones."
        )
    clean = (
        _at(tables.inverse_signal, timesteps, noisy) * noisy
        - _at(tables.noise_ratio, timesteps, noisy) * noise_prediction.float()
    )
    if scheduler.config.get("clip_sample", False) if clip_sample is None else clip_sample:
        limit = scheduler.config.get("clip_sample_range", 1.0)
        clean = clean.clamp(-limit, limit)
    return clean


def predicted_mean_log_variance(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    noisy_sample: torch.Tensor,
    timesteps: torch.Tensor,
    clip_sample: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of the model's p(x_{t-1} | x_t).

    Args:
        scheduler: a diffusers scheduler with `prediction_type="epsilon"`.
        model_output: (N, 2C, H, W): epsilon, then v, which interpolates in log space between the posterior's variance
            (v = -1) and beta (v = 1) (Improved DDPM, eq. 15).
        noisy_sample: x_t, (N, C, H, W).
        timesteps: t, (N,) integers.
        clip_sample: whether to clip the predicted x_0; None takes the scheduler's setting.

    Returns:
        Mean and log variance, each (N, C, H, W) float32.
    """
    _check(scheduler, timesteps, noisy_sample=noisy_sample, model_output=model_output)
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"`scheduler` must have prediction_type='epsilon', but has {scheduler.config.prediction_type!r}."
        )
    with torch.autocast(noisy_sample.device.type, enabled=False):
        noise_prediction, variance_fraction = model_output.float().chunk(2, dim=1)  # (N, C, H, W) each
        clean = predicted_clean_sample(scheduler, noise_prediction, noisy_sample, timesteps, clip_sample)
        mean, _ = posterior_mean_log_variance(scheduler, clean, noisy_sample, timesteps)
        lowest = _at(_tables(scheduler).log_variance, timesteps, mean)
        highest = _at(_tables(scheduler).log_beta, timesteps, mean)
        fraction = (variance_fraction + 1.0) / 2.0
        return mean, fraction * highest + (1.0 - fraction) * lowest


def gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)), element by element, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean).square() * torch.exp(-other_log_variance)
        - 1.0
    )


def kl_divergence_map(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    noisy_sample: torch.Tensor,
    clean_sample: torch.Tensor,
    timesteps: torch.Tensor,
    clip_sample: bool | None = None,
) -> torch.Tensor:
    """KL between the true and the predicted posterior at each pixel and channel (Lu et al., eq. 8).

    Args:
        scheduler: a diffusers `DDPMScheduler` with epsilon prediction.
        model_output: (N, 2C, H, W): epsilon, then the learned-range variance.
        noisy_sample: x_t, (N, C, H, W).
        clean_sample: x_0, (N, C, H, W), in [-1, 1].
        timesteps: t, (N,) integers in [0, num_train_timesteps).
        clip_sample: whether to clip the predicted x_0; None takes the scheduler's setting.

    Returns:
        (N, C, H, W) float32, in nats, not negative but for rounding.
    """
    with torch.autocast(noisy_sample.device.type, enabled=False):
        true_mean, true_log_variance = posterior_mean_log_variance(scheduler, clean_sample, noisy_sample, timesteps)
        mean, log_variance = predicted_mean_log_variance(scheduler, model_output, noisy_sample, timesteps, clip_sample)
        return gaussian_kl(true_mean, true_log_variance, mean, log_variance)


def decoder_nll_map(mean: torch.Tensor, log_variance: torch.Tensor, clean_sample: torch.Tensor) -> torch.Tensor:
    """-log p(x_0 | x_1) of 8-bit images under a discretised Gaussian (DDPM eq. 13), (N, C, H, W), in nats.

    `clean_sample` is in [-1, 1]; the outermost bins reach to infinity. The normal distribution function is the tanh
    approximation that the published implementations of DDPM use, so that bounds compare with published ones.
    """

    def cdf(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))

    with torch.autocast(clean_sample.device.type, enabled=False):
        clean, inverse_std = clean_sample.float(), torch.exp(-0.5 * log_variance.float())
        centered = clean - mean.float()
        upper = cdf(inverse_std * (centered + 1.0 / 255.0))
        lower = cdf(inverse_std * (centered - 1.0 / 255.0))
        probability = torch.where(clean < -0.999, upper, torch.where(clean > 0.999, 1.0 - lower, upper - lower))
        return -torch.log(probability.clamp(min=1e-12))


def variational_bound(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    noisy_sample: torch.Tensor,
    clean_sample: torch.Tensor,
    timesteps: torch.Tensor,
    clip_sample: bool | None = None,
) -> torch.Tensor:
    """One term L_{t-1} of the variational bound per image (DDPM eq. 5), (N,) float32, in bits per dimension.

    t = 0 takes the decoder term, every other timestep the KL. Arguments as in `kl_divergence_map`.
    """
    with torch.autocast(noisy_sample.device.type, enabled=False):
        true_mean, true_log_variance = posterior_mean_log_variance(scheduler, clean_sample, noisy_sample, timesteps)
        mean, log_variance = predicted_mean_log_variance(scheduler, model_output, noisy_sample, timesteps, clip_sample)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance).mean(dim=(1, 2, 3))  # (N,)
        decoder_nll = decoder_nll_map(mean, log_variance, clean_sample).mean(dim=(1, 2, 3))  # (N,)
        return torch.where(timesteps.to(kl.device) == 0, decoder_nll, kl) / math.log(2.0)
