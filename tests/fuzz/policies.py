"""Policy folders with a damaged file: refused, or a policy that draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import glance
from argrpo_cli.shapes import Sampling
from tests.fuzz.mutate import Damage, damaged_file
from tests.policy.test_var_training import tiny_var
from tests.policy.tiny_janus import tiny_janus
from tests.training.tiny import tiny_caption_policy, tiny_policy

SETTINGS = (".json",)
FAMILIES = {"classes": tiny_policy, "captions": tiny_caption_policy, "var": tiny_var, "janus": tiny_janus}


def seeds(folder: Path) -> list[Path]:
    """A policy of classes, one of captions with its text encoder, one of each other family, and a file of weights."""
    for name, make in FAMILIES.items():
        if not (folder / name / "policy.json").is_file():
            make().save(folder / name)
    torch.save(
        {"model": {key: torch.ones(2, 3) for key in ("output.weight", "tok_embeddings.weight")}}, folder / "c2i.pt"
    )
    return [*(folder / name for name in FAMILIES), folder / "c2i.pt"]


def case(seeds: list[Path], rng: Damage, folder: Path) -> str:
    """Glanced at, opened and drawn from."""
    *folders, file = seeds
    source = rng.choice(folders if rng.none else (*folders * 4, file))
    path = folder / source.name
    if source.is_file():
        shutil.copy(source, path)
        damaged_file(path, rng)
        load_policy(path)
        return "opened"
    shutil.copytree(source, path)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    small = [one for one in files if one.suffix in SETTINGS]
    damaged_file(rng.choice(small if rng.random() < 0.75 else files), rng)
    seen = glance(path)
    policy = load_policy(path)
    assert seen is not None and (seen.reads, tuple(seen.names)) == (policy.card.reads, policy.card.names), (
        "another at a glance"
    )
    ask = [0] if policy.card.reads == "classes" else ["a red dog"]
    drawn = policy.sample(policy.encode(policy.conditions(ask)), Sampling(**policy.sampling), [5])
    assert drawn.tokens.shape == (1, policy.card.tokens), "another number of tokens"
    images = policy.decode(drawn.tokens)
    size = policy.card.image_size
    assert images.shape == (1, 3, size, size) and images.dtype == torch.uint8, "no image of its size"
    return "drawn"
