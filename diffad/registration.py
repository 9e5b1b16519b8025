"""All that touches diffusers: which of this package's classes it can load, and the pipelines' names.

`DiffusionPipeline.from_pretrained` reads in `model_index.json` a pipeline's class by name, and its components' by
library and name: `"_class_name": "DiADPipeline"`, `"sg_network": ["diffad", "SemanticGuidedNetwork"]`. The former it
looks up in diffusers itself, the latter in the libraries that `LOADABLE_CLASSES` lists. So there is one entry more in
that list, and one attribute of the module `diffusers` for each pipeline. Nothing is replaced.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

# Every pipeline and every component that is saved with one, by name with its module; `diffad` has them as attributes.
PIPELINES = {
    "AnomalyDenoisePipeline": "diffad.pipelines.pipeline_anomaly_denoise",
    "DDPMReconstructionPipeline": "diffad.pipelines.pipeline_ddpm_reconstruction",
    "DiADPipeline": "diffad.pipelines.pipeline_diad",
    "GradientDenoisingPipeline": "diffad.pipelines.pipeline_gradient_denoising",
}
COMPONENTS = {
    "AutoencoderTAEF2": "diffad.models.autoencoder_taef2",
    "DenoisingUNet2DModel": "diffad.models.denoising_unet_2d",
    "GaussianFeatureModel": "diffad.models.gaussian_feature_model",
    "PromptEmbedding": "diffad.models.prompt_embedding",
    "ScoreCalibration": "diffad.calibration.score_calibration",
    "SemanticGuidedNetwork": "diffad.models.semantic_guided_network",
    "TimmFeatureExtractor": "diffad.models.feature_extractor",
}

DIFFUSION_PIPELINE_MODULE = "diffusers.pipelines.pipeline_utils"


def register_with_diffusers() -> None:
    """Registers now where `DiffusionPipeline` is there already, else as soon as it is imported.

    Registering imports torch and the pipelines, seconds that `import diffad` alone must not take.
    """
    if DIFFUSION_PIPELINE_MODULE in sys.modules:
        register()
    elif _DiffusionPipelineFinder not in map(type, sys.meta_path):
        sys.meta_path.insert(0, _DiffusionPipelineFinder())


def register() -> None:
    """Makes this package's classes known to diffusers. A second time changes nothing."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _DiffusionPipelineFinder)]

    import diffusers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    LOADABLE_CLASSES["diffad"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    for name, module in PIPELINES.items():
        setattr(diffusers, name, getattr(importlib.import_module(module), name))


class _DiffusionPipelineFinder(MetaPathFinder):
    """Finds the module of `DiffusionPipeline` as Python does, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DIFFUSION_PIPELINE_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None  # from an archive, say: then the first import of one of the pipelines registers
        spec.loader = _RegisteringLoader(spec.loader.name, spec.loader.path)
        return spec


class _RegisteringLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        register()
