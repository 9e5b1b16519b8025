"""What every anomaly pipeline checks of its arguments. Each message names the argument and the fix."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from diffad.calibration.recorded_settings import SMOOTHS_INSIDE
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import ImageSequence, Side, as_size
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.pipelines.output import OUTPUT_TYPES
from diffad.reading.grey_depth import warn_of_found_range
from diffad.reading.unicode_forms import same_name
from diffad.warn_once import warn_once

MAP_NAMES = ("kl", "feature_error", "gaussian", "nearest")  # what AnomalyDenoise joins
NO_POSTERIOR = (
    "`scheduler` is a {}, which has no posterior to compare with: use DDPMScheduler. `denoise` takes another as an "
    "argument."
)


def check_call(
    images: ImageSequence,
    batch_size: int,
    resolution: Side,
    size_multiple: int,
    match_input_resolution: bool,
    generator: Any,
    output_type: str,
) -> None:
    """Checks the arguments of a call.

    Args:
        images: of the call.
        batch_size: at least 1.
        resolution: `processing_resolution`, of positive multiples of `size_multiple`.
        size_multiple: the networks take images whose sides are multiples of this.
        match_input_resolution: whether maps come at the images' own size, which then must be one.
        generator: None, one, or one for each image.
        output_type: one of `OUTPUT_TYPES`.

    Raises:
        ValueError: an argument is wrong.
    """
    check_batch_size(batch_size)
    check_resolution(resolution, size_multiple)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'`output_type` must be "np", "pt" or "pil", but is {output_type!r}.')
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(images)
    if len(generators) != len(images) or not all(g is None or isinstance(g, torch.Generator) for g in generators):
        raise ValueError(
            "`generator` must be a torch.Generator or a list of them, one for each of the "
            f"{len(images)} images, but is {generator!r}."
        )
    sizes = sorted(set(images.sizes))
    if match_input_resolution and len(sizes) > 1:
        raise ValueError(
            f"`image` holds images of different sizes ({', '.join(f'{h}x{w}' for h, w in sizes)}, height x width), "
            "whose maps do not fit one array. Pass `match_input_resolution=False`, or make one call for each size."
        )
    if images.found_value_range is not None:
        warn_of_found_range(images.found_value_range)


def check_batch_size(batch_size: int) -> None:
    """Raises a ValueError where no batch can have as many images."""
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer, but is {batch_size!r}.")


def check_good_images(name: str, images: Any) -> None:
    """Raises a ValueError where an argument is no sequence of images, such as the path of a folder of them."""
    is_path = isinstance(images, (str, os.PathLike))
    if is_path or not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
        raise ValueError(
            f"`{name}` must be a sequence of good images, such as a list of paths, but is {images!r}. For a folder "
            "pass `diffad.predict.find_images([folder])`."
        )
    if hasattr(images, "iloc"):  # a pandas column, which counts by its labels
        raise ValueError(f"`{name}` is a column of pandas: pass `list({name})`.")


def check_calibration_call(
    images: Any, statistics_images: Any, false_alarm_rate: float, batch_size: int, generator: Any, smallest_area: float
) -> None:
    """Raises a ValueError where arguments of `calibrate` are of a wrong kind or out of their range."""
    check_good_images("images", images)
    if statistics_images is not None:
        check_good_images("statistics_images", statistics_images)
    if not isinstance(false_alarm_rate, Real) or not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"`false_alarm_rate` must lie in (0, 1), but is {false_alarm_rate!r}.")
    if not isinstance(smallest_area, Real) or not 0.0 <= smallest_area < 1.0:
        raise ValueError(f"`smallest_area` is a share of the image's area, in [0, 1), but is {smallest_area!r}.")
    check_generator(generator)
    check_batch_size(batch_size)


def check_generator(generator: Any) -> None:
    """Raises a ValueError where it is neither a generator nor None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be a torch.Generator or None, but is {generator!r}.")


def _both_sides(side: Any) -> list[Any]:
    """Height and width as they were given, whatever they are: of a square where `side` is one."""
    return list(side) if isinstance(side, (list, tuple)) else [side] * 2


def check_resolution(resolution: Side, size_multiple: int) -> None:
    """Raises a ValueError where `processing_resolution`, a side or height and width, is none for a network."""
    sides = _both_sides(resolution)
    if len(sides) != 2:
        raise ValueError(f"`processing_resolution` must be one side, or height and width, but is {resolution!r}.")
    if not all(isinstance(side, (int, np.integer)) and side >= size_multiple for side in sides):
        raise ValueError(
            f"`processing_resolution` must be at least {size_multiple}, in whole pixels, but is {resolution!r}."
        )
    if any(side % size_multiple for side in sides):
        nearest = [round(side / size_multiple) * size_multiple for side in sides]
        raise ValueError(
            f"`processing_resolution` must be a multiple of {size_multiple} for this network, but is {resolution}. "
            f"Try {nearest[0] if isinstance(resolution, (int, np.integer)) else nearest}."
        )


def check_feature_resolution(resolution: Side | None, largest: tuple[int, int]) -> None:
    """Raises a ValueError where `feature_resolution` is no grid in images of `largest` pixels (height, width)."""
    sides = _both_sides(resolution)
    fits = len(sides) == 2 and all(
        isinstance(side, (int, np.integer)) and 1 <= side <= most for side, most in zip(sides, largest, strict=True)
    )
    if resolution is not None and not fits:
        raise ValueError(
            "`feature_resolution` must be one side, or rows and columns, from 1 to the "
            f"{largest[0]} x {largest[1]} pixels that the features are of, but is {resolution!r}."
        )


def check_required(**components: Any) -> None:
    """Raises a ValueError where a component, given by its name, is None and no pipeline works without."""
    for name, component in components.items():
        if component is None:
            raise ValueError(f"`{name}` is None, and this pipeline does not work without one. Give it one.")


def check_denoiser(unet: Any, scheduler: Any, feature_extractor: TimmFeatureExtractor) -> None:
    """Raises a ValueError where AnomalyDenoise's denoiser does not go with its scheduler or its features."""
    if (unet is None) != (scheduler is None):
        raise ValueError("`unet` and `scheduler` go together: give both, or None for both.")
    if not hasattr(feature_extractor, "num_channels"):
        raise ValueError(
            f"`feature_extractor` is a {type(feature_extractor).__name__}, which gives no maps of features: use "
            "TimmFeatureExtractor."
        )
    if unet is None:
        return
    if "feature_channels" not in unet.config:
        raise ValueError(
            f"`unet` is a {type(unet).__name__}, which predicts no features: use DenoisingUNet2DModel, as "
            "training/train_ddpm.py trains it."
        )
    predicted, true = unet.config.feature_channels, feature_extractor.num_channels
    if predicted != true:
        raise ValueError(
            f"`unet` predicts features of {predicted} channels, but `feature_extractor` gives {true}. Use the feature "
            "extractor that the denoiser was trained with."
        )


def check_forward_process(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Raises a ValueError where images are not noised as in DDPM (eq. 4), by whose posterior they are compared."""
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is not None and max(timesteps) >= len(alpha_bar):
        raise ValueError(
            f"`scheduler` has {len(alpha_bar)} timesteps, and the pipeline's `timesteps` go to {max(timesteps)}. Use "
            "the scheduler that the denoiser was trained with."
        )
    if alpha_bar is not None and "clip_sample" in scheduler.config:
        t = torch.tensor(timesteps, device=alpha_bar.device)
        zeros = torch.zeros(len(t), 1, 1, 1, dtype=torch.float32, device=t.device)
        try:
            of_image, of_noise = scheduler.add_noise(zeros + 1, zeros, t), scheduler.add_noise(zeros, zeros + 1, t)
        except (AttributeError, IndexError, NotImplementedError, TypeError):
            of_image = of_noise = zeros  # it noises to no step, or to its own alone
        found = torch.stack([of_image, of_noise]).float().square().flatten(1)  # (2, T)
        expected = torch.stack([alpha_bar[t], 1.0 - alpha_bar[t]]).float()
        if torch.allclose(found, expected, atol=1e-4):
            return
    raise ValueError(NO_POSTERIOR.format(type(scheduler).__name__))


def check_timesteps(timesteps: Any, scheduler: Any) -> list[int]:
    """The timesteps as a list; a ValueError where they are none of the scheduler's (None without a denoiser)."""
    last = (1000 if scheduler is None else scheduler.config.num_train_timesteps) - 1
    listed = list(timesteps) if hasattr(timesteps, "__iter__") else []
    if not listed or any(
        not isinstance(t, (int, np.integer)) or isinstance(t, bool) or not 0 <= t <= last for t in listed
    ):
        raise ValueError(f"`timesteps` must list integers in [0, {last}], but is {timesteps!r}.")
    return listed


def category_indices(
    category: str | int | Sequence[str | int] | None, names: Sequence[str], num_images: int
) -> torch.Tensor:
    """(N,) indices of N images' categories among `names`; a model of one category asks for nothing.

    Raises:
        ValueError: a wrong or missing name; the message lists the right ones.
    """
    names = list(names or ["default"])
    if isinstance(category, (np.ndarray, torch.Tensor)):
        category = category.tolist()
    if isinstance(category, np.integer):
        category = int(category)
    if category is None:
        if len(names) > 1:
            raise ValueError(f"`category` is needed: this model knows {', '.join(names)}. Pass one of them.")
        return torch.zeros(num_images, dtype=torch.long)
    one_or_each: Any = category
    is_one = isinstance(category, str) or not hasattr(category, "__iter__")
    given = [one_or_each] * num_images if is_one else list(one_or_each)
    if len(given) != num_images:
        raise ValueError(f"`category` lists {len(given)} names for {num_images} images. Pass one, or one each.")
    indices = []
    for name in given:
        known = same_name(name, names) if isinstance(name, str) else None
        index = name if known is None else names.index(known)
        if not isinstance(index, (int, np.integer)) or isinstance(index, bool) or index not in range(len(names)):
            raise ValueError(f"`category` {name!r} is unknown: this model knows {', '.join(names)}.")
        indices.append(index)
    return torch.tensor(indices)


def check_calibrated_categories(calibration: ScoreCalibration | None, categories: Sequence[str]) -> None:
    """Raises a ValueError where a calibration is not of as many categories as have names."""
    known, named = 0 if calibration is None else len(calibration.image_threshold), max(1, len(categories))
    if calibration is not None and known != named:
        raise ValueError(
            f"`calibration` is of {known} {'category' if known == 1 else 'categories'}, but `categories` names "
            f"{len(categories)}. Name the same ones, or load with `calibration=None` and calibrate each."
        )


def check_class_embeddings(unet: Any, categories: Sequence[str]) -> None:
    """Raises a ValueError where a class-conditional denoiser has not one embedding for each category's name."""
    count = None if unet is None else unet.config.num_class_embeds
    if count and count != len(categories):
        raise ValueError(
            f"`unet` was built for {count} categories, but `categories` names {len(categories)} "
            f"({', '.join(categories)}). Name all of them, in the order of its labels."
        )


def scored_layers(score_strides: Sequence[int] | None, feature_extractor: TimmFeatureExtractor) -> list[int]:
    """Which of the feature extractor's layers are scored, as indices; None takes all.

    Raises:
        ValueError: a stride is none of the extractor's.
    """
    strides = list(feature_extractor.config.strides)
    given = strides if score_strides is None else list(score_strides) if hasattr(score_strides, "__iter__") else []
    if not given or any(stride not in strides for stride in given):
        raise ValueError(f"`score_strides` must be taken from {strides}, the extractor's, but is {score_strides!r}.")
    return [i for i, stride in enumerate(feature_extractor.layer_strides) if stride in given]


def check_value_range(value_range: float | None) -> None:
    """Raises a ValueError where it is no range."""
    if value_range is not None and (not isinstance(value_range, Real) or not 0.0 < value_range < math.inf):
        raise ValueError(f"`value_range` must be positive and finite, or None, but is {value_range!r}.")


def check_map_settings(position_trust: float, contrast: float) -> None:
    """Raises a ValueError where one is out of its range."""
    if not isinstance(contrast, Real) or not 0.0 <= contrast < math.inf:
        raise ValueError(f"`contrast` must be finite and not negative, but is {contrast!r}.")
    check_share("position_trust", position_trust)


def check_smoothing(**sigmas: float) -> None:
    """Raises a ValueError where a sigma, given by its name, is no width of a Gaussian."""
    for name, sigma in sigmas.items():
        if not isinstance(sigma, Real) or not 0.0 <= sigma < math.inf:
            raise ValueError(f"`{name}` must be a number of pixels, finite and not negative, but is {sigma!r}.")


def check_share(name: str, share: float) -> None:
    """Raises a ValueError where an argument is no number in [0, 1]."""
    if not isinstance(share, Real) or not 0.0 <= share <= 1.0:
        raise ValueError(f"`{name}` must lie in [0, 1], but is {share!r}.")


def check_tiles(tile_size: Side | None, tile_overlap: float) -> None:
    """Raises a ValueError where one is out of its range."""
    sides = _both_sides(tile_size)
    is_size = len(sides) == 2 and all(isinstance(side, (int, np.integer)) and side >= 8 for side in sides)
    if tile_size is not None and not is_size:
        raise ValueError(f"`tile_size` must be a side of at least 8 pixels, or height and width, but is {tile_size!r}.")
    if not isinstance(tile_overlap, Real) or not 0.0 <= tile_overlap <= 0.75:
        raise ValueError(f"`tile_overlap` must lie in [0, 0.75], but is {tile_overlap}.")


def check_tiled_call(pipeline: Any, processing_resolution: Side) -> None:
    """Raises a ValueError where a pipeline that looks at tiles knows nothing of them, or not at this resolution."""
    if as_size(processing_resolution) != as_size(pipeline.processing_resolution):
        raise ValueError(
            f"`processing_resolution` must be {pipeline.processing_resolution}, or None, as tiles were calibrated at "
            f"that, but is {processing_resolution!r}."
        )
    if pipeline.calibration is not None and pipeline.tile_calibration is None:
        raise ValueError(
            f"`tile_size` is {pipeline.config.tile_size}, but this pipeline was calibrated without tiles. Call "
            "`pipe.calibrate(good_images)`, or load it without."
        )


def check_callback_inputs(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises a ValueError where `callback_on_step_end_tensor_inputs` asks for what a pipeline does not hand out."""
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` holds {unknown}, but may be taken from {list(allowed)} only."
        )


def check_calibration(
    calibration: ScoreCalibration | None,
    category: torch.Tensor,
    names: Sequence[str],
    precision: str,
    settings: dict[str, Any],
    own_noise: bool | None = None,
) -> None:
    """Warns, once, where there is no calibration, or one of another precision, of other settings or of other noise.

    `own_noise`: whether images have the model's noise; None where none is drawn.

    Raises:
        ValueError: a category of the images is not calibrated.
    """
    if calibration is not None:
        calibration.check_category(category, names)
        calibration.warn_of_precision(precision)
        calibration.warn_of_settings(settings if calibration.region is None else {**settings, SMOOTHS_INSIDE: True})
        if own_noise is not None:
            calibration.warn_of_noise(own_noise)
        return
    warn_once(
        "This pipeline is not calibrated: maps and scores are raw, and anomaly_mask, is_anomalous and p_value "
        "are None. Call `pipe.calibrate(good_images)` once and save the pipeline again."
    )


def map_weights(weights: dict[str, float] | None, alpha: float, has_denoiser: bool) -> dict[str, float]:
    """The weights of AnomalyDenoise's maps by their names; raises a ValueError as `named_weights` does."""
    if weights is None:
        weights = {"kl": alpha, "feature_error": 1.0 - alpha} if has_denoiser else {"gaussian": 1.0}
    named = named_weights(weights, MAP_NAMES)
    if not has_denoiser and (named["kl"] or named["feature_error"]):
        raise ValueError(f"`weights` must be 0 for kl and feature_error without a `unet`, but are {weights}.")
    return named


def named_weights(weights: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The weights of all maps by their names; raises a ValueError where there is one for no map, or none above 0."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"`weights` must give maps their weights, such as {{{names[0]!r}: 1.0}}, but is {weights!r}.")
    unknown = sorted(map(str, {*weights} - {*names}))
    if unknown:
        raise ValueError(f"`weights` must be of {', '.join(names)}, but names {', '.join(unknown)}.")
    weights = dict(weights)
    are_weights = all(isinstance(weight, Real) and 0.0 <= weight < math.inf for weight in weights.values())
    if not are_weights or not sum(weights.values()):
        raise ValueError(f"`weights` must be finite, not negative and not all 0, but are {weights}.")
    return {name: float(weights.get(name, 0.0)) for name in names}


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of maps, divided by their sum."""
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
