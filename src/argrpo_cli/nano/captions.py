"""Captions of the nano world to train on: its grammar without the prompts that the benchmark asks."""

from __future__ import annotations

import numpy as np

from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.nano.scenes import CATEGORIES, caption_scene

DRAWN_PER_CATEGORY, SEED = 250, 7


def training_captions(drawn: int = DRAWN_PER_CATEGORY, seed: int = SEED) -> list[str]:
    """Distinct captions in a fixed order, `drawn` draws of each category; none is one of GenEval's.

    The small categories run out: there are only 24 captions of a single object.
    """
    asked = {prompt.text for name in ("geneval", "geneval-nano-extra") for prompt in prompt_set(name)}
    rng = np.random.default_rng(seed)
    captions = [caption_scene(rng, tag).caption for _ in range(drawn) for tag in CATEGORIES]
    return [caption for caption in dict.fromkeys(captions) if caption not in asked]
