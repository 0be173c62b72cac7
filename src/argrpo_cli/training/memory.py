"""An estimate of the memory that training takes on one device, part by part, from shapes alone.

What autograd keeps of the training pass is measured, by running the pass on tensors without numbers. The rest follows
from the recipe by sums that are as exact and need no pass: running the optimiser, the rollout and the backward pass
that way, too, takes half a minute for the largest policies. Fragments that the allocator cannot use, CUDA's own context
(about half a gigabyte) and the rewards' intermediate values are left out or coarse.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from argrpo_cli.policy.open import adapted_layers
from argrpo_cli.recipe.sections import LoraSection
from argrpo_cli.training.launch import drawn_at_once, images_per_process

if TYPE_CHECKING:
    from argrpo_cli.policy import Policy
    from argrpo_cli.policy.outline import Outline
    from argrpo_cli.recipe import Recipe
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
    recipe: Recipe,
    outline: Outline,
    needs: Sequence[Needs],
    *,
    share: int,
    micro: int,
    processes: int,
    device: str,
    measure: Callable[..., int] | None = None,
) -> list[Part]:
    """The parts of the estimate for one device.

    Args:
        needs: of the reward networks that are loaded, each network once.
        share, micro: images that the device draws in an update, and trains on at a time.
        device: "cpu" or "cuda".
        measure: says what autograd keeps, in the place of `pass_bytes`.
    """
    optim, model, method = recipe.optim, outline.policy.model, recipe.method
    grpo, distil = method == "grpo", method == "distil"
    autocast, adapted = recipe.policy.dtype == "bfloat16", recipe.policy.lora is not None
    parameters = [parameter.numel() for parameter in model.parameters()]
    weights, trained = sum(parameters), trained_parameters(outline.policy, recipe.policy.lora)
    steered = distil or (recipe.sampling.cfg_scale > 1 and not recipe.unguided)
    reference = recipe.unguided or (grpo and recipe.grpo.refers and not adapted)
    guided = grpo and recipe.grpo.logprob == "guided"
    rows = 2 * micro if method == "cca" else micro  # of the training pass: an image under two conditions
    sampling = recipe.sampling if guided else replace(recipe.sampling, cfg_scale=1.0)
    measure = measure or pass_bytes
    kept = measure(outline, rows, sampling, autocast=autocast, checkpointing=optim.gradient_checkpointing)
    drawn = recipe.logging.grid_images if recipe.learns_from_images else share
    images, number = min(drawn, drawn_at_once(outline.policy.card.tokens)), 2 if autocast else 4
    cache = outline.drawing_bytes(images, guided=steered, recorded=device != "cpu", number=number)
    decoded = micro * recipe.pixel.samples if method == "pixel" else 0  # while the training pass is held
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
        Part("decoding what is drawn of real ones", outline.decoding_bytes(decoded) if decoded else 0, "update"),
        Part("bfloat16 copies of the matrices", 2 * matrices if autocast else 0, "rollout"),
        Part("rewards at work", max((one.working for one in needs), default=0), "scoring"),
        Part("gradients, float32", 4 * trained + again, "update"),
        Part("gradients in transit (DDP)", 4 * trained if processes > 1 else 0, "update"),
        Part("training pass", kept, "update"),
        Part("logits, a part of them, and their gradients", (1 + distil) * outline.logits_bytes(rows), "update"),
    ]
    return [part for part in parts if part.bytes]


class Fit(NamedTuple):
    """Changes of a recipe, as one would write them, and the bytes that it then takes."""

    changes: tuple[str, ...]
    bytes: int


def room_here(device: str) -> int:
    """Bytes of memory of this machine's GPU, or of the machine as far as this process may use it."""
    if device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(sizes)


def what_fits(
    recipe: Recipe, outline: Outline, needs: Sequence[Needs], room: int, *, processes: int, device: str
) -> list[Fit]:
    """What makes a run fit into `room` bytes of a GPU, or of the machine, by the same sums.

    Returns:
        Every single change that suffices, in its mildest form, or else the first that do together. Where nothing does,
        all of them, which take more than there is room for.
    """
    passes: dict[Any, tuple[int, int]] = {}

    def measure(outline: Outline, images: int, sampling: Sampling, **how: bool) -> int:
        """What a pass keeps is so much, and so much for each image."""
        key = sampling, *how.values()
        if key not in passes:
            passes[key] = tuple(pass_bytes(outline, number, sampling, **how) for number in (1, 2))
        one, two = passes[key]
        return one + (two - one) * (images - 1)

    def fit(changed: Recipe, changes: Sequence[str], number: int = processes) -> Fit:
        share, micro = images_per_process(changed, number)
        parts = estimate(
            changed, outline, needs, share=share, micro=micro, processes=number, device=device, measure=measure
        )
        return Fit(tuple(changes), total(parts) * (number if device == "cpu" else 1))

    batch, unit = recipe.optim.batch_size, recipe.optim.group_size * processes
    micro = recipe.optim.micro_batch_size or batch
    parts = [size for size in range(min(micro, batch) - 1, 0, -1) if batch // processes % size == 0]
    halves = [batch >> power for power in range(1, batch.bit_length())]
    batches = [size for size in halves if size % unit == 0 and size // processes % min(micro, size // processes) == 0]

    def smaller(key: str, sizes: Sequence[int], changed: Recipe, changes: Sequence[str] = ()) -> list[Fit]:
        key = f"{changed.method}.{key}"
        return [fit(_with(changed, key, size), [*changes, f"{key}: {size}"]) for size in sizes]

    checkpointing, lora = f"{recipe.method}.gradient_checkpointing", LoraSection()
    others: list[tuple[str, str, Any]] = []
    if not recipe.optim.gradient_checkpointing:
        others.append((f"{checkpointing}: true", checkpointing, True))
    if outline.text_bytes and recipe.policy.text_device == "same":
        others.append(("policy.text_device: offload", "policy.text_device", "offload"))
    if recipe.policy.lora is None and recipe.policy.trainable == "all":
        others.append((f"policy.lora.rank: {lora.rank}", "policy.lora", lora))
    sizes = range(processes + 1, 65) if device != "cpu" else ()
    more = [n for n in sizes if batch % (n * recipe.optim.group_size) == 0 and batch // n % min(micro, batch // n) == 0]

    ways = [
        smaller("micro_batch_size", parts, recipe),
        *([fit(_with(recipe, key, value), [words])] for words, key, value in others),
        [fit(recipe, [f"--processes {number}"], number) for number in more],
        smaller("batch_size", batches, recipe),
    ]
    if fitting := [next(way for way in one if way.bytes <= room) for one in ways if any(w.bytes <= room for w in one)]:
        return fitting
    changes: list[str] = []
    for words, key, value in others:
        changes, recipe = [*changes, words], _with(recipe, key, value)
        together = [fit(recipe, changes), *smaller("micro_batch_size", parts, recipe, changes)]
        if fitting := [way for way in together if way.bytes <= room]:
            return fitting[:1]
    together = [fit(recipe, changes), *smaller("batch_size", batches, recipe, changes)]
    return [next((way for way in together if way.bytes <= room), together[-1])]


def _with(recipe: Recipe, dotted: str, value: Any) -> Recipe:
    """The recipe with another value under a key of a section."""
    section, _, key = dotted.partition(".")
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})
