"""The estimate of memory against what torch really keeps, and what a recipe changes about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.model import Encoded, LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.published import outline_policy
from argrpo_cli.policy.llamagen.sample import new_cache
from argrpo_cli.recipe import Recipe
from argrpo_cli.recipe.schema import LoraSection
from argrpo_cli.training import memory
from argrpo_cli.training.memory import activation_bytes, cache_bytes, estimate, lora_parameters, total

IMAGES = 4


def small(condition: str = "class", layers: int = 4, kv_heads: int = 4) -> LlamaGenConfig:
    return LlamaGenConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=256, block_size=64, num_classes=10, condition=condition,
        cls_token_num=1 if condition == "class" else 8, caption_dim=32,
    )  # fmt: skip


def kept_bytes(model: LlamaGenForImageGeneration, guided: bool, autocast: bool) -> int:
    """The storages that autograd keeps of a pass, each once, the weights and copies of them left out."""
    config = model.config
    encoded = Encoded(torch.zeros(IMAGES, dtype=torch.long))
    if config.condition == "caption":
        features = torch.randn(IMAGES, config.cls_token_num, config.caption_dim)
        encoded = Encoded(features, torch.ones(IMAGES, config.cls_token_num))
    tokens = torch.randint(0, 10, (IMAGES, config.block_size))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {frozenset(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copied = tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and frozenset(tensor.shape) in shapes
        if storage.data_ptr() not in own and not copied:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor lives, so its address is its own
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.model(encoded, tokens, 2.0 if guided else 1.0)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("condition", ["class", "caption"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_training_pass_keeps_what_is_estimated(condition: str, guided: bool, autocast: bool) -> None:
    config = small(condition)
    expected = activation_bytes(config, IMAGES, guided=guided, autocast=autocast)
    measured = kept_bytes(LlamaGenForImageGeneration(config), guided, autocast)
    assert expected == pytest.approx(measured, rel=0.1)


def test_fewer_key_heads_keep_less() -> None:
    config = small(kv_heads=1)
    expected = activation_bytes(config, IMAGES, guided=False, autocast=False)
    assert expected == pytest.approx(kept_bytes(LlamaGenForImageGeneration(config), False, False), rel=0.1)
    assert expected < 0.95 * activation_bytes(small(), IMAGES, guided=False, autocast=False)


def test_with_gradient_checkpointing_the_layers_keep_their_inputs() -> None:
    config = small(layers=6)
    model = LlamaGenForImageGeneration(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    measured = kept_bytes(model, guided=False, autocast=False)
    one, none = (
        activation_bytes(small(layers=layers), IMAGES, guided=False, autocast=False, checkpointing=True)
        for layers in (6, 0)
    )
    again = none - IMAGES * 65 * 8 * 64  # one layer in full, which is computed after the pass
    assert one - again == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("condition", ["class", "caption"])
def test_the_cache_is_as_large_as_the_sampler_makes_it(condition: str) -> None:
    config = small(condition)
    for autocast, number in ((False, 4), (True, 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cache = new_cache(LlamaGenForImageGeneration(config), 2 * IMAGES)
        made = sum(tensor.nbytes for pair in cache for tensor in pair)
        assert cache_bytes(config, IMAGES, guided=True, bucketed=False, number=number) == made
        bucketed = cache_bytes(config, IMAGES, guided=True, bucketed=True, number=number)
        assert bucketed == made * 128 // (config.cls_token_num + 64)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    peft = pytest.importorskip("peft")
    model, lora = LlamaGenForImageGeneration(small()), LoraSection(rank=3)
    expected = lora_parameters(model, lora)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=lora.targets), model)
    assert expected == sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)


def parts_of(checkpoint: str = "c2i-l-384", **sections: Any) -> dict[str, int]:
    recipe = Recipe.model_validate({"name": "x", "policy": {"checkpoint": checkpoint}, **sections})
    parts = estimate(
        recipe, outline_policy(checkpoint), [], share=8, micro=4, processes=sections.get("processes", 1), device="cuda"
    )
    return {part.name: part.bytes for part in parts} | {"total": total(parts)}


def test_the_recipe_decides_what_is_held() -> None:
    full = parts_of()
    weights = 4 * 342_910_976  # of table 1's L, at 384 pixels
    assert full["policy, float32"] == full["reference policy, float32"] == full["gradients, float32"] == weights
    assert full["AdamW's two moments"] == 2 * weights
    assert "reference policy, float32" not in parts_of(grpo={"beta": 0.0})
    adapted = parts_of(policy={"checkpoint": "c2i-l-384", "lora": {"rank": 8}})
    assert "reference policy, float32" not in adapted  # the policy without its adapters
    assert adapted["AdamW's two moments"] < 0.05 * weights
    guided = parts_of(grpo={"logprob": "guided"})
    assert guided["training pass"] == 2 * full["training pass"]
    assert parts_of(grpo={"gradient_checkpointing": True})["training pass"] < 0.2 * full["training pass"]
    assert parts_of(sampling={"cfg_scale": 1.0})["keys and values"] * 2 == full["keys and values"]


def test_precision_and_the_mean_decide_too() -> None:
    full, name = parts_of(), "LM head, a tile of logits and its gradients"
    low = parts_of(policy={"checkpoint": "c2i-l-384", "dtype": "bfloat16"}, grpo={"ema_decay": 0.9})
    assert 2 * low["keys and values"] == full["keys and values"]
    assert low["running mean of the weights"] == full["policy, float32"]
    tokens, codes, width = 4 * 576, 16384, 1024
    hidden, second = 4 * tokens * width, 4 * codes * width  # the share of 8 images is trained in two parts of 4
    assert low[name] == tokens * memory.HEAD_WIDTH * 2 + hidden + second
    assert full[name] == tokens * memory.HEAD_WIDTH * 4 + hidden + second
    matrices = 342_910_976 - 1001 * width - codes * width  # embeddings are looked up, not multiplied
    assert low["bfloat16 copies of the matrices"] == pytest.approx(2 * matrices, rel=1e-3)


def test_the_phases_follow_each_other() -> None:
    captions = {"conditions": {"source": "captions", "captions": ["a dog"]}}
    resident = parts_of("t2i-xl-256", **captions)
    away = parts_of("t2i-xl-256", policy={"checkpoint": "t2i-xl-256", "text_device": "offload"}, **captions)
    assert resident["text encoder"] == away["text encoder"] == 2 * 1_223_527_424
    assert resident["total"] - away["total"] == resident["text encoder"]  # it is gone when the cache is largest
