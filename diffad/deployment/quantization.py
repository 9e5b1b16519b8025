"""A graph's networks in 8 bits, by NNCF's post-training quantisation."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffad.installation import needs_extra

MOST_IMAGES = 300  # from which 8-bit ranges are taken: NNCF's default
FEWEST_FOR_INT8 = 20
HELD_OUT = 5  # every fifth image sets the thresholds, and the others the 8 bits and the statistics


def quantize_networks(model: Any, batches: Sequence[np.ndarray], weights: tuple[str, ...]) -> Any:
    """An `onnx.ModelProto` whose networks compute with 8 bits; distances, thresholds and all else stay float32.

    Args:
        model: a graph with the input `image`.
        batches: images (1, R', R', 3) in [0, 1].
        weights: how the names of the networks' weights begin.
    """
    with needs_extra("quantize"):
        nncf = importlib.import_module("nncf")
        from nncf.quantization.advanced_parameters import QuantizationParameters
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # of a unified model: whose statistics are in float, so any category does
    others = {"category": np.array(0)} if any(one.name == "category" for one in model.graph.input) else {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # its bars; standard output is for results
        warnings.simplefilter("ignore")
        return nncf.quantize(
            copy.deepcopy(model),
            nncf.Dataset(batches, lambda pixels: {"image": pixels, **others}),
            subset_size=min(len(batches), MOST_IMAGES),
            # ONNX Runtime takes one zero point for all channels of what goes into a layer
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_quantization_params=QuantizationParameters(per_channel=False)
            ),
            ignored_scope=nncf.IgnoredScope(names=sorted(outside_networks(model.graph, weights)), validate=False),
        )


def outside_networks(graph: Any, weights: tuple[str, ...]) -> set[str]:
    """Names of the nodes of an ONNX graph that are not of the networks: no layer with weights comes after them.

    Nor are the products before, which resize images.
    """
    makers = {output: node for node in graph.node for output in node.output}
    layers = {
        node.name: node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and any(name.startswith(weights) for name in node.input)
    }
    inside: set[str] = set()
    waiting = list(layers.values())
    while waiting:
        node = waiting.pop()
        if node.name not in inside:
            inside.add(node.name)
            waiting += [makers[name] for name in node.input if name in makers]
    resizing = {node.name for node in graph.node if node.op_type == "MatMul" and node.name not in layers}
    return {node.name for node in graph.node} - (inside - resizing)
