"""Whole parameters on every process for as long as images are drawn, however the model is shared out.

The sampler walks through the layers by hand, so the hooks with which sharded models gather a layer before its forward
pass do not all run. TRL gathers what DeepSpeed ZeRO-3 has partitioned; for FSDP2 it leaves DTensors, which are gathered
here. With DDP, ZeRO-2 and a single process there is nothing to gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule
from trl.models import unwrap_model_for_generation

if TYPE_CHECKING:
    from torch import nn
    from trl import GRPOTrainer


@contextmanager
def whole_model(trainer: GRPOTrainer) -> Iterator[nn.Module]:
    """The model in training, unwrapped and with all its parameters; every process must enter, and leave.

    It is the module that the policy holds, so that `Policy.sample` works within. It must not be saved within: FSDP2
    shards it again when asked for its state.
    """
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        try:
            for module in sharded:
                module.unshard()
            yield model
        finally:
            for module in sharded:
                module.reshard()
