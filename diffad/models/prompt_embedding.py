"""The empty prompt's embedding as weights, so that no text encoder is needed to run DiAD (He et al., AAAI 2024)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class PromptEmbedding(ModelMixin, ConfigMixin):
    r"""A text encoder's output for one fixed prompt, saved in safetensors with a pipeline.

    Args:
        length: L, the prompt's tokens.
        width: D, the text encoder's width, which is the denoiser's `cross_attention_dim`.
    """

    @register_to_config
    def __init__(self, length: int = 77, width: int = 768):
        super().__init__()
        # a parameter and not a buffer: accelerate's offloading looks at a module's parameters
        self.embedding = nn.Parameter(torch.zeros(1, length, width), requires_grad=False)

    @classmethod
    def from_tensor(cls, prompt_embeds: torch.Tensor) -> PromptEmbedding:
        """Holds a copy of `prompt_embeds`, (1, L, D).

        Raises:
            ValueError: another shape.
        """
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[0] != 1:
            raise ValueError(f"`prompt_embeds` must have shape (1, L, D), but has {tuple(prompt_embeds.shape)}.")
        embedding = cls(*prompt_embeds.shape[1:])
        embedding.embedding.data.copy_(prompt_embeds)
        return embedding.eval()

    @classmethod
    @torch.no_grad()
    def from_text_encoder(cls, tokenizer: Any, text_encoder: Any, prompt: str = "") -> PromptEmbedding:
        """The prompt's embedding by transformers' CLIP tokenizer and text encoder, padded as in Stable Diffusion."""
        tokens = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return cls.from_tensor(text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state.float().cpu())

    def forward(self) -> torch.Tensor:
        """(1, L, D)."""
        return self.embedding
