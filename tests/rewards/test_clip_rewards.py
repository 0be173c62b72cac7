"""clip, aesthetic and pickscore with small networks, and their real architectures."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from argrpo_cli.networks import clip as clip_model
from argrpo_cli.networks.clip import (
    AestheticHead,
    ClipModel,
    TransformersClip,
    build_open_clip,
    load_state,
    open_clip_config,
    tokenizer_of,
    transformers_tokenizer,
)
from argrpo_cli.networks.pixels import Preprocess
from argrpo_cli.rewards.clip import Aesthetic, Clip, PickScore
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.rewards.clips import CONFIG, patch_fetch, random_clip, register, to_transformers, transformers_config

PROMPTS = ["a photo of a dog", "two red cars", "a photo of a dog", "very " * 100 + "long"]
CONDITIONS = [Condition(prompt, 3) for prompt in PROMPTS]
IMAGES = torch.randint(0, 256, (4, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected(network: torch.nn.Module) -> torch.Tensor:
    """Cosine similarity, spelled out."""
    tokens = tokenizer_of(CONFIG["text_cfg"])(PROMPTS)
    image = network.encode_image(Preprocess(32)(IMAGES))
    return F.cosine_similarity(image, network.encode_text(tokens)).detach()


@pytest.fixture
def folder(tmp_path):
    """A CLIP with QuickGELU as transformers keeps it, and the same network of open_clip."""
    network = random_clip({**CONFIG, "quick_gelu": True})
    state = to_transformers(network.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # older files have it
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(CONFIG, "quick_gelu")))
    return tmp_path, network


def test_clip_is_the_cosine_similarity(tmp_path, monkeypatch):
    register(monkeypatch)
    network = random_clip()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    scores = Clip(model="tiny", weights=tmp_path / "w.pt").score(IMAGES, CONDITIONS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, expected(network), atol=1e-6, rtol=0)
    assert scores.std() > 0.01


def test_a_clip_of_transformers_gives_open_clips_scores(folder):
    path, network = folder
    scores = Clip(model=str(path)).score(IMAGES, CONDITIONS)
    torch.testing.assert_close(scores, expected(network), atol=1e-6, rtol=0)
    assert (scores - expected(random_clip())).abs().max() > 1e-4  # plain GELU is another network


def test_a_clip_of_the_hub_is_fetched_file_by_file(folder, monkeypatch):
    asked = []
    patch_fetch(monkeypatch, lambda repo, file: asked.append((repo, file)) or folder[0] / file)
    scores = Clip(model="openai/clip-vit-large-patch14").score(IMAGES, CONDITIONS)
    torch.testing.assert_close(scores, expected(folder[1]), atol=1e-6, rtol=0)
    name = "openai/clip-vit-large-patch14"
    assert asked == [(name, "config.json"), (name, "model.safetensors")]


def test_texts_are_cut_into_the_tokens_of_transformers():
    from transformers import CLIPTokenizer

    ours = transformers_tokenizer(77)
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(word, word): index for word, index in ours.encoder.items()}
    theirs = CLIPTokenizer(vocab=vocabulary, merges=list(ours.bpe_ranks))
    texts = [
        *PROMPTS,
        "",
        "It's a dog's “café”,  NAÏVE; 100% &amp; fine!\n",
        "日本の山の写真",
        "I don’t KNOW…",
        "e\u0301",
    ]
    for text, tokens in zip(texts, ours(texts).tolist(), strict=True):
        assert (
            tokens[: tokens.index(ours.eot_token_id) + 1] == theirs(text, truncation=True, max_length=77)["input_ids"]
        )


def test_another_kind_of_model_is_refused(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(UserError, match="is a 'siglip' model; expected 'clip'"):
        Clip(model=str(path))
    config["text_config"]["vocab_size"] = 1000
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"token_embedding.weight is \[49408, 16\], expected \[1000, 16\]"):
        Clip(model=str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        Clip(model=str(path))


def test_openais_own_names_are_open_clips(monkeypatch):
    asked = []
    patch_fetch(monkeypatch, lambda repo, file: asked.append(repo) or _stop())
    for model in ("ViT-B/32", "ViT-L-14", "ViT-B-32-quickgelu"):
        with pytest.raises(KeyboardInterrupt):
            Clip(model=model)
    assert asked == [f"timm/vit_{size}_clip_224.openai" for size in ("base_patch32", "large_patch14", "base_patch32")]


def _stop():
    raise KeyboardInterrupt


def test_vit_b_32_runs_at_its_real_size():
    config, _ = open_clip_config("ViT-B-32-quickgelu", "openai")
    network = build_open_clip(config)
    assert sum(p.numel() for p in network.parameters()) == 151_277_313
    clip = ClipModel(network, tokenizer_of(config["text_cfg"]), Preprocess(224))
    scores = clip.cosine(IMAGES, PROMPTS)
    assert scores.isfinite().all() and scores.abs().max() <= 1
    assert clip.text_features(PROMPTS).shape == (4, 512)


def test_aesthetic_is_a_chain_of_linear_layers(tmp_path, monkeypatch):
    config = {**CONFIG, "embed_dim": 768}
    register(monkeypatch, config=config)
    monkeypatch.setattr(Aesthetic, "model", ("tiny", "openai"))
    network, head = random_clip(config), AestheticHead()
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = Aesthetic(weights=tmp_path / "head.pth", clip_weights=tmp_path / "clip.pt")
    scores = reward.score(IMAGES, CONDITIONS)
    assert scores.shape == (4,) and scores.dtype == torch.float32
    x = F.normalize(network.encode_image(Preprocess(32)(IMAGES)), dim=-1)
    state = head.state_dict()
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    torch.testing.assert_close(scores, x[:, 0].detach(), atol=1e-6, rtol=0)
    assert torch.equal(reward.score(IMAGES, CONDITIONS), scores)  # dropout is off


def test_the_aesthetic_head_has_the_published_names():
    shapes = {key: tuple(value.shape) for key, value in AestheticHead().state_dict().items()}
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    published = {f"layers.{i}.weight": size for i, size in sizes.items()}
    published |= {f"layers.{i}.bias": size[:1] for i, size in sizes.items()}
    assert shapes == published


def test_the_aesthetic_head_is_opened_before_its_clip(tmp_path):
    with pytest.raises(UserError, match=r"weights not found: .*nowhere"):
        Aesthetic(weights=tmp_path / "nowhere.pth")


def test_pickscore_is_the_scaled_cosine_similarity(tmp_path, monkeypatch):
    network = random_clip()  # plain GELU
    monkeypatch.setattr(PickScore, "config", transformers_config(CONFIG, "gelu"))
    state = to_transformers(network.state_dict())
    state["logit_scale"] = torch.tensor(3.0)
    torch.save(state, tmp_path / "w.bin")
    scores = PickScore(weights=tmp_path / "w.bin").score(IMAGES, CONDITIONS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, torch.tensor(3.0).exp() * expected(network), atol=2e-5, rtol=0)


def test_pickscore_has_the_names_and_sizes_of_vit_h_14_in_transformers_layout():
    with torch.device("meta"):
        ours = TransformersClip(PickScore.config).clip.state_dict()
        published = to_transformers(build_open_clip(clip_model.open_clip.get_model_config("ViT-H-14")).state_dict())
    assert sum(value.numel() for value in ours.values()) == 986_109_441
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in published.items()}


def test_weights_of_another_network_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(PickScore, "config", transformers_config(CONFIG, "gelu"))
    torch.save(random_clip().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"weights do not fit: .*missing .* and \d+ more; unexpected ") as caught:
        PickScore(weights=tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="weights do not fit: "):
        load_state(AestheticHead(), tmp_path / "w.pt")


def test_pickscore_has_the_heads_of_vit_h_14():
    """Their number changes the scores and no shape."""
    published = open_clip.get_model_config("ViT-H-14")
    vision, words = published["vision_cfg"], published["text_cfg"]
    assert PickScore.config["vision_config"]["num_attention_heads"] == vision["width"] // vision["head_width"]
    assert PickScore.config["text_config"]["num_attention_heads"] == words["heads"]


def test_an_image_far_too_oblong_is_refused():
    with pytest.raises(UserError, match="60000 x 1 pixels is too oblong for CLIP"):
        Preprocess()(torch.zeros(1, 3, 1, 60000, dtype=torch.uint8))
