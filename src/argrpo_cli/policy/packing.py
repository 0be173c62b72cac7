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
    packed = []
    if _can_pack(model):
        for module in model.modules():
            plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module)
            if plain:
                module.forward = _packed(module, rows)  # shadows the method of the class, in this instance
                packed.append(module)
    try:
        yield bool(packed)
    finally:
        for module in packed:
            del module.forward


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")

    return forward


def _can_pack(model: nn.Module) -> bool:
    first = next(model.parameters())
    operators = torch.ops.mkldnn
    if first.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
        return False
    kernels = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if first.dtype in kernels:
        return hasattr(operators, kernels[first.dtype]) and getattr(operators, kernels[first.dtype])()
    return first.dtype == torch.float32
