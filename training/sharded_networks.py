"""Networks whose weights, gradients and optimizer are shared out among processes, by accelerate (FSDP)."""

from __future__ import annotations

import argparse
from typing import Any

from accelerate import Accelerator, DistributedType
from diffusers import ModelMixin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch` was told to (`--use_fsdp`, or `distributed_type: FSDP`), and there are GPUs."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(args: argparse.Namespace, accelerator: Accelerator, can_shard: bool) -> None:
    """Raises a ValueError where weights are sharded, and a script or its flags need them whole."""
    if not is_sharded(accelerator):
        return
    if not can_shard:
        raise ValueError("Only train_diad.py shards weights: start this script without --use_fsdp.")
    if not accelerator.is_fsdp2:
        raise ValueError("`fsdp_version` must be 2, see training/configs/accelerate/fsdp.yaml.")
    if wrong := [f"--{name}" for name in ("use_ema", "validation_steps") if getattr(args, name)]:
        raise ValueError(f"{', '.join(wrong)}: no process has all weights here. Leave it out, or --use_fsdp.")


def whole_network(network_class: type[ModelMixin], network: Any) -> Any:
    """A network with all weights in each process, of one whose weights are sharded. Every process calls this.

    Args:
        network_class: what `network` was before; its class is now torch's.
        network: sharded, in a larger module or by itself.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = network_class.from_config(network.config)
    whole.load_state_dict(get_model_state_dict(network, options=StateDictOptions(full_state_dict=True)))
    return whole.to(network.device).eval()
