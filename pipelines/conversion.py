"""Published checkpoints of DiAD (He et al., AAAI 2024) as diffusers components.

The published code stands on Stable Diffusion's and ControlNet's first implementations, and so does the layout of its
Lightning checkpoints: `model.diffusion_model.` is the denoiser, `control_model.` the semantic-guided network,
`first_stage_model.` the autoencoder and `cond_stage_model.` the text encoder. Widths, levels and depths are read off
the tensors' shapes, so that a checkpoint of any size converts.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from diffad.installation import needs_extra
from diffad.models.autoencoder_taef2 import AutoencoderTAEF2
from diffad.models.feature_extractor import TimmFeatureExtractor
from diffad.models.prompt_embedding import PromptEmbedding
from diffad.models.semantic_guided_network import SemanticGuidedNetwork
from diffad.pipelines.checkpoint_layout import (
    AUTOENCODER,
    CONTROL,
    FEATURE_EXTRACTOR,
    TEXT_ENCODER,
    UNET,
    _highest,
    original_sg_names,
    original_unet_name,
    original_vae_name,
    read_sg_network_config,
    read_unet_config,
    read_vae_config,
)

if TYPE_CHECKING:
    from diffad.pipelines.pipeline_diad import DiADPipeline


# What a Lightning checkpoint carries beside the networks: the noise schedule's buffers, the weights' running average,
# the loss's own networks, the text encoder, and the ResNet that validation compares features with.
_IGNORED = re.compile(
    r"(alphas_cumprod|alphas_cumprod_prev|betas|log_one_minus_alphas_cumprod|logvar|lvlb_weights|"
    r"posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|posterior_variance|"
    r"sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod)$"
    r"|(model_ema|loss|cond_stage_model|pretrained_model)\."
    r"|first_stage_model\.(loss|model_ema)\."
)


def load_taef2(folder: str | os.PathLike[str]) -> AutoencoderTAEF2:
    """TAEF2's published weights as an autoencoder that `save_pretrained` writes.

    Args:
        folder: holds `taef2_encoder.safetensors` and `taef2_decoder.safetensors`, tensors named by layer number, as at
            https://github.com/madebyollin/taesd. Any width, depth and number of latent channels.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file's tensors are not those of such an autoencoder.

    Example:
        ```py
        >>> vae = load_taef2("taesd")  # doctest: +SKIP
        >>> vae.save_pretrained("taef2")  # doctest: +SKIP
        ```
    """
    state_dict: dict[str, torch.Tensor] = {}
    for part, first in (("encoder", 0), ("decoder", 1)):  # the published decoder's layer 0, a tanh, has no number here
        path = Path(folder, f"taef2_{part}.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"`folder` has no {path.name}: {folder}. Give the folder of both published files.")
        for name, tensor in _read_file("folder", path).items():
            layer, _, rest = name.partition(".")
            if not layer.isdigit():
                raise ValueError(f"{path} holds the tensor {name!r}, where names begin with a layer's number.")
            state_dict[f"{part}.{int(layer) - first}.{rest}"] = tensor.float()
    layers = [int(name.split(".")[1]) for name in state_dict if name.startswith("encoder.")]
    last = max(layers, default=0)  # behind 1 + 1 layers at the full size and 1 + 3 at each other level
    ends = [state_dict.get(name) for name in ("encoder.0.weight", f"encoder.{last}.weight")]
    shapes = [tuple(tensor.shape) for tensor in ends if tensor is not None and tensor.ndim == 4]
    if len(shapes) < 2 or last < 6:
        raise ValueError(f"`folder` {folder} does not hold TAEF2: its encoder's first or last convolution is missing.")
    (width, in_channels, *_), (latent_channels, *_) = shapes
    vae = AutoencoderTAEF2(in_channels, latent_channels, (width,) * (1 + (last - 2) // 4))
    expected = vae.state_dict()
    wrong = [n for n in expected.keys() | state_dict.keys() if n not in expected or n not in state_dict]
    wrong += [n for n in expected.keys() & state_dict.keys() if expected[n].shape != state_dict[n].shape]
    if wrong:
        raise ValueError(
            f"`folder` {folder} does not hold TAEF2: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"the first {min(wrong)!r}."
        )
    vae.load_state_dict(state_dict)
    return vae.requires_grad_(False).eval()


def load_diad_checkpoint(
    state_dict_or_path: Mapping[str, Any] | str | os.PathLike,
    prompt_embeds: torch.Tensor | str | os.PathLike | None = None,
    feature_extractor: TimmFeatureExtractor | None = None,
) -> DiADPipeline:
    """A `DiADPipeline` from a published checkpoint.

    Args:
        state_dict_or_path: as in `load_diad_components`, whose errors are raised.
        prompt_embeds: as in `load_diad_components`.
        feature_extractor: what images and reconstructions are compared with. None takes the ResNet-50 that a
            Lightning checkpoint carries along from validation. Where there is none, the pipeline has none: `denoise`
            and `decode` work, and a call asks for one. Nothing is downloaded.
    """
    # Here, as pipelines import the library and not the other way round.
    from diffad.pipelines.pipeline_diad import DiADPipeline

    components = load_diad_components(state_dict_or_path, prompt_embeds)
    prompt_embedding = PromptEmbedding.from_tensor(components.pop("prompt_embeds"))
    if feature_extractor is not None:
        components["feature_extractor"] = feature_extractor
    return DiADPipeline(**components, prompt_embedding=prompt_embedding)


def load_diad_components(
    state_dict_or_path: Mapping[str, Any] | str | os.PathLike,
    prompt_embeds: torch.Tensor | str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The networks of a published DiAD checkpoint, in float32, with copies of its weights.

    Args:
        state_dict_or_path: a state dict in the published layout, with or without Lightning's `state_dict` around it,
            or its file: `.safetensors`, or a `.ckpt` or `.pth`, of which only tensors are read, never code.
        prompt_embeds: the empty prompt's embedding, (1, L, D), or a `.safetensors` file that holds it. None computes
            it with the checkpoint's own text encoder.

    Returns:
        `vae` (`AutoencoderKL`), `unet` (`UNet2DConditionModel`), `sg_network` (`SemanticGuidedNetwork`), `scheduler`
        (`DDIMScheduler`), `prompt_embeds`, (1, L, D), and `feature_extractor`: the `TimmFeatureExtractor` that the
        checkpoint carries along from validation, or None.

    Raises:
        FileNotFoundError: no file stands at the path.
        ValueError: the file is damaged or holds code, or the tensors are not those of a DiAD model; missing and
            unknown tensors are named.
    """
    tensors, origin = _read_state_dict(state_dict_or_path)
    found = Counter(name.split(".")[0] + "." for name in tensors)
    absent = [prefix for prefix in (UNET, CONTROL, AUTOENCODER) if not any(n.startswith(prefix) for n in tensors)]
    if absent:
        listed = ", ".join(f"{prefix} ({count})" for prefix, count in found.most_common(8)) or "nothing"
        raise ValueError(
            f"`state_dict_or_path`: {origin} is not a DiAD checkpoint in the published layout: no tensor's name begins "
            f"with {_list(absent)}. Found: {listed}."
        )

    try:
        unet_config = read_unet_config(tensors, UNET)
        sg_config = read_sg_network_config(tensors)
        vae_config = read_vae_config(tensors)
    except KeyError as error:
        raise ValueError(_mismatch(origin, missing=[error.args[0]])) from None
    except IndexError as error:
        raise ValueError(_mismatch(origin, misshapen=[error.args[0]])) from None
    with init_empty_weights():
        components = {
            "vae": AutoencoderKL(**vae_config),
            "unet": UNet2DConditionModel(**unet_config),
            "sg_network": SemanticGuidedNetwork(**sg_config),
        }
    levels = len(vae_config["block_out_channels"])
    original_names = {
        "vae": {name: [original_vae_name(name, levels)] for name in components["vae"].state_dict()},
        "unet": {name: [original_unet_name(name, unet_config)] for name in components["unet"].state_dict()},
        "sg_network": {name: original_sg_names(name, sg_config) for name in components["sg_network"].state_dict()},
    }

    # Each tensor of the checkpoint is wanted by one parameter, or known to be of no use.
    missing, misshapen, known = [], [], set()
    for component, network in components.items():
        for name, parameter in network.state_dict().items():
            originals = original_names[component][name]
            known.update(originals)
            absent = [original for original in originals if original not in tensors]
            missing += absent
            if not absent and not _fits([tensors[original] for original in originals], parameter.shape):
                misshapen += [f"{original} {tuple(tensors[original].shape)}" for original in originals]
    # The published network runs a zero convolution on every skip, but only those of the two lowest levels lead
    # anywhere: to the denoiser, and to the SFF block.
    per_level = sg_config["layers_per_block"] + 1
    for skip in range((len(sg_config["block_out_channels"]) - 2) * per_level):
        known |= {f"{CONTROL}zero_convs.{skip}.0.weight", f"{CONTROL}zero_convs.{skip}.0.bias"}
    unknown = [name for name in tensors if name not in known and not _IGNORED.match(name)]
    if missing or unknown or misshapen:
        raise ValueError(_mismatch(origin, missing, unknown, misshapen))

    prompt_embeds = _empty_prompt_embeds(tensors, prompt_embeds, unet_config["cross_attention_dim"], origin)
    for component, network in components.items():
        weights = {
            name: torch.cat([tensors[original] for original in original_names[component][name]])
            .reshape(parameter.shape)
            .to(torch.float32)
            for name, parameter in network.state_dict().items()
        }
        network.load_state_dict(weights, assign=True)
        network.eval()
    # 10 steps are then 901, 801, ..., 1, and the last one goes to alphas_cumprod[0], as in the published sampler.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        **components,
        "scheduler": scheduler,
        "prompt_embeds": prompt_embeds,
        "feature_extractor": _feature_extractor(tensors),
    }


def _read_state_dict(
    state_dict_or_path: Mapping[str, Any] | str | os.PathLike,
) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict, and what to call it in a message."""
    if isinstance(state_dict_or_path, Mapping):
        content, origin = state_dict_or_path, "the given state dict"
    else:
        content, origin = _read_file("state_dict_or_path", Path(state_dict_or_path)), str(state_dict_or_path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"`state_dict_or_path`: {origin} holds a {type(content).__name__}, not a state dict.")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"`state_dict_or_path`: {origin} has {len(others)} entries that are no tensors: {_list(others)}."
        )
    return dict(content), origin


def _read_file(argument: str, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"`{argument}`: no file at {path}. Give the path of a .ckpt, .pth or .safetensors file."
        )
    damaged = f"`{argument}`: {path} is damaged or truncated, or no checkpoint of tensors alone. Fetch it again."
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{damaged} ({error})") from error
    archive = zipfile.is_zipfile(path)
    try:
        # Mapped into memory, so that a Lightning checkpoint's optimizer states are never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        if archive or "GLOBAL" in str(error):
            raise ValueError(
                f"`{argument}`: {path} holds Python code beside its tensors, which is not run. If you trust where it "
                "comes from, save its state dict alone: "
                "torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)."
            ) from error
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{damaged} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error


def _fits(parts: list[torch.Tensor], shape: torch.Size) -> bool:
    """Whether the tensors, joined along their first dimension, make a parameter of this shape."""
    if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        return False
    joined = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return joined in (shape, (*shape, 1, 1))  # the autoencoder's attention is written as 1x1 convolutions


def _mismatch(
    origin: str, missing: Iterable[str] = (), unknown: Iterable[str] = (), misshapen: Iterable[str] = ()
) -> str:
    kinds = {"missing": [*missing], "unknown": [*unknown], "of an unexpected shape": [*misshapen]}
    problems = "; ".join(f"{len(names)} {kind}: {_list(names)}" for kind, names in kinds.items() if names)
    return f"`state_dict_or_path`: {origin} does not hold the tensors of a DiAD model: {problems}."


def _list(names: list[str]) -> str:
    most = 6
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _empty_prompt_embeds(
    tensors: dict[str, torch.Tensor],
    prompt_embeds: torch.Tensor | str | os.PathLike | None,
    width: int,
    origin: str,
) -> torch.Tensor:
    """The empty prompt's embedding, (1, L, width) float32: the given one, or the checkpoint's own text encoder's."""
    if prompt_embeds is None:
        weights = {
            name.removeprefix(TEXT_ENCODER): tensor for name, tensor in tensors.items() if name.startswith(TEXT_ENCODER)
        }
        if not weights:
            raise ValueError(
                f"`prompt_embeds`: {origin} holds no CLIP text encoder ({TEXT_ENCODER}*) to embed the empty prompt "
                f"with. Give its embedding, a tensor of shape (1, 77, {width}) or a .safetensors file that holds it."
            )
        return _embed_empty_prompt(weights, origin)
    if not isinstance(prompt_embeds, torch.Tensor):
        content = _read_file("prompt_embeds", Path(prompt_embeds))
        if not isinstance(content, Mapping) or len(content) != 1:
            raise ValueError(f"`prompt_embeds`: {prompt_embeds} must hold one tensor, the empty prompt's embedding.")
        (embeds,) = content.values()
    else:
        embeds = prompt_embeds
    if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
        raise ValueError(
            f"`prompt_embeds` must have shape (1, 77, {width}), as the denoiser's attention is {width} wide, but has "
            f"shape {tuple(embeds.shape)}."
        )
    return embeds.detach().to(torch.float32, copy=True)


def _embed_empty_prompt(weights: dict[str, torch.Tensor], origin: str) -> torch.Tensor:
    """CLIP's last hidden state for the empty prompt, (1, 77, D): its start token, then end tokens to the last."""
    with needs_extra("train"):
        from transformers import CLIPTextConfig, CLIPTextModel

    try:
        vocabulary, width = weights["embeddings.token_embedding.weight"].shape
        length = weights["embeddings.position_embedding.weight"].shape[0]
        intermediate = weights["encoder.layers.0.mlp.fc1.weight"].shape[0]
        layers = 1 + _highest(weights, "encoder.layers.")
    except KeyError as error:
        raise ValueError(_mismatch(origin, missing=[TEXT_ENCODER + error.args[0]])) from None
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),  # 64 wide in every CLIP
        max_position_embeddings=length,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    with init_empty_weights():
        text_encoder = CLIPTextModel(config)
    expected = text_encoder.state_dict()
    weights.pop("embeddings.position_ids", None)  # a buffer that older versions of transformers saved
    # transformers 5 has taken the inner `text_model` away
    weights = {name if name in expected else f"text_model.{name}": t.float() for name, t in weights.items()}
    missing = [TEXT_ENCODER + name.removeprefix("text_model.") for name in expected if name not in weights]
    unknown = [TEXT_ENCODER + name.removeprefix("text_model.") for name in weights if name not in expected]
    misshapen = [TEXT_ENCODER + n for n, t in expected.items() if n in weights and weights[n].shape != t.shape]
    if missing or unknown or misshapen:
        raise ValueError(_mismatch(origin, missing, unknown, misshapen))
    text_encoder.load_state_dict(weights, assign=True)
    tokens = torch.full((1, length), vocabulary - 1)
    tokens[0, 0] = vocabulary - 2
    with torch.no_grad():
        return text_encoder.eval()(input_ids=tokens).last_hidden_state


def _feature_extractor(tensors: dict[str, torch.Tensor]) -> TimmFeatureExtractor | None:
    """The pretrained ResNet-50 that validation compares features with, if the checkpoint holds all of it."""
    if not any(name.startswith(FEATURE_EXTRACTOR) for name in tensors):
        return None
    extractor = TimmFeatureExtractor("resnet50", (4, 8, 16))
    expected = extractor.network.state_dict()
    weights = {name: tensors.get(FEATURE_EXTRACTOR + name) for name in expected}
    if any(tensor is None or tensor.shape != expected[name].shape for name, tensor in weights.items()):
        return None
    extractor.network.load_state_dict(weights)
    return extractor
