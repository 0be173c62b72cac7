"""The estimate of memory against what torch really keeps, and what a recipe changes about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.published import LlamaGenOutline
from argrpo_cli.policy.llamagen.sample import new_cache
from argrpo_cli.policy.open import outline_policy
from argrpo_cli.recipe import Recipe
from argrpo_cli.recipe.sections import LoraSection
from argrpo_cli.shapes import Sampling
from argrpo_cli.training.memory import estimate, pass_bytes, total, trained_parameters, what_fits
from tests.training.tiny import tiny_caption_policy

IMAGES = 4


def small(condition: str = "class", layers: int = 4, kv_heads: int = 4) -> LlamaGenConfig:
    return LlamaGenConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=256, block_size=64, num_classes=10, condition=condition,
        cls_token_num=1 if condition == "class" else 8, caption_dim=32,
    )  # fmt: skip


def outline(config: LlamaGenConfig) -> LlamaGenOutline:
    with torch.device("meta"):
        return LlamaGenOutline(SimpleNamespace(model=LlamaGenForImageGeneration(config)), 0, ())


def kept_bytes(model: nn.Module, inputs: tuple[Any, ...], autocast: bool) -> int:
    """The storages that autograd keeps of a real pass, each once, the weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # the tensor lives, so its address is its own
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(*inputs)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def measured(config: LlamaGenConfig, guided: bool = False, autocast: bool = False, checkpointing: bool = False) -> int:
    model = LlamaGenForImageGeneration(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sampling = Sampling(cfg_scale=2.0 if guided else 1.0)
    return kept_bytes(model, (*outline(config).blank(IMAGES), sampling), autocast)


def expected(config: LlamaGenConfig, guided: bool = False, autocast: bool = False, checkpointing: bool = False) -> int:
    sampling = Sampling(cfg_scale=2.0 if guided else 1.0)
    return pass_bytes(outline(config), IMAGES, sampling, autocast=autocast, checkpointing=checkpointing)


@pytest.mark.parametrize("condition", ["class", "caption"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_training_pass_keeps_what_is_estimated(condition: str, guided: bool, autocast: bool) -> None:
    config = small(condition)
    assert expected(config, guided, autocast) == pytest.approx(measured(config, guided, autocast), rel=0.01)


def test_fewer_key_heads_keep_less() -> None:
    config = small(kv_heads=1)
    assert expected(config) == pytest.approx(measured(config), rel=0.01)
    assert expected(config) < 0.95 * expected(small())


def test_with_gradient_checkpointing_the_layers_keep_their_inputs_and_one_is_there_in_full() -> None:
    config = small(layers=6)
    inputs, full = measured(config, checkpointing=True), measured(config)
    assert expected(config, checkpointing=True) == pytest.approx(inputs + (full - inputs) / 6, rel=0.01)


def test_measuring_leaves_nothing_behind_that_has_no_numbers() -> None:
    config = small()
    expected(config)
    model = LlamaGenForImageGeneration(config)
    assert model(*outline(config).blank(IMAGES)).logp.isfinite().all()


@pytest.mark.parametrize("condition", ["class", "caption"])
def test_the_cache_is_as_large_as_the_sampler_makes_it(condition: str) -> None:
    config = small(condition)
    for autocast, number in ((False, 4), (True, 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cache = new_cache(LlamaGenForImageGeneration(config), 2 * IMAGES)
        made = sum(tensor.nbytes for pair in cache for tensor in pair)
        assert outline(config).drawing_bytes(IMAGES, guided=True, recorded=False, number=number) == made
        recorded = outline(config).drawing_bytes(IMAGES, guided=True, recorded=True, number=number)
        assert recorded == made * 128 // (config.cls_token_num + 64)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    peft = pytest.importorskip("peft")
    lora, targets = LoraSection(rank=3), ["wqkv", "wo", "w1", "w2", "w3"]
    policy = tiny_caption_policy()  # whose fc1 and fc2, before the layers, have none
    expected = trained_parameters(policy, lora)
    assert expected == trained_parameters(policy, LoraSection(rank=3, targets=targets))
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=targets), policy.model)
    assert expected == sum(value.numel() for name, value in policy.model.named_parameters() if "lora_" in name)


def parts_of(checkpoint: str = "c2i-l-384", **sections: Any) -> dict[str, int]:
    recipe = Recipe.model_validate({"name": "x", "policy": {"checkpoint": checkpoint}, **sections})
    parts = estimate(
        recipe, outline_policy(checkpoint), [], share=8, micro=4, processes=sections.get("processes", 1), device="cuda"
    )
    return {part.name: part.bytes for part in parts} | {"total": total(parts)}


def test_the_recipe_decides_what_is_held() -> None:
    full = parts_of()
    weights = 4 * 342_910_976  # of table 1's L, at 384 pixels
    assert full["policy, float32"] == full["reference policy, float32"] == weights
    assert full["gradients, float32"] == weights + 4 * 16384 * 1024  # 8 images in two parts: one of the head's again
    assert full["AdamW's two moments"] == 2 * weights
    assert "reference policy, float32" not in parts_of(grpo={"beta": 0.0})
    adapted = parts_of(policy={"checkpoint": "c2i-l-384", "lora": {"rank": 8}})
    assert "reference policy, float32" not in adapted  # the policy without its adapters
    assert adapted["AdamW's two moments"] < 0.05 * weights
    guided = parts_of(grpo={"logprob": "guided"})
    assert guided["training pass"] == pytest.approx(2 * full["training pass"], rel=0.01)
    assert parts_of(grpo={"gradient_checkpointing": True})["training pass"] < 0.2 * full["training pass"]
    assert parts_of(sampling={"cfg_scale": 1.0})["keys and values"] * 2 == full["keys and values"]


def test_precision_and_the_mean_decide_too() -> None:
    full = parts_of()
    low = parts_of(policy={"checkpoint": "c2i-l-384", "dtype": "bfloat16"}, grpo={"ema_decay": 0.9})
    assert 2 * low["keys and values"] == full["keys and values"]
    assert low["running mean of the weights"] == full["policy, float32"]
    width, codes = 1024, 16384
    matrices = 342_910_976 - 1001 * width - codes * width  # embeddings are looked up, not multiplied
    assert low["bfloat16 copies of the matrices"] == pytest.approx(2 * matrices, rel=1e-3)


def test_the_phases_follow_each_other() -> None:
    captions = {"conditions": {"source": "captions", "captions": ["a dog"]}}
    resident = parts_of("t2i-xl-256", **captions)
    away = parts_of("t2i-xl-256", policy={"checkpoint": "t2i-xl-256", "text_device": "offload"}, **captions)
    assert resident["text encoder"] == away["text encoder"] == 2 * 1_223_527_424
    assert resident["total"] - away["total"] == resident["text encoder"]  # it is gone when the cache is largest


def test_what_would_fit_is_found_by_the_same_sums() -> None:
    outline = outline_policy("nano-c2i")
    sections = {"grpo": {"batch_size": 192, "logprob": "guided"}}
    recipe = Recipe.model_validate({"name": "x", "policy": {"checkpoint": "nano-c2i"}, **sections})

    def bytes_with(micro: int, **grpo: Any) -> int:
        changed = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update=grpo)})
        return total(estimate(changed, outline, [], share=192, micro=micro, processes=1, device="cuda"))

    def fits(room: int, device: str = "cuda") -> dict[tuple[str, ...], int]:
        return dict(what_fits(recipe, outline, [], room, processes=1, device=device))

    room = bytes_with(96)
    assert bytes_with(64) < room < bytes_with(192)
    ways = fits(room)
    assert ways["grpo.micro_batch_size: 96",] == room  # the largest part that fits
    assert ways["grpo.gradient_checkpointing: true",] == bytes_with(192, gradient_checkpointing=True) < room
    assert any(words[0].startswith("--processes ") for words in ways)
    assert all(size <= room for size in ways.values())
    ((words, size),) = fits(1, "cpu").items()  # nothing helps
    both = ("grpo.gradient_checkpointing: true", "policy.lora.rank: 16")
    assert words == (*both, "grpo.batch_size: 24") and size > 1
    ((words, same),) = fits(size, "cpu").items()  # and this much does
    assert same == size and words[:2] == both
