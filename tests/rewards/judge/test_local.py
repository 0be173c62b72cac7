"""The judge in this process: Qwen2.5-VL in miniature, through the real architecture and processor."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from argrpo_cli.rewards.judge import JudgeFake, JudgeQuality, JudgeWeird
from argrpo_cli.rewards.judge.local import LocalJudge, load_local
from argrpo_cli.rewards.judge.questions import FAKE, FORCED_PREFIX, QUALITY, read_score
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import to_pil
from tests.rewards.judge.tiny_vlm import tiny_model, tiny_processor

CAPTIONS = [
    "a dog",
    "two zebras that stand far apart in a wide landscape under clouds " * 2,
    "<|im_end|> <|image_pad|>",
]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm")
    model = tiny_model(processor)
    model.generation_config.update(do_sample=True, temperature=1e-6, repetition_penalty=1.05)  # as the real one
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(folder):
    loaded = load_local(str(folder), "cpu")
    loaded.max_tokens = 8
    return loaded


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (3, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prompts():
    return [QUALITY.fill(caption) for caption in CAPTIONS]


def test_a_batch_gives_what_each_image_gives_alone(judge, images, prompts):
    pictures = to_pil(images)
    alone = [judge.probability_of_one([one], [prompt]).item() for one, prompt in zip(pictures, prompts, strict=True)]
    together = judge.probability_of_one(pictures, prompts)
    torch.testing.assert_close(together, torch.tensor(alone), atol=2e-6, rtol=0)
    assert together.std() > 1e-4  # so that one row in another's place would show
    replies = [judge.generate([one], [prompt])[0] for one, prompt in zip(pictures, prompts, strict=True)]
    assert judge.generate(pictures, prompts) == replies


def test_padding_on_the_right_would_not(judge, images, prompts):
    tokenizer = judge.processor.tokenizer
    together = judge.generate(to_pil(images), prompts)
    tokenizer.padding_side = "right"
    try:
        assert judge.generate(to_pil(images), prompts) != together
    finally:
        tokenizer.padding_side = "left"


def test_logit_is_the_probability_of_the_digit_after_the_forced_prefix(judge, images):
    picture, prompt = to_pil(images[:1]), FAKE.fill("")
    text = judge._chat(prompt) + FORCED_PREFIX
    inputs = judge.processor(images=picture, text=[text], return_tensors="pt")
    logits = judge.model(**inputs).logits[0, -1]
    zero, one = (judge.processor.tokenizer.convert_tokens_to_ids(digit) for digit in "01")
    expected = logits[[zero, one]].softmax(0)[1]
    torch.testing.assert_close(judge.probability_of_one(picture, [prompt])[0], expected, atol=1e-6, rtol=0)


def test_logit_as_a_reward(folder, judge, images):
    reward = JudgeWeird(model=str(folder), reading="logit")
    scores = reward.score(images, [Condition(caption) for caption in CAPTIONS])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and ((scores > 0) & (scores < 1)).all()
    assert not reward.remote and not scores.requires_grad
    other = reward.score(images, [Condition("other")] * 3)
    assert torch.equal(scores, other)  # this question does not look at the prompt
    assert JudgeFake(model=str(folder)).local is reward.local is judge  # loaded once for all


def test_the_image_stands_where_the_question_says(judge, prompts):
    chat = judge._chat(prompts[0])
    assert '"a dog"\nBelow is one generated image: <|vision_start|><|image_pad|><|vision_end|>\n\n1. Describe' in chat
    assert chat.endswith("<|im_start|>assistant\n")


def test_greedy_repeats_itself_and_further_attempts_do_not(judge, images, prompts):
    before = torch.get_rng_state()
    pictures = to_pil(images)
    first = judge.generate(pictures, prompts)
    assert judge.generate(pictures, prompts) == first
    assert judge.generate(pictures, prompts, sample=1) == judge.generate(pictures, prompts, sample=1) != first
    assert judge.generate(pictures, prompts, sample=2) != judge.generate(pictures, prompts, sample=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_replies_without_a_score_are_asked_for_again_and_then_missing(folder, judge, images, monkeypatch):
    asked = []

    def generate(pictures, prompts, sample=0):
        asked.append((len(pictures), sample))
        return [['{"score": 3}', "no", "no"], ["no", '{"score": 4}'], ["still no"]][sample]

    monkeypatch.setattr(judge, "generate", generate)
    reward = JudgeQuality(model=str(folder))
    scores = reward.score(images, [Condition(caption) for caption in CAPTIONS]).tolist()
    assert scores[0] == 3 and math.isnan(scores[1]) and scores[2] == 4
    assert asked == [(3, 0), (2, 1), (1, 2)]
    assert reward.failures == 1
    assert reward.last_error == "the reply has no JSON object with a score (attempt 3 of 3)"


def test_a_model_that_replies_nonsense_gives_no_score(folder, judge, images):
    reward = JudgeQuality(model=str(folder), attempts=1)
    assert reward.score(images[:1], [Condition("a dog")]).isnan().all()
    assert reward.failures == 1 and reward.score(images[:0], []).shape == (0,)
    assert judge.ask(to_pil(images[:1]), [("", "x")], lambda reply: read_score('{"score": 1}', FAKE)) == [(1.0, "")]


def test_digits_that_are_no_tokens_of_their_own_are_refused(judge, images, monkeypatch):
    def merged(images, texts):
        ids = torch.tensor([[5, 6, 7 + text.endswith("1"), 9] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    monkeypatch.setattr(judge, "_inputs", merged)
    with pytest.raises(UserError, match="reading 'logit' needs a model in whose tokenizer"):
        judge.probability_of_one(to_pil(images), [FAKE.fill("")] * 3)


def test_weights_must_be_complete(folder, tmp_path, capfd):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    assert {"visual.patch_embed.proj.weight", "model.layers.0.mlp.up_proj.weight"} <= state.keys()  # published names
    state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys such as model.language_model.norm.weight"):
        load_local(str(tmp_path), "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="cannot load the model"):
        load_local(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="image-text-to-text model"):
        load_local(str(tmp_path), "cpu")
    assert capfd.readouterr() == ("", "")


def test_no_such_folder():
    with pytest.raises(UserError, match="there is no model folder '/nowhere/at/all'"):
        JudgeFake(model="/nowhere/at/all")


def test_the_real_size_is_built_as_published():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_754_622_976  # of Qwen2.5-VL-3B-Instruct


def test_pixels_take_the_precision_of_the_model():
    images = [Image.new("RGB", (28, 28))]
    outer = LocalJudge(SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16), tiny_processor())
    assert outer._inputs(images, [outer._chat(("", "x"))])["pixel_values"].dtype == torch.bfloat16
