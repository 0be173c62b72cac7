"""The network against the published one: logits, log-probabilities, training call, gradients, masks, guidance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from argrpo_cli.policy import tokens as shared
from argrpo_cli.policy.llamagen.checkpoints import RENAMES
from argrpo_cli.policy.llamagen.config import LlamaGenConfig, published_config
from argrpo_cli.policy.llamagen.geometry import SIZES
from argrpo_cli.policy.llamagen.model import Encoded, caption_attention_mask, left_pad
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration, LlamaGenModel
from argrpo_cli.policy.protocol import Scored
from argrpo_cli.shapes import Sampling
from tests.goldens import TOLERANCE, cases, golden_model, max_difference, tensors

CAPTION_CASES = ["B_t2i8", "B_t2i120"]
PUBLISHED_PARAMETERS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
}


def inputs(data: dict[str, torch.Tensor], prefix: str = "") -> tuple[Encoded, torch.Tensor]:
    """Conditions and tokens of a golden case."""
    if f"in/{prefix}labels" in data:
        return Encoded(data[f"in/{prefix}labels"]), data[f"in/{prefix}tokens"]
    return Encoded(data["out/c_indices"], data["out/c_emb_masks"]), data["in/tokens"]


def predicting(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of published logits, those that the tokens are drawn by: the last ones predict nothing."""
    return logits[:, -tokens.shape[1] - 1 : -1]


def check_training_call(model: LlamaGenForImageGeneration, logits, tokens, data, names) -> None:
    """Loss, loss over valid samples and the norm of every gradient of the published training call."""
    assert max_difference(logits, data["out/train_logits"]) < TOLERANCE
    losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    assert losses.mean().item() == pytest.approx(data["out/train_loss"].item(), abs=TOLERANCE)
    valid = data["in/valid"][:, None].expand_as(losses)
    loss_valid = (losses * valid).sum() / valid.sum().clamp(min=1)
    assert loss_valid.item() == pytest.approx(data["out/train_loss_valid"].item(), abs=TOLERANCE)

    model.zero_grad()
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = torch.stack([gradients.pop(RENAMES.get(name, f"model.{name}")).norm() for name in names])
    assert max_difference(norms, data["out/train_grad_norm"]) < TOLERANCE
    assert not gradients, "a parameter the published model does not train"


@pytest.mark.parametrize("training", [False, True])
def test_class_conditional_logits(training):
    data = tensors("A_c2i")
    model = copy.deepcopy(golden_model("A_c2i")).train(training)
    encoded, tokens = inputs(data)
    with torch.no_grad():
        logits = model.logits(encoded, tokens)
    assert max_difference(logits, predicting(data["out/tf_logits"], tokens)) < TOLERANCE


@pytest.mark.parametrize("case", ["A_c2i", *CAPTION_CASES])
def test_the_published_training_call(case):
    data, model = tensors(case), copy.deepcopy(golden_model(case))
    encoded, tokens = inputs(data)
    check_training_call(model, model.logits(encoded, tokens), tokens, data, cases()[case]["train_grad_names"])


@pytest.mark.parametrize("kv_heads", ["gqa_kv2", "gqa_kv1"])
def test_grouped_query_attention(kv_heads):
    data = tensors("C_rope")
    encoded, tokens = inputs(data, f"{kv_heads}_")
    with torch.no_grad():
        logits = golden_model("C_rope", kv_heads).logits(encoded, tokens)
    assert max_difference(logits, predicting(data[f"out/{kv_heads}_tf_logits"], tokens)) < TOLERANCE


@pytest.mark.parametrize("case", CAPTION_CASES)
def test_captions_are_moved_to_the_right_end(case):
    data = tensors(case)
    features, mask = left_pad(data["in/caption_embs"], data["in/emb_masks"])
    assert torch.equal(features, data["out/c_indices"])
    assert torch.equal(mask, data["out/c_emb_masks"])


@pytest.mark.parametrize("case", CAPTION_CASES)
def test_caption_attention_mask(case):
    data = tensors(case)
    expected = data["out/attn_mask"].bool()
    actual = caption_attention_mask(data["out/c_emb_masks"], expected.shape[-1])
    assert torch.equal(actual[:, 0], expected)


@pytest.mark.parametrize("case", CAPTION_CASES)
@pytest.mark.parametrize("output", ["tf_logits", "tf_nomask_logits", "tf_uncond_logits"])
def test_caption_conditional_logits(case, output):
    data, model = tensors(case), golden_model(case)
    encoded, tokens = inputs(data)
    if output == "tf_uncond_logits":
        encoded = Encoded(model.model.null_caption.expand_as(encoded.condition), encoded.mask)
    elif output == "tf_nomask_logits":
        encoded = Encoded(encoded.condition)
    with torch.no_grad():
        logits = model.logits(encoded, tokens)
    assert max_difference(logits, predicting(data[f"out/{output}"], tokens)) < TOLERANCE


def test_real_size_b_log_probabilities_and_entropies():
    """GPT-B at 256 px, 111 million parameters: conditional, null, and guided."""
    data, model = tensors("G_gptB"), golden_model("G_gptB")
    tokens, null = data["in/tokens"], torch.tensor([model.config.num_classes])
    scale = data["in/cfg_scale"].item()
    runs = [("cond", data["in/label"], 1.0), ("uncond", null, 1.0), ("guided", data["in/label"], scale)]
    for name, label, guidance in runs:
        with torch.no_grad():
            logits = model.logits(Encoded(label), tokens, guidance)
            scored = model(Encoded(label), tokens, Sampling(cfg_scale=guidance), entropy=True)
        assert max_difference(logits[:, ::32, ::512], data[f"out/{name}_logits_sub"]) < TOLERANCE, name
        assert max_difference(scored.logp[0].double(), data[f"out/{name}_target_logp"]) < TOLERANCE, name
        if name != "uncond":
            assert max_difference(scored.entropy[0].double(), data[f"out/{name}_entropy"]) < TOLERANCE, name


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_parameter_counts(size):
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(published_config(size, image_size=384))
    assert model.config.block_size == 576
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[size]


def test_published_caption_policy_has_the_published_parameter_count():
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(published_config("XL", condition="caption"))
    assert model.config.cls_token_num == 120
    assert sum(p.numel() for p in model.parameters()) == 777_678_080


@pytest.mark.parametrize(("case", "scale"), [("A_c2i", 2.0), ("A_c2i", 7.5), *((case, 3.0) for case in CAPTION_CASES)])
def test_the_guided_pass_gives_guided_logits(case, scale):
    data, model = tensors(case), golden_model(case)
    encoded, tokens = inputs(data)
    null = model.model.null_caption if encoded.mask is not None else torch.tensor(model.config.num_classes)
    with torch.no_grad():
        conditional = model.logits(encoded, tokens)
        unconditional = model.logits(Encoded(null.expand_as(encoded.condition), encoded.mask), tokens)
        guided = model.logits(encoded, tokens, scale)
    assert max_difference(guided, unconditional + scale * (conditional - unconditional)) < TOLERANCE
    assert max_difference(guided, conditional) > 0.1


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_no_guidance_up_to_scale_one(scale):
    data, model = tensors("A_c2i"), golden_model("A_c2i")
    encoded, tokens = inputs(data)
    with torch.no_grad():
        logits = model.logits(encoded, tokens, scale)
    assert max_difference(logits, predicting(data["out/tf_logits"], tokens)) < TOLERANCE


def test_guided_gradients_reach_both_the_class_and_the_null_row():
    model = copy.deepcopy(golden_model("A_c2i"))
    encoded, tokens = inputs(tensors("A_c2i"))
    model(encoded[:1], tokens[:1], Sampling(cfg_scale=2.0)).logp.sum().backward()
    rows = model.model.class_embedding.weight.grad.norm(dim=1).nonzero().flatten().tolist()
    assert sorted(rows) == sorted({encoded.condition[0].item(), model.config.num_classes})


def test_the_loss_of_pre_training_is_the_mean_of_minus_the_log_probabilities():
    data = tensors("A_c2i")
    with torch.no_grad():
        scored = golden_model("A_c2i")(*inputs(data))
    assert -scored.logp.mean().item() == pytest.approx(data["out/train_loss"].item(), abs=TOLERANCE)
    assert scored.entropy is None


@pytest.mark.parametrize("case", ["A_c2i", "B_t2i8"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("at_once", [2**24, 100])
def test_logits_in_parts_give_what_whole_ones_give_and_the_same_gradient(case, entropy, autocast, at_once, monkeypatch):
    monkeypatch.setattr(shared, "LOGITS_AT_ONCE", at_once)
    encoded, tokens = inputs(tensors(case))
    sampling = Sampling(cfg_scale=2.0, temperature=0.8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model = copy.deepcopy(golden_model(case))
        logp = (model.logits(encoded, tokens, 2.0) / 0.8).log_softmax(-1)
        expected = Scored(logp.gather(-1, tokens[..., None])[..., 0], -(logp.exp() * logp).sum(-1))
        (expected.logp - 0.3 * expected.entropy * entropy).mean().backward()
        other = copy.deepcopy(golden_model(case))
        target = other.distribution(encoded, tokens, sampling)

        def against(logp, at):  # the entropy once more, as a distance to the distribution itself
            assert max_difference(logp, target(at)) < 1e-5
            return -(target(at).exp() * logp).sum(-1)

        scored = other(encoded, tokens, sampling, entropy, against if entropy else None)
        (scored.logp - (0.3 * scored.entropy if entropy else 0)).mean().backward()
    assert scored.logp.dtype == torch.float32 and max_difference(scored.logp, expected.logp) < 1e-5
    assert scored.entropy is None or max_difference(scored.entropy, expected.entropy) < 1e-5
    assert scored.compared is None or max_difference(scored.compared, expected.entropy) < 1e-5
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad - two.grad).norm() <= (2e-2 if autocast else 1e-5) * one.grad.norm()


def test_logits_are_not_held_whole(monkeypatch):
    """What autograd keeps of the head is its inputs, and in the backward pass it is one part at a time."""
    monkeypatch.setattr(shared, "LOGITS_AT_ONCE", 4 * 64)
    model = LlamaGenForImageGeneration(
        LlamaGenConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, block_size=16)
    )
    tokens, kept = torch.randint(64, (3, 16)), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one)
    with hooks:
        model(Encoded(torch.arange(3)), tokens, entropy=True).logp.sum().backward()
    assert [shape for shape in kept if shape[-1:] == (64,) and len(shape) > 1] == []


def test_gradient_checkpointing_changes_no_gradient():
    encoded, tokens = inputs(tensors("A_c2i"))
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(golden_model("A_c2i")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(encoded, tokens).logp.mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-7)


def test_bfloat16_stays_near_float32():
    data = tensors("A_c2i")
    model = copy.deepcopy(golden_model("A_c2i")).to(torch.bfloat16)
    with torch.no_grad():
        encoded, tokens = inputs(data)
        logits = model.logits(encoded, tokens)
    assert logits.dtype == torch.float32
    assert (logits - predicting(data["out/tf_logits"], tokens)).abs().mean() < 0.02


def test_parameters_may_be_of_another_type_than_the_null_caption():
    """As FSDP2 gathers them in mixed precision, to draw with outside of autocast."""
    data, model = tensors("B_t2i8"), copy.deepcopy(golden_model("B_t2i8"))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    encoded, tokens = inputs(data)
    with torch.no_grad():
        logp = model(encoded, tokens, Sampling(cfg_scale=2.0)).logp
        expected = golden_model("B_t2i8")(encoded, tokens, Sampling(cfg_scale=2.0)).logp
    assert (logp - expected).abs().mean() < 0.1


def test_a_fresh_policy_is_uniform_and_has_the_published_initialisation():
    torch.manual_seed(0)
    model = LlamaGenForImageGeneration(
        LlamaGenConfig(
            vocab_size=64,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            block_size=16,
            num_classes=3,
        )
    )
    assert not model.lm_head.weight.any()
    assert model.model.layers[0].attention.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(64))


def test_a_fresh_caption_policy_has_null_rows_of_unit_length_on_average():
    torch.manual_seed(0)
    model = LlamaGenModel(golden_model("B_t2i8").config)
    assert model.null_caption.norm(dim=-1).mean().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("case", ["A_c2i", "B_t2i8"])
def test_save_and_load_round_trip(case, tmp_path):
    model = golden_model(case)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = LlamaGenForImageGeneration.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert loaded.config.auto_map == {}  # TRL asks for it
    assert loaded.config._name_or_path == str(tmp_path)
    for field in ("hidden_size", "block_size", "condition", "num_key_value_heads", "intermediate_size"):
        assert getattr(loaded.config, field) == getattr(model.config, field)


def test_auto_classes_know_the_model(tmp_path):
    golden_model("A_c2i").save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LlamaGenConfig)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, LlamaGenModel)
    assert torch.equal(backbone.norm.weight, golden_model("A_c2i").model.norm.weight)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LlamaGenForImageGeneration)


def test_lora_of_peft_fits():
    peft = pytest.importorskip("peft")
    data = tensors("A_c2i")
    encoded, tokens = inputs(data)
    model = peft.get_peft_model(
        copy.deepcopy(golden_model("A_c2i")), peft.LoraConfig(target_modules=["wqkv", "wo"], r=2)
    )
    scored = model(encoded, tokens, Sampling(cfg_scale=1.0))
    assert -scored.logp.mean().item() == pytest.approx(data["out/train_loss"].item(), abs=TOLERANCE)
    scored.logp.mean().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("encoded", "columns", "message"),
    [
        (Encoded(torch.zeros(1, dtype=torch.long)), 17, r"\[1, 17\].*images of 16"),
        (Encoded(torch.zeros(2, dtype=torch.long)), 2, "for 2 conditions"),
        (Encoded(torch.zeros(1, 1, 4)), 2, r"a class: conditions \[1, 1, 4\] do not fit"),
    ],
)
def test_a_wrong_call_is_refused(encoded, columns, message):
    with pytest.raises(ValueError, match=message):
        golden_model("A_c2i")(encoded, torch.zeros(1, columns, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 60}, "block_size is 60"),
        ({"hidden_size": 72, "num_attention_heads": 12}, "multiple of 4"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"condition": "image"}, "'image'"),
        ({"cls_token_num": 4}, "cls_token_num is 4"),
    ],
)
def test_an_impossible_geometry_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaGenConfig(**fields)


def test_bfloat16_on_a_cpu_has_the_gradient_of_float32_up_to_rounding():
    """The training pass under autocast, whose attention and norms are computed in float32."""
    model, given = copy.deepcopy(golden_model("A_c2i")), inputs(tensors("A_c2i"))
    gradients = []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(*given).logp.mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
