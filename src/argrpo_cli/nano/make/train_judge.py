"""Builds nano-judge: tokens of canonical and reference scenes, and the judge's own classifier.

    python -m argrpo_cli.nano.make.train_judge [OUT_DIR] [--steps 900]

The classifier learns renderings and reconstructions, mirrored, shifted, with parts hidden and colours varied, so that
it does not name an object by a scrap of it or by its tint.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from argrpo_cli.nano import scenes
from argrpo_cli.nano.judge import RecognitionNet, canonical_layout, canonical_scene
from argrpo_cli.nano.make.study import augmented
from argrpo_cli.nano.make.training import fit
from argrpo_cli.nano.tokens import TOKENS_FILE, decode, encode, load_tokenizer
from argrpo_cli.networks.weights import save_network, to_unit
from argrpo_cli.policy.llamagen.vq import VQModel
from argrpo_cli.system.files import WEIGHTS, atomic_path

CONFIG = {"recogniser": {"classes": len(scenes.CLASS_NAMES), "growth": 20, "layers": [2, 3, 3], "features": 128}}
BATCH = 64
SCENES = 4800  # reconstructed up front; as many renderings again are drawn fresh during training
REFERENCES = 1200


def canonical_tokens(vq: VQModel) -> Tensor:
    """Tokens int16 [classes, S, T] of the canonical scenes; needs the font."""
    images = [
        scenes.render(canonical_scene(class_id, x, y, background))
        for class_id in range(len(scenes.CLASS_NAMES))
        for x, y, background in canonical_layout()
    ]
    tokens = encode(vq, torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()))
    return tokens.view(len(scenes.CLASS_NAMES), len(canonical_layout()), -1).to(torch.int16)


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 to float in [-1, 1]: mirrored, shifted, one rectangle hidden half of the time, channels scaled by +-10%."""
    (images,) = augmented(images, generator=generator, reach=5)
    x = to_unit(images)
    count, size = len(x), x.shape[-1]
    side = torch.randint(8, 25, (2, count, 1), generator=generator)
    corner = torch.randint(0, size - 8, (2, count, 1), generator=generator)
    line = torch.arange(size)
    rows, columns = ((line >= corner[i]) & (line < corner[i] + side[i]) for i in range(2))
    hidden = rows[:, :, None] & columns[:, None, :] & (torch.rand(count, 1, 1, generator=generator) < 0.5)
    fill = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    x = torch.where(hidden[:, None], fill, x)
    return x * (0.9 + 0.2 * torch.rand(count, 3, 1, 1, generator=generator))


def train(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 900,
    weights: Path = WEIGHTS,
    log=print,
) -> RecognitionNet:
    """Build everything from a fixed seed under `out_dir`; returns the classifier."""
    started = time.time()
    torch.manual_seed(seed)
    say = lambda line: log(f"nano-judge: {line}, {time.time() - started:.0f} s")  # noqa: E731
    vq = load_tokenizer(weights / "nano-vq")
    renderings, class_ids = scenes.class_batch(np.random.default_rng(seed + 6), SCENES, balanced=True)
    renderings, class_ids = torch.from_numpy(renderings), torch.from_numpy(class_ids)
    pictures = torch.cat([renderings, decode(vq, encode(vq, renderings))])
    labels = torch.cat([class_ids, class_ids])
    unseen, unseen_ids = scenes.class_batch(np.random.default_rng(seed + 60_000), REFERENCES, balanced=True)
    reference = encode(vq, torch.from_numpy(unseen))
    unseen = decode(vq, reference)
    save_tokens(Path(out_dir), canonical_tokens(vq), reference, torch.from_numpy(unseen_ids))
    say(f"{SCENES} scenes to learn and {REFERENCES} reference scenes tokenised")
    network = RecognitionNet(**CONFIG["recogniser"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)

    def lesson(step: int) -> Tensor:
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        x = varied(pictures[rows], generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        return F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)

    def report(done: int, loss: float) -> None:
        right = accuracy(network, unseen, torch.from_numpy(unseen_ids))
        say(f"step {done}/{steps}, loss {loss:.3f}, {right:.1%} of unseen reconstructions recognised")

    fit(network, [optimizer], steps, lesson, report)
    save_network(out_dir, network, CONFIG)
    return network


def save_tokens(folder: Path, canonical: Tensor, reference: Tensor, classes: Tensor) -> None:
    """What the judge decodes instead of rendering."""
    kept = {
        "canonical": canonical,
        "reference": reference.to(torch.int16),
        "reference_classes": classes.to(torch.int16),
    }
    with atomic_path(folder / TOKENS_FILE) as temporary:
        save_file(kept, temporary)


@torch.inference_mode()
def accuracy(network: RecognitionNet, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 [B, 3, 64, 64] whose class is named."""
    found = torch.cat([network(to_unit(chunk)).argmax(1) for chunk in images.split(100)])
    return (found == labels).float().mean().item()


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-judge")
