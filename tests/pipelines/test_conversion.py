from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.models.semantic_guided_network import SemanticGuidedNetwork
from diffad.pipelines import checkpoint_layout
from diffad.pipelines.conversion import load_diad_checkpoint, load_diad_components

FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCE = json.loads((FIXTURES / "diad_dev.json").read_text())
VALUES = load_file(FIXTURES / "diad_dev.safetensors")
PROMPT_EMBEDS = VALUES["in.encoder_hidden_states"]


def reference_tensor(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """The reference's weights, made from their names."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed * 2**32))
    x = rng.standard_normal(shape).astype(np.float32)
    if name.endswith(".weight") and len(shape) > 1:
        x /= np.float32(np.sqrt(np.prod(shape[1:])))
    elif name.endswith(".weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.05 * x
    return torch.from_numpy(x)


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    return {name: reference_tensor(name, shape, REFERENCE["seed"]) for name, shape in REFERENCE["keys"].items()}


@pytest.fixture(scope="module")
def components(state_dict) -> dict:
    return load_diad_components(state_dict, PROMPT_EMBEDS)


def relative_error(value: torch.Tensor, name: str) -> float:
    return float((value - VALUES[f"out.{name}"]).norm() / VALUES[f"out.{name}"].norm())


@torch.no_grad()
def test_networks_match_the_published_implementation(components):
    vae, unet, sg_network = (components[name] for name in ("vae", "unet", "sg_network"))
    pixel_values, latents = VALUES["in.pixel_values"], VALUES["in.latents"]
    prompt_embeds = components["prompt_embeds"].expand(2, -1, -1)
    embedding = sg_network.embed_condition(pixel_values)

    def denoiser(sample, timestep):
        output = sg_network(sample, timestep, prompt_embeds, conditioning_embedding=embedding)
        down, middle = output.down_block_res_samples, output.mid_block_res_sample
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return down, middle, unet(sample, timestep, prompt_embeds, **residuals).sample

    latent_mode = vae.encode(pixel_values).latent_dist.mode() * vae.config.scaling_factor
    assert relative_error(latent_mode, "latent_mode") < 1e-5

    down, middle, epsilon = denoiser(latents, VALUES["in.timesteps_probe"])
    assert all(residual.ndim == 0 and float(residual) == 0.0 for residual in down[:9])
    for skip in (9, 10, 11):
        assert relative_error(down[skip], f"control_{skip}") < 1e-5
    assert relative_error(middle, "control_mid") < 1e-5
    assert relative_error(epsilon, "eps") < 1e-5

    scheduler = components["scheduler"]
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == VALUES["out.timesteps"].tolist() == [*range(901, 0, -100)]
    for timestep in scheduler.timesteps:
        latents = scheduler.step(denoiser(latents, timestep)[2], timestep, latents).prev_sample
    assert relative_error(latents, "ddim10_latent") < 1e-5
    assert relative_error(vae.decode(latents / vae.config.scaling_factor).sample, "decoded") < 1e-5


def test_pipeline_matches_the_published_sampler(state_dict, tmp_path):
    """Ten DDIM steps and the autoencoder's image of them, also after saving; without a feature extractor."""
    pipe = load_diad_checkpoint(state_dict, PROMPT_EMBEDS)
    pixel_values = VALUES["in.pixel_values"]
    assert relative_error(pipe.encode(pixel_values), "latent_mode") < 1e-5
    latents = pipe.denoise(pixel_values, latents=VALUES["in.latents"], num_inference_steps=10)
    assert relative_error(latents, "ddim10_latent") < 1e-5
    assert relative_error(pipe.decode(latents), "decoded") < 1e-5

    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.denoise(pixel_values, latents=VALUES["in.latents"], num_inference_steps=10), latents)
    with pytest.raises(ValueError, match="`feature_extractor` is None"):
        loaded(torch.zeros(3, 128, 128))


def test_pipeline_takes_the_feature_extractor_that_validation_left_in_the_checkpoint(state_dict, tmp_path):
    torch.manual_seed(0)
    resnet = timm.create_model("resnet50", features_only=True).eval()  # all its stages, as in the published code
    weights = {f"pretrained_model.{name}": weight for name, weight in resnet.state_dict().items()}
    torch.save({"state_dict": {**state_dict, **weights}}, tmp_path / "diad.ckpt")
    extractor = load_diad_checkpoint(tmp_path / "diad.ckpt", PROMPT_EMBEDS).feature_extractor
    assert (extractor.config.backbone, list(extractor.config.strides)) == ("resnet50", [4, 8, 16])
    images = torch.rand(1, 3, 64, 64)
    normalised = (images - extractor.image_mean) / extractor.image_std
    with torch.no_grad():
        expected = resnet(normalised)[1:4]
        torch.testing.assert_close(extractor.layers(images * 2.0 - 1.0), expected, rtol=1e-4, atol=1e-5)

    # a given one goes before; a part of one is none
    given = TimmFeatureExtractor.from_backbone("test_resnet", (2, 4), weights="random")
    assert load_diad_checkpoint(tmp_path / "diad.ckpt", PROMPT_EMBEDS, given).feature_extractor is given
    name, weight = next(iter(weights.items()))
    assert load_diad_checkpoint({**state_dict, name: weight}, PROMPT_EMBEDS).feature_extractor is None


def scaled_keys(model_scale: int, vae_scale: int, prompt_width: int) -> dict[str, tuple[int, ...]]:
    """The reference's names and shapes, as a network with other widths has them."""
    keys = {}
    for name, shape in REFERENCE["keys"].items():
        size = list(shape)
        scale = vae_scale if name.startswith("first_stage_model.") else model_scale
        size[:2] = [scale * n for n in size[:2]]
        if name.endswith(("input_blocks.0.0.weight", "encoder.conv_in.weight")):
            size[1] = shape[1]
        if ".out.2." in name or "decoder.conv_out" in name or "encoder.conv_out" in name:
            size[0] = shape[0]
        if "decoder.conv_in.weight" in name:
            size[1] = shape[1]
        if "quant_conv" in name:
            size = shape
        if "attn2.to_k" in name or "attn2.to_v" in name:
            size[1] = prompt_width
        if "input_hint_block" in name:
            size = [scale * shape[0], *shape[1:]] if "input_hint_block.14" in name else shape
        keys[name] = tuple(size)
    return keys


def test_full_size_has_the_papers_parameter_counts():
    """Table of He et al., section 4: denoiser 859M, SG network 471M, autoencoder 83.7M parameters."""
    keys = scaled_keys(model_scale=10, vae_scale=4, prompt_width=768)
    meta = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    components = load_diad_components(meta, torch.zeros(1, 77, 768))
    counts = {name: sum(p.numel() for p in components[name].parameters()) for name in ("vae", "unet", "sg_network")}
    assert counts["unet"] == pytest.approx(859e6, rel=0.01)
    assert counts["vae"] == pytest.approx(83.7e6, rel=0.01)
    # Exactly the six zero convolutions less, of which nothing depends: those of skips 0 to 5, 1.6M parameters.
    dropped = 4 * (320 * 320 + 320) + 2 * (640 * 640 + 640)
    published = sum(np.prod(shape) for name, shape in keys.items() if name.startswith("control_model."))
    assert counts["sg_network"] == published - dropped
    assert counts["sg_network"] == pytest.approx(471e6, rel=0.01)
    assert components["unet"].config.block_out_channels == (320, 640, 1280, 1280)
    assert components["sg_network"].config.conditioning_embedding_out_channels == (16, 32, 96, 256)
    assert components["vae"].config.block_out_channels == (128, 256, 512, 512)


def original_state_dict(vae, unet, sg_network) -> dict[str, torch.Tensor]:
    """The networks in the published layout."""
    tensors = {}
    for name, weight in unet.state_dict().items():
        tensors[checkpoint_layout.original_unet_name(name, unet.config)] = weight
    for name, weight in vae.state_dict().items():
        convolution = name.endswith("weight") and "attentions" in name and weight.ndim == 2
        original = checkpoint_layout.original_vae_name(name, len(vae.config.block_out_channels))
        tensors[original] = weight[..., None, None] if convolution else weight
    for name, weight in sg_network.state_dict().items():
        originals = checkpoint_layout.original_sg_names(name, sg_network.config)
        sizes = sg_network.feature_fusion.target_channels if len(originals) > 1 else [len(weight)]
        tensors.update(zip(originals, weight.split(sizes), strict=True))
    return tensors


@pytest.mark.parametrize(
    ("levels", "layers", "depth", "attends", "linear"),
    [(3, 1, 2, "..x", False), (2, 2, (1, 3), "xx", True), (5, 1, (1, 2, 1, 1, 2), "xx...", False)],
)
def test_other_depths_and_levels_are_read_off_the_shapes(levels, layers, depth, attends, linear):
    torch.manual_seed(0)
    down = tuple("CrossAttnDownBlock2D" if letter == "x" else "DownBlock2D" for letter in attends)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 96, 96, 64)[:levels],
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        transformer_layers_per_block=depth,
        use_linear_projection=linear,
        cross_attention_dim=24,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
    )
    sg_network = SemanticGuidedNetwork.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    tensors = original_state_dict(vae, unet, sg_network)
    # diffusers' own conversion of the same layout is the judge of the names
    for network, convert in ((unet, convert_ldm_unet_checkpoint), (vae, convert_ldm_vae_checkpoint)):
        judged, state = convert(tensors, network.config), network.state_dict()
        assert judged.keys() == state.keys()
        assert all(torch.equal(judged[name], weight) for name, weight in state.items())

    components = load_diad_components(tensors, torch.zeros(1, 7, 24))
    for name, network in (("vae", vae), ("unet", unet), ("sg_network", sg_network)):
        converted = components[name]
        for key, value in converted.config.items():
            if key not in ("sample_size", "_use_default_values", "transformer_layers_per_block"):
                assert value == network.config[key], key
        expected = network.state_dict()
        assert converted.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[key]) for key, weight in converted.state_dict().items())


def test_weights_are_copies_in_float32(state_dict):
    halves = {name: weight.half() for name, weight in state_dict.items()}
    unet = load_diad_components(halves, PROMPT_EMBEDS)["unet"]
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    before = state_dict["model.diffusion_model.out.2.bias"].clone()
    unet = load_diad_components(state_dict, PROMPT_EMBEDS)["unet"]
    unet.conv_out.bias.data.zero_()
    assert torch.equal(state_dict["model.diffusion_model.out.2.bias"], before)


def test_what_a_lightning_checkpoint_carries_besides_is_dropped(state_dict, components, tmp_path):
    extras = {
        "betas": torch.rand(1000),
        "posterior_log_variance_clipped": torch.rand(1000),
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelout2bias": torch.zeros(4),
        "pretrained_model.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    checkpoint = {"state_dict": {**state_dict, **extras}, "epoch": 999, "optimizer_states": [{"lr": 1e-5}]}
    torch.save(checkpoint, tmp_path / "diad.ckpt")
    save_file({"anything": PROMPT_EMBEDS}, tmp_path / "prompt.safetensors")
    converted = load_diad_components(tmp_path / "diad.ckpt", str(tmp_path / "prompt.safetensors"))
    assert torch.equal(converted["prompt_embeds"], PROMPT_EMBEDS)
    for name in ("vae", "unet", "sg_network"):
        expected = components[name].state_dict()
        assert all(torch.equal(weight, expected[key]) for key, weight in converted[name].state_dict().items())


def test_safetensors_without_a_wrapper(state_dict, components, tmp_path):
    save_file(state_dict, tmp_path / "diad.safetensors")
    converted = load_diad_components(str(tmp_path / "diad.safetensors"), PROMPT_EMBEDS)
    assert torch.equal(converted["unet"].conv_out.weight, components["unet"].conv_out.weight)
    assert not converted["unet"].training


@pytest.mark.parametrize("with_position_ids", [False, True])
def test_empty_prompt_is_embedded_by_the_checkpoints_text_encoder(state_dict, with_position_ids):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1
    )
    text_encoder = CLIPTextModel(config).eval()
    weights = {name.removeprefix("text_model."): weight for name, weight in text_encoder.state_dict().items()}
    if with_position_ids:
        weights["embeddings.position_ids"] = torch.arange(77)[None]
    encoder = {f"cond_stage_model.transformer.text_model.{name}": weight for name, weight in weights.items()}
    prompt_embeds = load_diad_components({**state_dict, **encoder})["prompt_embeds"]
    with torch.no_grad():  # "<|startoftext|>", then "<|endoftext|>" to the end, as CLIP's tokenizer pads
        expected = text_encoder(input_ids=torch.tensor([[49406] + [49407] * 76])).last_hidden_state
    torch.testing.assert_close(prompt_embeds, expected)
    assert not prompt_embeds.requires_grad

    # a given embedding goes before
    assert torch.equal(load_diad_components({**state_dict, **encoder}, PROMPT_EMBEDS)["prompt_embeds"], PROMPT_EMBEDS)
    del encoder["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.bias"]
    with pytest.raises(
        ValueError, match=r"missing: cond_stage_model\.transformer\.text_model\.encoder\.layers\.0\.mlp"
    ):
        load_diad_components({**state_dict, **encoder})


def test_prompt_embeds_are_checked(state_dict, tmp_path):
    with pytest.raises(ValueError, match=r"`prompt_embeds`.*no CLIP text encoder.*\(1, 77, 64\)"):
        load_diad_components(state_dict)
    with pytest.raises(ValueError, match=r"`prompt_embeds` must have shape \(1, 77, 64\)"):
        load_diad_components(state_dict, torch.zeros(1, 77, 768))
    with pytest.raises(FileNotFoundError, match="`prompt_embeds`"):
        load_diad_components(state_dict, tmp_path / "absent.safetensors")
    save_file({"one": PROMPT_EMBEDS, "two": PROMPT_EMBEDS + 1}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"`prompt_embeds`.*must hold one tensor"):
        load_diad_components(state_dict, tmp_path / "two.safetensors")


def changed(state_dict, remove=(), **add) -> dict[str, torch.Tensor]:
    return {**{name: weight for name, weight in state_dict.items() if name not in remove}, **add}


def test_missing_unknown_and_misshapen_tensors_are_named(state_dict):
    def message(**change) -> str:
        with pytest.raises(ValueError, match="`state_dict_or_path`") as error:
            load_diad_components(changed(state_dict, **change), PROMPT_EMBEDS)
        return str(error.value)

    # one that no configuration is read from, some that are, and one of the joined SFF convolutions
    for name in (
        "model.diffusion_model.output_blocks.5.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "control_model.input_blocks.3.0.op.weight",
        "control_model.zero_convs.7.0.bias",
        "control_model.down32.0.weight",
        "first_stage_model.encoder.down.2.block.0.conv1.weight",
        "first_stage_model.quant_conv.bias",
    ):
        assert f"1 missing: {name}." in message(remove=[name])
    assert "1 unknown: control_model.surprise." in message(**{"control_model.surprise": torch.zeros(1)})
    assert "1 unknown: surprise." in message(**{"surprise": torch.zeros(1)})
    many = [name for name in state_dict if name.startswith("control_model.down")]
    assert "9 missing" in (text := message(remove=many))
    assert "and 3 more" in text
    for name, shape in (
        ("model.diffusion_model.out.0.bias", (31,)),
        ("control_model.down21.0.weight", (128, 64, 3, 3)),
        ("model.diffusion_model.input_blocks.0.0.weight", ()),
    ):
        text = message(**{name: torch.zeros(shape)})
        assert "of an unexpected shape" in text
        assert f"{name} {shape}" in text


def test_another_model_is_told_by_its_name(state_dict):
    stable_diffusion = {name: w for name, w in state_dict.items() if not name.startswith("control_model.")}
    with pytest.raises(
        ValueError, match=r"not a DiAD checkpoint.*control_model\.\. Found: model\. \(686\), first_stage"
    ):
        load_diad_components(stable_diffusion)
    with pytest.raises(ValueError, match=r"Found: conv1\. \(1\)"):
        load_diad_components({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="Found: nothing"):
        load_diad_components({})
    with pytest.raises(ValueError, match="entries that are no tensors: epoch"):
        load_diad_components({**state_dict, "epoch": 3})


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_and_unsafe_files_are_refused(tmp_path, zipped):
    path = tmp_path / "diad.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(10_000)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"diad\.ckpt is damaged or truncated"):
            load_diad_components(path)

    torch.save({"state_dict": {}, "callbacks": Exploit()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"diad\.ckpt holds Python code"):
        load_diad_components(path)
    path.write_bytes(pickle.dumps(Exploit(), protocol=2))
    with pytest.raises(ValueError, match=r"diad\.ckpt holds Python code"):
        load_diad_components(path)

    save_file({"a": torch.zeros(10_000)}, path := tmp_path / "diad.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"diad\.safetensors is damaged or truncated"):
        load_diad_components(path)
    torch.save([1, 2], path := tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_diad_components(path)
    with pytest.raises(FileNotFoundError, match="`state_dict_or_path`: no file at"):
        load_diad_components(tmp_path)
