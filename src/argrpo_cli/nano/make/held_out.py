"""Held-out scenes of the nano world as tokens, so that measuring on them needs no font: the split `val`.

python -m argrpo_cli.nano.make.held_out [OUT_DIR]        builds them
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from argrpo_cli.nano import scenes
from argrpo_cli.nano.tokens import CAPTIONS_FILE, TOKENS_FILE, encode, load_tokenizer
from argrpo_cli.system.files import WEIGHTS, atomic_path, write_jsonl

SCENES = 1008  # of each task


def train(out_dir: str | Path, seed: int = 0, weights: Path = WEIGHTS, log=print) -> None:
    """Render, tokenise and save both tasks' scenes; nothing is learnt (the name is that of the other builders)."""
    vq = load_tokenizer(weights / "nano-vq")
    images, ids = scenes.class_batch(np.random.default_rng(seed + 80_000), SCENES)
    captioned, made = scenes.caption_batch(np.random.default_rng(seed + 80_001), SCENES)
    kept = {
        "classes": encode(vq, torch.from_numpy(images)).to(torch.int16),
        "class_ids": torch.from_numpy(ids).to(torch.int16),
        "captions": encode(vq, torch.from_numpy(captioned)).to(torch.int16),
    }
    out_dir = Path(out_dir)
    write_jsonl(out_dir / CAPTIONS_FILE, [{"prompt": scene.caption} for scene in made])
    with atomic_path(out_dir / TOKENS_FILE) as temporary:
        save_file(kept, temporary)
    log(f"nano-val: {SCENES} scenes of each task tokenised")


if __name__ == "__main__":
    from argrpo_cli.nano.make.training import trainer_cli

    trainer_cli(train, "nano-val")
