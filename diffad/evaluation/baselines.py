"""What users would take otherwise, measured on the same images: PaDiM, and the plain DDPM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DDIMScheduler

from diffad import GaussianFeatureModel, TimmFeatureExtractor
from diffad.data import load_anomaly_dataset
from diffad.evaluation.detectors import call_arguments, counted_region, evaluate_detectors
from diffad.evaluation.metric_names import BASELINE_TITLES
from diffad.images import ImageSequence, Side, as_size, images_to_pixel_values
from diffad.pipelines.pipeline_ddpm_reconstruction import DDPMReconstructionPipeline
from diffad.process_share import process_share

PADIM_IMAGE_SIZE = 224  # px, PaDiM's own


def fit_padim(
    feature_extractor: TimmFeatureExtractor,
    good: Dataset,
    batch_size: int,
    accelerator: Accelerator,
    value_range: float | None,
) -> GaussianFeatureModel:
    """PaDiM over the pipeline's own backbone and strides, at PaDiM's 224 px, fitted to good images.

    The grid is 56 x 56 whatever the finest stride: PaDiM's own, with a ResNet. The images are shared among the
    accelerator's processes, and each ends with the same model.
    """
    model = GaussianFeatureModel.from_extractor(
        feature_extractor, image_size=PADIM_IMAGE_SIZE, feature_size=PADIM_IMAGE_SIZE // 4
    )
    mine = good.select(process_share(len(good), accelerator))
    return model.fit(image_batches(mine, batch_size, PADIM_IMAGE_SIZE, value_range), accelerator=accelerator)


def image_batches(
    images: Dataset, batch_size: int, image_size: Side, value_range: float | None
) -> Iterator[torch.Tensor]:
    """A data set's images in batches of (N, 3, H, W) of a size, in [-1, 1]; only one is in memory."""
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        rows = ImageSequence.of_rows(images["image"], indices, value_range)
        yield images_to_pixel_values(rows, as_size(image_size))


def evaluate_baseline(
    name: str,
    pipeline: Any,
    good: Dataset | None,
    images: Dataset,
    category: str,
    accelerator: Accelerator,
    resolution: int = 256,
    pro_fpr_limit: float = 0.3,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Evaluates what users would take otherwise, on the same images.

    Args:
        name: "padim", or "ddpm": the plain DDPM of an AnomalyDenoise pipeline, noised to t = 250 and denoised in 50
            DDIM steps.
        good: training images of the category, for PaDiM.
        pipeline, images, category, accelerator, resolution, pro_fpr_limit, batch_size: as of `evaluate_category`.
            Where the pipeline has a region of interest, only what is inside counts here, too: an image's score is then
            the map's maximum inside. The baseline still sees the whole image.

    Returns:
        As of `Evaluation.result`; empty for PaDiM with fewer than two good images, as a covariance takes two.
    """
    if name == "padim":
        if good is None or len(good) < 2:
            return {}
        value_range = pipeline.value_range
        padim = fit_padim(pipeline.feature_extractor, good, batch_size, accelerator, value_range)

        def detect(pictures: list[Any], indices: list[int]) -> list[Any]:
            options = {"match_input_resolution": False, "value_range": value_range}
            return [padim.detect(pictures, batch_size=batch_size, **options)]

    else:  # the plain DDPM
        ddpm = pipeline.share_components(DDPMReconstructionPipeline)
        ddpm.register_modules(scheduler=DDIMScheduler.from_config(pipeline.scheduler.config))

        def detect(pictures: list[Any], indices: list[int]) -> list[Any]:
            return [ddpm(pictures, **call_arguments(pipeline, category, len(pictures)))]

    def detect_inside(pictures: list[Any], indices: list[int]) -> list[Any]:
        output = detect(pictures, indices)[0]
        maps = output.anomaly_map.cpu()  # (N, h, w)
        inside = counted_region(pipeline, category, (maps.shape[1], maps.shape[2]))
        if inside is not None:
            output.anomaly_score = maps[:, inside].amax(dim=1)
        return [output]

    title = f"{BASELINE_TITLES[name]}: {category}"
    limits, region = (resolution, pro_fpr_limit, batch_size), counted_region(pipeline, category, (resolution,) * 2)
    return evaluate_detectors(detect_inside, 1, images, title, accelerator, *limits, region=region)[0].result


def load_training_images(
    data: str,
    category: Sequence[str] | None,
    dataset: str | None,
    test: Dataset,
    accelerator: Accelerator,
    on_bad_image: str = "error",
) -> Dataset | None:
    """Good images of the training split that are not in the test split too; None, and a word why, if there are none."""
    try:
        training = load_anomaly_dataset(data, "train", category, dataset, on_bad_image)
    except (FileNotFoundError, ValueError) as error:
        accelerator.print(f"No good images for training in {data}: {error}")
        return None
    tested = set(test["path"]) - {""}  # a plain folder shows the same good images in both
    paths, labels = training["path"], np.asarray(training["label"])
    chosen = [i for i, path in enumerate(paths) if labels[i] == 0 and path not in tested]
    if not chosen:
        accelerator.print(f"No good images for training in {data}: all of them are in its test split.")
        return None
    return training.select(chosen) if len(chosen) < len(training) else training
