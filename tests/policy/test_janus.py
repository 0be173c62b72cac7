"""Janus against transformers' own `generate(generation_mode="image")`, and what its family promises beside."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from argrpo_cli.draw import score_tokens
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.folder import glance
from argrpo_cli.policy.janus.model import Encoded
from argrpo_cli.policy.janus.policy import Janus
from argrpo_cli.policy.janus.prompts import TEMPLATE, Prompts
from argrpo_cli.policy.janus.sample import draw_tokens, new_cache
from argrpo_cli.policy.janus.vq import vq_config
from argrpo_cli.policy.open import adapted_layers, choose_trainable, outline_policy
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from argrpo_cli.training.memory import pass_bytes
from tests.policy.tiny_janus import CODES, IMAGE_SIZE, PROMPTS, TOKENS, tiny_janus
from tests.training.test_memory import kept_bytes

SCALE = 2.5


@cache
def janus() -> Janus:
    return tiny_janus()


def encoded(prompts: tuple[str, ...] = PROMPTS) -> Encoded:
    return janus().encode(janus().conditions(prompts))


class Recorder(LogitsProcessor):
    """Keeps what it is shown: both halves' logits of each step, before guidance."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


@cache
def generated() -> tuple[Tensor, Tensor, Tensor]:
    """Greedy tokens [B, T] of transformers' loop, and the conditional and the null logits [B, T, V] of its steps."""
    given, seen = encoded(), Recorder()
    tokens = janus().model.generate(
        given.ids,
        attention_mask=given.mask,
        generation_mode="image",
        do_sample=False,
        guidance_scale=SCALE,
        logits_processor=LogitsProcessorList([seen]),
    )
    return tokens, *torch.stack(seen.steps, dim=1).chunk(2)


def guided(conditional: Tensor, null: Tensor) -> Tensor:
    return null + SCALE * (conditional - null)


def drawn_greedily(**settings: float) -> tuple[Tensor, Tensor, Tensor]:
    """Our loop's likeliest tokens, with the guided and the conditional logits [B, T, V] that it chose by."""
    rows: list[tuple[Tensor, Tensor]] = []

    def choose(logits: Tensor, conditional, index: int) -> Tensor:
        assert index == len(rows)
        rows.append((logits, conditional()))
        return logits.argmax(-1)

    tokens = draw_tokens(janus().model, encoded(), choose, **settings)
    return tokens, *(torch.stack(column, dim=1) for column in zip(*rows, strict=True))


def test_the_loop_is_that_of_transformers_step_by_step() -> None:
    tokens, conditional, null = generated()
    assert len(tokens.unique()) > 4 and not torch.equal(*tokens)
    own, steered, plain = drawn_greedily(cfg_scale=SCALE)
    assert torch.equal(own, tokens)
    torch.testing.assert_close(plain, conditional, atol=1e-4, rtol=0)
    torch.testing.assert_close(steered, guided(conditional, null), atol=1e-4, rtol=0)
    assert (conditional - null).abs().max() > 0.5, "or nothing was compared"


def test_a_teacher_forced_pass_gives_the_logits_of_the_loop() -> None:
    tokens, conditional, null = generated()
    model, given = janus().model, encoded()
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(given, tokens), conditional, atol=1e-4, rtol=0)
        dropped = janus().encode(janus().conditions(PROMPTS), dropped=torch.tensor([True, False]))
        torch.testing.assert_close(model.logits(dropped, tokens)[0], null[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(model.logits(dropped, tokens)[1], conditional[1], atol=1e-4, rtol=0)
        scored = model(given, tokens, Sampling(cfg_scale=SCALE, temperature=0.7), True)
    logp = (guided(conditional, null) / 0.7).log_softmax(-1)
    torch.testing.assert_close(scored.logp, logp.gather(-1, tokens[..., None])[..., 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.entropy, -(logp.exp() * logp).sum(-1), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="for 2 conditions and images of 16"):
        model.logits(given, tokens[:1])


def test_the_gradient_is_that_of_transformers_modules_through_both_halves_and_recomputed_or_not() -> None:
    given, tokens, advantages = encoded(), generated()[0], torch.tensor([[1.0], [-0.5]])
    tiny = tiny_janus()
    inner, seen = tiny.model.model, torch.cat([given.mask, torch.ones(2, TOKENS - 1, dtype=torch.long)], dim=1)
    read = tiny.model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    conditional, null = (
        inner.generation_head(
            inner.language_model(
                inputs_embeds=torch.cat([inner.language_model.embed_tokens(ids), read], dim=1), attention_mask=seen
            ).last_hidden_state[:, -TOKENS:]
        )
        for ids in (given.ids, given.null)
    )
    logp = guided(conditional, null).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    (advantages * logp).mean().backward()
    expected = {name: one.grad for name, one in tiny.model.named_parameters() if one.grad is not None}
    assert {name.split(".")[1] for name in expected} == {
        "language_model", "generation_embeddings", "generation_aligner", "generation_head",
    }  # fmt: skip
    for recomputed in (False, True):
        model = tiny_janus().model.train()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (advantages * model(given, tokens, Sampling(cfg_scale=SCALE)).logp).mean().backward()
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() < 1e-3 * expected[name].norm(), name


@pytest.mark.parametrize("kind", ["guided", "conditional"])
def test_log_probabilities_of_draws_are_those_of_the_training_pass(kind: str) -> None:
    sampling = Sampling(cfg_scale=SCALE, temperature=0.9)
    tokens, logp = janus().sample(encoded(), sampling, [1, 2], logp=kind)
    trained = sampling if kind == "guided" else replace(sampling, cfg_scale=1.0)
    again = score_tokens(janus(), janus().conditions(PROMPTS), tokens, trained).logp
    torch.testing.assert_close(logp, again, atol=1e-5, rtol=0)
    assert logp.shape == (2, TOKENS) and logp.std() > 0.1


def test_a_prompt_and_a_seed_give_an_image_whatever_else_is_drawn() -> None:
    sampling, seeds = Sampling(cfg_scale=SCALE), [5, 6, 7]
    together = janus().sample(encoded((PROMPTS[1], *PROMPTS)), sampling, seeds).tokens
    alone = [
        janus().sample(encoded((one,)), sampling, [seed]).tokens for one, seed in zip(PROMPTS, (6, 7), strict=True)
    ]
    assert torch.equal(together[1:], torch.cat(alone)), "a longer prompt beside it changes its padding alone"
    assert not torch.equal(together[0], together[2]), "another seed"
    rows = encoded()[torch.tensor([1, 0])]
    assert torch.equal(janus().sample(rows, sampling, [7, 6]).tokens, together[[2, 1]])
    with pytest.raises(ValueError, match="2 seeds for 1 conditions"):
        janus().sample(encoded(PROMPTS[:1]), sampling, [0, 1])


def test_after_its_interval_guidance_is_gone_and_its_half_with_it() -> None:
    tokens, steered, plain = drawn_greedily(cfg_scale=SCALE, cfg_interval=3)
    assert (steered != plain).any(-1).tolist() == [[index < 5 for index in range(TOKENS)]] * 2
    with torch.inference_mode():
        torch.testing.assert_close(janus().model.logits(encoded(), tokens), plain, atol=1e-4, rtol=0)


def test_under_autocast_draws_and_training_pass_agree_as_far_as_bfloat16_goes() -> None:
    sampling = Sampling(cfg_scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, logp = janus().sample(encoded(), sampling, [1, 2], logp="guided")
        again = score_tokens(janus(), janus().conditions(PROMPTS), tokens, sampling).logp
    assert 0 < (logp - again).abs().mean() < 0.1


def test_the_prompt_is_worded_as_published_and_its_null_is_as_long() -> None:
    prompts, given = janus().prompts, encoded()
    assert TEMPLATE.format("a dog") == "<|User|>: a dog\n\n<|Assistant|>:"
    spelled = prompts.tokenizer.convert_ids_to_tokens(prompts.ids("  a dog "))
    assert spelled == ["<begin>", "<|", "user", "|>:", "a", "dog", "<|", "assistant", "|>:", "<begin_of_image>"]
    assert given.mask.sum(1).tolist() == [10, 16] and given.ids[0, :6].eq(prompts.pad).all()
    for ids, null, mask in zip(given.ids, given.null, given.mask, strict=True):
        first = int((mask == 0).sum())
        assert null[first] == ids[first] == prompts.begin and null[-1] == ids[-1] == prompts.image
        assert null[first + 1 : -1].eq(prompts.pad).all()
    assert given[torch.tensor([0])].halves(True)[0].tolist() == [given.ids[0].tolist(), given.null[0].tolist()]


def test_a_chat_template_of_the_folder_takes_the_place_of_the_published_one(tmp_path: Path) -> None:
    tiny = tiny_janus()
    tiny.prompts.tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    tiny.save(tmp_path)
    again = Prompts.load(tmp_path)
    assert again.tokenizer.convert_ids_to_tokens(again.ids("a dog")) == ["<begin>", "a", "dog", "<begin_of_image>"]
    assert load_policy(tmp_path).fingerprint() != janus().fingerprint()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "an empty prompt"),
        ("a dof", "does not know the word 'dof' in the prompt 'a dof'; did you mean 'dog'"),
        ("a dog and " * 20, r"has \d+ tokens and the policy reads 48: shorten it"),
    ],
)
def test_a_prompt_that_it_cannot_read_is_refused_in_one_line(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        janus().conditions([prompt])


def test_its_tokenizer_is_transformers_with_the_lookup_by_unit_vectors() -> None:
    tokens = janus().sample(encoded(), Sampling(cfg_scale=1.0), [3, 4]).tokens
    with torch.inference_mode():
        theirs = janus().model.decode_image_tokens(tokens).permute(0, 3, 1, 2)
        torch.testing.assert_close(janus().tokenizer.decode_tokens(tokens), theirs, atol=1e-5, rtol=0)
        images = janus().decode(tokens)
        assert images.dtype == torch.uint8 and images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert janus().decode(tokens, 8).shape == (2, 3, 8, 8)
        vq = janus().model.model.vqmodel
        latent = vq.quant_conv(vq.encoder(images.float() / 127.5 - 1)).flatten(2).transpose(1, 2)
        near = torch.cosine_similarity(latent[:, :, None], vq.quantize.embedding.weight[None, None], dim=-1).argmax(-1)
    assert torch.equal(janus().tokenise(images), near)
    assert janus().tokenizer_fingerprint() == tiny_janus().tokenizer_fingerprint()


def test_a_saved_policy_opens_again_and_in_transformers(tmp_path: Path) -> None:
    tiny = tiny_janus()
    tiny.model.config.text_config.pad_token_id = CODES  # as TRL does, beyond the words that there are
    tiny.model.generation_config.pad_token_id = CODES
    tiny.save(tmp_path)
    assert json.loads((tmp_path / "policy.json").read_text()) == {
        "family": "janus", "reads": "captions", "image_size": 16, "base": "tiny", "sampling": {"cfg_scale": 3.0},
    }  # fmt: skip
    again = load_policy(tmp_path)
    assert isinstance(again, Janus) and again.card == replace(janus().card, name=str(tmp_path))
    assert again.fingerprint() == janus().fingerprint()
    first, second = (one.sample(encoded(), Sampling(), [1, 2]).tokens for one in (again, janus()))
    assert torch.equal(first, second)
    seen = glance(tmp_path)
    assert (seen.reads, seen.sampling) == ("captions", {"cfg_scale": 3.0})
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path)
    assert theirs.config.text_config.pad_token_id == theirs.generation_config.pad_token_id == 0
    with torch.inference_mode():
        head = theirs.model.generation_head(torch.ones(1, 32))
        torch.testing.assert_close(head, janus().model.model.generation_head(torch.ones(1, 32)))


def test_in_bfloat16_the_image_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    janus().save(tmp_path)
    half = load_policy(tmp_path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.tokenizer_fingerprint() == janus().tokenizer_fingerprint()
    drawn = half.sample(half.encode(half.conditions(PROMPTS)), Sampling(cfg_scale=2.0), [0, 1])
    assert drawn.tokens.shape == (2, TOKENS)


def published_folder(folder: Path) -> Path:
    """As on the hub: no policy.json."""
    janus().save(folder)
    (folder / "policy.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["JanusForConditionalGeneration"]
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_transformers_format_opens_as_it_is(tmp_path: Path) -> None:
    policy = load_policy(published_folder(tmp_path))
    assert policy.fingerprint() == janus().fingerprint()
    assert policy.card.sampling == {"cfg_scale": 3.0} == glance(tmp_path).sampling, "as generation_config.json says"
    assert policy.model.config._name_or_path == "", "training writes a folder that opens as our class"
    (tmp_path / "generation_config.json").unlink()
    assert load_policy(tmp_path).card.sampling == {"cfg_scale": 5.0}
    assert outline_policy(tmp_path).policy.model.num_parameters() == policy.model.num_parameters()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "multi_modality"},
            "first format; convert it with .* convert_janus_weights_to_hf.py",
        ),
        ({"vision_config": {"num_image_tokens": 4}}, "16 tokens at this image size, but the model draws 4"),
    ],
)
def test_another_format_or_another_size_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    file = published_folder(tmp_path) / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path)


def test_a_tokenizer_without_the_token_that_begins_an_image_is_none_of_janus(tmp_path: Path) -> None:
    published_folder(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / file).read_text().replace("<begin_of_image>", "<eoi>")
        (tmp_path / file).write_text(text.replace('"boi_token"', '"eoi_token"'))
    with pytest.raises(UserError, match="no token begins an image; this is no tokenizer of Janus"):
        load_policy(tmp_path)


@pytest.mark.parametrize(("name", "revision"), [("janus-pro-1b", None), ("janus-pro-7b@refs/pr/1", "refs/pr/1")])
def test_a_published_name_is_fetched_whole_at_its_revision(name, revision, tmp_path, monkeypatch) -> None:
    asked = []

    def snapshot(repo, *, revision, allow_patterns, local_files_only):
        asked.append((repo, revision, local_files_only))
        if local_files_only:
            return str(tmp_path / "empty")  # of an earlier call that was interrupted
        return str(published_folder(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("argrpo_cli.system.hub.require_hub", lambda: None)
    policy = load_policy(name)
    repo = f"deepseek-community/Janus-Pro-{'7B' if '7b' in name else '1B'}"
    assert asked == [(repo, revision, True), (repo, revision, False)]
    assert policy.name == policy.card.base == name and glance(name).sampling == {"cfg_scale": 5.0}
    asked.clear()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **keys: asked.append(keys) or str(tmp_path))
    load_policy(name)
    assert [keys["local_files_only"] for keys in asked] == [True], "the cache has it"


def test_offline_a_published_name_says_what_to_do(monkeypatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*args, **keys):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("argrpo_cli.system.hub.require_hub", lambda: None)
    with pytest.raises(UserError) as error:
        load_policy("janus-pro-1b")
    assert "cannot fetch deepseek-community/Janus-Pro-1B: the hub is not reached" in str(error.value)
    assert "hf download deepseek-community/Janus-Pro-1B --local-dir FOLDER" in str(error.value)
    with pytest.raises(UserError, match="no policy 'c2i-b-256@main'"):
        load_policy("c2i-b-256@main")


def test_what_is_trained_leaves_out_what_sees_pictures() -> None:
    tiny = tiny_janus()
    choose_trainable(tiny, "all")
    trained = {name.split(".")[1] for name, one in tiny.model.named_parameters() if one.requires_grad}
    assert trained == {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}
    with pytest.raises(UserError, match="no parameter's name contains 'vision_model'"):
        choose_trainable(tiny, "vision_model")
    layers = adapted_layers(tiny, None)
    assert len(layers) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in layers)
    assert adapted_layers(tiny, ["fc1"]) == ["model.generation_aligner.fc1"], "the vision tower has layers of that name"
    with pytest.raises(UserError, match=r"no linear layer 'wqkv'; there are q_proj"):
        adapted_layers(tiny, ["wqkv"])


@pytest.mark.parametrize(("name", "gigabytes", "width"), [("janus-pro-1b", 4.18, 2048), ("janus-pro-7b", 14.84, 4096)])
def test_published_sizes_have_outlines(name: str, gigabytes: float, width: int) -> None:
    """The authors' own files are a hundredth larger: they hold a pooling layer that the conversion leaves out."""
    outline = outline_policy(name)
    (file,) = outline.files
    assert file.size / 1e9 == pytest.approx(gigabytes, rel=0.01)
    card = outline.policy.card
    assert (card.image_size, card.tokens, card.codes, card.reads) == (384, 576, 16384, "captions")
    assert outline.config.text_config.hidden_size == width and outline.tokenizer_bytes == 0
    assert outline.policy.tokenizer.config.downsample == 16


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_training_pass_keeps_what_is_estimated(scale: float, autocast: bool, tmp_path: Path) -> None:
    tiny, sampling = tiny_janus(), Sampling(cfg_scale=scale)
    tiny.save(tmp_path)
    outline = outline_policy(tmp_path)
    for one in (tiny, outline.policy):
        choose_trainable(one, "all")
    estimate = partial(pass_bytes, outline, 2, sampling, autocast=autocast)
    full = kept_bytes(tiny.model.train(), (*outline.blank(2), sampling), autocast)
    assert estimate(checkpointing=False) == pytest.approx(full, rel=0.01)
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = kept_bytes(tiny.model, (*outline.blank(2), sampling), autocast)
    assert inputs < full / 2
    assert estimate(checkpointing=True) == pytest.approx(inputs + (full - inputs) / 2, rel=0.01), "of two layers"


def test_an_outline_counts_the_cache_that_drawing_fills(tmp_path: Path) -> None:
    janus().save(tmp_path)
    outline = outline_policy(tmp_path)
    given, tokens = outline.blank(3)
    cache = new_cache(janus().model, given.ids.shape[1] + TOKENS)
    for layer in cache.layers:
        layer.update(torch.zeros(6, 2, 1, 8), torch.zeros(6, 2, 1, 8))
    made = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert outline.drawing_bytes(3, guided=True, recorded=True, number=4) == made
    assert tokens.shape == (3, TOKENS) and vq_config(janus().model.config.vq_config).downsample == 4


@pytest.mark.parametrize(("pad", "complaint"), [(1.5, "has the id 1.5"), (-1, "has the id -1"), (10**6, "id 1000000")])
def test_a_padding_that_is_no_token_is_refused(tmp_path: Path, pad: float, complaint: str) -> None:
    tiny_janus().save(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": pad}))
    with pytest.raises(UserError, match=complaint):
        load_policy(tmp_path)
