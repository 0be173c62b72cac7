"""What the CLIP rewards share: Pillow's pixels, remembered texts, strict weights."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from argrpo_cli.networks import clip as clip_model
from argrpo_cli.networks.clip import (
    ClipModel,
    build_open_clip,
    load_open_clip,
    load_state,
    open_clip_config,
    open_clip_from,
    tokenizer_of,
)
from argrpo_cli.networks.pixels import Preprocess, resize
from argrpo_cli.networks.weights import published_file, read_state
from argrpo_cli.system.errors import UserError
from tests.rewards.clips import CONFIG, PIXELS, patch_fetch, random_clip, register


def pictures(height: int, width: int, count: int = 2) -> torch.Tensor:
    """Noise over a gradient, with pure black and white: whatever rounding and clipping can meet."""
    generator = np.random.default_rng(height * 1000 + width)
    noise = generator.integers(0, 256, (count, 3, height, width))
    noise[..., : height // 3, : width // 3] = generator.integers(0, 2, (height // 3, width // 3)) * 255
    return torch.from_numpy(noise.astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("before", "after"), [((96, 96), (56, 56)), ((50, 81), (56, 90)), ((20, 20), (33, 33)), ((64, 99), (64, 30))]
)
def test_resize_is_pillows_bit_for_bit(before, after, interpolation):
    images = pictures(*before)
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    ours = resize(images, *after, interpolation)
    for image, mine in zip(images, ours, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(after[::-1], kernel)
        assert np.array_equal(np.asarray(theirs), mine.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(96, 96), (224, 224), (240, 224), (100, 257), (301, 230)])
def test_preprocessing_equals_open_clips_on_each_image(size):
    images = pictures(*size)
    ours = Preprocess()(images)
    theirs = open_clip.image_transform(224, is_train=False)
    for image, mine in zip(images, ours, strict=True):
        torch.testing.assert_close(mine, theirs(Image.fromarray(image.permute(1, 2, 0).numpy())), atol=1e-6, rtol=0)


def test_preprocessing_follows_the_configuration_of_the_weights():
    images = pictures(60, 60)
    known = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bilinear", "resize_mode": "squash"}
    theirs = open_clip.image_transform(32, is_train=False, **known)
    want = theirs(Image.fromarray(images[0].permute(1, 2, 0).numpy()))
    torch.testing.assert_close(Preprocess(32, **known)(images)[0], want, atol=1e-6, rtol=0)
    assert Preprocess(32, resize_mode="squash")(pictures(40, 80)).shape == (2, 3, 32, 32)


class Counting(nn.Module):
    """Features that name their input; counts the texts it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.texts: list[int] = []

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) @ self.weight

    def encode_text(self, tokens):
        self.texts += tokens[:, 0].tolist()
        return tokens.to(self.weight.dtype)


def lengths(texts):
    return torch.tensor([[len(text), 1, 2] for text in texts])


def test_each_prompt_is_encoded_once_and_in_its_own_place():
    network = Counting()
    clip = ClipModel(network, lengths, lambda images: images.float())
    first = clip.text_features(["a", "bb", "a", "ccc"])
    assert network.texts == [1, 2, 3]
    again = clip.text_features(["ccc", "a"])
    assert network.texts == [1, 2, 3]
    assert torch.equal(again, first[[3, 0]])
    torch.testing.assert_close(first[1], torch.tensor([2.0, 1.0, 2.0]) / 3)


def test_the_prompts_used_last_are_remembered(monkeypatch):
    monkeypatch.setattr(clip_model, "REMEMBERED", 2)
    network = Counting()
    clip = ClipModel(network, lengths, lambda images: images.float())
    assert clip.text_features(["a", "bb", "ccc"]).shape == (3, 3)
    clip.text_features(["bb"])  # now "ccc" is the older one
    clip.text_features(["dddd"])
    assert network.texts == [1, 2, 3, 4]
    clip.text_features(["bb"])
    assert network.texts == [1, 2, 3, 4]
    clip.text_features(["ccc"])
    assert network.texts == [1, 2, 3, 4, 3]


def test_cosine_pairs_images_with_their_prompts():
    clip = ClipModel(Counting(), lengths, lambda images: images.float())
    images = torch.tensor([[2, 1, 2], [1, 0, 0]], dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)
    scores = clip.cosine(images, ["bb", "ccc"])
    torch.testing.assert_close(scores, torch.tensor([1.0, 3 / 14**0.5]))
    assert clip.cosine(images[:0], []).shape == (0,)


def test_scores_are_float32_in_every_type_of_the_network():
    images, prompts = pictures(32, 32, 4), ["a cat", "two dogs", "a cat", ""]
    network, tokenizer = random_clip(), tokenizer_of(CONFIG["text_cfg"])
    exact = ClipModel(network, tokenizer, Preprocess(32)).cosine(images, prompts)
    for dtype in ("bfloat16", "float16"):
        near = ClipModel(network, tokenizer, Preprocess(32), dtype=dtype).cosine(images, prompts)
        assert near.dtype == torch.float32 and not torch.equal(near, exact)
        torch.testing.assert_close(near, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_openais_weights_get_quickgelu(model):
    config, _ = open_clip_config(model, "openai")
    with torch.device("meta"):
        network = build_open_clip(config)
    activations = {type(m).__name__ for m in network.modules() if "GELU" in type(m).__name__}
    assert activations == {"QuickGELU"}


def test_laions_weights_keep_gelu():
    config, _ = open_clip_config("ViT-B-32", "laion2b_s34b_b79k")
    with torch.device("meta"):
        network = build_open_clip(config)
    assert not any("QuickGELU" in type(m).__name__ for m in network.modules())


def test_unknown_models_and_tags_are_named():
    with pytest.raises(UserError, match=r"no model 'ViT-B-23'; did you mean 'ViT-B-32'"):
        open_clip_config("ViT-B-23", "openai")
    with pytest.raises(UserError, match=r"no weights 'opena' of ViT-B-32; there are openai.*did you mean 'openai'"):
        open_clip_config("ViT-B-32", "opena")
    with pytest.raises(UserError, match=r"no weights 'openai' of ViT-S-16; there are none"):
        open_clip_config("ViT-S-16", "openai")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "wrapped.pt"])
def test_weights_from_a_file_are_the_networks(tmp_path, monkeypatch, name):
    register(monkeypatch)
    network = random_clip()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    path = tmp_path / name
    if name == "weights.safetensors":
        save_file({key: value.contiguous().half() for key, value in state.items()}, path)
    else:
        state["logit_scale"] = state["logit_scale"].reshape(1)
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}} if "wrap" in name else state, path
        )
    clip = load_open_clip("tiny", "openai", path)
    for key, value in clip.network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value, network.state_dict()[key], atol=0 if name != "weights.safetensors" else 2e-3, rtol=0
        )
    assert not clip.network.training and not any(p.requires_grad for p in clip.network.parameters())


def test_published_weights_are_sought_under_the_names_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, file):
        asked.append((repo, file))
        if file != "open_clip_pytorch_model.bin":
            raise UserError("not there")
        return tmp_path / "weights.pt"

    torch.save(random_clip().state_dict(), tmp_path / "weights.pt")
    register(monkeypatch)
    patch_fetch(monkeypatch, fetch)
    load_open_clip("tiny", "openai")
    assert asked == [("someone/tiny", "open_clip_model.safetensors"), ("someone/tiny", "open_clip_pytorch_model.bin")]
    register(monkeypatch, tags={"openai": {**PIXELS, "hf_hub": "someone/tiny/other.bin"}})
    with pytest.raises(UserError, match="not there"):
        load_open_clip("tiny", "openai")
    assert asked[2:] == [("someone/tiny", "other.bin")]


def test_a_hub_repository_in_open_clips_layout(tmp_path, monkeypatch):
    import json

    whole = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    save_file(
        {k: v.contiguous() for k, v in random_clip().state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    patch_fetch(monkeypatch, lambda repo, file: tmp_path / file if repo == "me/mine" else None)
    clip = load_open_clip("hf-hub:me/mine", "openai")
    assert clip.prepare(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)).unique().tolist() == [1.0]


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = random_clip().state_dict()
    state["visual.proj"] = state["visual.proj"][:, :5]
    state["surprise"] = state.pop("ln_final.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        load_state(build_open_clip(CONFIG), tmp_path / "w.pt")
    told = str(caught.value)
    assert "missing ln_final.weight" in told and "unexpected surprise" in told and "\n" not in told
    assert "visual.proj is [32, 5], expected [32, 24]" in told


def test_files_that_hold_no_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"weights not found: .*nowhere"):
        published_file("a/b", ["c"], tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, said in (("text.pt", "not a readable"), ("text.safetensors", "not a readable"), ("list.pt", "no state")):
        with pytest.raises(UserError, match=said):
            read_state(tmp_path / name)


def test_no_code_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="not a readable"):
        read_state(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_network_filled_from_a_file_keeps_what_is_computed(tmp_path):
    torch.save(random_clip().state_dict(), tmp_path / "w.pt")
    network = open_clip_from(CONFIG, tmp_path / "w.pt", Preprocess(32), "cpu", "float32").network
    assert torch.equal(network.attn_mask, build_open_clip(CONFIG).attn_mask)
    tokens = tokenizer_of(CONFIG["text_cfg"])(["a cat"])
    assert torch.equal(network.encode_text(tokens), random_clip().encode_text(tokens))
