"""Held-out scenes of the nano world as tokens, so that measuring on them needs no font: the split `val`.

python -m argrpo_cli.nano.make.held_out [OUT_DIR]        builds them
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from argrpo_cli.nano import WEIGHTS, scenes
from argrpo_cli.shapes import Condition, class_prompt
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import atomic_path, read_jsonl, write_jsonl

SCENES = 1008  # of each task
TOKENS_FILE, CAPTIONS_FILE = "tokens.safetensors", "captions.jsonl"


def load_held_out(task: str, folder: Path = WEIGHTS / "nano-val") -> tuple[Tensor, list[Condition]]:
    """Tokens int64 [N, T] and conditions of the scenes of a task, "classes" or "captions", in random order.

    Raises:
        UserError: the files are missing.
    """
    if not (folder / TOKENS_FILE).is_file():
        raise UserError(f"held-out scenes not found: {folder}; install the package again or run `make nano`")
    kept = load_file(folder / TOKENS_FILE)
    if task == "classes":
        ids = kept["class_ids"].tolist()
        return kept["classes"].long(), [Condition(class_prompt(scenes.CLASS_NAMES[i]), i) for i in ids]
    return kept["captions"].long(), [Condition(row["prompt"]) for row in read_jsonl(folder / CAPTIONS_FILE)]


def train(out_dir: str | Path, seed: int = 0, weights: Path = WEIGHTS, log=print) -> None:
    """Render, tokenise and save both tasks' scenes; nothing is learnt (the name is that of the other builders)."""
    from argrpo_cli.nano.make.corrupt import encode
    from argrpo_cli.nano.make.study import load_tokenizer

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
