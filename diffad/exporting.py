"""Whether a graph is being exported: it takes any number of images, so it has neither values nor loops over them."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether `torch.export` is tracing. `torch.compile`, which sees each size anew, takes the usual way."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
