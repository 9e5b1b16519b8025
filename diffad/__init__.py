"""Diffusion-based visual anomaly detection for the Hugging Face stack."""

import diffusers

from diffad.calibration import ScoreCalibration
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.pipelines.anomaly_pipeline import AnomalyOutput
from diffad.pipelines.pipeline_anomaly_denoise import AnomalyDenoisePipeline

__version__ = "0.1.0"

__all__ = [
    "AnomalyDenoisePipeline",
    "AnomalyOutput",
    "DenoisingUNet2DModel",
    "ScoreCalibration",
    "TimmFeatureExtractor",
]

# `DiffusionPipeline.from_pretrained` looks a saved pipeline's class up by name in diffusers itself.
for _pipeline in (AnomalyDenoisePipeline,):
    setattr(diffusers, _pipeline.__name__, _pipeline)
