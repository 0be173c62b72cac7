"""Captions to features, and a policy that draws captions."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen import text
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.training.tiny import sample, save_tiny_policy, tiny_caption_policy, tiny_text_encoder


def test_features_are_left_padded_zero_in_the_padding_and_independent_of_the_batch():
    encoder = tiny_text_encoder()
    features, mask = encoder.encode(["a dog", "a red dog a cat", "a dog"], length=6)
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1]]
    assert features[0, :3].abs().max() == 0
    assert features[0, 3:].abs().min() > 0
    assert torch.equal(features[0], features[2])
    alone, _ = encoder.encode(["a dog"], length=6)
    assert torch.allclose(alone[0], features[0], atol=1e-6)
    # The encoder itself saw no padding: the same words without any.
    words = encoder.tokenizer(["a dog"], return_tensors="pt")
    bare = encoder.model(input_ids=words.input_ids).last_hidden_state
    assert torch.allclose(bare[0], features[0, 3:], atol=1e-6)


def test_a_distinct_caption_is_encoded_once(monkeypatch):
    encoder = tiny_text_encoder()
    sizes = []
    forward = encoder.model.forward
    monkeypatch.setattr(
        encoder.model, "forward", lambda **given: sizes.append(len(given["input_ids"])) or forward(**given)
    )
    before = encoder.encode(["a dog", "a cat", "a dog", "a dog"], length=6)
    assert sizes == [1, 1]
    again = encoder.encode(["a red dog", "a cat", "a dog"], length=6)
    assert sizes == [1, 1, 1], "what the call before read is remembered"
    assert torch.equal(again[0][2], before[0][0]) and torch.equal(again[0][1], before[0][1])
    encoder.encode(["a cat"], length=5)
    assert sizes == [1, 1, 1, 1], "but not for another length"


def test_features_do_not_depend_on_what_else_is_asked_for():
    """To the bit, or an interrupted job would not end in the same bytes."""
    together, _ = tiny_text_encoder().encode(["a dog", "a red dog a cat", "a blue cat"], length=6)
    for row, prompt in enumerate(["a dog", "a red dog a cat", "a blue cat"]):
        assert torch.equal(tiny_text_encoder().encode([prompt], length=6)[0][0], together[row])


def test_only_the_latest_captions_are_remembered(monkeypatch):
    monkeypatch.setattr(text, "KEPT", 2)
    encoder, read = tiny_text_encoder(), []
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda **given: read.append(prompt) or forward(**given))
    for prompt in ("a dog", "a cat", "a dog", "a red dog", "a dog", "a cat"):
        encoder.encode([prompt], length=6)
    assert read == ["a dog", "a cat", "a red dog", "a cat"]


def test_an_offloaded_encoder_visits_the_device_only_to_read(monkeypatch):
    """A second name of the CPU stands for a GPU."""
    encoder, where = tiny_text_encoder(), []
    encoder.place("cpu", "offload")
    move = encoder.model.to
    monkeypatch.setattr(encoder.model, "to", lambda device: where.append(str(device)) or move(device))
    encoder.device = torch.device("cpu", 0)
    encoder.encode(["a dog"], length=6)
    encoder.encode(["a dog"], length=6)
    assert where == ["cpu:0", "cpu", "cpu"], "there once, and back"
    with pytest.raises(UserError, match="device 'nowhere'"):
        encoder.place("cpu", "nowhere")


def test_a_long_caption_is_cut_and_still_ends():
    features, mask = tiny_text_encoder().encode(["a dog a dog a dog a dog"], length=4)
    short, _ = tiny_text_encoder().encode(["a dog a"], length=4)
    assert mask.tolist() == [[1, 1, 1, 1]]
    assert torch.allclose(features, short)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a rde dog", "'rde' in the prompt 'a rde dog'; did you mean 'red'"), ("a dog!", "the word '!'"), ("  ", "empty")],
)
def test_a_caption_with_unknown_words_is_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        tiny_caption_policy().conditions(["a dog", prompt])


def test_the_caption_and_the_seed_decide_the_image():
    policy = tiny_caption_policy()
    asked = policy.conditions(["a dog", "a blue cat", "A Dog", "a dog"])
    assert asked[0] == Condition("a dog")
    tokens = sample(policy, asked, [1, 1, 1, 2], cfg_scale=3.0)
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[3])
    one_by_one = torch.cat(
        [sample(policy, [one], [s], cfg_scale=3.0) for one, s in zip(asked, [1, 1, 1, 2], strict=True)]
    )
    assert torch.equal(tokens, one_by_one)


def test_a_policy_folder_brings_its_text_encoder(tmp_path):
    policy = tiny_caption_policy()
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    asked = ["a red dog", "a cat"]
    first, second = (sample(one, one.conditions(asked), [3, 4]) for one in (policy, again))
    assert torch.equal(first, second)
    assert again.text_encoder.words == policy.text_encoder.words


def test_parts_that_do_not_fit_are_named(tmp_path):
    policy = tiny_caption_policy()
    policy.save(tmp_path / "a")
    (tmp_path / "a" / "text_encoder" / "model.safetensors").rename(tmp_path / "a" / "x")
    with pytest.raises(UserError, match="text_encoder"):
        load_policy(tmp_path / "a")
    policy.text_encoder.model.config.d_model = 24
    policy.save(tmp_path / "b")
    card = tmp_path / "b" / "policy.json"
    card.write_text(card.read_text().replace('"text_encoder": "text_encoder"', '"text_encoder": "gone"'))
    with pytest.raises(UserError, match=r"the text encoder of .* is missing: no folder .*gone"):
        load_policy(tmp_path / "b")


@pytest.mark.parametrize(
    ("whole", "damaged", "message"),
    [
        ('"cat"', "cat", r"tokenizer\.json: not JSON"),
        ('"Sequence"', '"Sequences"', "cannot load the text tokenizer of .*text_encoder: data did not match"),
        ('"id": "</s>",\n          "type_id"', '"id": "x",\n          "type_id"', "cannot load the text tokenizer of"),
        ('"cat": 7', '"cat": 70', "the text tokenizer has a token 70, and the model reads 8 tokens"),
    ],
)
def test_a_damaged_text_tokenizer_is_named(tmp_path, whole, damaged, message):
    tiny_caption_policy().save(tmp_path)
    file = tmp_path / "text_encoder" / "tokenizer.json"
    content = file.read_text()
    assert whole in content
    file.write_text(content.replace(whole, damaged))
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path)


def test_a_class_policy_reads_no_captions(tmp_path):
    save_tiny_policy(tmp_path)
    with pytest.raises(UserError, match="no class 'a dog'"):
        load_policy(tmp_path).conditions(["a dog"])


def test_a_published_encoder_cleans_reads_in_bfloat16_and_pads_as_told(tmp_path):
    """`open_text_encoder` on a folder in the place of a name of the hub."""
    tiny_text_encoder().save(tmp_path)
    encoder = text.open_text_encoder(str(tmp_path))
    assert encoder.cleans and next(encoder.model.parameters()).dtype == torch.bfloat16
    (left, mask), (same, _) = encoder.encode(["a dog"], 6), encoder.encode(["<b>A</b> DOG #123456"], 6)
    assert torch.equal(left, same) and mask.tolist() == [[0, 0, 0, 1, 1, 1]]
    right, right_mask = text.open_text_encoder(str(tmp_path), right_padded=True).encode(["a dog"], 6)
    assert right_mask.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert torch.equal(right[0, :3], left[0, 3:])


def test_a_policy_can_be_trained_on_features():
    features, _ = tiny_text_encoder().encode(["a dog"], length=6)
    weight = torch.ones(features.shape[-1], requires_grad=True)
    (features @ weight).sum().backward()
    assert weight.grad is not None
