"""The network against the published one: logits, training call, gradients, masks, guided backbone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from argrpo_cli.policy.llamagen.checkpoints import RENAMES
from argrpo_cli.policy.llamagen.config import SIZES, LlamaGenConfig, published_config
from argrpo_cli.policy.llamagen.modeling import (
    LlamaGenForImageGeneration,
    LlamaGenModel,
    caption_attention_mask,
    left_pad,
)
from tests.goldens import TOLERANCE, cases, golden_model, max_difference, tensors

CAPTION_CASES = ["B_t2i8", "B_t2i120"]
PUBLISHED_PARAMETERS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
}


def class_ids_and_tokens(data: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    return torch.cat([data[f"in/{prefix}labels"][:, None], data[f"in/{prefix}tokens"]], dim=1)


def caption_inputs(data: dict[str, torch.Tensor]) -> torch.Tensor:
    """Placeholders for the caption rows, then the tokens."""
    rows = data["in/caption_embs"].shape[1]
    return F.pad(data["in/tokens"], (rows, 0))


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
    with torch.no_grad():
        logits = model(class_ids_and_tokens(data)).logits
    assert max_difference(logits, data["out/tf_logits"]) < TOLERANCE


def test_class_conditional_training_call():
    data, model = tensors("A_c2i"), copy.deepcopy(golden_model("A_c2i"))
    logits = model(class_ids_and_tokens(data)[:, :-1]).logits
    check_training_call(model, logits, data["in/tokens"], data, cases()["A_c2i"]["train_grad_names"])


@pytest.mark.parametrize("kv_heads", ["gqa_kv2", "gqa_kv1"])
def test_grouped_query_attention(kv_heads):
    data = tensors("C_rope")
    with torch.no_grad():
        logits = golden_model("C_rope", kv_heads)(class_ids_and_tokens(data, f"{kv_heads}_")).logits
    assert max_difference(logits, data[f"out/{kv_heads}_tf_logits"]) < TOLERANCE


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
    features = data["out/c_indices"]
    if output == "tf_uncond_logits":
        features = model.model.null_caption.expand_as(features)
    mask = None if output == "tf_nomask_logits" else data["out/c_emb_masks"]
    with torch.no_grad():
        logits = model(caption_inputs(data), condition_features=features, condition_mask=mask).logits
    expected = data[f"out/{output}"]
    assert max_difference(logits[:, -expected.shape[1] :], expected) < TOLERANCE


def test_the_caption_mask_may_come_inside_the_attention_mask():
    data, model = tensors("B_t2i8"), golden_model("B_t2i8")
    attention_mask = F.pad(data["out/c_emb_masks"], (0, data["in/tokens"].shape[1]), value=1)
    with torch.no_grad():
        logits = model(caption_inputs(data), attention_mask, condition_features=data["out/c_indices"]).logits
    assert max_difference(logits, data["out/tf_logits"]) < TOLERANCE


@pytest.mark.parametrize("case", CAPTION_CASES)
def test_caption_conditional_training_call(case):
    data, model = tensors(case), copy.deepcopy(golden_model(case))
    logits = model(
        caption_inputs(data)[:, :-1],
        condition_features=data["out/c_indices"],
        condition_mask=data["out/c_emb_masks"],
    ).logits
    logits = logits[:, model.config.cls_token_num - 1 :]
    check_training_call(model, logits, data["in/tokens"], data, cases()[case]["train_grad_names"])


def test_real_size_b_log_probabilities_and_entropies():
    """GPT-B at 256 px, 111 million parameters: conditional, null, and guided by the backbone."""
    data, model = tensors("G_gptB"), golden_model("G_gptB")
    tokens, null = data["in/tokens"], torch.tensor([model.config.num_classes])
    scale = data["in/cfg_scale"].item()
    runs = [("cond", data["in/label"], None), ("uncond", null, None), ("guided", data["in/label"], scale)]
    for name, label, guidance in runs:
        model.guidance_scale = guidance
        with torch.no_grad():
            logits = model(torch.cat([label[:, None], tokens[:, :-1]], dim=1)).logits
        model.guidance_scale = None
        assert max_difference(logits[:, ::32, ::512], data[f"out/{name}_logits_sub"]) < TOLERANCE, name
        logp = logits[0].double().log_softmax(-1)
        target = logp.gather(-1, tokens[0][:, None])[:, 0]
        assert max_difference(target, data[f"out/{name}_target_logp"]) < TOLERANCE, name
        if name != "uncond":
            entropy = -(logp.exp() * logp).sum(-1)
            assert max_difference(entropy, data[f"out/{name}_entropy"]) < TOLERANCE, name


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


@pytest.mark.parametrize("scale", [2.0, 7.5])
def test_guided_backbone_equals_guided_logits_for_classes(scale):
    data, model = tensors("A_c2i"), copy.deepcopy(golden_model("A_c2i"))
    ids = class_ids_and_tokens(data)
    null_ids = ids.clone()
    null_ids[:, 0] = model.config.num_classes
    with torch.no_grad():
        conditional, null = model(ids).logits, model(null_ids).logits
        model.guidance_scale = scale
        guided = model(ids).logits
    assert max_difference(guided, null + scale * (conditional - null)) < TOLERANCE
    assert max_difference(guided, conditional) > 0.1


@pytest.mark.parametrize("case", CAPTION_CASES)
def test_guided_backbone_equals_guided_logits_for_captions(case):
    data, model = tensors(case), copy.deepcopy(golden_model(case))
    model.guidance_scale = 3.0
    with torch.no_grad():
        guided = model(
            caption_inputs(data),
            condition_features=data["out/c_indices"],
            condition_mask=data["out/c_emb_masks"],
        ).logits
    conditional, null = data["out/tf_logits"], data["out/tf_uncond_logits"]
    expected = null + 3.0 * (conditional - null)
    assert max_difference(guided[:, -expected.shape[1] :], expected) < TOLERANCE


@pytest.mark.parametrize("scale", [None, 0.5, 1.0])
def test_no_guidance_up_to_scale_one(scale):
    data, model = tensors("A_c2i"), copy.deepcopy(golden_model("A_c2i"))
    model.guidance_scale = scale
    with torch.no_grad():
        assert max_difference(model(class_ids_and_tokens(data)).logits, data["out/tf_logits"]) < TOLERANCE


def test_guided_gradients_reach_both_the_class_and_the_null_row():
    data, model = tensors("A_c2i"), copy.deepcopy(golden_model("A_c2i"))
    ids = class_ids_and_tokens(data)[:1]
    model.guidance_scale = 2.0
    model(ids, labels=ids).loss.backward()
    rows = model.model.class_embedding.weight.grad.norm(dim=1).nonzero().flatten().tolist()
    assert sorted(rows) == sorted({ids[0, 0].item(), model.config.num_classes})


def test_labels_give_the_mean_cross_entropy_of_the_next_token():
    data, model = tensors("A_c2i"), golden_model("A_c2i")
    ids = class_ids_and_tokens(data)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        assert loss == pytest.approx(data["out/train_loss"].item(), abs=TOLERANCE)
        half = ids.clone()
        half[:, 8:] = -100
        logits = model(ids).logits
        expected = F.cross_entropy(logits[:, :7].flatten(0, 1), ids[:, 1:8].flatten())
        assert model(ids, labels=half).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    data = tensors("A_c2i")
    ids = class_ids_and_tokens(data)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(golden_model("A_c2i")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-7)


def test_bfloat16_stays_near_float32():
    data = tensors("A_c2i")
    model = copy.deepcopy(golden_model("A_c2i")).to(torch.bfloat16)
    with torch.no_grad():
        logits = model(class_ids_and_tokens(data)).logits
    assert logits.dtype == torch.float32
    assert (logits - data["out/tf_logits"]).abs().mean() < 0.02


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
    # What TRL asks of a model and of its configuration.
    assert loaded.config.auto_map == {}
    assert loaded.generation_config is not None
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


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_trl_fused_head_gives_our_log_probabilities_and_entropies(guidance):
    from trl.trainer.utils import add_fused_lm_head

    data, model = tensors("A_c2i"), copy.deepcopy(golden_model("A_c2i"))
    ids = class_ids_and_tokens(data)
    model.guidance_scale = guidance
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].log_softmax(-1)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        labels = ids.clone()
        labels[:, 0] = -100
        fused = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    assert max_difference(fused.log_probs, logp.gather(-1, ids[:, 1:, None])[..., 0]) < TOLERANCE
    assert max_difference(fused.entropy, -(logp.exp() * logp).sum(-1)) < TOLERANCE


def test_lora_of_peft_fits():
    peft = pytest.importorskip("peft")
    data = tensors("A_c2i")
    ids = class_ids_and_tokens(data)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["wqkv", "wo"], r=2)
    model = peft.get_peft_model(copy.deepcopy(golden_model("A_c2i")), config)
    output = model(input_ids=ids, labels=ids)
    assert max_difference(output.logits.detach(), data["out/tf_logits"]) < TOLERANCE
    output.loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_generate_says_where_sampling_lives():
    with pytest.raises(NotImplementedError, match="sample_tokens"):
        golden_model("A_c2i").generate(torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"columns": 18}, "18 columns"),
        ({"columns": 2, "output_hidden_states": True}, "last_hidden_state only"),
        ({"columns": 2, "condition_features": torch.zeros(1, 1, 4)}, "class"),
    ],
)
def test_a_wrong_call_is_refused(kwargs, message):
    rest = {key: value for key, value in kwargs.items() if key != "columns"}
    with pytest.raises(ValueError, match=message):
        golden_model("A_c2i")(torch.zeros(1, kwargs["columns"], dtype=torch.long), **rest)


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
