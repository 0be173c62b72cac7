"""ImageReward: the published checkpoint's keys, BLIP's arithmetic, and what the score depends on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from argrpo_cli.networks import blip
from argrpo_cli.networks.blip import TEXT, VISION, build_network, from_published
from argrpo_cli.networks.pixels import Preprocess
from argrpo_cli.networks.weights import fit_state
from argrpo_cli.rewards.imagereward import ImageReward
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.formula import formula_weights

KEYS = Path(__file__).parents[1] / "data" / "imagereward" / "keys.json"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "dog", "cat", "##s", "red", "."]
# Sizes of a small network; heads and epsilons stay the published ones.
SMALL = {1024: 32, 3072: 96, 768: 24, 4096: 48, 197: 5, 30524: len(WORDS), 512: 40, 128: 8, 64: 6, 16: 4, 256: 8}


def published_shapes() -> dict[str, list[int]]:
    """Key to shape of the published file; `{0..11}` in the data stands for layers."""
    shapes = {}
    for key, shape in json.loads(KEYS.read_text()).items():
        found = re.search(r"\{0\.\.(\d+)\}", key)
        for layer in range(int(found[1]) + 1 if found else 1):
            shapes[re.sub(r"\{.*\}", str(layer), key)] = shape
    return shapes


def small_state() -> dict[str, torch.Tensor]:
    """A published state dict of two layers a tower, by formula."""
    shapes = {}
    for key, shape in published_shapes().items():
        if re.search(r"\.(blocks|layer)\.(\d\d|[2-9])\.", key):
            continue
        if key == "blip.text_encoder.embeddings.position_ids":
            continue
        if "patch_embed.proj.weight" in key:
            shapes[key] = [32, 3, 16, 16]
        elif ".encoder.layer." in key and ("intermediate" in key or "output.dense.weight" in key) and 3072 in shape:
            shapes[key] = [48 if size == 3072 else SMALL[size] for size in shape]
        else:
            shapes[key] = [SMALL.get(size, size) for size in shape]
    state = formula_weights(shapes)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state


def small_network() -> blip.ImageRewardNetwork:
    vision = {**VISION, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 32}
    text = {**TEXT, "vocab_size": len(WORDS), "hidden_size": 24, "encoder_hidden_size": 32, "num_hidden_layers": 2}
    return build_network(vision, text | {"intermediate_size": 48, "max_position_embeddings": 40}, (32, 8, 6, 4, 1))


@pytest.fixture
def reward(tmp_path, monkeypatch) -> ImageReward:
    """The reward with a small network, from files as a user has them."""
    monkeypatch.setattr(blip, "build_network", small_network)
    torch.save(small_state(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return ImageReward(weights=tmp_path / "ImageReward.pt", vocabulary=tmp_path / "vocab.txt")


def test_every_published_key_is_used_or_ignored_and_every_parameter_filled():
    shapes = published_shapes()
    assert len(shapes) == 625
    converted = from_published({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    ours = build_network().state_dict()
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in ours.items()}
    ignored = {key for key in shapes if not from_published({key: torch.empty(0)})}
    assert ignored == {
        "blip.text_encoder.embeddings.position_ids",
        *(f"blip.{tower}_proj.{kind}" for tower in ("vision", "text") for kind in ("weight", "bias")),
    }
    assert sum(value.numel() for value in ours.values()) == 446_206_689


def test_unknown_and_missing_keys_are_told():
    state = small_state()
    state["blip.itm_head.weight"] = state.pop("blip.visual_encoder.blocks.1.attn.qkv.bias")
    with pytest.raises(UserError) as error:
        fit_state(small_network(), from_published(state), "ImageReward.pt")
    assert "missing vision.encoder.layers.1.self_attn.qkv.bias" in str(error.value)
    assert "unexpected blip.itm_head.weight" in str(error.value)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, epsilon):
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(q, k, v, heads):
    """One sequence each, [T, D]; heads one by one."""
    width = q.shape[-1] // heads
    out = []
    for one in (slice(i * width, (i + 1) * width) for i in range(heads)):
        out.append((q[:, one] @ k[:, one].T / width**0.5).softmax(-1) @ v[:, one])
    return torch.cat(out, -1)


def blip_reward(state: dict[str, torch.Tensor], pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """r of one image [3, H, W] and its tokens [T] without padding, from BLIP's description and the published keys."""
    see = "blip.visual_encoder"
    kernel = state[f"{see}.patch_embed.proj.weight"]
    patches = pixels.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 3 * 16 * 16)
    x = patches @ kernel.flatten(1).T + state[f"{see}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{see}.cls_token"][0], x]) + state[f"{see}.pos_embed"][0]
    for block in (f"{see}.blocks.{i}" for i in range(2)):
        q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attention(q, k, v, heads=16))
        h = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", h)
    image = norm(state, f"{see}.norm", x, 1e-6)

    read = "blip.text_encoder"
    t = state[f"{read}.embeddings.word_embeddings.weight"][tokens]
    t = t + state[f"{read}.embeddings.position_embeddings.weight"][: len(tokens)]
    t = norm(state, f"{read}.embeddings.LayerNorm", t, 1e-12)
    for layer in (f"{read}.encoder.layer.{i}" for i in range(2)):
        for kind, source in (("attention", None), ("crossattention", image)):
            source = t if source is None else source
            q = linear(state, f"{layer}.{kind}.self.query", t)
            k, v = (linear(state, f"{layer}.{kind}.self.{one}", source) for one in ("key", "value"))
            out = linear(state, f"{layer}.{kind}.output.dense", attention(q, k, v, heads=12))
            t = norm(state, f"{layer}.{kind}.output.LayerNorm", out + t, 1e-12)
        h = linear(state, f"{layer}.output.dense", F.gelu(linear(state, f"{layer}.intermediate.dense", t)))
        t = norm(state, f"{layer}.output.LayerNorm", h + t, 1e-12)
    r = t[0]
    for index in (0, 2, 4, 6, 7):
        r = linear(state, f"mlp.layers.{index}", r)
    return r[0]


def test_network_computes_blip_with_prompts_of_different_lengths():
    state = small_state()
    network = small_network()
    fit_state(network, from_published(state), "formula")
    network = network.double()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([[2, 4, 5, 6, 7, 3], [2, 8, 9, 3, 0, 0], [2, 3, 0, 0, 0, 0]])
    ours = network(pixels, tokens, (tokens != 0).long())
    exact = {key: value.double() for key, value in state.items()}
    expected = [blip_reward(exact, image, row[row != 0]) for image, row in zip(pixels, tokens, strict=True)]
    assert (ours - torch.stack(expected)).abs().max() < 1e-9
    assert ours.std() > 1e-3


def test_score_is_normalised_and_does_not_depend_on_the_batch(reward):
    images = torch.randint(0, 256, (3, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    conditions = [Condition("a photo of dogs"), Condition("a red cat. a red cat."), Condition("dog")]
    scores = reward.score(images, conditions)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    alone = [reward.score(images[i : i + 1], conditions[i : i + 1]).item() for i in range(3)]
    assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    pixels = Preprocess(32)(images).double()
    exact = {key: value.double() for key, value in small_state().items()}
    r = blip_reward(exact, pixels[0], torch.tensor([2, 4, 5, 6, 7, 9, 3]))
    assert scores[0].item() == pytest.approx((r.item() - 0.16717362830052426) / 1.0333394966054072, abs=1e-5)
    assert len(reward.score(images[:0], [])) == 0


def test_image_and_prompt_both_count(reward):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    first, other_image = reward.score(images, [Condition("dog")] * 2).tolist()
    other_prompt = reward.score(images[:1], [Condition("a red cat")]).item()
    assert abs(first - other_image) > 1e-4
    assert abs(first - other_prompt) > 1e-4


def test_prompts_are_cut_after_35_tokens(reward):
    image = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    scores = [reward.score(image, [Condition("dog " * 33 + tail)]).item() for tail in ("", "cat " * 50)]
    assert scores[0] == scores[1]
    assert reward.score(image, [Condition("dog " * 32 + "cat")]).item() != scores[0]


def test_what_the_user_can_mend_is_told(reward, tmp_path):
    reward.check([Condition("a dog")])
    with pytest.raises(UserError, match="image 2 of 2 has no prompt"):
        reward.check([Condition("a dog"), Condition(" ")])
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"other\.txt is not the vocabulary .*\[PAD\]"):
        ImageReward(weights=tmp_path / "ImageReward.pt", vocabulary=tmp_path / "other.txt")
    with pytest.raises(UserError, match=r"weights not found: .*none\.pt"):
        ImageReward(weights=tmp_path / "none.pt", vocabulary=tmp_path / "vocab.txt")
