"""The rewards on CLIP networks: clip, hpsv2, pickscore and aesthetic, and the steps of the first two.

The first three score how well an image fits its prompt by the cosine of their features in a network trained for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from argrpo_cli.rewards.base import Dtype, File, Needs, Reward, choose
from argrpo_cli.shapes import Condition
from argrpo_cli.system.files import HubFile

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.networks.clip import ClipModel

B32, L14, H14 = 151_277_313, 427_616_513, 986_109_441  # parameters of open_clip's networks
OPEN_CLIP_FILE = "open_clip_model.safetensors"
OPENAI_FILES = {  # of open_clip's models with OpenAI's weights, and their parameters
    "ViT-B-32": (HubFile("timm/vit_base_patch32_clip_224.openai", OPEN_CLIP_FILE, 4 * B32), B32),
    "ViT-L-14": (HubFile("timm/vit_large_patch14_clip_224.openai", OPEN_CLIP_FILE, 4 * L14), L14),
}


class ClipReward(Reward):
    """Cosine similarity of the unit features of image and prompt, in [-1, 1]."""

    low, high = -1.001, 1.001  # in half precision it passes 1 by a rounding
    unit = "cosine"
    clip: ClipModel

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.clip.cosine(images, [condition.prompt for condition in conditions])


class Clip(ClipReward):
    """CLIP's cosine similarity (Radford et al. 2021, section 2.3), without factor.

    The published code takes openai/clip-vit-base-patch32 and multiplies by 5 in training.

    Args:
        model: a model of open_clip (`ViT-L-14`, also `ViT-L/14`; `hf-hub:owner/name` for one in its layout on the
            hub), or, with a slash, a CLIP of transformers (`openai/clip-vit-large-patch14`) or a folder with one.
        pretrained: which of open_clip's weights; its activation (GELU or QuickGELU) follows the weights.
        weights: a local file in the place of the published one.
        dtype: float32, bfloat16 or float16, of the network.
    """

    name, factor, label = "clip", 5.0, "CLIP score"

    def __init__(
        self,
        device: str = "cpu",
        *,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str = "openai",
        weights: File = None,
        dtype: Dtype = "float32",
    ):
        import open_clip

        from argrpo_cli.networks.clip import HUB_PREFIX, load_open_clip, load_transformers_clip

        dashed = model.replace("/", "-")  # OpenAI's own names have a slash
        if dashed in open_clip.list_models():
            model = dashed
        if "/" in model and not model.startswith(HUB_PREFIX):
            self.clip = load_transformers_clip(model, weights, device, dtype)
        else:
            self.clip = load_open_clip(model, pretrained, weights, device, dtype)

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """The weights of OpenAI's two models; of others the file alone is known."""
        model = options.get("model", "ViT-B-32-quickgelu")
        known = model.replace("/", "-").removesuffix("-quickgelu")
        if known in OPENAI_FILES and options.get("pretrained", "openai") == "openai":
            file, parameters = OPENAI_FILES[known]
            return cls.network_needs(options, {"weights": file}, parameters, known)
        repo = model.removeprefix("hf-hub:")
        file = HubFile(repo, OPEN_CLIP_FILE if repo != model else "model.safetensors")
        return cls.network_needs(options, {"weights": file} if "/" in repo else {}, None, model)


class HPSv2(ClipReward):
    """Human Preference Score v2.0 and v2.1 (Wu et al. 2023, arXiv 2306.09341; repository tgxs002/HPSv2).

    A CLIP ViT-H-14 trained on which of two images people prefer for a prompt, in open_clip, whose names and shapes the
    published checkpoints have. The score is `hpsv2.score`'s, a cosine without logit scale or factor; the published code
    runs under float16 autocast and so rounds it to steps of 0.00024, float32 does not.

    Args:
        version: "2.1" or "2.0", which published checkpoint.
        weights: a local file in its place.
        dtype: float32, bfloat16 or float16, of the network.
    """

    name, factor, label = "hpsv2", 5.0, "HPSv2"
    architecture: ClassVar[str] = "ViT-H-14"
    checkpoints: ClassVar[dict[str, HubFile]] = {
        "2.1": HubFile("xswu/HPSv2", "HPS_v2.1_compressed.pt", 2 * H14),
        "2.0": HubFile("xswu/HPSv2", "HPS_v2_compressed.pt", 2 * H14),
    }

    def __init__(
        self, device: str = "cpu", *, version: str | float = "2.1", weights: File = None, dtype: Dtype = "float32"
    ):
        import open_clip

        from argrpo_cli.networks.clip import open_clip_from
        from argrpo_cli.networks.pixels import letterbox
        from argrpo_cli.networks.weights import published_file

        file = self.checkpoint(version)
        path = published_file(file.repo, file.file, weights)
        config = open_clip.get_model_config(self.architecture)
        prepare = partial(letterbox, size=config["vision_cfg"]["image_size"])
        self.clip = open_clip_from(config, path, prepare, device, dtype)

    @classmethod
    def checkpoint(cls, version: str | float) -> HubFile:
        """The published file of a version; UserError for one that there is not."""
        version = str(version)  # YAML reads 2.0 as a number
        choose(cls.name, "version", version, list(cls.checkpoints))
        return cls.checkpoints[version]

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """The checkpoint of the version."""
        file = cls.checkpoint(options.get("version", "2.1"))
        return cls.network_needs(options, {"weights": file}, H14, f"ViT-H-14 of {file.repo}")


def _tower(width: int, layers: int) -> dict[str, Any]:
    """transformers' configuration of one of ViT-H-14's two transformers."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}


class PickScore(ClipReward):
    """PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569; repository yuvalkirstain/PickScore).

    A CLIP ViT-H-14, in transformers' layout, trained on which of two images people picked for a prompt. The score is
    exp(logit scale) times the cosine, the logit that the published example computes; AR-GRPO's tables divide it by 26.

    Args:
        weights: a local file in the place of the published one.
        dtype: float32, bfloat16 or float16, of the network.
    """

    name, factor, label = "pickscore", 1 / 26, "PickScore"
    unit, divisor = "logit / 26", 26.0
    low, high = -math.inf, math.inf
    files: ClassVar = {"weights": HubFile("yuvalkirstain/PickScore_v1", "model.safetensors", 4 * H14)}
    parameters, network_name = H14, "ViT-H-14 of yuvalkirstain/PickScore_v1"
    config: ClassVar[dict[str, Any]] = {
        "projection_dim": 1024,
        "text_config": _tower(1024, layers=24),
        "vision_config": {**_tower(1280, layers=32), "patch_size": 14},
    }

    def __init__(self, device: str = "cpu", *, weights: File = None, dtype: Dtype = "float32"):
        from argrpo_cli.networks.clip import TRANSFORMERS_FILES, transformers_clip
        from argrpo_cli.networks.weights import published_file

        path = published_file(self.files["weights"].repo, TRANSFORMERS_FILES, weights)
        self.clip = transformers_clip(self.config, path, device, dtype)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        scale = self.clip.network.clip.logit_scale.float().exp()
        return scale * super().score(images, conditions)


class Aesthetic(Reward):
    """LAION's improved aesthetic predictor (repository christophschuhmann/improved-aesthetic-predictor).

    A stack of linear layers on CLIP ViT-L/14's image feature, trained on ratings from 1 to 10, without bounds.

    Args:
        weights: a local file of the predictor in the place of the published one.
        clip_weights: a local file of OpenAI's ViT-L/14 in open_clip's layout in the place of the published one.
        dtype: float32, bfloat16 or float16, of the CLIP network; the predictor computes in float32.
    """

    name, family, reads_prompt = "aesthetic", "quality", False
    label, unit = "Aesthetic", "1 to 10"
    # The first is a copy of the published file, which lies in the repository above, under its name there. SHA-256 of
    # the published one: 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0.
    files: ClassVar = {
        "weights": HubFile("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth", 4 * 925_425),
        "clip_weights": OPENAI_FILES["ViT-L-14"][0],
    }
    parameters, network_name = L14, "ViT-L-14 and the aesthetic predictor"
    model: ClassVar[tuple[str, str]] = ("ViT-L-14-quickgelu", "openai")

    def __init__(
        self, device: str = "cpu", *, weights: File = None, clip_weights: File = None, dtype: Dtype = "float32"
    ):
        from argrpo_cli.networks.clip import AestheticHead, load_open_clip, load_state

        self.head = AestheticHead()
        load_state(self.head, self.path("weights", weights))
        self.head.to(device).eval().requires_grad_(False)
        self.clip = load_open_clip(*self.model, clip_weights, device, dtype)

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B]; the conditions are not looked at."""
        return self.head(self.clip.image_features(images))


class Steps(Reward):
    """A score in steps, which leave less to exploit (appendix D); they replace the scaled score.

    Args:
        score: the score itself, where it is asked for too: one network and one pass serve both.
        mapping: to which steps, see `quantize`.
        options: those of the score.
    """

    low, high, factor = -1.0, 1.5, 1.0
    label, unit = "", ""
    basis: ClassVar[str] = ""

    def __init__(
        self,
        device: str = "cpu",
        score: ClipReward | None = None,
        /,  # none of the options, which come by keyword
        *,
        mapping: Literal["paper", "code"] = "paper",
        **options: Any,
    ):
        self.mapping = mapping
        if score is None:
            super().__init__(device, **options)
        else:
            self.clip = score.clip

    @classmethod
    def derived(cls, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The score and its options, without that of the steps."""
        return cls.basis, {key: value for key, value in options.items() if key != "mapping"}

    def score(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self.derive(super().score(images, conditions))

    def derive(self, scores: Tensor) -> Tensor:
        """The steps of scores."""
        steps = quantize(scores, self.mapping)
        if (steps.isnan() & ~scores.isnan()).any():
            self.last_error = "a score of 1 or more, for which there is no step"
        return steps


def quantize(scores: Tensor, mapping: str = "paper") -> Tensor:
    """The steps of raw float32 scores; NaN stays NaN.

    - "paper": 0.5 below 0.3, 1 from 0.3, 1.5 from 0.6. The paper gives the three values, the edges are the code's.
    - "code": the published code's, where a negative score gives -1. It fails at a score of 1 or more, which has no bin;
      here that score is missing (NaN).
    """
    steps = scores.new_full(scores.shape, 0.5).masked_fill(scores >= 0.3, 1.0).masked_fill(scores >= 0.6, 1.5)
    missing = scores.isnan()
    if mapping == "code":
        steps = steps.masked_fill(scores < 0, -1.0)
        missing = missing | (scores >= 1)
    return steps.masked_fill(missing, math.nan)


class ClipQuantized(Steps, Clip):
    """CLIP's score in steps."""

    name, basis = "clip-quantized", "clip"


class HPSv2Quantized(Steps, HPSv2):
    """HPSv2's score in steps."""

    name, basis = "hpsv2-quantized", "hpsv2"
