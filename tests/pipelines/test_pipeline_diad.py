"""DiAD's pipeline on tiny real components: the reverse process, scores, calibration, saving, offloading.

Long, as one small pipeline serves all of it.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import STRIDES, generator, relative_error, texture, textures, tiny_extractor
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import nn

from diffad import DiADPipeline, SemanticGuidedNetwork
from diffad.calibration.recorded_settings import changed_settings
from diffad.calibration.score_calibration import ScoreCalibration
from diffad.images import denormalize_images, images_to_tensors, normalize_images
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.scoring import cosine_distance_map, gaussian_smooth, max_score
from diffad.seeding import image_generators
from diffad.warn_once import warn_once

PROMPT = (5, 12)  # length and width
SIDE = 16  # pixels; latents are 8 x 8


def make_vae(**config) -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "sample_size": SIDE,
            "scaling_factor": 0.7,
            **config,
        }
    )


def make_unet(**config) -> UNet2DConditionModel:
    torch.manual_seed(4)
    return UNet2DConditionModel(
        **{
            "sample_size": SIDE // 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": PROMPT[1],
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        }
    )


def make_sg_network(unet: UNet2DConditionModel, **config) -> SemanticGuidedNetwork:
    network = SemanticGuidedNetwork.from_unet(unet, **{"conditioning_embedding_out_channels": (4, 8), **config})
    torch.manual_seed(5)
    for parameter in network.parameters():  # as if trained: new, it would add nothing
        parameter.data.normal_(std=0.3)
    return network


def make_scheduler(cls=DDIMScheduler, **config):
    stable_diffusion = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if cls is DDIMScheduler:
        stable_diffusion |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return cls(1000, **{**stable_diffusion, **config})


def make_pipeline(guided: bool = True, scheduler=None, sg_config: dict | None = None, **config) -> DiADPipeline:
    unet = make_unet()
    torch.manual_seed(6)
    pipeline = DiADPipeline(
        vae=make_vae(),
        unet=unet,
        prompt_embedding=PromptEmbedding.from_tensor(torch.randn(1, *PROMPT)),
        scheduler=scheduler or make_scheduler(),
        sg_network=make_sg_network(unet, **(sg_config or {})) if guided else None,
        feature_extractor=tiny_extractor(),
        **{
            "num_inference_steps": 3,
            "sigma": 1.0,
            "pooling_size": 2,
            "pooling_rounds": 2,
            "processing_resolution": SIDE,
            **config,
        },
    )
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.vae, pipeline.unet, pipeline.sg_network):
        if network is not None:
            network.eval()
    return pipeline


def pixel_values(count: int = 2, side: int = SIDE) -> torch.Tensor:
    return normalize_images(
        torch.stack(images_to_tensors(textures(count, side))) * 2.0 - 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, SIDE // 2, SIDE // 2, generator=generator(1))


@pytest.fixture(scope="module")
def pipe() -> DiADPipeline:
    return make_pipeline()


# -- the reverse process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_ten_steps_are_ten_passes_of_each_network_and_one_of_the_images_stack(count):
    pipe, calls = make_pipeline(), []
    pipe(textures(1), num_inference_steps=1)  # which makes the extractor's network that runs
    networks = {
        "unet": pipe.unet,
        "sg_network": pipe.sg_network,
        "stack": pipe.sg_network.controlnet_cond_embedding,
        "encoder": pipe.vae.encoder,
        "decoder": pipe.vae.decoder,
        "extractor": pipe.feature_extractor.running_network(),
    }
    for name, network in networks.items():
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    pipe(textures(count), num_inference_steps=10)
    # one image, or three in one batch; nothing is encoded, and both images' features come from one pass
    assert {name: calls.count(name) for name in networks} == {
        "unet": 10,
        "sg_network": 10,
        "stack": 1,
        "encoder": 0,
        "decoder": 1,
        "extractor": 1,
    }


@torch.no_grad()
def test_denoising_is_the_loop_written_out(pipe):
    images, latents = pixel_values(), noise()
    timesteps = []
    result = pipe.denoise(
        images,
        latents,
        num_inference_steps=10,
        callback_on_step_end=lambda _, step, timestep, values: timesteps.append(int(timestep)) or values,
    )
    assert timesteps == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]

    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    prompt = pipe.prompt_embedding().expand(2, -1, -1)
    for timestep in scheduler.timesteps:
        guidance = pipe.sg_network(latents, timestep, prompt, pixel_values=images)
        epsilon = pipe.unet(
            latents,
            timestep,
            prompt,
            down_block_additional_residuals=guidance.down_block_res_samples,
            mid_block_additional_residual=guidance.mid_block_res_sample,
        ).sample
        latents = scheduler.step(epsilon, timestep, latents, eta=0.0).prev_sample
    torch.testing.assert_close(result, latents)


def test_the_image_guides(pipe):
    latents = noise(1).expand(2, -1, -1, -1)
    guided = pipe.denoise(pixel_values(2), latents)
    assert relative_error(guided[1], guided[0]) > 1e-3
    plain = make_pipeline(guided=False).denoise(pixel_values(2), latents)
    torch.testing.assert_close(plain[0], plain[1])  # latent diffusion alone does not see it
    assert relative_error(guided[0], plain[0]) > 1e-3


@torch.no_grad()
def test_below_full_strength_it_starts_from_the_noised_image(pipe):
    images, latents, starts = pixel_values(), noise(), []

    def keep(module, args, kwargs):
        starts.append((args[0], int(args[1])))

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipe.denoise(images, latents, num_inference_steps=10, strength=0.4)
        clean = pipe.vae.encode(images).latent_dist.mode() * 0.7
        assert [timestep for _, timestep in starts] == [301, 201, 101, 1]
        signal = pipe.scheduler.alphas_cumprod[301]
        expected = signal.sqrt() * clean + (1.0 - signal).sqrt() * latents
        torch.testing.assert_close(starts[0][0], expected)
        torch.testing.assert_close(pipe.encode(images), clean)

        starts.clear()
        pipe.denoise(images, latents, num_inference_steps=10, strength=1.0)
        assert torch.equal(starts[0][0], latents)  # noise alone
    finally:
        hook.remove()


@torch.no_grad()
def test_decode_undoes_encode(pipe):
    images = pixel_values()
    mode = pipe.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(pipe.decode(pipe.encode(images)), pipe.vae.decode(mode).sample)
    pixels = torch.rand(2, 3, 4, 4) * 2.0 - 1.0
    statistics = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    torch.testing.assert_close(denormalize_images(normalize_images(pixels, *statistics), *statistics), pixels)
    torch.testing.assert_close(normalize_images(-torch.ones(1, 3, 1, 1), *statistics)[0, 1, 0, 0], torch.tensor(-0.4))


def test_shifted_latents():
    pipe = make_pipeline()
    pipe.vae.register_to_config(shift_factor=0.3)
    plain = make_pipeline()
    images = pixel_values()
    torch.testing.assert_close(pipe.encode(images), plain.encode(images) - 0.3 * 0.7)
    torch.testing.assert_close(pipe.decode(pipe.encode(images)), plain.decode(plain.encode(images)))


@pytest.fixture(scope="module")
def small_steps() -> dict[float, torch.Tensor]:
    """Latents by a hundred steps of DDIM, at full strength and at half."""
    return {
        strength: make_pipeline().denoise(pixel_values(), noise(), num_inference_steps=100, strength=strength)
        for strength in (1.0, 0.5)
    }


@pytest.mark.parametrize(
    ("scheduler", "passes"),
    [
        (DDIMScheduler, 20),
        (DPMSolverMultistepScheduler, 20),
        (UniPCMultistepScheduler, 20),
        (EulerDiscreteScheduler, 20),  # scales its input, and starts from far larger noise
        (HeunDiscreteScheduler, 39),  # two passes a step
    ],
)
def test_schedulers_swap(scheduler, passes, small_steps):
    """They solve one equation, to about the same latents; a wrongly scaled start or input would end far away."""
    pipe, calls = make_pipeline(), []
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    for strength, expected in small_steps.items():
        latents = pipe.denoise(pixel_values(), noise(), num_inference_steps=20, strength=strength)
        assert relative_error(latents, expected) < 0.25
        if strength == 1.0:
            assert len(calls) == passes


def test_a_scheduler_that_draws_noise_takes_the_images_generators():
    pipe = make_pipeline(scheduler=make_scheduler(DDPMScheduler, clip_sample=False))
    images = textures(3)

    def scores(batch_size: int, first_seed: int = 0) -> np.ndarray:
        generators = [generator(first_seed + i) for i in range(3)]
        return pipe(images, generator=generators, batch_size=batch_size).anomaly_score

    np.testing.assert_allclose(scores(1), scores(3), rtol=1e-4)
    assert not np.allclose(scores(3), scores(3, first_seed=10), rtol=1e-3)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_thresholds_come_of_the_noise_that_calls_have(scheduler):
    options = {"clip_sample": False} if scheduler is DDPMScheduler else {}
    pipe, good = make_pipeline(scheduler=make_scheduler(scheduler, **options)), textures(20)
    pipe.calibrate(good[12:], good[:12], false_alarm_rate=0.2)
    scores = pipe(good[12:], batch_size=3).anomaly_score
    np.testing.assert_allclose(np.sort(scores), pipe.calibration.good_scores(0), rtol=1e-3, atol=1e-3)
    assert np.array_equal(pipe(good[12]).reconstruction[0], pipe(good[12]).reconstruction[0])


def test_noise_that_the_statistics_do_not_know_warns_once(caplog):
    warn_once.cache_clear()
    pipe = make_pipeline()
    pipe.calibrate(textures(12), false_alarm_rate=0.3)
    pipe(texture(0))
    assert "calibrated with its own noise" not in caplog.text
    pipe(texture(0), latents=noise()[:1])
    pipe(texture(0), generator=generator())
    assert caplog.text.count("calibrated with its own noise") == 1


def test_a_scheduler_that_the_calibration_does_not_know_warns_once(caplog):
    warn_once.cache_clear()
    pipe = make_pipeline()
    pipe.calibrate(textures(12), false_alarm_rate=0.3)
    pipe(texture(0))
    assert "calibrated with other settings" not in caplog.text
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe(texture(0))
    pipe(texture(1))
    assert caplog.text.count("scheduler") == 1


@pytest.mark.parametrize(
    "change", [{"clip_sample": True}, {"set_alpha_to_one": True}, {"trained_betas": [1e-3] * 1000}]
)
def test_other_settings_of_the_same_scheduler_warn(caplog, change):
    warn_once.cache_clear()
    pipe = make_pipeline()
    pipe.calibrate(textures(6), false_alarm_rate=0.3)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **change)
    pipe(texture(0))
    assert "calibrated with other settings (scheduler)" in caplog.text


def test_a_record_of_an_earlier_version_says_less_of_the_scheduler():
    known = {"class": "DDIMScheduler", "beta_end": 0.02}
    now = {"scheduler": {**known, "clip_sample": True}}
    assert changed_settings({"scheduler": known}, now) == []
    assert changed_settings({"scheduler": {**known, "beta_end": 0.012}}, now) == ["scheduler"]


def test_callback_sees_each_step_and_may_change_the_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, values):
        assert pipeline is pipe
        seen.append((step, int(timestep), tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else values

    changed = pipe(textures(3), batch_size=2, callback_on_step_end=callback, generator=generator())
    steps = [(0, 667), (1, 334), (2, 1)]
    assert seen == [(*step, (2, 4, 8, 8)) for step in steps] + [(*step, (1, 4, 8, 8)) for step in steps]
    # all three end at the same latents, hence at the same picture
    np.testing.assert_allclose(changed.reconstruction[0], changed.reconstruction[2], atol=1e-6)
    plain = pipe(textures(3), batch_size=2, generator=generator())
    assert not np.allclose(plain.reconstruction[0], plain.reconstruction[2])
    # without a change to return
    pipe(textures(1), callback_on_step_end=lambda *_: {})


# -- a call ------------------------------------------------------------------------------------------------------


def test_scores_are_the_papers(pipe):
    images = textures(2)
    output = pipe(images, latents=noise(), output_type="pt")
    pixels = torch.stack(images_to_tensors(images)) * 2.0 - 1.0
    statistics = (pipe.config.image_mean, pipe.config.image_std)
    decoded = pipe.decode(pipe.denoise(normalize_images(pixels, *statistics), noise(), 3))
    restored = denormalize_images(decoded, *statistics)
    with torch.no_grad():
        layers = [pipe.feature_extractor.layers(one) for one in (pixels, restored)]
    maps = gaussian_smooth(cosine_distance_map(*layers, size=(SIDE, SIDE)), 1.0)
    torch.testing.assert_close(output.anomaly_map, maps)
    torch.testing.assert_close(output.anomaly_score, max_score(maps, 2, 2))
    torch.testing.assert_close(output.reconstruction, (restored / 2.0 + 0.5).clamp(0.0, 1.0))
    assert output.anomaly_mask is None


def test_output_at_the_images_own_size_in_each_form(pipe):
    images = [texture(0, (20, 24)), texture(1, (20, 24))]
    output = pipe(images)
    assert output.anomaly_map.shape == (2, 20, 24)
    assert output.anomaly_map.dtype == np.float32
    assert output.anomaly_score.shape == (2,)
    assert output.reconstruction.shape == (2, 20, 24, 3)
    assert 0.0 <= output.reconstruction.min() <= output.reconstruction.max() <= 1.0
    assert pipe(images, match_input_resolution=False).anomaly_map.shape == (2, SIDE, SIDE)
    assert pipe(images, processing_resolution=24, match_input_resolution=False).anomaly_map.shape == (2, 24, 24)
    assert pipe(images, output_type="pt").reconstruction.shape == (2, 3, 20, 24)
    pictures = pipe(images, output_type="pil").reconstruction
    assert [picture.size for picture in pictures] == [(24, 20)] * 2
    assert isinstance(pictures[0], Image.Image)
    fields = pipe(images, return_dict=False)
    assert [field is None for field in fields] == [False] * 3 + [True] * 3


def test_an_images_result_depends_neither_on_the_batch_nor_on_later_images(pipe):
    images = textures(5)
    together = pipe(images, batch_size=5, generator=generator())
    split = pipe(images, batch_size=2, generator=generator())
    fewer = pipe(images[:3], generator=generator())
    np.testing.assert_allclose(together.anomaly_map, split.anomaly_map, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(together.anomaly_map[:3], fewer.anomaly_map, rtol=1e-4, atol=1e-6)
    again = pipe(images, batch_size=5, generator=generator())
    assert np.array_equal(together.anomaly_map, again.anomaly_map)  # to the bit
    listed = pipe(images[1:], generator=[generator(i) for i in range(1, 5)])
    alone = pipe(images[3], generator=generator(3))
    np.testing.assert_allclose(listed.anomaly_map[2], alone.anomaly_map[0], rtol=1e-4, atol=1e-6)
    assert not np.allclose(together.anomaly_map, pipe(images, generator=generator(9)).anomaly_map, rtol=1e-3)
    # given latents take the generator's place, and are shared out to the batches
    given = pipe(images, latents=noise(5), batch_size=2)
    np.testing.assert_allclose(given.anomaly_map, pipe(images, latents=noise(5)).anomaly_map, rtol=1e-4, atol=1e-6)


def test_arguments_go_before_the_pipelines_own():
    pipe = make_pipeline(num_inference_steps=5, strength=0.4)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    for options, passes in (({}, 2), ({"strength": 1.0}, 5), ({"num_inference_steps": 10}, 4)):
        calls.clear()
        pipe(texture(0), **options)
        assert len(calls) == passes


def test_images_are_normalised_by_the_pipelines_statistics():
    pipe, seen = make_pipeline(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]), []
    pipe.sg_network.controlnet_cond_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pipe(texture(0))
    torch.testing.assert_close(seen[0], torch.stack(images_to_tensors(texture(0))) * 2.0 - 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
        ({"strength": 0.0}, "`strength` must lie in"),
        ({"strength": 1.5}, "`strength` must lie in"),
        ({"strength": "a"}, "`strength` must lie in"),
        ({"strength": 0.1}, r"`strength` of 0.1 leaves none of 3 steps. Use at least 0.33"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"`latents` must have shape \(1, 4, 8, 8\)"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "`latents` must be a torch.Tensor"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "`latents` holds NaN"),
        ({"processing_resolution": 17}, "`processing_resolution` must be a multiple of 2.*Try 16"),
        ({"processing_resolution": 4}, "`sample` of 2 x 2 is too small.*larger `processing_resolution`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"output_type": "latent"}, "`output_type`"),
        ({"category": "tile"}, "`category` 'tile' is unknown"),
    ],
)
def test_bad_arguments_are_named(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(texture(0), **options)


def test_statistics_of_the_latents_go_together():
    for mean, std in (
        ([0.0] * 4, None),
        ([0.0] * 3, [1.0] * 3),
        ([0.0] * 4, [1.0, 1.0, 0.0, 1.0]),
        ([float("nan")] * 4, [1.0] * 4),
    ):
        with pytest.raises(ValueError, match="`latents_mean` and `latents_std` go together: a number for each of"):
            make_pipeline(latents_mean=mean, latents_std=std)


def test_bad_tensors_are_named(pipe):
    for call in (pipe.denoise, pipe.encode):
        with pytest.raises(ValueError, match=r"`pixel_values` of 15 x 16.*multiples of 2"):
            call(torch.zeros(1, 3, 15, 16))
        with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(N, 3, H, W\)"):
            call(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"`latents` must have shape \(N, 4, h, w\), but has \(1, 3, 8, 8\)"):
        pipe.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="`generator` lists 3 generators for 2 images"):
        pipe.denoise(pixel_values(), generator=[generator()] * 3)


def test_components_that_do_not_belong_together():
    unet = make_unet()
    parts = {
        "vae": make_vae(),
        "unet": unet,
        "prompt_embedding": PromptEmbedding(*PROMPT),
        "scheduler": make_scheduler(),
        "sg_network": make_sg_network(unet),
    }
    for changed, words in (
        ({"vae": make_vae(latent_channels=8)}, "`unet` takes latents of 4 channels, but `vae` makes them with 8"),
        ({"prompt_embedding": PromptEmbedding(5, 7)}, "`prompt_embedding` is 7 wide.*width 12"),
        (
            {"sg_network": make_sg_network(unet, conditioning_embedding_out_channels=(4, 8, 8))},
            "`sg_network` makes the image 4 times smaller and `vae` 2 times",
        ),
        ({"strength": 0.0}, "`strength`"),
        ({"sigma": -1.0}, "`sigma`"),
        ({"sigma": float("nan")}, "`sigma`"),
        ({"pooling_size": 0}, "`pooling_size`"),
        ({"pooling_size": 2.5}, "`pooling_size`"),
        ({"pooling_rounds": 1.5}, "`pooling_rounds`"),
        ({"image_mean": [0.5]}, "`image_mean` and `image_std` must be"),
        ({"image_std": [0.0] * 3}, "`image_mean` and `image_std` must be"),
        ({"processing_resolution": 17}, "`processing_resolution` must be a multiple of 2"),
        ({"vae": None}, "`vae` is None"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "`scheduler` is a FlowMatchEuler.*no `add_noise`"),
    ):
        with pytest.raises(ValueError, match=words):
            DiADPipeline(**{**parts, **changed})
    with pytest.raises(ValueError, match=r"`prompt_embeds` must have shape \(1, L, D\)"):
        PromptEmbedding.from_tensor(torch.zeros(2, 3, 4))


def test_a_scheduler_that_cannot_begin_so_late_is_refused():
    pipe = make_pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"Runge-Kutta steps first.*`skip_prk_steps=True`"):
        pipe.denoise(pixel_values(), num_inference_steps=10, strength=0.3)
    assert pipe.denoise(pixel_values(), num_inference_steps=10).isfinite().all()
    pipe.scheduler = IPNDMScheduler()
    with pytest.raises(ValueError, match=r"`scheduler` is a IPNDMScheduler.*no `add_noise`"):
        pipe.denoise(pixel_values())


def test_without_features_it_denoises_and_says_what_a_call_needs():
    pipe = make_pipeline()
    pipe.register_modules(feature_extractor=None)
    assert pipe.decode(pipe.denoise(pixel_values())).shape == (2, 3, SIDE, SIDE)
    for use in (lambda: pipe(texture(0)), lambda: pipe.calibrate(textures(4))):
        with pytest.raises(ValueError, match=r"`feature_extractor` is None.*register_modules"):
            use()
    pipe.register_modules(feature_extractor=tiny_extractor())
    assert np.isfinite(pipe(texture(0)).anomaly_score).all()


# -- calibration -------------------------------------------------------------------------------------------------


def test_calibration_normalises_by_place_and_counts_good_images():
    pipe = make_pipeline()
    good = textures(9)
    pipe.calibrate(good[:3], statistics_images=good[3:], false_alarm_rate=0.3, generator=generator(), batch_size=4)
    assert pipe.calibration.map_mean.shape == (1, len(STRIDES), SIDE, SIDE)
    assert pipe.calibration.residual_mean is None
    assert pipe.calibration.normal_scores.shape == (1, 3)

    # each layer is normalised by itself
    latents = noise(1)
    output = pipe(good[0], latents=latents)
    normalized = []
    for i, stride in enumerate(STRIDES):
        raw = make_pipeline(score_strides=[stride])
        maps = raw(good[3:], generator=image_generators(generator(), 6)).anomaly_map  # noise as the calibration drew it
        mean, std = pipe.calibration.map_mean[0, i].numpy(), pipe.calibration.map_std[0, i].numpy()
        np.testing.assert_allclose(mean, maps.mean(axis=0), rtol=1e-3, atol=1e-6)
        normalized.append((raw(good[0], latents=latents).anomaly_map[0] - mean) / std)
    np.testing.assert_allclose(output.anomaly_map[0], np.mean(normalized, axis=0), rtol=1e-3, atol=1e-3)
    assert output.anomaly_mask.shape == (1, SIDE, SIDE)
    assert output.p_value[0] in np.arange(1, 5, dtype=np.float32) / 4
    # half for statistics and half for thresholds, of one list
    assert make_pipeline().calibrate(textures(5), false_alarm_rate=0.4).calibration.normal_scores.shape == (1, 3)
    with pytest.raises(ValueError, match="it takes 1 of each, or 2 `images`"):
        make_pipeline().calibrate(textures(1))


def test_the_papers_map_is_the_sum_of_its_layers():
    layers = [make_pipeline(score_strides=[s])(texture(0), latents=noise(1)).anomaly_map for s in STRIDES]
    together = make_pipeline()(texture(0), latents=noise(1)).anomaly_map
    np.testing.assert_allclose(together, sum(layers), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"`score_strides` must be taken from \[2, 4\]"):
        make_pipeline(score_strides=[16])


@pytest.mark.parametrize("rounds", [0, 1])
def test_contrast_changes_outlines_and_no_verdict(rounds):
    images = [*textures(4, first_seed=100), *(texture(2000 + i, defect=True) for i in range(4))]
    plain, heightened = (
        make_pipeline(distance="mahalanobis", pooling_rounds=rounds, contrast=c).calibrate(
            textures(20), false_alarm_rate=0.3, generator=generator()
        )(images, generator=generator())
        for c in (0.0, 0.5)
    )
    for name in ("anomaly_score", "p_value", "is_anomalous"):
        assert np.array_equal(getattr(heightened, name), getattr(plain, name))  # to the bit
    assert (heightened.anomaly_map <= plain.anomaly_map).all()
    assert not np.array_equal(heightened.anomaly_map, plain.anomaly_map)
    with pytest.raises(ValueError, match="`contrast` must be finite"):
        make_pipeline(contrast=-0.1)


def test_without_trust_in_positions_all_have_one_mean_and_deviation():
    at_each, of_all = (
        make_pipeline(distance="mahalanobis", position_trust=trust)
        .calibrate(textures(12), false_alarm_rate=0.25, generator=generator())
        .calibration
        for trust in (1.0, 0.0)
    )
    for name in ("map_mean", "map_std"):
        assert getattr(at_each, name)[0].std(dim=(-2, -1)).min() > 0.0
        assert getattr(of_all, name)[0].std(dim=(-2, -1)).max() < 1e-5
    with pytest.raises(ValueError, match="`position_trust` must lie in"):
        make_pipeline(position_trust=1.5)


JOINED = {"reconstruction": 2.0, "gaussian": 1.0, "nearest": 1.0}


@pytest.mark.parametrize("distance", ["cosine", "mahalanobis"])
def test_features_own_maps_join_the_reconstructions(distance):
    pipe = make_pipeline(distance=distance, weights=JOINED).calibrate(
        textures(6), textures(24, first_seed=50), false_alarm_rate=0.25, generator=generator()
    )
    measurement = pipe.compare(pixel_values(), pipe.reconstruct(pixel_values(), noise=noise()))
    category = torch.zeros(2, dtype=torch.long)
    maps = pipe.score_maps(measurement, category, pipe.calibration)
    rebuilt = 2 if distance == "cosine" else 1
    assert maps.shape[1] == rebuilt + 2
    normalized = pipe.calibration.normalize(maps, category)
    expected = 0.5 * normalized[:, :rebuilt].mean(dim=1) + 0.25 * normalized[:, -2] + 0.25 * normalized[:, -1]
    torch.testing.assert_close(pipe.join_maps(maps, category, pipe.calibration), expected)
    good, bad = ([texture(500 + i, defect=defect) for i in range(12)] for defect in (False, True))
    scores = [pipe(images, generator=generator()).anomaly_score for images in (good, bad)]
    assert (scores[1][:, None] > scores[0]).mean() > 0.9


def test_the_reconstruction_alone_is_what_no_weights_are(tmp_path):
    plain, named, joined = (
        make_pipeline(weights=weights).calibrate(textures(12), false_alarm_rate=0.25, generator=generator())
        for weights in (None, {"reconstruction": 3.0}, JOINED)
    )
    images = textures(3, first_seed=90)
    first = plain(images, generator=generator()).anomaly_map
    assert np.array_equal(named(images, generator=generator()).anomaly_map, first)
    other = joined(images, generator=generator()).anomaly_map
    assert not np.allclose(other, first)
    known = joined.calibration.config.settings
    assert changed_settings(known, {**known, "weights": {name: 2.0 * one for name, one in JOINED.items()}}) == []
    assert changed_settings(known, {**known, "weights": {"reconstruction": 1.0}}) == ["weights"]
    joined.save_pretrained(tmp_path)
    again = DiADPipeline.from_pretrained(tmp_path)
    assert again.weights == JOINED
    assert np.array_equal(again(images, generator=generator()).anomaly_map, other)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kl": 1.0}, "`weights` must be of reconstruction, gaussian, nearest, but names kl"),
        ({"reconstruction": -1.0}, "`weights` must be finite, not negative"),
        ({"gaussian": 1.0}, "`weights` must be above 0 for the reconstruction"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(weights=weights)


def test_weights_that_the_calibration_does_not_know():
    pipe = make_pipeline().calibrate(textures(8), false_alarm_rate=0.25, generator=generator())
    pipe.register_to_config(weights=JOINED)
    with pytest.raises(ValueError, match="was made for other scores"):
        pipe(texture(0), generator=generator())


def test_a_category_of_an_earlier_version_keeps_its_statistics_of_positions():
    pipe = make_pipeline(distance="mahalanobis", categories=["a", "b"])
    pipe.calibrate(textures(8), false_alarm_rate=0.25, category="a", generator=generator())
    known = {name: value for name, value in pipe.calibration.config.settings.items() if name != "position_trust"}
    pipe.calibration.register_to_config(settings=known)  # as it was before there was such a setting
    pipe.register_to_config(position_trust=0.0)
    with pytest.raises(ValueError, match=r"with other settings \(position_trust\)"):
        pipe.calibrate(textures(8), false_alarm_rate=0.25, category="b", generator=generator())


def test_cells_of_several_positions(monkeypatch):
    channels = make_pipeline(distance="mahalanobis").feature_extractor.num_channels
    # at 2 x 2 places
    monkeypatch.setattr("diffad.calibration.residual_gaussian.COVARIANCE_NUMBERS", 4 * channels * (channels + 1) // 2)
    pipe = make_pipeline(distance="mahalanobis")
    pipe.calibrate(textures(4), textures(24, first_seed=50), false_alarm_rate=0.3, generator=generator())
    assert pipe.calibration.num_distances == 2
    images = [*textures(4, first_seed=90), *(texture(i, defect=True) for i in range(4))]
    scores = pipe(images, latents=noise(1).expand(8, -1, -1, -1)).anomaly_score
    assert scores[:4].max() < scores[4:].min()


def test_whitened_residuals_are_calibrated_and_saved(tmp_path):
    pipe = make_pipeline(distance="mahalanobis")
    pipe.calibrate(textures(4), statistics_images=textures(24, first_seed=50), false_alarm_rate=0.3)
    assert tuple(pipe.calibration.config.residual_shape) == (pipe.feature_extractor.num_channels, SIDE // 2, SIDE // 2)
    bad = [texture(i, defect=True) for i in range(4)]
    latents = noise(1).expand(4, -1, -1, -1)
    good, found = pipe(textures(4, first_seed=90), latents=latents), pipe(bad, latents=latents)
    assert found.anomaly_score.min() > good.anomaly_score.max()
    pipe.save_pretrained(tmp_path)
    loaded = DiADPipeline.from_pretrained(tmp_path)
    assert np.array_equal(loaded(bad, latents=latents).anomaly_map, found.anomaly_map)
    with pytest.raises(ValueError, match="`distance` must be"):
        make_pipeline(distance="euclidean")


def test_one_model_of_two_categories_differs_in_calibration_alone():
    pipe = make_pipeline(categories=["cable", "tile"])
    raw = pipe(texture(0), latents=noise(1))  # no category is needed before there are statistics of each
    assert np.array_equal(raw.anomaly_map, pipe(texture(0), "tile", latents=noise(1)).anomaly_map)
    for number, name in enumerate(("cable", "tile")):
        good = textures(6, first_seed=100 * number)
        pipe.calibrate(good, false_alarm_rate=0.3, category=name, generator=generator())
        if name == "cable":
            with pytest.raises(ValueError, match="its calibration not what they all look like"):
                pipe(texture(0))  # which may be a tile
    cable, tile = (pipe(texture(0), name, latents=noise(1)) for name in ("cable", "tile"))
    assert not np.allclose(cable.anomaly_map, tile.anomaly_map)
    assert np.array_equal(cable.reconstruction, tile.reconstruction)
    both = pipe([texture(0)] * 2, ["cable", 1], latents=noise(1).expand(2, -1, -1, -1))
    np.testing.assert_allclose(both.anomaly_map[1], tile.anomaly_map[0], rtol=1e-3, atol=1e-3)
    recognised = pipe(good[0], latents=noise(1))
    assert np.array_equal(recognised.anomaly_map, pipe(good[0], "tile", latents=noise(1)).anomaly_map)


# -- saving ------------------------------------------------------------------------------------------------------


@pytest.fixture
def messages():
    """What diffusers says."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    yield said
    logging.getLogger("diffusers").removeHandler(handler)


@pytest.mark.parametrize("loader", [DiADPipeline, DiffusionPipeline])
def test_saved_and_loaded_it_gives_the_same_to_the_bit(tmp_path, messages, loader):
    pipe = make_pipeline(categories=["a"], image_mean=[0.4, 0.5, 0.6], strength=0.9)
    pipe.calibrate(textures(6), false_alarm_rate=0.3, generator=generator())
    expected = pipe(textures(2), generator=generator())
    pipe.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.rglob("*.*") if path.suffix in (".bin", ".pt", ".pkl")) == []
    loaded = loader.from_pretrained(tmp_path)
    assert messages == []
    assert type(loaded) is DiADPipeline
    output = loaded(textures(2), generator=generator())
    for name, value in expected.items():
        assert np.array_equal(output[name], value), name
    names = [name for name in pipe.config if not name.startswith("_") and name not in pipe.components]
    assert "strength" in names
    assert {name: loaded.config[name] for name in names} == {name: pipe.config[name] for name in names}


def test_optional_components_stay_away(tmp_path, messages):
    pipe = make_pipeline(guided=False)
    pipe.register_modules(feature_extractor=None)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert messages == []
    assert loaded.sg_network is None
    assert loaded.feature_extractor is None
    assert loaded.calibration is None
    assert torch.equal(loaded.denoise(pixel_values(), noise()), pipe.denoise(pixel_values(), noise()))


ABLATIONS = {
    "nothing": None,
    "middle": {"guidance_outputs": ("middle",)},
    "sgdb3": {"guidance_outputs": ("middle", "sgdb3")},
    "sgdb4": {"guidance_outputs": ("sgdb4",)},
    "both": {"guidance_outputs": ("middle", "sgdb3", "sgdb4")},
    "batch norm": {"fusion": "batch_norm_relu"},
    "no fusion": {"fusion": None},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_run_save_and_load(tmp_path, name):
    pipe = make_pipeline(guided=ABLATIONS[name] is not None, sg_config=ABLATIONS[name])
    expected = pipe(textures(2), latents=noise())
    pipe.save_pretrained(tmp_path)
    output = DiffusionPipeline.from_pretrained(tmp_path)(textures(2), latents=noise())
    assert np.array_equal(output.anomaly_map, expected.anomaly_map)
    if name != "nothing":
        unguided = make_pipeline(guided=False)(textures(2), latents=noise())
        assert not np.allclose(unguided.anomaly_map, expected.anomaly_map, rtol=1e-3)


def test_prompts_embedding_by_a_text_encoder(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, [], model_max_length=5)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3,
            hidden_size=12,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=5,
        )
    ).eval()
    embedding = PromptEmbedding.from_text_encoder(tokenizer, encoder)
    with torch.no_grad():
        expected = encoder(input_ids=torch.tensor([[0, 1, 1, 1, 1]])).last_hidden_state
    assert torch.equal(embedding(), expected)
    assert not embedding().requires_grad
    embedding.save_pretrained(tmp_path)
    assert torch.equal(PromptEmbedding.from_pretrained(tmp_path)(), expected)
    other = PromptEmbedding.from_text_encoder(tokenizer, encoder, prompt="a")
    assert not torch.equal(other(), expected)


# -- precision, compilation, offloading --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision(dtype, tolerance):
    pipe = make_pipeline()
    expected = pipe(textures(2), latents=noise(), output_type="pt")
    half = make_pipeline().to(dtype)
    output = half(textures(2), latents=noise(), output_type="pt")
    assert half.unet.dtype == half.vae.dtype == half.prompt_embedding.dtype == dtype
    assert output.anomaly_map.dtype == output.reconstruction.dtype == torch.float32
    assert half.denoise(pixel_values(), noise()).dtype == torch.float32  # steps are summed in float32
    assert relative_error(output.reconstruction, expected.reconstruction) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pipe(textures(2), latents=noise(), output_type="pt")
    assert mixed.anomaly_map.dtype == torch.float32
    assert relative_error(mixed.reconstruction, expected.reconstruction) < 0.06


def test_channels_last():
    expected = make_pipeline()(textures(2), latents=noise())
    pipe = make_pipeline()
    for part in (pipe.unet, pipe.sg_network, pipe.vae):
        part.to(memory_format=torch.channels_last)
    np.testing.assert_allclose(pipe(textures(2), latents=noise()).anomaly_map, expected.anomaly_map, rtol=1e-3)


def test_compiled_and_saved_as_it_was(tmp_path):
    expected = make_pipeline()(textures(2), latents=noise())
    pipe = make_pipeline()
    torch._dynamo.utils.counters.clear()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    pipe.sg_network = torch.compile(pipe.sg_network, backend="eager", fullgraph=True)
    output = pipe(textures(2), latents=noise())
    np.testing.assert_allclose(output.anomaly_map, expected.anomaly_map, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for all steps, and one of each network
    pipe.save_pretrained(tmp_path)
    torch._dynamo.reset()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert np.array_equal(loaded(textures(2), latents=noise()).anomaly_map, expected.anomaly_map)


class Arrival(ModelHook):
    """Stands for accelerate's hook that moves a network to its device: brings back the weights it took away."""

    def __init__(self, module: nn.Module):
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}
        for parameter in module.parameters():
            parameter.data.zero_()

    def pre_forward(self, module, *args, **kwargs):
        module.load_state_dict(self.weights)
        return args, kwargs


def test_every_network_is_fetched_before_it_is_used():
    """Also by what is not `forward`: the image's stack, the extractor's layers, encoder and decoder."""
    expected = make_pipeline()(textures(2), latents=noise(), strength=0.7)
    pipe = make_pipeline()
    for part in (pipe.vae, pipe.unet, pipe.sg_network, pipe.feature_extractor):
        add_hook_to_module(part, Arrival(part))
    output = pipe(textures(2), latents=noise(), strength=0.7)
    # where hooks move weights, the extractor's batch norms are not folded: other roundings
    np.testing.assert_allclose(output.anomaly_map, expected.anomaly_map, rtol=1e-5)


def test_offloaded_layer_by_layer():
    expected = make_pipeline()(textures(2), latents=noise(), strength=0.7)
    pipe = make_pipeline()
    for part in (pipe.vae, pipe.unet, pipe.sg_network, pipe.feature_extractor):
        cpu_offload(part, execution_device=torch.device("cpu"))
    output = pipe(textures(2), latents=noise(), strength=0.7)
    np.testing.assert_allclose(output.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-6)


def test_sequence_of_offloading_leaves_out_the_network_that_takes_turns(pipe):
    sequence = DiADPipeline.model_cpu_offload_seq.split("->")
    assert set(sequence) < set(pipe.components)
    assert "sg_network" not in sequence
    assert not {"prompt_embedding", "calibration"} & set(sequence)  # small, and held on the device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_on_a_gpu(offload):
    pipe = make_pipeline()
    pipe.calibrate(textures(6), false_alarm_rate=0.3, generator=generator())
    expected = pipe(textures(3), latents=noise(3), batch_size=2)
    getattr(pipe, offload)()
    for _ in range(2):
        output = pipe(textures(3), latents=noise(3), batch_size=2)
        np.testing.assert_allclose(output.reconstruction, expected.reconstruction, atol=1e-2)


def test_tiny_autoencoder():
    """Stable Diffusion's distilled one, without a Gaussian."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipe = make_pipeline()
    pipe.register_modules(vae=vae)
    output = pipe(textures(2), strength=0.7)
    assert np.isfinite(output.anomaly_map).all()
    with torch.no_grad():
        torch.testing.assert_close(pipe.encode(pixel_values()), vae.encode(pixel_values()).latents)


def test_calibration_stays_in_float32():
    pipe = make_pipeline()
    pipe.calibrate(textures(6), false_alarm_rate=0.3, generator=generator())
    pipe.to(torch.bfloat16)
    assert isinstance(pipe.calibration, ScoreCalibration)
    assert pipe.calibration.map_mean.dtype == torch.float32
    assert pipe(texture(0)).anomaly_mask.shape == (1, SIDE, SIDE)
