"""Golden cases of the policy: inputs and outputs of the published LlamaGen code with formula weights.

`tests/data/policy/policy_cases.json` holds the geometry, the published key -> shape lists and the runs; the
tensors are in one `.safetensors` file per case, inputs as `in/<name>`, expected outputs as `out/<name>`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from argrpo_cli.policy.llamagen.checkpoints import from_published
from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration
from tests.formula import formula_weights

DATA = Path(__file__).parent / "data" / "policy"
TOLERANCE = 1e-4  # logits, float32; an independent float64 implementation agrees within 3.6e-5

# The published code's names of the configuration fields.
FIELDS = {
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
}
CONDITIONS = {"c2i": "class", "t2i": "caption"}


def cases() -> dict[str, Any]:
    """What there is, by name of the case."""
    return json.loads((DATA / "policy_cases.json").read_text())


def tensors(name: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of one case."""
    return load_file(DATA / f"{name}.safetensors")


def golden_config(fields: dict[str, Any]) -> LlamaGenConfig:
    """Our configuration for a published one."""
    values = {FIELDS.get(key, key): value for key, value in fields.items() if key != "model_type"}
    return LlamaGenConfig(**values, condition=CONDITIONS[fields["model_type"]])


@cache
def golden_model(name: str, part: str | None = None) -> LlamaGenForImageGeneration:
    """The model of a case with its formula weights; shared between tests, so leave it as it is."""
    case = cases()[name] if part is None else cases()[name]["gqa_models"][part]
    network = from_published(formula_weights(case["shapes"]), golden_config(case["config"]))
    return LlamaGenForImageGeneration.around(network)


def max_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference of two tensors of one shape."""
    assert actual.shape == expected.shape
    return (actual.double() - expected.double()).abs().max().item()
