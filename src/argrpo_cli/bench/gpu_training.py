"""The parts of `bench gpu` that are about a step of GRPO, on the pieces that it is made of.

TRL has no part in it: what is timed is what its trainer calls. The authors' pieces stand beside ours: rewards an image
at a time, the two halves of guidance by themselves and each through the LM head, the logits of whole images held in
float32, and a reference model kept beside the policy. Nothing here is theirs but the order of the work.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPVisionConfig, CLIPVisionModel

from argrpo_cli.bench import Bench
from argrpo_cli.bench.gpu_sampling import PUBLISHED_TOKENS, config_of
from argrpo_cli.bench.sampler import random_policy, sample_as_published
from argrpo_cli.networks.pixels import Preprocess
from argrpo_cli.policy.llamagen.config import VQConfig
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration, VQModel
from argrpo_cli.policy.llamagen.sample import sample_tokens
from argrpo_cli.policy.tokens import guide
from argrpo_cli.shapes import Sampling

IMAGES, CFG, BETA = 64, 2.0, 0.1  # of an update, as the paper has them
VISION = {  # width, layers, heads of CLIP's image towers; patches of 14 pixels of 224
    "CLIP-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "ViT-H": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120},
}
TOY_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def step(bench: Bench) -> None:
    """A step at the paper's batch: XL at 384 px, then B at 256."""
    for size, pixels, micro in (("XL", 384, 4), ("B", 256, 16))[: 1 if bench.toy else 2]:
        step_of(bench, f"{size}-{pixels}", size, pixels, 2 if bench.toy else micro)


def step_of(bench: Bench, name: str, size: str, pixels: int, micro: int) -> None:
    """Rows of one policy, each piece ours and the authors', and their sums."""
    config, images = config_of(bench, size, pixels), 4 if bench.toy else IMAGES
    model = random_policy(config, torch.float32, bench.device).requires_grad_(True)
    theirs = copy.deepcopy(model).bfloat16()  # the published code trains in bfloat16 weights
    reference = copy.deepcopy(theirs).requires_grad_(False)
    encoded = Encoded(torch.arange(images, device=bench.device) % config.num_classes)
    vq = random_tokenizer(bench)
    networks = {name: vision(bench, name) for name in VISION}
    autocast = partial(torch.autocast, bench.device, torch.bfloat16)
    totals = {"ours_s": 0.0, "authors_s": 0.0}

    def row(piece: str, ours: Callable[[], object], authors: Callable[[], object], times: float = 1.0) -> None:
        """`authors` does the part 1 / `times` of the whole."""
        ours()  # libraries choose their kernels on the first call, AdamW makes room for its moments
        authors()
        bench.free()
        ours_s = bench.seconds(ours)
        ours_GiB = bench.memory()
        bench.free()
        authors_s = times * bench.seconds(authors)
        figures = {"ours_s": ours_s, "authors_s": authors_s, "times": authors_s / ours_s}
        bench.row(f"{name} {piece}", **figures, ours_GiB=ours_GiB, authors_GiB=bench.memory())
        if "guided" not in piece:
            for key in totals:
                totals[key] += figures[key]

    def draw() -> Tensor:
        with autocast():
            return sample_tokens(model, encoded, Sampling(CFG), range(images), "conditional").tokens.clone()

    some = min(PUBLISHED_TOKENS, config.block_size)
    tokens = draw()
    published = partial(sample_as_published, theirs, encoded.condition, CFG, some)
    row("rollout", draw, published, config.block_size / some)
    pixels = pixels if not bench.toy else 8

    def decode() -> Tensor:
        with torch.no_grad(), autocast():
            return vq.decode_images(tokens, pixels)

    def decode_as_published() -> Tensor:
        with torch.no_grad():
            return vq.decode_tokens(tokens)

    pictures = decode()
    row("decode", decode, decode_as_published)
    both = [partial(scores, network, mixed=True) for network in networks.values()]
    alone = [partial(scores, network) for network in networks.values()]
    row(
        "rewards, CLIP-L and ViT-H",
        lambda: [score(pictures) for score in both],
        lambda: [score(pictures[i : i + 1]) for score in alone for i in range(images)],
    )
    advantages = torch.randn(images, 1, device=bench.device)
    kept = [torch.zeros(images, config.block_size, device=bench.device) for _ in range(2)]

    def refer() -> None:
        with torch.no_grad(), autocast():
            for part in parts(images, micro):
                kept[0][part] = model(encoded[part], tokens[part], Sampling(1.0)).logp

    def refer_as_published() -> None:
        with torch.no_grad():
            for part in parts(images, micro):
                kept[1][part] = whole_logp(reference, encoded[part], tokens[part], 1.0)

    row("reference", refer, refer_as_published)
    optimisers = [torch.optim.AdamW(one.parameters(), lr=1e-5, fused=True) for one in (model, theirs)]

    def update(cfg_scale: float) -> None:
        for part in parts(images, micro):
            with autocast():
                logp = model(encoded[part], tokens[part], Sampling(cfg_scale)).logp
            loss_of(logp, kept[0][part], advantages[part], images // micro).backward()
        apply(model, optimisers[0])

    def update_as_published(cfg_scale: float) -> None:
        for part in parts(images, micro):
            logp = whole_logp(theirs, encoded[part], tokens[part], cfg_scale)
            loss_of(logp, kept[1][part], advantages[part], images // micro).backward()
        apply(theirs, optimisers[1])

    for scale, piece in ((1.0, "update"), (CFG, "update, guided")):
        row(piece, partial(update, scale), partial(update_as_published, scale))
    bench.row(f"{name} whole step", **totals, times=totals["authors_s"] / totals["ours_s"])
    if importlib.util.find_spec("peft") is None:
        bench.row(f"{name} update, LoRA", note="left out: PEFT is not installed")
        return
    from peft import LoraConfig, get_peft_model

    targets = ["wqkv", "wo", "w1", "w2", "w3"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    optimisers = [torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5, fused=True)]
    for scale, piece in ((1.0, "update, LoRA"), (CFG, "update, LoRA, guided")):
        update(scale)
        bench.free()
        bench.row(f"{name} {piece}", ours_s=bench.seconds(partial(update, scale)), ours_GiB=bench.memory())


def parts(images: int, micro: int) -> list[slice]:
    """The micro-batches of an update."""
    return [slice(start, start + micro) for start in range(0, images, micro)]


def whole_logp(model: LlamaGenForImageGeneration, encoded: Encoded, tokens: Tensor, cfg_scale: float) -> Tensor:
    """Log-probabilities [B, T] the plain way: the logits of whole images in float32; under guidance a pass, and a pass
    of the LM head, for each half."""
    logits = model.logits(encoded, tokens)
    if cfg_scale > 1:
        null = Encoded(torch.full_like(encoded.condition, model.config.num_classes))
        logits = guide(logits, model.logits(null, tokens), cfg_scale)
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def loss_of(logp: Tensor, reference: Tensor, advantages: Tensor, count: int) -> Tensor:
    """The loss of GRPO (eq. 3 to 5) on policy, where nothing is clipped, with its KL term; one of `count` parts."""
    ratio = (logp - logp.detach()).exp()
    apart = reference - logp
    return -(ratio * advantages - BETA * (apart.exp() - apart - 1)).mean() / count


def apply(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """A step of the optimiser, the gradient clipped as the recipes have it."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def random_tokenizer(bench: Bench) -> VQModel:
    """VQ-16 with random weights."""
    small = VQConfig(codebook_size=64, ch=32, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), num_res_blocks=1)
    with torch.device(bench.device):
        return VQModel(small if bench.toy else VQConfig()).eval().requires_grad_(False)


def vision(bench: Bench, name: str) -> CLIPVisionModel:
    """An image tower of CLIP with random weights, as transformers has it."""
    shape = TOY_VISION if bench.toy else VISION[name]
    with torch.device(bench.device):
        return CLIPVisionModel(CLIPVisionConfig(**shape, image_size=224, patch_size=14)).eval().requires_grad_(False)


@torch.inference_mode()
def scores(network: CLIPVisionModel, images: Tensor, mixed: bool = False) -> Tensor:
    """Image features [B, D] of uint8 [B, 3, H, W], preprocessing included; those of texts are remembered, and the
    same for both ways to score."""
    pixels = Preprocess()(images)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed):
        return network(pixel_values=pixels).pooler_output


def ratio(bench: Bench) -> None:
    """|pi_theta / pi_sampler - 1| of a first update in bfloat16, where nothing but rounding keeps it from 0.

    Random weights, the head scaled to logits of deviation 3: an entropy of five to six nats of 9.7, as published
    policies have.
    """
    for size, pixels in (("B", 256), ("XL", 384))[: 1 if bench.toy else 2]:
        config, images = config_of(bench, size, pixels), 2 if bench.toy else 32
        model = random_policy(config, torch.float32, bench.device)
        nn.init.normal_(model.lm_head.weight, std=3 * config.hidden_size**-0.5)
        encoded = Encoded(torch.arange(images, device=bench.device) % config.num_classes)
        # Float32 shows that nothing but rounding is in the way; one size is enough.
        for dtype in (torch.bfloat16, torch.float32) if size == "B" else (torch.bfloat16,):
            for cfg_scale in (1.0, CFG, 7.5):
                sampling = Sampling(cfg_scale)
                with torch.no_grad(), torch.autocast(bench.device, torch.bfloat16, enabled=dtype is torch.bfloat16):
                    drawn = sample_tokens(model, encoded, sampling, range(images), "guided")
                    scored = [model(encoded[at], drawn.tokens[at], sampling, True) for at in parts(images, 2)]
                logp, entropy = (torch.cat([one[index] for one in scored]) for index in (0, 1))
                r = (logp - drawn.logp).exp()
                name = f"{size}-{pixels} {dtype} cfg {cfg_scale:g}".replace("torch.", "")
                bench.row(
                    name,
                    mean_off=(r - 1).abs().mean().item(),
                    largest_off=(r - 1).abs().max().item(),
                    outside_08_12=((r < 0.8) | (r > 1.2)).float().mean().item(),
                    entropy=entropy.mean().item(),
                )


def rewards(bench: Bench) -> None:
    """Reward networks on a batch against one image at a time, images of 384 px."""
    images, side = (2, 32) if bench.toy else (IMAGES, 384)
    pictures = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, device=bench.device)
    for name in VISION:
        network = vision(bench, name)
        for mixed in (False, True):
            batched, alone = partial(scores, network, pictures, mixed), partial(scores, network, mixed=mixed)
            batched()
            one, all_ = (
                bench.seconds(lambda alone=alone: [alone(one) for one in pictures.split(1)]),
                bench.seconds(batched, 3),
            )
            label = f"{name} {'bfloat16' if mixed else 'float32'}"
            bench.row(label, batched_s=images / all_, one_by_one_s=images / one, times=one / all_, GiB=bench.memory())
    if bench.toy or importlib.util.find_spec("pyiqa") is None:
        bench.row("MANIQA", note="left out: a toy run" if bench.toy else "left out: pyiqa is not installed")
        return
    from argrpo_cli.rewards.maniqa import build_network, patch_maps  # CUDA

    network = build_network().to(bench.device)  # CUDA
    crops = torch.rand(20, 3, 224, 224, device=bench.device)  # CUDA: those of one image
    for mixed in (False, True):  # CUDA
        with torch.inference_mode(), torch.autocast(bench.device, torch.bfloat16, enabled=mixed):  # CUDA
            patch_maps(network, crops)  # CUDA
            each = bench.seconds(lambda: [patch_maps(network, crop) for crop in crops.split(1)])  # CUDA
            together = bench.seconds(partial(patch_maps, network, crops), 3)  # CUDA
        label = f"MANIQA {'bfloat16' if mixed else 'float32'}"  # CUDA
        bench.row(label, batched_s=1 / together, one_by_one_s=1 / each, times=each / together)  # CUDA


def ddp(bench: Bench) -> None:
    """An update of L at 384 px, eight images, alone and as the one process of DistributedDataParallel."""
    config, images = config_of(bench, "L", 384), 2 if bench.toy else 8
    model = random_policy(config, torch.float32, bench.device).requires_grad_(True)
    encoded = Encoded(torch.arange(images, device=bench.device) % config.num_classes)
    tokens = torch.randint(0, config.vocab_size, (images, config.block_size), device=bench.device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if bench.device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            for name in ("alone", "DDP"):
                network = model if name == "alone" else DistributedDataParallel(model)

                def update(network: nn.Module = network) -> None:
                    with torch.autocast(bench.device, torch.bfloat16):
                        logp = network(encoded, tokens, Sampling(1.0)).logp
                    logp.mean().backward()
                    network.zero_grad(set_to_none=True)

                update()
                bench.free()
                bench.row(f"{name}, {backend}", update_s=bench.seconds(update, 3), GiB=bench.memory())
        finally:
            torch.distributed.destroy_process_group()


def inception(bench: Bench) -> None:
    """Images a second through torchvision's Inception, whose convolutions are those of the evaluation's network, in
    float32 without TF32; `bench eval` measures that network itself where torch-fidelity is installed."""
    from torchvision.models import inception_v3

    images, side = (1, 75) if bench.toy else (256, 299)
    with torch.device(bench.device):
        network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False).eval()
    pixels = torch.rand(images, 3, side, side, device=bench.device)

    def features(part: int) -> None:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for some in pixels.split(part):
                network(some)

    for part in (images, 64):
        features(part)
        bench.row(f"batches of {part}", images_s=images / bench.seconds(partial(features, part), 3), GiB=bench.memory())
