"""What `DiADPipeline` checks of its components, settings and inputs. Each message names the argument and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from diffad.exporting import is_exporting
from diffad.image_sizes import Side, as_side
from diffad.latents import latent_factor
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.models.semantic_guided_network import SemanticGuidedNetwork
from diffad.pipelines.checks import check_required, check_smoothing, named_weights

RECONSTRUCTION_MAPS = ("reconstruction", "gaussian", "nearest")  # what DiAD joins


def check_components(
    vae: Any,
    unet: UNet2DConditionModel,
    prompt_embedding: PromptEmbedding,
    scheduler: Any,
    sg_network: SemanticGuidedNetwork | None,
) -> None:
    """Raises a ValueError where a component is missing, or two do not fit together."""
    check_required(vae=vae, unet=unet, prompt_embedding=prompt_embedding, scheduler=scheduler)
    check_scheduler(scheduler)
    missing = [name for name in ("block_out_channels", "latent_channels") if name not in vae.config]
    if missing:
        raise ValueError(
            f"`vae` is a {type(vae).__name__}, whose configuration has no {missing[0]}. Use an autoencoder of images, "
            "such as AutoencoderKL, AutoencoderTiny or AutoencoderTAEF2."
        )
    factor = latent_factor(vae)
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"`unet` takes latents of {unet.config.in_channels} channels, but `vae` makes them with "
            f"{vae.config.latent_channels}. Use the autoencoder that the denoiser was trained with."
        )
    if unet.config.cross_attention_dim != prompt_embedding.config.width:
        raise ValueError(
            f"`prompt_embedding` is {prompt_embedding.config.width} wide, but `unet` attends to a prompt of "
            f"width {unet.config.cross_attention_dim}. Embed it with the denoiser's own text encoder."
        )
    if sg_network is not None:
        stack_factor = 2 ** (len(sg_network.config.conditioning_embedding_out_channels) - 1)
        if stack_factor != factor:
            raise ValueError(
                f"`sg_network` makes the image {stack_factor} times smaller and `vae` {factor} times. Give the "
                "network's `conditioning_embedding_out_channels` as many widths as the autoencoder has levels."
            )


def check_scheduler(scheduler: Any, skipped: int = 0) -> None:
    """Raises a ValueError where it does not go back from noise, or cannot leave out its first `skipped` steps."""
    unknown = [name for name in ("add_noise", "init_noise_sigma") if not hasattr(scheduler, name)]
    if unknown:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, which has no `{unknown[0]}`. Use one that goes back from "
            "noise as DDPM's, such as DDIMScheduler or DPMSolverMultistepScheduler."
        )
    if skipped and scheduler.config.get("skip_prk_steps") is False:
        raise ValueError(
            "`scheduler` takes Runge-Kutta steps first, which cannot begin below its last timestep, as `strength` "
            "below 1 does. Make it with `skip_prk_steps=True`."
        )


def check_latent_statistics(vae: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises a ValueError where they do not normalise the autoencoder's latents."""
    if mean is None and std is None:
        return
    channels = vae.config.latent_channels
    if not are_statistics(mean, std, channels):
        raise ValueError(
            f"`latents_mean` and `latents_std` go together: a number for each of the {channels} channels of `vae`, "
            f"above 0 in the latter, but they are {mean} and {std}."
        )


def check_colour_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises a ValueError where they do not normalise the three colours of images."""
    if not are_statistics(mean, std, 3):
        raise ValueError(
            "`image_mean` and `image_std` must be a finite number for each of the 3 colours, above 0 in the latter, "
            f"but they are {mean} and {std}."
        )


def are_statistics(mean: Any, std: Any, num_channels: int) -> bool:
    """Whether a mean and a deviation, each a sequence, normalise so many channels."""
    if not all(hasattr(values, "__len__") and len(values) == num_channels for values in (mean, std)):
        return False
    return all(isinstance(one, Real) and math.isfinite(one) for one in (*mean, *std)) and min(std) > 0.0


def check_settings(distance: str, sigma: float, pooling_size: int, pooling_rounds: int) -> None:
    """Raises a ValueError where a setting is out of its range."""
    if distance not in ("cosine", "mahalanobis"):
        raise ValueError(f'`distance` must be "cosine" or "mahalanobis", but is {distance!r}.')
    check_smoothing(sigma=sigma)
    are_integers = isinstance(pooling_size, Integral) and isinstance(pooling_rounds, Integral)
    if not are_integers or pooling_size < 1 or pooling_rounds < 0:
        raise ValueError(
            "`pooling_size` must be an integer of at least 1 and `pooling_rounds` one of at least 0, but they are "
            f"{pooling_size!r} and {pooling_rounds!r}."
        )


def square_side(resolution: Side) -> int:
    """The side of the square that the networks see; raises a ValueError where it is none."""
    side = as_side(resolution)
    if not isinstance(side, int):
        raise ValueError(f"`processing_resolution` must be one side: DiAD sees squares, but it is {resolution!r}.")
    return side


def check_pixel_values(pixel_values: torch.Tensor, vae: Any) -> tuple[int, int]:
    """Height and width of images that the networks take, (N, 3, H, W).

    Raises:
        ValueError: another shape.
    """
    multiple = latent_factor(vae)
    check_tensor("pixel_values", pixel_values)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != vae.config.in_channels:
        raise ValueError(
            f"`pixel_values` must have shape (N, {vae.config.in_channels}, H, W), but has {tuple(pixel_values.shape)}."
        )
    height, width = pixel_values.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(
            f"`pixel_values` of {height} x {width}: both sides must be multiples of {multiple}, the autoencoder's "
            "factor. Resize or pad the images."
        )
    return height, width


def check_latents(latents: torch.Tensor | None, vae: Any, sizes: tuple[int, int, int]) -> torch.Tensor | None:
    """`latents` as they are, if they are finite numbers that fit images of `sizes` (N, H, W).

    Raises:
        ValueError: they do not.
    """
    count, height, width = sizes
    factor = latent_factor(vae)
    shape = (count, vae.config.latent_channels, height // factor, width // factor)
    if latents is None:
        return None
    check_tensor("latents", latents)
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"`latents` must have shape {shape} for {count} images of {height} x {width}, but has "
            f"{tuple(latents.shape)}."
        )
    if not is_exporting() and not bool(latents.isfinite().all()):  # a graph's are drawn, and have no values yet
        raise ValueError("`latents` holds NaN or infinity. Give noise, such as torch.randn's, or leave it out.")
    return latents


def check_latent_channels(latents: torch.Tensor, vae: Any) -> None:
    """Raises a ValueError where `latents` are none that an autoencoder decodes."""
    check_tensor("latents", latents)
    channels = vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"`latents` must have shape (N, {channels}, h, w), but has {tuple(latents.shape)}.")


def check_tensor(name: str, values: Any) -> None:
    """Raises a ValueError where an argument is no tensor."""
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor, but is of type {type(values).__name__}.")


def check_tiled_reverse_process(
    config: Any, num_inference_steps: int, strength: float, latents: Any, callback: Any
) -> None:
    """Raises a ValueError where a call asks for another reverse process than tiles were calibrated with, or into it."""
    given = {"num_inference_steps": num_inference_steps, "strength": strength}
    changed = [name for name, value in given.items() if value != config[name]]
    changed += [name for name, value in (("latents", latents), ("callback_on_step_end", callback)) if value is not None]
    if changed:
        raise ValueError(
            f"`{changed[0]}` cannot be given where images are looked at in tiles, each with a reverse process of its "
            "own. Leave it out, or load the pipeline with `tile_size=None`."
        )


def skipped_steps(num_inference_steps: int, strength: float) -> int:
    """How many of the first steps a strength leaves out; both are checked."""
    if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be a positive integer, but is {num_inference_steps!r}.")
    if not isinstance(strength, Real) or not 0.0 < strength <= 1.0:
        raise ValueError(f"`strength` must lie in (0, 1], but is {strength!r}.")
    steps = round(num_inference_steps * strength)
    if steps == 0:
        raise ValueError(
            f"`strength` of {strength} leaves none of {num_inference_steps} steps. Use at least "
            f"{1.0 / num_inference_steps:.2g}, or more `num_inference_steps`."
        )
    return num_inference_steps - steps


def reconstruction_weights(weights: dict[str, float] | None) -> dict[str, float]:
    """The weights of DiAD's maps by their names, all three.

    Raises:
        ValueError: there is one for no map, or none for the reconstruction.
    """
    named = named_weights({"reconstruction": 1.0} if weights is None else weights, RECONSTRUCTION_MAPS)
    if not named["reconstruction"]:
        raise ValueError(
            f"`weights` must be above 0 for the reconstruction, but are {weights}: what features alone tell, a model "
            "of `diffad fit` tells without one."
        )
    return named
