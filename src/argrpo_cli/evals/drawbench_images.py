"""The pictures of DrawBench: every prompt several times, each with a seed of its own, in a folder for `argrpo score`.

A batch of which a picture is missing is drawn whole, so that a picture always comes out of the same batch and its
bytes do not depend on interruptions. metadata.jsonl is written last: its presence means the folder is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from argrpo_cli.images import METADATA
from argrpo_cli.policy import Policy
from argrpo_cli.sample import file_name
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, save_png, write_jsonl
from argrpo_cli.system.processes import ALONE, Team
from argrpo_cli.system.progress import shared_progress

# Away from the seeds of training and the other benchmarks. Prompts share no seed: with five seeds in all, what these
# have in common would be part of every mean, and an error clustered by prompt would not see it.
FIRST_SEED, SEED_STRIDE, MOST_SEEDS = 1_500_000_000, 100_000, 5_000


@dataclass(frozen=True)
class Drawing:
    """What is drawn of each prompt; the defaults are the paper's."""

    per_prompt: int = 5
    cfg_scale: float = 2.0
    temperature: float = 1.0
    seed: int = 0
    dtype: str = "float32"

    def check(self, prompts: int) -> None:
        """Raise UserError for a number out of range."""
        most = SEED_STRIDE // prompts
        if not 1 <= self.per_prompt <= most:
            raise UserError(f"--n {self.per_prompt}: give 1 to {most} images of each of {prompts} prompts")
        if not 0 <= self.seed < MOST_SEEDS:
            raise UserError(f"--seed {self.seed}: give 0 to {MOST_SEEDS - 1}")

    def image_seed(self, index: int) -> int:
        """Seed of the image `index`, counted prompt by prompt."""
        return FIRST_SEED + self.seed * SEED_STRIDE + index


def draw(
    policy: Policy,
    name: str,
    prompts: Sequence[str],
    drawing: Drawing,
    folder: Path,
    batch_size: int,
    team: Team = ALONE,
) -> None:
    """Draw what is missing in `folder`, a team its batches in turn; `name` is that of the policy.

    Raises:
        UserError: a prompt that the policy cannot read, a folder that cannot be written.
    """
    conditions = policy.conditions(list(prompts))
    count = len(prompts) * drawing.per_prompt
    files = [
        file_name(index // drawing.per_prompt, prompts[index // drawing.per_prompt], index % drawing.per_prompt)
        for index in range(count)
    ]
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]

    def look() -> list[range]:
        make_dir(folder)
        return [batch for batch in batches if not all((folder / files[index]).is_file() for index in batch)]

    unfinished = team.from_lead(look)
    mine = unfinished[team.index :: team.count]

    def work() -> None:
        with shared_progress(team, f"drawing {name}", sum(map(len, mine))) as advance:
            for batch in mine:
                _draw_batch(policy, [conditions[i // drawing.per_prompt] for i in batch], drawing, batch, files, folder)
                advance(len(batch))

    team.together(work)
    sampling = {"cfg_scale": drawing.cfg_scale, "temperature": drawing.temperature, "dtype": drawing.dtype}
    rows = [
        {
            "file": file,
            "prompt": prompts[index // drawing.per_prompt],
            "seed": drawing.image_seed(index),
            "policy": name,
            **sampling,
        }
        for index, file in enumerate(files)
    ]
    if unfinished or not (folder / METADATA).is_file():
        team.lead(lambda: write_jsonl(folder / METADATA, rows))


def _draw_batch(policy, conditions, drawing: Drawing, batch: range, files: Sequence[str], folder: Path) -> None:
    from PIL import Image

    tokens = policy.sample(
        conditions,
        cfg_scale=drawing.cfg_scale,
        temperature=drawing.temperature,
        seeds=[drawing.image_seed(index) for index in batch],
        batch_size=len(batch),
    )
    pixels = policy.decode(tokens).permute(0, 2, 3, 1).cpu().numpy()
    for index, array in zip(batch, pixels, strict=True):
        if not (folder / files[index]).is_file():
            save_png(folder / files[index], Image.fromarray(array))
