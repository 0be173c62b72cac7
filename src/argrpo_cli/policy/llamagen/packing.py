"""Linear layers with their weights laid out for the processor, while images are drawn on a CPU.

A decoding step multiplies a few rows by every weight of the model, and with weights as they are stored half of that
time goes into rearranging them, again for every token. oneDNN can lay them out once. torch's compiler does this through
two operators that torch documents nowhere else; where a version does not have them, layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[bool]:
    """Within this context the linear layers of a model on a CPU use copies of their weights laid out for `rows` rows.

    The copies are as large as the weights and are gone afterwards; gradients do not flow through them. Yields whether
    anything was packed: not on other devices, under autocast, or where torch or the processor has no such kernel.
    """
    packed: list[nn.Module] = []
    try:
        if not torch.is_autocast_enabled("cpu"):
            for module in model.modules():
                if _can_pack(module):
                    forward = _packed(module, rows)
                    packed.append(module)
                    module.forward = forward  # shadows the method of the class, in this instance
        yield bool(packed)
    finally:
        for module in packed:
            vars(module).pop("forward", None)


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")

    return forward


def _can_pack(module: nn.Module) -> bool:
    """A plain linear layer on a CPU, in a type that oneDNN has a kernel for on this processor."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or "forward" in vars(module):
        return False
    if module.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators, dtype = torch.ops.mkldnn, module.weight.dtype
    if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
        return False
    kernels = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype in kernels:
        return hasattr(operators, kernels[dtype]) and getattr(operators, kernels[dtype])()
    return dtype == torch.float32
