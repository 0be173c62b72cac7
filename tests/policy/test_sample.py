"""The sampler: published decoding, filters, the sampled distribution and its log-probabilities, seeds."""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch

from argrpo_cli.policy.llamagen import sample as sampler
from argrpo_cli.policy.llamagen.checkpoints import from_published, to_published
from argrpo_cli.policy.llamagen.config import LlamaGenConfig
from argrpo_cli.policy.llamagen.model import Encoded, RMSNorm, attend
from argrpo_cli.policy.llamagen.pretrained import LlamaGenForImageGeneration
from argrpo_cli.policy.llamagen.sample import draw_tokens, packed_linears, sample_tokens
from argrpo_cli.policy.tokens import filter_logits, guide, image_uniforms, inverse_cdf
from argrpo_cli.shapes import Sampling
from argrpo_cli.system.errors import UserError
from tests.formula import formula_weights
from tests.goldens import TOLERANCE, cases, golden_model, max_difference, tensors

GREEDY_RUNS = [
    pytest.param(name, run, id=f"{name}-{run['key']}")
    for name in ("A_c2i", "B_t2i8", "B_t2i120")
    for run in cases()[name]["greedy_runs"]
]


@cache
def tiny_model(vocab_size: int = 8, block_size: int = 4) -> LlamaGenForImageGeneration:
    """A policy small enough to enumerate what it can draw."""
    config = LlamaGenConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        block_size=block_size,
        num_classes=5,
    )
    shapes = {k: v.shape for k, v in to_published(LlamaGenForImageGeneration(config)).items()}
    return from_published(formula_weights(shapes), config)


def teacher_forced(model, class_ids, tokens, guidance=1.0) -> torch.Tensor:
    """Logits [B, T, V] from which each of the given tokens is drawn."""
    with torch.no_grad():
        return model.logits(Encoded(class_ids), tokens, guidance)


def log_probs(model, class_ids, tokens, sampling) -> torch.Tensor:
    """What the training pass makes of the tokens."""
    with torch.no_grad():
        return model(Encoded(class_ids), tokens, sampling).logp


def sample(model, condition, seeds=None, logp=None, **settings):
    """Tokens, or with `logp` the tokens and their log-probabilities."""
    encoded = condition if isinstance(condition, Encoded) else Encoded(condition)
    drawn = sample_tokens(model, encoded, Sampling(**settings), range(len(encoded)) if seeds is None else seeds, logp)
    return drawn if logp else drawn.tokens


def condition_of(name, data, masked=True) -> Encoded:
    """The conditions of a golden case."""
    if name == "A_c2i":
        return Encoded(data["in/gen_labels"])
    return Encoded(data["out/c_indices"], data["out/c_emb_masks"] if masked else None)


# --- the published decoding ---


@pytest.mark.parametrize(("name", "run"), GREEDY_RUNS)
def test_greedy_decoding_and_the_logits_of_every_step(name, run):
    data, model = tensors(name), golden_model(name)
    encoded = condition_of(name, data, run["emb_masks_given"])
    steps = []

    def most_likely(logits, conditional, index):
        steps.append(logits.clone())
        return logits.argmax(-1)

    settings = {"cfg_scale": run["cfg_scale"], "cfg_interval": run["cfg_interval"]}
    tokens = draw_tokens(model, encoded, most_likely, **settings)
    expected = data[f"out/greedy_ids_{run['key']}"].long()
    assert torch.equal(tokens, expected)
    assert max_difference(torch.stack(steps, dim=1), data[f"out/greedy_step_logits_{run['key']}"]) < TOLERANCE
    assert torch.equal(sample(model, encoded, top_k=1, **settings), expected)


@pytest.mark.parametrize("bucketed", [False, True], ids=["exact", "bucketed"])
@pytest.mark.parametrize("name", ["A_c2i", "B_t2i8", "B_t2i120"])
def test_cached_decoding_equals_the_published_cache_and_the_teacher_forced_pass(name, bucketed, monkeypatch):
    """With a step's attention over the filled part, and over whole buckets as on a GPU."""
    monkeypatch.setattr(sampler, "BUCKET", 7)  # a golden image has 16 tokens
    monkeypatch.setattr(sampler, "Decoder", partial(sampler.Decoder, bucketed=bucketed))
    data, model = tensors(name), golden_model(name)
    given, steps = data["in/tokens"], []

    def forced(logits, conditional, index):
        steps.append(logits.clone())
        return given[:, index]

    encoded = Encoded(data["in/labels"]) if name == "A_c2i" else condition_of(name, data)
    assert torch.equal(draw_tokens(model, encoded, forced), given)
    actual = torch.stack(steps, dim=1)
    length = given.shape[1]
    for output in ("kv_logits", "tf_logits"):  # the last position predicts nothing
        assert max_difference(actual, data[f"out/{output}"][:, -length - 1 : -1]) < TOLERANCE


@pytest.mark.parametrize(
    ("cfg_interval", "more"),
    [(-1, {"logp": "guided"}), (5, {"logp": "conditional"}), (5, {"logp": "guided", "top_k": 20, "top_p": 0.9})],
)
def test_bucketed_steps_follow_guidance(cfg_interval, more, monkeypatch):
    """And draws that read their position from a tensor, as those of a graph do."""
    data, model = tensors("B_t2i8"), golden_model("B_t2i8")
    encoded = condition_of("B_t2i8", data)
    settings = {"cfg_scale": 2.5, "cfg_interval": cfg_interval, **more}
    expected = sample(model, encoded, range(len(encoded)), **settings)
    monkeypatch.setattr(sampler, "BUCKET", 7)
    monkeypatch.setattr(sampler, "Decoder", partial(sampler.Decoder, bucketed=True))
    tokens, logprobs = sample(model, encoded, range(len(encoded)), **settings)
    assert torch.equal(tokens, expected[0]) and max_difference(logprobs, expected[1]) < TOLERANCE


def test_packed_linear_layers_compute_the_same_and_leave_no_trace():
    model = copy.deepcopy(golden_model("A_c2i"))
    layer, x = model.model.layers[0].feed_forward.w1, torch.randn(4, 1, model.config.hidden_size)
    plain = layer(x)
    with packed_linears(model, rows=4) as packed:
        assert packed == torch.backends.mkldnn.is_available()
        assert ("forward" in vars(layer)) == packed
        assert max_difference(layer(x), plain) < 1e-5
    assert "forward" not in vars(layer)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with packed_linears(model, rows=4) as packed:
            assert layer(x).dtype == plain.dtype == torch.bfloat16
            assert max_difference(layer(x), plain) < 1e-2


def test_packing_minds_biases_and_leaves_no_trace_of_a_failure(monkeypatch):
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    plain = layer(x)
    with packed_linears(layer, rows=3):
        assert max_difference(layer(x), plain) < 1e-6
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    pack = sampler._packed
    monkeypatch.setattr(sampler, "_packed", lambda layer, rows: pack(layer, rows) if layer is layers[0] else 1 / 0)
    with pytest.raises(ZeroDivisionError), packed_linears(layers, rows=3):
        pass
    assert not any("forward" in vars(layer) for layer in layers)
    with packed_linears(torch.nn.Identity(), rows=3) as packed:
        assert not packed


def test_half_precision_keeps_its_sums_in_float32():
    """The softmax, the norm and guidance; against float64 on the same bfloat16 numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator).bfloat16() for n in (1, 400, 400))
    exact = (0.25 * q.double() @ k.double().transpose(-1, -2)).softmax(-1) @ v.double()
    assert max_difference(attend(q, k, v, None, causal=False).double(), exact) < 2e-3
    norm = RMSNorm(16, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    x = torch.randn(4, 16, generator=generator).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight), "cast back, then scaled, as published"
    torch.testing.assert_close(norm.float()(x.float()), wide * norm.weight, rtol=1e-6, atol=0)
    mixed = norm(x)  # bfloat16 states and float32 weights
    assert torch.equal(mixed, wide.bfloat16() * norm.weight) and mixed.dtype == torch.float32
    conditional, null = torch.full((1, 1), 100.25).bfloat16(), torch.full((1, 1), 100.0).bfloat16()
    conditional[0, 0] = 101.0
    assert guide(conditional, null, 7.5).item() == torch.tensor(107.5).bfloat16().item()


def test_the_noise_of_a_seed_is_torchs_own_stream():
    uniforms = image_uniforms([3, 4], 5, torch.device("cpu"))
    for row, seed in zip(uniforms, (3, 4), strict=True):
        expected = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(row, expected) and row.dtype == torch.float64


def test_a_model_of_peft_is_sampled_with_its_adapters():
    from peft import LoraConfig, get_peft_model

    plain, class_ids = golden_model("A_c2i"), torch.tensor([1, 2])
    tuned = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["wqkv"], init_lora_weights=False))
    settings = {"cfg_scale": 2.0, "seeds": [0, 1], "logp": "guided"}
    assert not torch.equal(sample(tuned, class_ids, **settings)[1], sample(plain, class_ids, **settings)[1])


def test_decoding_works_with_grouped_queries():
    """The published cache cannot; ours must agree with the teacher-forced pass."""
    model, class_ids = golden_model("C_rope", "gqa_kv2"), torch.tensor([1, 7])
    tokens, logprobs = sample(model, class_ids, [0, 1], cfg_scale=1.0, logp="guided")
    assert max_difference(logprobs, log_probs(model, class_ids, tokens, Sampling(cfg_scale=1.0))) < TOLERANCE


@pytest.mark.parametrize(
    ("cfg_scale", "cfg_interval", "guided_tokens"),
    [(1.0, -1, 0), (2.0, -1, 16), (2.0, 0, 2), (2.0, 5, 7)],
)
def test_the_null_half_runs_only_where_guidance_needs_it(cfg_scale, cfg_interval, guided_tokens, monkeypatch):
    model = copy.deepcopy(golden_model("A_c2i"))
    backbone_batches, head_batches = [], []
    run = model.model.run
    monkeypatch.setattr(
        model.model, "run", lambda x, *rest, **more: backbone_batches.append(len(x)) or run(x, *rest, **more)
    )
    model.lm_head.register_forward_pre_hook(lambda head, given: head_batches.append(len(given[0])))
    sample(model, torch.tensor([3, 4]), [0, 1], cfg_scale=cfg_scale, cfg_interval=cfg_interval)
    assert backbone_batches == [4] * guided_tokens + [2] * (16 - guided_tokens)
    assert head_batches == [2] * 16, "one head pass a token, for the conditional batch only"


# --- filters ---


@pytest.mark.parametrize("run", cases()["D_filter"]["filter_runs"], ids=lambda run: run["key"])
def test_filters(run):
    data = tensors("D_filter")
    logits = data["in/logits"].clone()
    actual = filter_logits(logits, run["temperature"], run["top_k"], run["top_p"]).softmax(-1)
    expected = data[f"out/{run['key']}"]
    assert torch.equal(actual > 0, expected > 0)
    assert max_difference(actual, expected) < 1e-5
    assert torch.equal(logits, data["in/logits"]), "the argument is left as it is"


def test_tokens_that_tie_with_the_kth_stay():
    data = tensors("D_filter")
    actual = filter_logits(data["in/logits_ties"], 1.0, 5, 1.0).softmax(-1)
    assert ((actual > 0).sum(-1) == 7).all()
    assert max_difference(actual, data["out/ties_probs_k5_p1_T1"]) < 1e-5


def test_temperature_zero_is_one_hot():
    data = tensors("D_filter")
    actual = filter_logits(data["in/logits"], 0.0).softmax(-1)
    assert max_difference(actual, data["out/probs_k0_p1_T0"]) < 1e-5


def test_top_p_zero_keeps_one_token_and_a_large_top_k_keeps_all():
    logits = tensors("D_filter")["in/logits"]
    one = filter_logits(logits, 1.0, 0, 0.0)
    assert torch.equal(one.isfinite().sum(-1), torch.ones(4, dtype=torch.long))
    assert torch.equal(one.argmax(-1), logits.argmax(-1))
    assert torch.equal(filter_logits(logits, 1.0, 1000, 1.0), logits)


def test_the_inverse_cdf_skips_impossible_tokens_at_both_ends():
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 0.0, -inf]])
    below_one = 1 - 2**-53
    for uniform, token in [(0.0, 1), (0.49999, 1), (0.5, 3), (below_one, 3)]:
        assert inverse_cdf(logits, torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_the_inverse_cdf_is_right_where_the_probabilities_do_not_sum_to_one():
    """In float32 they sum to a little less or more than 1; the last token is impossible here."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator) * 3
    logits[:, -1] = float("-inf")
    tokens = inverse_cdf(logits, torch.full((64,), 1 - 2**-53, dtype=torch.float64))
    assert (tokens < 999).all()


def test_the_inverse_cdf_resolves_a_published_vocabulary():
    cells, some = 16384, torch.arange(0, 16384, 101)
    middles = (some.double() + 0.5) / cells
    assert torch.equal(inverse_cdf(torch.zeros(len(some), cells), middles), some)


def test_the_inverse_cdf_cuts_the_unit_interval_by_the_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    uniforms = torch.tensor([0.05, 0.15, 0.29, 0.31, 0.59, 0.61, 0.99], dtype=torch.float64)
    tokens = inverse_cdf(logits.expand(7, -1), uniforms)
    assert tokens.tolist() == [0, 1, 1, 2, 2, 3, 3]


# --- what is sampled, and its log-probability ---


def test_guided_logprob_equals_the_teacher_forced_guided_pass():
    model, class_ids = golden_model("A_c2i"), torch.tensor([0, 3, 9, 10])
    sampling = Sampling(cfg_scale=3.0, temperature=0.8)
    tokens, logprobs = sample_tokens(model, Encoded(class_ids), sampling, seeds=range(4), logp="guided")
    assert max_difference(logprobs, log_probs(model, class_ids, tokens, sampling)) < TOLERANCE
    assert logprobs.dtype == torch.float32 and not logprobs.requires_grad


def test_conditional_logprob_equals_the_teacher_forced_conditional_pass():
    model, class_ids = golden_model("A_c2i"), torch.tensor([0, 3, 9, 10])
    tokens, logprobs = sample(model, class_ids, range(4), cfg_scale=3.0, logp="conditional", temperature=0.8, top_k=20)
    expected = log_probs(model, class_ids, tokens, Sampling(cfg_scale=1.0, temperature=0.8))
    assert max_difference(logprobs, expected) < TOLERANCE


def test_guided_logprob_knows_temperature_and_filters():
    model, class_ids = golden_model("A_c2i"), torch.tensor([0, 3, 9])
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    tokens, logprobs = sample(model, class_ids, range(3), cfg_scale=2.0, logp="guided", **settings)
    logits = teacher_forced(model, class_ids, tokens, guidance=2.0)
    logp = filter_logits(logits.flatten(0, 1), **settings).log_softmax(-1).view_as(logits)
    assert max_difference(logprobs, logp.gather(-1, tokens[..., None])[..., 0]) < TOLERANCE


def test_asking_for_logprobs_changes_no_token():
    model, class_ids = golden_model("A_c2i"), torch.tensor([0, 3, 9])
    plain = sample(model, class_ids, range(3), cfg_scale=2.0)
    for kind in ("guided", "conditional"):
        tokens, _ = sample(model, class_ids, range(3), cfg_scale=2.0, logp=kind)
        assert torch.equal(tokens, plain)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_sampled_frequencies_match_the_guided_distribution(cfg_scale):
    """Chi-square on the first two tokens of 20,000 images; 63 degrees of freedom, limit at p = 1e-4."""
    model, draws, label = tiny_model(), 20_000, 2
    tokens = sample(model, torch.full((draws,), label), range(draws), cfg_scale=cfg_scale)
    counts = torch.bincount(tokens[:, 0] * 8 + tokens[:, 1], minlength=64).double()

    def chi_square(guidance):
        prefixes = torch.zeros(8, 4, dtype=torch.long)
        prefixes[:, 0] = torch.arange(8)
        probs = teacher_forced(model, torch.full((8,), label), prefixes, guidance).double().softmax(-1)
        expected = (probs[:, 0].gather(1, prefixes[:, :1]) * probs[:, 1]).flatten() * draws
        return ((counts - expected) ** 2 / expected).sum().item()

    assert chi_square(cfg_scale) < 113.5
    assert chi_square(1.5) > 500, "the test must be able to tell another guidance scale"


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_condition_and_a_seed_give_the_same_image_in_any_batch(batch_size):
    model = golden_model("A_c2i")
    class_ids, seeds = torch.tensor([0, 1, 2, 3, 4, 3, 3, 9]), [5, 6, 7, 8, 9, 8, 10, 2**40]
    whole = sample(model, class_ids, seeds, cfg_scale=2.0)
    parts = [
        sample(model, class_ids[i : i + batch_size], seeds[i : i + batch_size], cfg_scale=2.0)
        for i in range(0, 8, batch_size)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole[3], whole[5]), "same class, same seed"
    assert not torch.equal(whole[3], whole[6]), "same class, another seed"


def test_seeds_do_not_touch_the_global_generator():
    model = golden_model("A_c2i")
    before = torch.get_rng_state()
    sample(model, torch.tensor([3]), [1], cfg_scale=2.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_leaves_the_model_able_to_train():
    model = copy.deepcopy(golden_model("A_c2i"))
    tokens = sample(model, torch.tensor([1]), [0], cfg_scale=2.0)
    model(Encoded(torch.tensor([1])), tokens.clone()).logp.mean().backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampling_in_half_precision_and_under_autocast(dtype):
    model, class_ids = golden_model("A_c2i"), torch.tensor([1, 2])
    kwargs = {"cfg_scale": 2.0, "seeds": [0, 1], "logp": "guided"}
    tokens, logprobs = sample(copy.deepcopy(model).to(dtype), class_ids, **kwargs)
    assert tokens.shape == (2, 16) and logprobs.dtype == torch.float32 and logprobs.isfinite().all()
    with torch.autocast("cpu", dtype=dtype):
        tokens, logprobs = sample(model, class_ids, **kwargs)
    assert tokens.shape == (2, 16) and logprobs.isfinite().all()


def test_broken_weights_are_reported_instead_of_sampled():
    model = copy.deepcopy(golden_model("A_c2i"))
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        sample(model, torch.tensor([1]), [0], cfg_scale=2.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"condition": torch.tensor([11])}, "0 .. 10"),
        ({"condition": torch.tensor([-1])}, "0 .. 10"),
        ({"seeds": [1, 2]}, "2 seeds for 1 conditions"),
        ({"logp": "both"}, "'both'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(golden_model("A_c2i"), **{"condition": torch.tensor([0]), **kwargs})


def test_a_setting_out_of_range_is_named():
    with pytest.raises(UserError, match=r"sampling\.top_p 1\.5: must be above 0, at most 1"):
        sample(golden_model("A_c2i"), torch.tensor([0]), top_p=1.5)


def test_frozen_weights_are_cast_once_for_all_tokens():
    """Autocast forgets its casts of weights that require no gradient, as all of a model with adapters are."""

    def casts(trainable):
        model = copy.deepcopy(golden_model("A_c2i")).requires_grad_(trainable)
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            tokens = sample(model, torch.tensor([0, 1]), [0, 1], cfg_scale=2.0)
        assert all(weight.requires_grad == trainable for weight in model.parameters())
        return tokens, sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")

    (frozen, of_frozen), (free, of_free) = casts(False), casts(True)
    assert torch.equal(frozen, free) and of_frozen == of_free


def test_under_autocast_a_cache_of_half_the_size_gives_the_same_images(monkeypatch):
    """Keys and values are computed in autocast's precision, so a float32 cache holds nothing more."""
    data, model = tensors("A_c2i"), golden_model("A_c2i")
    encoded = condition_of("A_c2i", data)

    def drawn():
        with torch.autocast("cpu", torch.bfloat16):
            return sample(model, encoded, range(len(encoded)), cfg_scale=2.0, logp="guided")

    tokens, logp = drawn()
    small = sampler.new_cache
    kinds = set()

    def wide(*arguments):
        cache = small(*arguments)
        kinds.update(part.dtype for pair in cache for part in pair)
        return [(keys.float(), values.float()) for keys, values in cache]

    monkeypatch.setattr(sampler, "new_cache", wide)
    again, logp_again = drawn()
    assert kinds == {torch.bfloat16}
    assert torch.equal(tokens, again) and torch.equal(logp, logp_again)
