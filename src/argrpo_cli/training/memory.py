"""An estimate of the memory that training takes on one device, part by part, from shapes alone.

What autograd keeps of the training pass is measured, by running the pass on tensors without numbers. The rest follows
from the recipe by sums that are as exact and need no pass: running the optimiser, the rollout and the backward pass
that way, too, takes half a minute for the largest policies. Fragments that the allocator cannot use, CUDA's own context
(about half a gigabyte) and the rewards' intermediate values are left out or coarse.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from argrpo_cli.policy.open import adapted_layers
from argrpo_cli.training.launch import drawn_at_once

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.policy.outline import Outline
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.recipe.sections import LoraSection
    from argrpo_cli.rewards.base import Needs
    from argrpo_cli.shapes import Sampling

Phase = Literal["always", "reading", "rollout", "scoring", "update"]
PHASES: dict[Phase, str] = {
    "always": "all the time",
    "reading": "while captions are read",
    "rollout": "while images are drawn",
    "scoring": "while they are scored",
    "update": "in an update",
}


class Part(NamedTuple):
    """What takes memory, how many bytes, and when; the phases follow each other."""

    name: str
    bytes: int
    phase: Phase


def total(parts: Sequence[Part]) -> int:
    """Bytes at the worst moment: what is always there, and the largest phase."""
    phases = {phase: sum(part.bytes for part in parts if part.phase == phase) for phase in PHASES}
    return phases.pop("always") + max(phases.values())


def pass_bytes(outline: Outline, images: int, sampling: Sampling, *, autocast: bool, checkpointing: bool) -> int:
    """What autograd keeps of a training pass over `images` images, weights left out and their bfloat16 copies not.

    With gradient checkpointing that is the layers' inputs, and one layer in full while it is computed again.
    """
    model = outline.policy.model.train()
    full = _kept_bytes(outline, images, sampling, autocast)
    if not checkpointing:
        return full
    with warnings.catch_warnings():  # transformers is about to call it otherwise
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = _kept_bytes(outline, images, sampling, autocast)
        model.gradient_checkpointing_disable()
    return inputs + (full - inputs) // outline.layers


def _kept_bytes(outline: Outline, images: int, sampling: Sampling, autocast: bool) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode  # where torch's own memory tools take it from

    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # which lives, so no other storage gets its address
        return tensor

    model = outline.policy.model
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {
            name: torch.empty(one.shape, dtype=one.dtype, requires_grad=one.requires_grad)
            for name, one in (*model.named_parameters(), *model.named_buffers())
        }
        encoded, tokens = outline.blank(images)
        keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # tensors without numbers say they are
            torch.func.functional_call(model, weights, (encoded, tokens, sampling))
        own = {one.untyped_storage()._cdata for one in weights.values()}
        return sum(one.untyped_storage().nbytes() for key, one in kept.items() if key not in own)


def trained_parameters(policy: Policy, lora: LoraSection | None) -> int:
    """How many parameters the optimiser holds; `policy.trainable` has been applied to the model.

    Of adapters rank x (inputs + outputs) for every linear layer that has one.
    """
    if lora is None:
        return sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    layers = [policy.model.get_submodule(name) for name in adapted_layers(policy, lora.targets)]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def estimate(
    recipe: Recipe, outline: Outline, needs: Sequence[Needs], *, share: int, micro: int, processes: int, device: str
) -> list[Part]:
    """The parts of the estimate for one device.

    Args:
        needs: of the reward networks that are loaded, each network once.
        share, micro: images that the device draws in an update, and trains on at a time.
        device: "cpu" or "cuda".
    """
    optim, model, distil = recipe.optim, outline.policy.model, recipe.method == "distil"
    autocast, adapted = recipe.policy.dtype == "bfloat16", recipe.policy.lora is not None
    parameters = [parameter.numel() for parameter in model.parameters()]
    weights, trained = sum(parameters), trained_parameters(outline.policy, recipe.policy.lora)
    steered = distil or recipe.sampling.cfg_scale > 1
    reference = distil or (recipe.grpo.beta and not adapted)
    guided = not distil and recipe.grpo.logprob == "guided"
    sampling = recipe.sampling if guided else replace(recipe.sampling, cfg_scale=1.0)
    kept = pass_bytes(outline, micro, sampling, autocast=autocast, checkpointing=optim.gradient_checkpointing)
    images, number = min(share, drawn_at_once(outline.policy.card.tokens)), 2 if autocast else 4
    cache = outline.drawing_bytes(images, guided=steered, recorded=device != "cpu", number=number)
    again = 4 * max(parameters) if micro < share else 0  # a further micro-batch's gradient, before it is added
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    reading = {"same": "always", "offload": "reading"}.get(recipe.policy.text_device)
    parts = [
        Part("policy, float32", 4 * weights, "always"),
        Part("adapters, float32", 4 * trained if adapted else 0, "always"),
        Part("AdamW's two moments", 8 * trained, "always"),
        Part("teacher, float32" if distil else "reference policy, float32", 4 * weights if reference else 0, "always"),
        # Of a GPU's run on the host:
        Part("weights as training began", 4 * trained if device == "cpu" else 0, "always"),
        Part("running mean of the weights", 4 * trained if optim.ema_decay else 0, "always"),
        Part("image tokenizer, float32", outline.tokenizer_bytes, "always"),
        Part("text encoder", outline.text_bytes if reading else 0, reading or "always"),
        *(Part(f"reward: {one.network}", one.weights or 0, "always") for one in needs),
        Part("keys and values", cache, "rollout"),
        Part("decoding images", outline.decoding_bytes(images), "rollout"),
        Part("bfloat16 copies of the matrices", 2 * matrices if autocast else 0, "rollout"),
        Part("rewards at work", max((one.working for one in needs), default=0), "scoring"),
        Part("gradients, float32", 4 * trained + again, "update"),
        Part("gradients in transit (DDP)", 4 * trained if processes > 1 else 0, "update"),
        Part("training pass", kept, "update"),
        Part("logits, a part of them, and their gradients", (1 + distil) * outline.logits_bytes(micro), "update"),
    ]
    return [part for part in parts if part.bytes]
