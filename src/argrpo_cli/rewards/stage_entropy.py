"""stage-entropy: STAGE's reward for the entropy that the reference has (Ma et al. 2025, arXiv 2509.25027).

The best image of a group, and every other with the same total of the other rewards, has 1 / (1 + (H_ref - H)^2); the
others have 0. H is the entropy of the trained distribution, in nats, averaged over the image's tokens; H_ref is that of
the reference of the KL term on the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from argrpo_cli.rewards.base import Reward
from argrpo_cli.shapes import Condition

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.recipe import Recipe


class StageEntropy(Reward):
    """How near the entropy of a group's best image is to the reference's, 0 to 1; 0 for the others.

    The authors weigh it 0.4. It costs two forward passes over the images of an update.
    """

    name, family, scope, reads_prompt, reads_policy = "stage-entropy", "quality", "group", False, True
    low, high = 0.0, 1.0
    last_error = "it reads the policy that `argrpo train` trains, and no images"

    def __init__(self, device: str = "cpu"):
        """Nothing is loaded."""

    @classmethod
    def unfit(cls, options: Mapping[str, Any], recipe: Recipe) -> str:
        """It needs a reference, and the images of the update as they are."""
        grpo = recipe.grpo
        if recipe.selects:
            key = "dynamic_sampling" if grpo.dynamic_sampling else "spread_floor"
            return f"entropies are those of the update's images, and grpo.{key} chooses by scores before; leave it out"
        if not max(grpo.beta, grpo.beta_end or 0) and recipe.policy.lora is None:
            return "it compares with the reference, and without a KL term there is none; set grpo.beta above 0"
        return ""

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """H, H_ref and the total of the other rewards of each image, [N, 3], to float32 [N]."""
        import torch

        entropy, reference, total = seen.double().unbind(1)
        best = total == total.nan_to_num(-torch.inf).max()
        return torch.where(best, 1 / (1 + (reference - entropy).square()), 0).float()
