"""What diffusers' users expect of any pipeline: shared components, precision, callbacks, interruption, casting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import generator, texture, textures, tiny_extractor, tiny_pipeline, tiny_scheduler, tiny_unet
from test_pipeline_diad import make_pipeline

from diffad import AnomalyDenoisePipeline, DDPMReconstructionPipeline, DiADPipeline, GradientDenoisingPipeline
from diffad.model_card import render_model_card

GAUSSIAN = {"image_size": 16, "feature_size": 4, "num_channels": 8}
STEPS = {
    GradientDenoisingPipeline: {"num_iterations": 4},
    DDPMReconstructionPipeline: {"timestep": 40, "num_inference_steps": 4},
    DiADPipeline: {"num_inference_steps": 4},
}
TENSORS = {GradientDenoisingPipeline: "sample", DDPMReconstructionPipeline: "sample", DiADPipeline: "latents"}


def make(pipeline_class: type) -> Any:
    if pipeline_class is DiADPipeline:
        return make_pipeline()
    detector = tiny_pipeline()
    if pipeline_class is GradientDenoisingPipeline:
        detector.fit_gaussian(textures(12), generator=generator(), **GAUSSIAN)
    pipeline = detector if pipeline_class is AnomalyDenoisePipeline else detector.share_components(pipeline_class)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=[AnomalyDenoisePipeline, *STEPS], ids=lambda c: c.__name__)
def any_pipeline(request) -> Any:
    return make(request.param)


@pytest.fixture(params=STEPS, ids=lambda c: c.__name__)
def stepping(request) -> Any:
    return make(request.param)


def call(pipeline: Any, images: Any = None, **options: Any) -> Any:
    images = textures(2) if images is None else images
    options = {**STEPS.get(type(pipeline), {}), "generator": [generator(i) for i in range(len(images))], **options}
    if isinstance(pipeline, GradientDenoisingPipeline):
        options.pop("generator")  # one pass expects the clean image
    return pipeline(images, output_type="pt", **options)


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    modules = {name: m for name, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{name}.{key}": v.clone() for name, m in modules.items() for key, v in m.state_dict().items()}


# -- components --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_class", [GradientDenoisingPipeline, DDPMReconstructionPipeline])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_shares_components_and_changes_none(pipeline_class, dtype):
    detector = make(AnomalyDenoisePipeline).to(dtype=dtype)
    if pipeline_class is GradientDenoisingPipeline:
        detector.fit_gaussian(textures(12), generator=generator(), **GAUSSIAN)
    detector.calibrate(textures(4), false_alarm_rate=0.5)
    assert detector.dtype == dtype  # whose calibration is float32 in any case
    before = weights(detector)
    other = pipeline_class.from_pipe(detector, dtype=detector.dtype)
    assert other.unet is detector.unet
    assert other.feature_extractor is detector.feature_extractor
    assert other.config.kl_sigma == detector.config.kl_sigma
    output = call(other)
    assert torch.isfinite(output.anomaly_map).all()
    after = weights(detector)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    # the one-line ways are the same
    method = detector.reconstruct if pipeline_class is GradientDenoisingPipeline else detector.denoise
    options = {} if pipeline_class is GradientDenoisingPipeline else {"generator": [generator(i) for i in range(2)]}
    assert torch.equal(
        method(textures(2), output_type="pt", **options, **STEPS[pipeline_class]).reconstruction, output.reconstruction
    )


def test_a_constructor_changes_no_component():
    unet, extractor = tiny_unet().train(), tiny_extractor()
    layouts = [parameter.stride() for parameter in [*unet.parameters(), *extractor.buffers()]]
    AnomalyDenoisePipeline(unet, tiny_scheduler(), extractor)
    GradientDenoisingPipeline(unet, tiny_scheduler(), extractor)
    DDPMReconstructionPipeline(unet, tiny_scheduler(), extractor)
    assert unet.training
    assert [parameter.stride() for parameter in [*unet.parameters(), *extractor.buffers()]] == layouts


def test_each_component_has_a_precision_of_its_own(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    dtypes = {"unet": torch.bfloat16, "default": torch.float32}
    pipeline = AnomalyDenoisePipeline.from_pretrained(tmp_path, dtype=dtypes)
    assert pipeline.unet.dtype == torch.bfloat16
    assert pipeline.feature_extractor.dtype == torch.float32
    whole = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    mixed, expected = call(pipeline).anomaly_map, call(whole).anomaly_map
    assert mixed.dtype == torch.float32
    assert np.corrcoef(mixed.flatten(), expected.flatten())[0, 1] > 0.98


@pytest.mark.parametrize("loaded", [AnomalyDenoisePipeline, DiADPipeline, DDPMReconstructionPipeline])
def test_a_folder_of_other_networks_says_how_it_is_loaded(tmp_path, loaded):
    saved = AnomalyDenoisePipeline if loaded is DiADPipeline else DiADPipeline
    make(saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds a {saved.__name__}.*load it with `{saved.__name__}.from_pretrained`"):
        loaded.from_pretrained(tmp_path)


def test_pipelines_of_the_same_networks_load_each_others_folders(tmp_path):
    make(AnomalyDenoisePipeline).save_pretrained(tmp_path)

    class Own(AnomalyDenoisePipeline):
        pass

    for pipeline_class in (DDPMReconstructionPipeline, GradientDenoisingPipeline, Own):
        assert isinstance(pipeline_class.from_pretrained(tmp_path), pipeline_class)


def test_layerwise_casting_stores_weights_in_eight_bits():
    pipeline = make(AnomalyDenoisePipeline)
    expected = call(pipeline).anomaly_map
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in pipeline.unet.parameters())
    cast = call(pipeline).anomaly_map
    assert torch.isfinite(cast).all()
    assert np.corrcoef(cast.flatten(), expected.flatten())[0, 1] > 0.9


def test_optional_components_may_be_missing(any_pipeline, tmp_path):
    needed = {"feature_extractor", "unet", "scheduler"}  # for this call; without a denoiser: tests/training/test_fit.py
    for name in set(any_pipeline._optional_components) - needed:
        any_pipeline.register_modules(**{name: None})
    any_pipeline.save_pretrained(tmp_path)
    loaded = type(any_pipeline).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    missing = [name for name in any_pipeline._optional_components if getattr(loaded, name) is None]
    assert set(missing) == set(any_pipeline._optional_components) - needed
    if isinstance(loaded, GradientDenoisingPipeline):
        with pytest.raises(ValueError, match="no `gaussian`"):
            call(loaded)
    else:
        assert torch.equal(call(loaded).anomaly_map, call(any_pipeline).anomaly_map)


# -- steps -------------------------------------------------------------------------------------------------------


def test_a_callback_gets_the_tensors_that_it_asks_for(stepping):
    name, seen = TENSORS[type(stepping)], []

    def watch(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        assert pipe is stepping
        seen.append((step, set(tensors)))
        return tensors

    output = call(stepping, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=[name])
    assert [step for step, _ in seen] == list(range(stepping.num_timesteps))
    assert all(names == {name} for _, names in seen)
    assert torch.equal(output.reconstruction, call(stepping).reconstruction)  # nothing was changed
    call(stepping, callback_on_step_end=lambda *a: seen.append(a[3]) or {}, callback_on_step_end_tensor_inputs=[])
    assert seen[-1] == {}
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` holds \['noise'\]"):
        call(stepping, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["noise"])


def test_a_callback_changes_what_is_gone_on_with(stepping):
    name = TENSORS[type(stepping)]
    last = stepping.num_timesteps if hasattr(stepping, "_num_timesteps") else 4

    def blank(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        return {name: torch.zeros_like(tensors[name])} if step == last - 1 else {}

    output = call(stepping, callback_on_step_end=blank)
    assert (output.reconstruction[0] - output.reconstruction[1]).abs().max() < 1e-5  # both images are the same grey


def test_a_callback_can_interrupt(stepping):
    steps = []

    def stop(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    output = call(stepping, images=[texture(0)], callback_on_step_end=stop)
    assert steps == [0, 1]
    assert torch.isfinite(output.reconstruction).all()
    call(stepping, images=[texture(0)], callback_on_step_end=lambda *a: steps.append(a[1]) or {})
    assert steps == [0, 1, *range(4)]  # the next call runs to its end


def test_the_bar_counts_steps(stepping, capsys):
    stepping.set_progress_bar_config(disable=False)
    call(stepping, images=textures(3), batch_size=2)
    assert "8/8" in capsys.readouterr().err.replace("8.0/8", "8/8")  # two batches of four steps


@pytest.mark.parametrize(
    "pipeline_class", [AnomalyDenoisePipeline, DDPMReconstructionPipeline, GradientDenoisingPipeline]
)
def test_offloaded_layer_by_layer(pipeline_class):
    pipeline = make(pipeline_class)
    expected = call(pipeline).anomaly_map
    for network in (pipeline.unet, pipeline.feature_extractor):
        cpu_offload(network, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in pipeline.unet.parameters())
    torch.testing.assert_close(call(pipeline).anomaly_map, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_on_a_gpu(any_pipeline, offload):
    expected = call(any_pipeline).anomaly_map
    getattr(any_pipeline, offload)()
    torch.testing.assert_close(call(any_pipeline).anomaly_map, expected, rtol=1e-3, atol=1e-3)


# -- names of many categories, and a call of several batches -----------------------------------------------------


def test_twelve_categories_keep_their_order(tmp_path):
    names = [f"c{i}" for i in range(12)]
    tiny_pipeline(categories=names).save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    assert loaded.categories == names
    assert [loaded.category_index(name) for name in names] == list(range(12))
    with pytest.raises(ValueError, match="`categories` must be numbered from 0 on"):
        tiny_pipeline(categories={"0": "a", "2": "b"})


def test_an_interrupted_call_returns_the_batches_so_far(stepping):
    def stop(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pipe._interrupt = step == 1

    more = {"return_trajectory": True} if isinstance(stepping, GradientDenoisingPipeline) else {}
    output = call(stepping, images=textures(5), batch_size=2, callback_on_step_end=stop, **more)
    assert len(output.anomaly_map) == len(output.anomaly_score) == len(output.reconstruction) == 2
    assert torch.isfinite(output.reconstruction).all()


def test_a_category_without_thresholds_is_an_error():
    pipeline = tiny_pipeline(categories=["a", "b"])
    pipeline.calibrate(textures(12), category="a", false_alarm_rate=0.3, generator=generator())
    assert pipeline(texture(0), category="a").p_value is not None
    with pytest.raises(ValueError, match="Category 'b' is not calibrated"):
        pipeline(textures(2), category=["a", "b"])


def test_gradient_denoising_and_the_plain_ddpm_have_cards():
    for pipeline_class in (GradientDenoisingPipeline, DDPMReconstructionPipeline):
        assert pipeline_class.__name__ in str(render_model_card(make(pipeline_class)))
