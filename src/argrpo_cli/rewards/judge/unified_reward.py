"""unified-reward: UnifiedReward-7b-v1.5 behind an OpenAI-compatible server, 1 to 5 for how well an image fits its
caption and how good it looks.

The question is the pointwise one for generated images of the model's card as far as it is known here; it has not been
run against the real model. As the published evaluation: 512 x 512 pixels, temperature 0, the number after
"Final Score:". The published code divides it by 5; here it is raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from argrpo_cli.rewards.judge.prompts import plain
from argrpo_cli.rewards.judge.replies import read_final_score
from argrpo_cli.rewards.judge.server import ServerReward, to_pil
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SIZE = (512, 512)  # pixels
QUESTION = """\
You are given a text caption and a generated image based on that caption. \
Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, \
color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: """


class UnifiedReward(ServerReward):
    """1 to 5 by UnifiedReward; options as those of `ServerReward`."""

    name, low, high, factor = "unified-reward", 1.0, 5.0, 1 / 5
    label, unit, divisor = "UnifiedReward", "score / 5, images at 512 pixels", 5.0
    published = "CodeGoat24/UnifiedReward-7b-v1.5"

    def check(self, conditions: Sequence[Condition]) -> None:
        """UserError where a prompt is empty, since there is nothing to hold the image against."""
        if any(not condition.prompt.strip() for condition in conditions):
            raise UserError("unified-reward: a prompt is empty; give every image a caption")

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] and B conditions to float32 [B] in 1 to 5; NaN where there was no score."""
        from PIL import Image

        pictures = [one.resize(SIZE, Image.Resampling.BICUBIC) for one in to_pil(images)]
        prompts = [("", question(condition.prompt)) for condition in conditions]
        return self.scores_of(self.ask_server(pictures, prompts, read_final_score))


def question(caption: str) -> str:
    """The question about an image of this caption: on one line, in square brackets as the model was trained."""
    return f"{QUESTION}[{' '.join(plain(caption).split())}]"
