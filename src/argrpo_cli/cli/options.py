"""The options that mean the same in every command."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

import typer

from argrpo_cli.system.errors import UserError


class Dtype(StrEnum):
    """Number formats a policy can be run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _finite(param: typer.CallbackParam, value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"{param.opts[0]} {value:g}: must be a number, not infinite")
    return value


CfgScaleOption = Annotated[
    float,
    typer.Option("--cfg-scale", min=1.0, callback=_finite, help="Classifier-free guidance scale; 1 is no guidance."),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, callback=_finite, help="Softmax temperature.")
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Keep the k likeliest tokens; 0 keeps all.")]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens up to this probability; 1 keeps all."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="First seed.")]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images at a time; by rounding it turns a few tokens.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the policy.")]
BaselineOption = Annotated[
    str | None, typer.Option("--baseline", help="A second policy, drawn with the same seeds, to compare with.")
]
