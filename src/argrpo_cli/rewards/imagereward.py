"""ImageReward v1.0 (Xu et al., NeurIPS 2023, arXiv 2304.05977): how much people would prefer an image for a prompt.

The network is `networks/blip.py`; the score is (r - mean) / std, with the constants of the published code
(github.com/THUDM/ImageReward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from argrpo_cli.rewards.base import File, Reward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import HubFile

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS = 446_206_689
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of r over the published training set
MAX_TOKENS = 35


class ImageReward(Reward):
    """Human preference, about -2 to 2 (mean 0, standard deviation 1 over the published training set); larger is better.

    Prompts are cut after 35 word pieces, as published.

    Args:
        weights: a local ImageReward.pt; otherwise it is fetched.
        vocabulary: a local vocab.txt of bert-base-uncased; otherwise it is fetched.
    """

    name, label, unit = "imagereward", "ImageReward", "standardised"
    files: ClassVar = {
        "weights": HubFile("THUDM/ImageReward", "ImageReward.pt", 4 * PARAMETERS),
        "vocabulary": HubFile("google-bert/bert-base-uncased", "vocab.txt", 231_508),
    }
    parameters, network_name = PARAMETERS, "BLIP of ImageReward"

    def __init__(self, device: str = "cpu", *, weights: File = None, vocabulary: File = None):
        from argrpo_cli.networks import blip
        from argrpo_cli.networks.pixels import Preprocess
        from argrpo_cli.networks.weights import fit_state, read_state

        self.tokenizer = blip.load_tokenizer(self.path("vocabulary", vocabulary))
        path = self.path("weights", weights)
        network = blip.build_network()
        fit_state(network, blip.from_published(read_state(path)), path)
        self.network = network.to(device)
        self.prepare = Preprocess(self.network.vision.config.image_size)
        self.device = device

    def check(self, conditions: Sequence[Condition]) -> None:
        """UserError when a prompt is empty."""
        for number, condition in enumerate(conditions, start=1):
            if not condition.prompt.strip():
                raise UserError(f"imagereward: image {number} of {len(conditions)} has no prompt; give it one")

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        if not len(images):
            return images.new_zeros(0, device=self.device).float()
        prompts = [condition.prompt for condition in conditions]
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        pixels = self.prepare(images.to(self.device))
        raw = self.network(pixels, text["input_ids"].to(self.device), text["attention_mask"].to(self.device))
        return (raw - MEAN) / STD
