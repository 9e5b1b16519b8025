"""The plain DDPM that both papers compare themselves with: noise an image, denoise it, see what has changed."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffad.images import ImageInput, ImageSequence, Side, as_side, as_size, images_to_pixel_values, resize_images
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.pipelines.base import AnomalyPipeline, register_categories
from diffad.pipelines.checks import category_indices, check_call, check_callback_inputs, check_value_range
from diffad.pipelines.output import AnomalyOutput, check_scores, convert_output
from diffad.scoring import difference_map, max_score, top_fraction_score
from diffad.seeding import draw_noise, image_generators, noise_generators


class DDPMReconstructionPipeline(AnomalyPipeline):
    r"""Finds defects as what the reverse process of good images does not draw again (Lu et al., table 1, "DDPM").

    ```python
    pipe = AnomalyDenoisePipeline.from_pretrained("runs/parts")
    out = DDPMReconstructionPipeline.from_pipe(pipe, dtype=pipe.dtype)("part.png", timestep=250)
    ```

    Args:
        unet: the denoiser.
        scheduler: any of diffusers' for a network that predicts epsilon: to take another than a detector's, pass
            `scheduler=DDIMScheduler.from_config(pipe.scheduler.config)` to `from_pipe`.
        feature_extractor: tells the size at which images are read, which is a detector's with the same networks.
        kl_sigma: smoothing of the map, in pixels at the processing resolution.
        score_fraction: the image's score is the mean of this share of the map's highest pixels; 0 for the maximum.
        processing_resolution: side in pixels to which images are resized, or height and width; None takes the network's
            `sample_size`.
        categories: names of the categories of a unified model, in the order of its class labels.
        value_range: the largest value that images of more than 8 bits can have, such as 4095 of a camera of 12 bits, as
            found in the training images; None takes, in each call, the smallest of 8, 10, 12, 14 and 16 bits that holds
            all of its images.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["sample"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        unet: DenoisingUNet2DModel,
        scheduler: DDPMScheduler,
        feature_extractor: TimmFeatureExtractor,
        kl_sigma: float = 2.0,
        score_fraction: float = 0.0,
        processing_resolution: Side | None = None,
        categories: list[str] | dict[str, str] | None = None,
        value_range: float | None = None,
    ):
        super().__init__()
        check_value_range(value_range)
        if unet is None:
            raise ValueError(
                "`unet` is None: this pipeline takes a denoiser, and `diffad fit` makes models without one."
            )
        self.register_modules(unet=unet, scheduler=scheduler, feature_extractor=feature_extractor)
        self.register_to_config(
            kl_sigma=kl_sigma,
            score_fraction=score_fraction,
            processing_resolution=processing_resolution or unet.config.sample_size,
            categories=register_categories(categories),
            value_range=value_range,
        )
        self.size_multiple = 2 ** (len(unet.config.block_out_channels) - 1)  # the denoiser halves so often

    @property
    def processing_resolution(self) -> int | tuple[int, int]:
        """Side in pixels at which the denoiser sees images, unless a call says otherwise."""
        return as_side(self.config.processing_resolution)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call's reverse process."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `pipe._interrupt = True` ends the call, which returns the batches so far."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        timestep: int = 250,
        num_inference_steps: int = 50,
        scheduler: SchedulerMixin | None = None,
        category: str | int | Sequence[str | int] | None = None,
        batch_size: int = 16,
        processing_resolution: Side | None = None,
        match_input_resolution: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
        output_type: str = "np",
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple:
        """Noises one image or many, denoises them, and looks at what has changed.

        Args:
            image: PIL image, path, array (H, W[, C]) or (N, H, W, C), tensor ([C,] H, W) or (N, C, H, W), or a list of
                these. Floats lie in [0, 1].
            timestep: how far to noise. More noise hides larger defects, and more of the good parts.
            num_inference_steps: passes of the denoiser; at most `timestep`. It begins at that step of the scheduler's
                own spacing from which so many are left: at most one spacing below `timestep`, or, where that takes
                more than whole timesteps, up to a tenth of `timestep` lower. Some numbers of steps, large ones or 1,
                have none.
            scheduler: in the place of the pipeline's own.
            category: of a unified model, its name or index, one for all images or one each.
            batch_size: images in one pass of the network.
            processing_resolution: side in pixels at which the network sees the images; None takes the pipeline's own.
            match_input_resolution: whether images and maps come at the input's own size, which then must be one for
                all; else at the processing resolution.
            generator: of the noise, one for all images or one each. The noise of an image depends neither on the batch
                size nor on the images after it. None gives every image the same, so that calls repeat.
            callback_on_step_end: called after each step of each batch as `callback(pipe, step, timestep, tensors)`.
                What it returns under "sample" is gone on with.
            callback_on_step_end_tensor_inputs: which tensors it gets: "sample", x_{t-1} (B, 3, R, R).
            output_type: "np", "pt" or "pil".
            return_dict: False returns a tuple of the output's fields.

        Returns:
            [`AnomalyOutput`] with the `reconstruction`. The map is the difference of the two images, its absolute value
            averaged over the colours, in [0, 1], and smoothed; `anomaly_mask`, `is_anomalous` and `p_value` are None.

        Raises:
            ValueError, FileNotFoundError: an argument is wrong; the message names it and what to do.
        """
        # 1. Check the inputs: N images (3, H_i, W_i) in [0, 1], a category (N,) and a generator for each
        images = ImageSequence(image, self.value_range)
        resolution = self.processing_resolution if processing_resolution is None else processing_resolution
        check_call(images, batch_size, resolution, self.size_multiple, match_input_resolution, generator, output_type)
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        device = self._execution_device
        categories = category_indices(category, self.categories, len(images)).to(device)
        if scheduler is not None and not isinstance(scheduler, SchedulerMixin):
            raise ValueError(f"`scheduler` must be one of diffusers, such as DDIMScheduler(), but is {scheduler!r}.")
        scheduler = copy.deepcopy(self.scheduler if scheduler is None else scheduler)  # it keeps the state of a run
        last = scheduler.config.num_train_timesteps
        if not isinstance(timestep, (int, np.integer)) or not 1 <= timestep <= last:
            raise ValueError(f"`timestep` must be an integer in [1, {last}], but is {timestep!r}.")
        if not isinstance(num_inference_steps, (int, np.integer)) or not 1 <= num_inference_steps <= timestep:
            raise ValueError(
                f"`num_inference_steps` must be an integer in [1, {timestep}], the latter being `timestep`, but is "
                f"{num_inference_steps!r}."
            )
        generators = noise_generators(image_generators(generator, len(images)))
        resolution = as_size(resolution)
        size = images.sizes[0] if match_input_resolution else resolution
        seen = as_size(self.feature_extractor.input_resolution(resolution))
        self._interrupt = False

        # 2. Of as many steps as would go all the way down, the last `num_inference_steps` are taken
        total_steps = total_inference_steps(scheduler, timestep, num_inference_steps)
        begin = (total_steps - num_inference_steps) * scheduler.order
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        takes_variance = isinstance(scheduler, DDPMScheduler) and "learned" in scheduler.config.variance_type

        maps, scores, reconstructions = [], [], []
        num_batches = math.ceil(len(images) / batch_size)
        with self.progress_bar(total=num_batches * num_inference_steps) as progress:
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                options = {"generator": generators[batch]} if takes_generator else {}
                class_labels = categories[batch] if self.unet.config.num_class_embeds else None

                # 3. x_0, (B, 3, R, R) in [-1, 1], resized by way of the extractor's size as in a detector
                pixel_values = images_to_pixel_values(images[batch], seen).to(device)
                clean = resize_images(pixel_values, resolution)

                # 4. x_t of the first timestep (DDPM eq. 4)
                scheduler.set_timesteps(total_steps, device=device)
                timesteps = scheduler.timesteps[begin:]
                self._num_timesteps = len(timesteps)
                if hasattr(scheduler, "set_begin_index"):
                    scheduler.set_begin_index(begin)
                noise = draw_noise(clean.shape[1:], generators[batch], device)
                sample = scheduler.add_noise(clean, noise, timesteps[:1].expand(len(clean)))

                # 5. Denoise: x_{t-1} of x_t, down to x_0
                for step, t in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    model_input = scheduler.scale_model_input(sample, t).to(self.unet.dtype)
                    prediction = self.unet(model_input, t, class_labels=class_labels).sample.float()
                    if not takes_variance:
                        prediction = prediction[:, : sample.shape[1]]
                    sample = scheduler.step(prediction, t, sample, **options).prev_sample
                    if callback_on_step_end is not None:
                        tensors = {name: {"sample": sample}[name] for name in callback_on_step_end_tensor_inputs}
                        sample = (callback_on_step_end(self, step, t, tensors) or {}).get("sample", sample)
                    progress.update(1.0 / scheduler.order)

                # 6. What has changed: map (B, R, R), score (B,); all at the images' own size
                restored = sample.clamp(-1.0, 1.0)
                changed = difference_map(restored, clean, self.config.kl_sigma)
                fraction = self.config.score_fraction
                scores.append((top_fraction_score(changed, fraction) if fraction else max_score(changed)).cpu())
                maps.append(resize_images(changed[:, None], size)[:, 0].cpu())
                reconstructions.append(resize_images(restored / 2.0 + 0.5, size).clamp(0.0, 1.0).cpu())
                if self.interrupt:
                    break
        self.maybe_free_model_hooks()

        # 7. As arrays or pictures
        check_scores(torch.cat(scores))
        output = AnomalyOutput(torch.cat(maps), torch.cat(scores), torch.cat(reconstructions))
        return convert_output(output, output_type, return_dict)


def total_inference_steps(scheduler: SchedulerMixin, timestep: int, num_inference_steps: int) -> int:
    """Of how many steps from noise the last `num_inference_steps` begin at `timestep`, or as near below as can be.

    Most schedulers space steps by whole timesteps: of 400 steps they leave out the upper fifth of 1000.

    Args:
        scheduler: whose timesteps are set, and not kept.
        timestep: at least 1, at most the scheduler's `num_train_timesteps`.
        num_inference_steps: at least 1, at most `timestep`.

    Raises:
        ValueError: all begin more than a tenth of `timestep` and one spacing lower, or the scheduler takes Runge-Kutta
            steps first, which have to begin at the noise.
    """
    if scheduler.config.get("skip_prk_steps") is False:
        raise ValueError(
            "`scheduler` takes Runge-Kutta steps first, which cannot begin at `timestep`. Make it with "
            "`skip_prk_steps=True`."
        )
    last = scheduler.config.num_train_timesteps
    likely = round(num_inference_steps * last / timestep)
    # a spacing ends at 0 or one above: the total may be off by what one step more or fewer makes of it
    enough = last / timestep + 1.0
    found: dict[int, tuple[float, float, int]] = {}
    for total in sorted(range(1, last + 1), key=lambda total: abs(total - likely)):
        if total > likely + enough and num_inference_steps == 1:  # the one step is at `timestep` or above
            continue
        if abs(total - likely) > enough and not found.get(num_inference_steps, (math.inf,))[0]:
            break
        for count, below in steps_from(scheduler, timestep, total).items():
            found[count] = min(found.get(count, (math.inf, math.inf, 0)), (*below, total), key=lambda one: one[:2])
    if num_inference_steps in found:
        return found[num_inference_steps][2]
    nearest = min(found, key=lambda count: (abs(count - num_inference_steps), count), default=None)
    advice = "Take another `timestep`." if nearest is None else f"The nearest number that it has is {nearest}."
    raise ValueError(
        f"`num_inference_steps`: the {type(scheduler).__name__} has no {num_inference_steps} evenly spaced steps from "
        f"about `timestep` {timestep}. {advice}"
    )


def steps_from(scheduler: SchedulerMixin, timestep: int, total_steps: int) -> dict[int, tuple[float, float]]:
    """How many of the last of so many steps begin at `timestep` or not far below: each number with two distances.

    The first is by how much the beginning lies more than one spacing below, at most a tenth of `timestep`; the second
    how far it lies below in all. At 0 nothing is noised, so none begins there, but for a `timestep` of 1.
    """
    try:
        scheduler.set_timesteps(total_steps)
    except ValueError:  # an `LCMScheduler` has no more steps than it was distilled with
        return {}
    timesteps = scheduler.timesteps[:: scheduler.order].tolist()[:total_steps]
    above = [2 * timesteps[0] - timesteps[1] if len(timesteps) > 1 else math.inf, *timesteps]
    return {
        total_steps - i: (max(0.0, timestep - above[i]), timestep - one)
        for i, one in enumerate(timesteps)
        if min(1, timestep - 1) <= one <= timestep <= above[i] + timestep / 10 and total_steps - i <= timestep
    }
