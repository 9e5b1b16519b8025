"""What `import diffad` does to diffusers, and when: each story in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from diffusers import ModelMixin

import diffad
from diffad.registration import COMPONENTS, PIPELINES

# Everything that diffusers is made of: the attributes of its modules, and of the classes in them.
SNAPSHOT = """
import sys

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "diffusers":
            for attribute, value in list(vars(module).items()):
                found[name, attribute] = value
                if isinstance(value, type) and value.__module__.split(".")[0] == "diffusers":
                    for method, of_class in vars(value).items():
                        found[value.__module__, value.__qualname__, method] = of_class
    return found

def is_own(value):
    module = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", "diffusers")
    return module.split(".")[0] == "diffusers"
"""

DIFFUSERS_FIRST = f"""{SNAPSHOT}
import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

before, loadable, bases = attributes(), dict(LOADABLE_CLASSES), DiffusionPipeline.__mro__
modules = {{name[0] for name in before}}
import diffad
from diffad.registration import COMPONENTS, PIPELINES
loaded = DiffusionPipeline.from_pretrained(sys.argv[1])
for name in [*diffad.__all__, *COMPONENTS]:
    getattr(diffad, name)
after = attributes()

assert ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline", "from_pretrained") in before
replaced = [name for name, value in before.items() if after.get(name) is not value]
assert not replaced, replaced
assert DiffusionPipeline.__mro__ == bases
added = {{name for name in after.keys() - before.keys() if name[0] in modules and not is_own(after[name])}}
assert added == {{("diffusers", name) for name in PIPELINES}}, added
assert LOADABLE_CLASSES == {{**loadable, "diffad": {{"ModelMixin": ["save_pretrained", "from_pretrained"]}}}}
assert type(loaded) is diffad.AnomalyDenoisePipeline
assert type(loaded.unet) is diffad.DenoisingUNet2DModel
"""

DIFFAD_FIRST = """
import sys
import diffad
heavy = {"torch", "diffusers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
from diffusers import UNet2DModel
assert "diffad.pipelines" not in sys.modules  # a network takes no pipeline
from diffusers import DiffusionPipeline
loaded = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(loaded).__name__ == "AnomalyDenoisePipeline"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("diffad")]
"""

# A module that the pipelines need must not, by what it imports, start to import the pipelines. Forked, as a fresh
# process for each would load torch each time.
EACH_MODULE_FIRST = """
import os, pkgutil, sys, traceback
import diffad
paths = [os.path.dirname(diffad.__file__), *sys.argv[1:]]
names = [f"diffad.{module.name}" for module in pkgutil.iter_modules(paths[:1])]
for folder in ("calibration", "data", "evaluation", "models"):
    names += [f"diffad.{folder}.{m.name}" for m in pkgutil.iter_modules([os.path.join(paths[0], folder)])]
names += [f"diffad.pipelines.{module.name}" for module in pkgutil.iter_modules(paths[1:])]
import torch, timm, transformers, accelerate, datasets, torchmetrics, matplotlib.figure
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel, UNet2DModel
failed = []
for name in names:
    if name.startswith("diffad.__"):
        continue
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
            if name.startswith("diffad.pipelines."):
                import diffusers
                diffusers.AnomalyDenoisePipeline, diffusers.DiADPipeline
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
assert len(names) > 30 and not failed, failed
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tiny_pipeline(categories=["mono", "poly"]).save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


def run(code: str, *arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]


def test_nothing_of_diffusers_is_replaced_and_only_the_pipelines_names_are_new(model, tmp_path):
    run(DIFFUSERS_FIRST, model, cwd=tmp_path)


def test_the_import_is_light_and_diffusers_may_come_after_it(model, tmp_path):
    run(DIFFAD_FIRST, model, cwd=tmp_path)


def test_each_module_can_be_imported_first_and_one_pipeline_registers_all(tmp_path):
    import diffad.pipelines

    run(EACH_MODULE_FIRST, Path(diffad.pipelines.__file__).parent, cwd=tmp_path)


def test_every_component_is_registered():
    found, classes = set(), [ModelMixin]
    for parent in classes:
        classes.extend(parent.__subclasses__())
        if parent.__module__.startswith("diffad."):
            found.add(parent.__name__)
    assert found == set(COMPONENTS)


def test_public_names_are_listed_and_wrong_ones_are_refused():
    assert set(diffad.__all__) <= set(dir(diffad))
    for name in (*PIPELINES, *COMPONENTS):
        assert name in dir(diffad)
        assert getattr(diffad, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'diffad' has no attribute 'Anomaly'"):
        diffad.Anomaly  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Anomaly'"):
        from diffad import Anomaly  # noqa: F401
