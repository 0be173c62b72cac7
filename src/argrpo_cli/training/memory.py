"""An estimate of the memory that training takes on one device, part by part, from shapes alone.

Weights, gradients, optimiser and caches follow from the recipe. What autograd keeps of the training pass is counted
from the operations of `policy/modeling.py`; the tests hold the count against what torch saves. Fragments that the
allocator cannot use, CUDA's own context (about half a gigabyte) and the rewards' intermediate values are left out or
coarse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from argrpo_cli.policy.llamagen.policy import DECODE_PIXELS
from argrpo_cli.policy.llamagen.published import count
from argrpo_cli.policy.llamagen.sample import BUCKET

if TYPE_CHECKING:
    from argrpo_cli.policy.llamagen.config import LlamaGenConfig
    from argrpo_cli.policy.llamagen.published import Outline
    from argrpo_cli.recipe import Recipe
    from argrpo_cli.recipe.schema import LoraSection
    from argrpo_cli.rewards.base import Needs

CHUNK = 64  # images drawn at a time (grpo/rollout.py)
HEAD_TOKENS, HEAD_WIDTH = 4096, 32768  # tile of logits in TRL's fused head
DECODER_LAYERS = 4  # activations of full size that the image decoder holds at once

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


def layer_bytes(config: LlamaGenConfig, autocast: bool) -> int:
    """What autograd keeps of one transformer layer for each token of a batch.

    With D the width, Q = heads x head width, K = key heads x head width, F the feed-forward width and w the bytes of a
    number in matrix products (4; 2 under bfloat16 autocast):

        each of two norms    its input and what it normalised, in float32; the product with its weight, as the matrices
                             read it                                                            2 (4 D + 4 D + w D)
        attention            the rotated queries and keys, the storage of the projection (of which the values are a
                             part), the output                                          w ((Q + K) + (Q + 2 K) + Q)
        feed-forward         w1 x, silu(w1 x), w3 x and their product                                        w (4 F)
        scalars              1 / rms of two norms, the log-normaliser of each head, in float32          4 (2 + heads)

    The residual sum after the attention is the input of the second norm, that after the feed-forward the first norm's
    of the next layer.
    """
    width = 2 if autocast else 4
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, k = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return 2 * (8 * d + width * d) + width * (3 * q + 3 * k) + width * 4 * f + 4 * (2 + heads)


def activation_bytes(
    config: LlamaGenConfig, images: int, *, guided: bool, autocast: bool, checkpointing: bool = False
) -> int:
    """What autograd keeps of the training pass over `images` images, the LM head left out.

    Rows are images, twice as many with guided log-probabilities (condition and null condition), each of P + T tokens.
    The layers cost `layer_bytes`; with gradient checkpointing only their inputs (float32), and one layer in full while
    it is computed again. After them the final norm keeps 8 D. A boolean mask of captions is one byte a pair of tokens.
    """
    length = config.cls_token_num + config.block_size
    rows = 2 * images if guided else images
    layer = layer_bytes(config, autocast)
    layers = config.num_hidden_layers * layer
    if checkpointing:
        layers = config.num_hidden_layers * 4 * config.hidden_size + layer
    mask = rows * length * length if config.condition == "caption" else 0
    return rows * length * (layers + 8 * config.hidden_size) + mask


def cache_bytes(config: LlamaGenConfig, images: int, *, guided: bool, bucketed: bool, number: int) -> int:
    """Keys and values of all layers while `images` images are drawn, in numbers of `number` bytes."""
    length = config.cls_token_num + config.block_size
    if bucketed:
        length = -(-length // BUCKET) * BUCKET
    rows = 2 * images if guided else images
    return 2 * config.num_hidden_layers * rows * config.num_key_value_heads * config.head_dim * length * number


def lora_parameters(model: nn.Module, lora: LoraSection) -> int:
    """Parameters of the adapters: rank x (inputs + outputs) of every linear layer that is named."""
    return sum(
        lora.rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == target or name.endswith(f".{target}") for target in lora.targets)
    )


def trained_parameters(recipe: Recipe, outline: Outline) -> int:
    """How many parameters the optimiser holds; `policy.trainable` has been applied to the outline's model."""
    model = outline.policy.model
    if recipe.policy.lora is not None:
        return lora_parameters(model, recipe.policy.lora)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def estimate(
    recipe: Recipe, outline: Outline, needs: Sequence[Needs], *, share: int, micro: int, processes: int, device: str
) -> list[Part]:
    """The parts of the estimate for one device.

    Args:
        needs: of the reward networks that are loaded, each network once.
        share, micro: images that the device draws in an update, and trains on at a time.
        device: "cpu" or "cuda".
    """
    config, grpo, gpu = outline.config, recipe.grpo, device != "cpu"
    autocast = recipe.policy.dtype == "bfloat16"
    weights, trained = count(outline.policy.model), trained_parameters(recipe, outline)
    adapted = recipe.policy.lora is not None
    guided = recipe.grpo.logprob == "guided" and recipe.sampling.cfg_scale > 1
    parts = [Part("policy, float32", 4 * weights, "always")]
    if adapted:
        parts.append(Part("adapters, float32", 4 * trained, "always"))
    parts.append(Part("AdamW's two moments", 8 * trained, "always"))
    if grpo.beta and not adapted:
        parts.append(Part("reference policy, float32", 4 * weights, "always"))
    if grpo.ema_decay:
        parts.append(Part("running mean of the weights", 4 * trained, "always"))
    parts.append(Part("image tokenizer, float32", 4 * count(outline.policy.tokenizer), "always"))
    if outline.text_bytes:
        where = recipe.policy.text_device
        if where == "same":
            parts.append(Part("text encoder", outline.text_bytes, "always"))
        elif where == "offload":
            parts.append(Part("text encoder", outline.text_bytes, "reading"))
    for one in needs:
        if one.weights:
            parts.append(Part(f"reward: {one.network}", one.weights, "always"))
    drawn = min(share, CHUNK)
    steered = recipe.sampling.cfg_scale > 1
    parts.append(
        Part(
            "keys and values",
            cache_bytes(config, drawn, guided=steered, bucketed=gpu, number=2 if autocast else 4),
            "rollout",
        ),
    )
    decoded = min(drawn * outline.policy.image_size**2, max(DECODE_PIXELS, outline.policy.image_size**2))
    channels = outline.policy.tokenizer.config.ch
    parts.append(Part("decoding images", DECODER_LAYERS * 4 * decoded * channels, "rollout"))
    parts.append(Part("rewards at work", max((one.working for one in needs), default=0), "scoring"))
    parts.append(Part("gradients, float32", 4 * trained, "update"))
    if processes > 1:
        parts.append(Part("gradients in transit (DDP)", 4 * trained, "update"))
    kept = activation_bytes(config, micro, guided=guided, autocast=autocast, checkpointing=grpo.gradient_checkpointing)
    parts.append(Part("training pass", kept, "update"))
    tokens = micro * config.block_size
    head = config.vocab_size * config.hidden_size
    tile = min(tokens, HEAD_TOKENS) * HEAD_WIDTH * (2 if autocast else 4)
    again = 4 * head if micro < share else 0  # the gradient of a further micro-batch, before it is added
    parts.append(
        Part("LM head, a tile of logits and its gradients", tile + 4 * tokens * config.hidden_size + again, "update")
    )
    if autocast:
        matrices = head + sum(parameter.numel() for parameter in outline.policy.model.model.layers.parameters())
        parts.append(Part("bfloat16 copies of the matrices", 2 * matrices, "rollout"))
        parts.append(Part("bfloat16 copies of the matrices", 2 * matrices, "update"))
    return [part for part in parts if part.bytes]
