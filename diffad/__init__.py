"""Diffusion-based visual anomaly detection for the Hugging Face stack.

Names are loaded when they are used, so that `import diffad` takes a moment and not seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffad.installation import check_one_checkout
from diffad.registration import COMPONENTS, PIPELINES, register_with_diffusers

if TYPE_CHECKING:
    from diffad.calibration.score_calibration import ScoreCalibration
    from diffad.models.denoising_unet_2d import DenoisingUNet2DModel
    from diffad.models.feature_extractor import TimmFeatureExtractor
    from diffad.models.gaussian_feature_model import GaussianFeatureModel
    from diffad.models.semantic_guided_network import SemanticGuidedNetwork
    from diffad.pipelines.output import AnomalyOutput
    from diffad.pipelines.pipeline_anomaly_denoise import AnomalyDenoisePipeline
    from diffad.pipelines.pipeline_ddpm_reconstruction import DDPMReconstructionPipeline
    from diffad.pipelines.pipeline_diad import DiADPipeline
    from diffad.pipelines.pipeline_gradient_denoising import GradientDenoisingPipeline

__version__ = "0.2.0.dev0"

__all__ = [
    "AnomalyDenoisePipeline",
    "AnomalyOutput",
    "DDPMReconstructionPipeline",
    "DenoisingUNet2DModel",
    "DiADPipeline",
    "GaussianFeatureModel",
    "GradientDenoisingPipeline",
    "ScoreCalibration",
    "SemanticGuidedNetwork",
    "TimmFeatureExtractor",
]

# By name, the module that each is loaded from. `ModelMixin` is for diffusers, which looks it up here.
_MODULES = {**PIPELINES, **COMPONENTS, "AnomalyOutput": "diffad.pipelines.output", "ModelMixin": "diffusers"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next time, it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


check_one_checkout()
register_with_diffusers()
