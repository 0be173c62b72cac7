"""CLIP's answer about colours against the zero-shot classifier written out, on a tiny network of the same make."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from argrpo_cli.geneval import observers
from argrpo_cli.geneval.observers import MODEL, PRETRAINED, ClipColors
from argrpo_cli.geneval.prompts import COLORS
from argrpo_cli.networks.clip import ClipModel, Preprocess, build_open_clip, open_clip_config
from argrpo_cli.system.errors import UserError

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TOKENIZER = open_clip.SimpleTokenizer()
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    network = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)
    return ClipModel(network, TOKENIZER, Preprocess(size=32))


@pytest.fixture(scope="module")
def crops():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((40, 60), (90, 33), (5, 8), (32, 32), (1, 50))]


def one_by_one(network, name, crop):
    """The logits [10] of one crop, as GenEval has them of open_clip and clip_benchmark."""
    transform = open_clip.image_transform(
        32, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    with torch.no_grad():
        image = F.normalize(network.encode_image(transform(Image.fromarray(crop))[None])[0], dim=-1)
        logits = []
        for color in COLORS:
            texts = [
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            ]
            features = F.normalize(network.encode_text(TOKENIZER(texts)), dim=-1).mean(0)
            logits.append(100 * image @ (features / features.norm()))
    return torch.stack(logits)


def test_logits_are_those_of_every_crop_by_itself_whatever_the_classes_and_sizes(clip, crops):
    names = ["car", "dog", "car", "wine glass", "dog"]
    expected = torch.stack([one_by_one(clip.network, name, crop) for name, crop in zip(names, crops, strict=True)])
    colors = ClipColors(clip, batch_size=2)
    logits = colors.logits(names, crops)
    assert logits.shape == (5, 10) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert colors.classify(names, crops) == [COLORS[place] for place in expected.argmax(1)]


def test_no_crops_have_no_colours(clip):
    assert ClipColors(clip).classify([], []) == []


def test_the_texts_of_a_class_are_encoded_once(clip, crops, monkeypatch):
    colors, asked = ClipColors(clip), []
    features = clip.text_features
    monkeypatch.setattr(clip, "text_features", lambda texts: asked.append(len(texts)) or features(texts))
    colors.classify(["car", "car"], crops[:2])
    colors.classify(["car"], crops[:1])
    assert asked == [30]


def test_the_real_network_is_openais_with_its_own_activation():
    config, pixels = open_clip_config(MODEL, PRETRAINED)
    with torch.device("meta"):
        network = build_open_clip(config)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == 427_616_513
    assert shapes["visual.conv1.weight"] == (1024, 3, 14, 14) and shapes["visual.proj"] == (1024, 768)
    assert shapes["text_projection"] == (768, 768) and shapes["token_embedding.weight"] == (49408, 768)
    kinds = {type(module).__name__ for module in network.modules() if "GELU" in type(module).__name__}
    assert kinds == {"QuickGELU"}
    assert pixels["hf_hub"].startswith("timm/vit_large_patch14_clip_224.openai")
    assert pixels["interpolation"] == "bicubic" and pixels["resize_mode"] == "shortest"


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(observers, "load_mask2former", lambda *given: None)
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        observers.load_observer("mask2former", clip_weights=tmp_path / "nothing.safetensors")
