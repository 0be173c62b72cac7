"""Drawing images from a policy: the one loop of `sample`, every evaluation, a run's grids and the critic's training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argrpo_cli.kept import Pictures, kept
from argrpo_cli.system.processes import ALONE, Team

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.policy.protocol import Policy, Scored
    from argrpo_cli.shapes import Condition, Sampling, Shot


def draw_batch(
    policy: Policy, shots: Sequence[Shot], sampling: Sampling, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, T] and images uint8 [B, 3, S, S] of shots, in one batch; `size` as in `Policy.decode`."""
    encoded = policy.encode([shot.condition for shot in shots])
    tokens = policy.sample(encoded, sampling, [shot.seed for shot in shots]).tokens
    return tokens, policy.decode(tokens, size)


def draw_into(
    folder: Path,
    policy: Policy,
    shots: Sequence[Shot],
    sampling: Sampling,
    *,
    batch_size: int,
    label: str,
    team: Team = ALONE,
    size: int | None = None,
) -> int:
    """Draw the pictures that the folder lacks, and wait for the team's others; how many were there before.

    Raises:
        UserError: a folder that cannot be written, or weights that give no numbers.
    """
    return kept(
        shots,
        lambda batch: draw_batch(policy, batch, sampling, size)[1],
        Pictures(folder),
        batch_size=batch_size,
        label=label,
        team=team,
    )


@torch.inference_mode()
def score_tokens(policy: Policy, conditions: Sequence[Condition], tokens: Tensor, sampling: Sampling) -> Scored:
    """Log-probabilities and entropies [B, T] of given tokens [B, T] under `sampling`'s guidance and temperature."""
    return policy.model(policy.encode(conditions), tokens.to(policy.model.device), sampling, True)
