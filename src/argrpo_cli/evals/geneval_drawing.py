"""Drawing GenEval's pictures: policies that read captions, batches that always come out the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from argrpo_cli.evals.geneval_folders import Picture
from argrpo_cli.nano import scenes
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import save_png
from argrpo_cli.system.processes import Team
from argrpo_cli.system.progress import shared_progress

if TYPE_CHECKING:
    from argrpo_cli.evals.geneval import GenEvalSettings


def open_captioned(path: str, device: str, dtype: str, text_device: str) -> Policy:
    """A policy that reads captions; UserError for another, or none."""
    policy = load_policy(path, device, dtype, text_device)
    if policy.text_encoder is None:
        raise UserError(f"{path} draws classes, and GenEval asks with captions; give a policy such as nano-t2i")
    return policy


def draws_nano_world(policy: Policy) -> bool:
    """Whether a policy of captions knows the nano world's objects and draws pictures of its size."""
    words = {word for name in scenes.CLASS_NAMES for word in name.split()}
    return policy.image_size == scenes.IMAGE_SIZE and words <= set(policy.text_encoder.words or ())


def draw_pictures(
    policy: Policy,
    settings: GenEvalSettings,
    pictures: Sequence[Picture],
    folder: Path,
    name: str,
    batch_size: int,
    team: Team,
) -> None:
    """The pictures that an earlier call did not leave. A batch of which one is missing is drawn whole: a picture comes
    out of the same batch whoever draws it and whenever, so that its bytes are always the same."""
    prompts = settings.prompts
    conditions = dict(zip(prompts, policy.conditions([prompt.text for prompt in prompts]), strict=True))
    places = {prompt: place for place, prompt in enumerate(prompts)}
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    missing = team.from_lead(lambda: [[one for one in batch if not (folder / one.file).is_file()] for batch in batches])
    mine = [pair for pair in zip(batches, missing, strict=True) if pair[1]][team.index :: team.count]

    def work() -> None:
        with shared_progress(team, f"drawing {name}", sum(len(wanted) for _, wanted in mine)) as advance:
            for batch, wanted in mine:
                tokens = policy.sample(
                    [conditions[one.prompt] for one in batch],
                    cfg_scale=settings.cfg_scale,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    seeds=[settings.image_seed(places[one.prompt], one.sample) for one in batch],
                    batch_size=len(batch),
                )
                for one, picture in zip(batch, policy.decode(tokens).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    if one in wanted:
                        save_png(folder / one.file, Image.fromarray(picture))
                advance(len(wanted))

    team.together(work)
