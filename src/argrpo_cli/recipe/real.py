"""The sections of the methods that learn from real images, and of these."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from argrpo_cli.recipe.sections import Amount, Name, NonNegative, OptimSection, Positive, Probability, Section


class RealSection(Section):
    """Real images, of which the methods pixel and cca learn; each is tokenised once. No other method looks at them."""

    # nano: rendered scenes of the nano world. Or a folder of pictures: in class folders, with a metadata.jsonl or a
    # file of labels, or with captions (a .txt of the same name beside each, or `captions`). Or the .tar files of a
    # webdataset, as a pattern (shards/*.tar) or their folder. Or an .npz of codes: `codes` [N, T] with `class_ids` or
    # `prompts` [N].
    path: Name = "nano"
    captions: Name | None = None  # file of captions for the pictures of a folder: rows with `file`, or in their order
    column: Name = "caption"  # of the captions, or class ids, in the .json files of a webdataset
    limit: Amount | None = None  # images taken, of all classes alike; null: all there are, of nano 10,000


class CcaSection(OptimSection):
    """Guidance put into the weights by contrast: condition contrastive alignment (arXiv 2410.09347) on real images x
    with their condition c and that of another image, c':

        L = - log sigma(beta D(x|c)) - lambda log sigma(- beta D(x|c')),   D = log pi(x|.) - log pi_base(x|.)
    """

    group_size: ClassVar[int] = 1
    updates_per_batch: ClassVar[int] = 1

    batch_size: Amount = 256  # images per update, of all processes together; c' is the condition of the next of them
    learning_rate: Positive = 1e-5  # of AdamW
    beta: Positive = 0.02  # of D, which is summed over an image's tokens
    lmbda: NonNegative = 300.0  # weight of the second term; the paper has 300 to 1,000 by the size of the policy
    # How often an image has no condition on both sides. It then counts as its own positive twice, with weight 1, as
    # does one whose c' is c.
    condition_dropout: Probability = 0.1


class PixelSection(OptimSection):
    """VA-pi (arXiv 2512.19680): pixels without rollouts. Of the codes of a real image a share is replaced; in one pass
    along them every token is drawn several times, and each draw y is decoded and compared with the image x:

        r = - (mse_weight MSE(y, x) + perceptual_weight d(y, x)),   A = (r - mean r) / std r among the draws of x
        L = - mean A log pi(y_t | noisy x_<t) - cross_entropy_weight mean log pi(x_t | noisy x_<t)

    where the first gradient is GRPO's: each batch is used once, so that ratios are 1 and nothing is clipped.
    """

    group_size: ClassVar[int] = 1  # what is drawn of an image stays with it
    updates_per_batch: ClassVar[int] = 1

    batch_size: Amount = 128  # real images per update, of all processes together
    learning_rate: Positive = 1e-6  # of AdamW
    samples: Annotated[int, Field(ge=2)] = 8  # of each image, compared with each other
    noise: Probability = 0.5  # share of the codes that are replaced by random ones in what the policy reads
    mse_weight: NonNegative = 1.0  # of pixels in [-1, 1]
    perceptual_weight: NonNegative = 1.0
    # d: LPIPS (VGG16, fetched), or for 64 pixels a distance of features of nano-quality (of captions nano-quality-t2i).
    perceptual: Literal["lpips", "nano"] = "lpips"
    perceptual_folder: Name | None = None  # of the two files that LPIPS is read from, in the place of the hub
    cross_entropy_weight: NonNegative = 0.1

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> PixelSection:
        if not self.mse_weight and not self.perceptual_weight:
            raise ValueError("mse_weight and perceptual_weight are both 0: no draw is better than another; raise one")
        return self
