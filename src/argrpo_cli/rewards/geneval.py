"""geneval, a task reward: does a detector find what the prompt asks for?

The paper names task rewards as the way forward; this one is GenEval's own logic in the form that serves as a reward
(`geneval.rules.reward_score`, the published reward server's), for the prompts that GenEval's templates make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from argrpo_cli.geneval.prompts import parse_prompt
from argrpo_cli.geneval.rules import reward_score
from argrpo_cli.rewards.base import File, Needs, Reward
from argrpo_cli.rewards.clip import L14, OPENAI_FILES
from argrpo_cli.shapes import Condition
from argrpo_cli.system.files import HubFile

if TYPE_CHECKING:
    from torch import Tensor

REPO, PARAMETERS = "facebook/mask2former-swin-small-coco-instance", 68_741_083


class GenEval(Reward):
    """The share of what a prompt asks for that is there, at most 1.

    As the published server counts: an object too many costs, too (so the score is negative where more than twice the
    count is found), and a relation that fails costs a quarter.

    Args:
        detector: `mask2former`, with CLIP for colours, the benchmark's own; `nano`, the bundled one of the nano world.
        strict: 1 where all is right and no object of these classes too many, else 0.
        weights: a local folder of the detector in the place of the published or bundled one, or the benchmark's own
            .pth file.
        clip_weights: a local file of OpenAI's ViT-L/14 in open_clip's layout in the place of the published one.
    """

    name = "geneval"
    files: ClassVar = {
        "weights": HubFile(REPO, "model.safetensors", 4 * PARAMETERS),
        "clip_weights": OPENAI_FILES["ViT-L-14"][0],
    }
    parameters, network_name = PARAMETERS + L14, "Mask2Former Swin-S and ViT-L-14"

    def __init__(
        self,
        device: str = "cpu",
        *,
        detector: Literal["mask2former", "nano"] = "mask2former",
        strict: bool = False,
        weights: File = None,
        clip_weights: File = None,
    ):
        from argrpo_cli.geneval.observers import load_observer

        self.device, self.strict = device, strict
        self.observer = load_observer(detector, device, weights, clip_weights)
        self.parse = cache(parse_prompt)

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """The detector and the CLIP that names colours; the nano world's are bundled."""
        if options.get("detector") == "nano":
            return Needs()
        config = () if options.get("weights") is not None else (HubFile(REPO, "config.json"),)
        needs = super().needs(options, device)
        return needs._replace(files=config + needs.files)

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise UserError for a prompt that GenEval's templates do not make."""
        for condition in conditions:
            self.parse(condition.prompt)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        import torch

        prompts = [self.parse(condition.prompt) for condition in conditions]
        seen = zip(prompts, self.observer.observe(images, prompts), strict=True)
        rewards = [reward_score(prompt, *both, self.observer.thresholds) for prompt, both in seen]
        scores = [strict if self.strict else score for score, strict in rewards]
        return torch.tensor(scores, dtype=torch.float32, device=self.device)
