"""A caption policy of the nano world with random weights: the real tokenizers and words, and nothing learnt.

`replayed` lets it draw held-out scenes instead, some of which show what is asked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from argrpo_cli.nano.make import policies
from argrpo_cli.nano.tokens import load_held_out
from argrpo_cli.policy import Policy
from argrpo_cli.policy.protocol import Drawn


def save_captioned_policy(folder: Path, seed: int = 0) -> Path:
    """A policy folder that brings its text encoder (as `nano-t5` beside it, copied in)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = policies.text_tokenizer()
        both = policies.CaptionedPolicy(words, codes=1024, tokens=64)
        torch.nn.init.normal_(both.policy.lm_head.weight, std=0.05)
    policies.save_captioned(both, words, folder)
    card = folder / "policy.json"
    card.write_text(card.read_text().replace('"nano-t5"', '"text"'))
    folder.with_name("nano-t5").rename(folder / "text")
    return folder


def replayed(self: Policy, conditions, sampling, seeds, **rest) -> Drawn:
    """Stands for `Policy.sample`: a held-out scene of the same caption where there is one, else any scene."""
    tokens, scenes = load_held_out("captions")
    places: dict[str, list[int]] = {}
    for place, scene in enumerate(scenes):
        places.setdefault(scene.prompt, []).append(place)
    chosen = []
    for one, seed in zip(conditions, seeds, strict=True):
        number = int(hashlib.sha256(f"{one.prompt}{seed}{len(self.base)}".encode()).hexdigest(), 16)
        own = places.get(one.prompt, range(len(scenes))) if number % 3 else range(len(scenes))
        chosen.append(own[number % len(own)])
    return Drawn(tokens[chosen], None)


def as_they_are(self: Policy, conditions, dropped=None):
    """Stands for `Policy.encode` beside it."""
    return list(conditions)
