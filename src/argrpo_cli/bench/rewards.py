"""Rewards on batches against one image at a time, as the published code scores: `python -m argrpo_cli.bench rewards`.

The same networks in the same run, in turns. By default the bundled nano rewards; with `--full` CLIP ViT-B/32, HPSv2's
ViT-H-14 and MANIQA at their real size with random weights, written to a temporary folder and opened as published ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo_cli.bench import measure, parse
from argrpo_cli.rewards import RewardSet, load_rewards
from argrpo_cli.shapes import Condition

SMALL = ("nano-clip", "nano-quality", "nano-critic")
FULL = ("clip", "hpsv2", "maniqa")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a line for each reward and one for all."""
    more = [
        ("--full", {"action": "store_true", "help": "the paper's networks at their real size"}),
        ("--rewards", {"help": "only these, with commas between them"}),
    ]
    options = parse("rewards", __doc__, arguments, more, images=64, repeats=3)
    names = options.rewards.split(",") if options.rewards else list(FULL if options.full else SMALL)
    size = 256 if options.full else 64
    images = torch.randint(0, 256, (options.images, 3, size, size), dtype=torch.uint8)
    conditions = [Condition("a photo of a dog") for _ in range(options.images)]
    print(f"{options.images} images of {size} px, median of {options.repeats}")
    print(f"{'':16}{'one by one':>12}{'batched':>12}{'ratio':>9}")
    with tempfile.TemporaryDirectory() as folder:
        whole = load_rewards(names, options.device, {name: random_weights(name, Path(folder)) for name in names})
    for chosen in [[name] for name in names] + ([names] if len(names) > 1 else []):
        rewards = RewardSet({name: whole.rewards[name] for name in chosen}, options.device)
        jobs: dict[str, Callable[[], object]] = {
            "one": partial(one_by_one, rewards, images, conditions),
            "batch": partial(rewards.score, images, conditions),
        }
        rewards.score(images[:2], conditions[:2])  # text features and kernels, which both then have
        times = measure(jobs, options.repeats)
        cells = "".join(f"{options.images / times[job]:8.1f} /s " for job in ("one", "batch"))
        label = chosen[0] if len(chosen) == 1 else "all together"
        print(f"{label:16}{cells}{times['one'] / times['batch']:8.1f}x")


def one_by_one(rewards: RewardSet, images: Tensor, conditions: list[Condition]) -> None:
    """The published code's way: every reward on every image by itself."""
    for index in range(len(images)):
        rewards.score(images[index : index + 1], conditions[index : index + 1])


def random_weights(name: str, folder: Path) -> dict[str, Any]:
    """The option that opens a full-size reward with random weights; none for a bundled one."""
    if name not in FULL:
        return {}
    if name == "maniqa":
        from argrpo_cli.rewards.maniqa import build_network as build
    else:
        import open_clip

        from argrpo_cli.networks.clip import build_open_clip

        architecture = "ViT-H-14" if name == "hpsv2" else "ViT-B-32-quickgelu"
        build = partial(build_open_clip, open_clip.get_model_config(architecture))
    torch.save(build().state_dict(), folder / f"{name}.pt")
    return {"weights": str(folder / f"{name}.pt")}
