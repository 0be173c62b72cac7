"""Whole parameters on every process for as long as images are drawn, however the model is shared out.

The sampler walks through the layers by hand, one token after another. TRL gathers for it what DeepSpeed ZeRO-3 has
partitioned. FSDP2 would gather and share out every layer again for every token, by hooks on the layers, so its
parameters are gathered here once, and the hooks are out of the way until then. With DDP, ZeRO-2 and a single process
there is nothing to gather.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule
from trl.models import unwrap_model_for_generation

from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from trl import GRPOTrainer


@contextmanager
def whole_model(trainer: GRPOTrainer) -> Iterator[nn.Module]:
    """The model in training, unwrapped and with all its parameters; every process must enter, and leave.

    It is the module that the policy holds, so that `Policy.sample` works within. It must not be saved within: FSDP2
    shards it again when asked for its state.
    """
    kwargs = trainer.args.gradient_checkpointing_kwargs
    with unwrap_model_for_generation(
        trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=kwargs
    ) as model:
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        with _without_hooks(sharded):
            try:
                for module in sharded:
                    module.unshard()
                yield model
            finally:
                for module in sharded:
                    module.reshard()


@contextmanager
def _without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context the modules compute, and nothing else.

    FSDP2 has no switch for its hooks. They would also take the first layer that runs for the root of the model.
    """
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    try:
        for module in modules:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, (before, after) in zip(modules, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after


def sharding(trainer: GRPOTrainer) -> str:
    """How training is shared out, as far as the files of a checkpoint depend on it: none, fsdp, zero2 or zero3."""
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp" if trainer.is_fsdp_enabled else "none"


def check_sharding(trainer: GRPOTrainer) -> None:
    """UserError when the launcher asked for FSDP or DeepSpeed and accelerate, without a word, does something else."""
    for name, variable, active in (
        ("FSDP", "ACCELERATE_USE_FSDP", trainer.is_fsdp_enabled),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", trainer.is_deepspeed_enabled),
    ):
        if os.environ.get(variable, "").lower() == "true" and not active:
            raise UserError(f"accelerate has no {name} on this device; use --accelerate-config ddp there")
