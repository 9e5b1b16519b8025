"""Diffusion-based visual anomaly detection for the Hugging Face stack."""

import diffusers

from diffad.calibration.score_calibration import ScoreCalibration
from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.models.gaussian_feature_model import GaussianFeatureModel
from diffad.models.semantic_guided_network import SemanticGuidedNetwork
from diffad.pipelines.output import AnomalyOutput
from diffad.pipelines.pipeline_anomaly_denoise import AnomalyDenoisePipeline
from diffad.pipelines.pipeline_diad import DiADPipeline

__version__ = "0.1.0"

__all__ = [
    "AnomalyDenoisePipeline",
    "AnomalyOutput",
    "DenoisingUNet2DModel",
    "DiADPipeline",
    "GaussianFeatureModel",
    "ScoreCalibration",
    "SemanticGuidedNetwork",
    "TimmFeatureExtractor",
]

# `DiffusionPipeline.from_pretrained` looks the classes of a saved pipeline and its components up in diffusers itself.
_classes = [diffusers.ConfigMixin]
for _class in _classes:
    _classes.extend(_class.__subclasses__())
    if _class.__module__.startswith("diffad."):
        setattr(diffusers, _class.__name__, _class)
