"""Drawing on a GPU: graphs against steps as they are, and the same images for a seed as on a CPU, in all families."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from argrpo_cli.policy import load_policy
from argrpo_cli.policy.llamagen import sample as sampler
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.llamagen.sample import sample_tokens
from argrpo_cli.shapes import Sampling
from tests.goldens import TOLERANCE, golden_model, max_difference, tensors
from tests.gpu.test_goldens import on
from tests.policy import var_reference
from tests.policy.test_sample import condition_of
from tests.policy.tiny_janus import PROMPTS, tiny_janus
from tests.training.tiny import tiny_caption_policy, tiny_policy, tiny_text_encoder

pytestmark = pytest.mark.gpu
FILTERED = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}


class Unrecorded(sampler.Decoder):
    """The same kernels, launched one by one."""

    def _repeat(self, graphs, key, job):
        job()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["A_c2i", "B_t2i8", "B_t2i120"])
@pytest.mark.parametrize("more", [{"cfg_scale": 1.0}, {"cfg_interval": 5}, FILTERED])
@pytest.mark.parametrize("logp", ["guided", "conditional"])
def test_graphs_draw_what_steps_as_they_are_draw(device, name, autocast, more, logp, monkeypatch):
    """Token by token, in the first batch and in the next one, which finds the graphs of the first; in float32 also
    against steps that attend to the filled part alone, by other kernels."""
    model, encoded = copy.deepcopy(golden_model(name)).to(device), on(device, condition_of(name, tensors(name)))
    sampling, count = Sampling(**{"cfg_scale": 2.5, **more}), len(encoded)
    monkeypatch.setattr(sampler, "BUCKET", 8)
    recorded = sampler.Decoder

    def drawn(decoder):
        monkeypatch.setattr(sampler, "Decoder", decoder)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return [sample_tokens(model, encoded, sampling, range(at, at + count), logp) for at in (0, 100)]

    batches = drawn(recorded)
    assert (model in sampler.rooms) == (device == "cuda" and not autocast)
    ways = [Unrecorded] if autocast else [Unrecorded, partial(recorded, bucketed=False)]
    for decoder in ways:
        for (tokens, logprobs), (others, expected) in zip(batches, drawn(decoder), strict=True):
            assert torch.equal(tokens, others)
            assert max_difference(logprobs, expected) < TOLERANCE


def test_graphs_read_the_weights_as_they_are_now(device, monkeypatch):
    monkeypatch.setattr(sampler, "BUCKET", 8)
    model, encoded = copy.deepcopy(golden_model("A_c2i")).to(device), Encoded(torch.arange(4, device=device))
    sample_tokens(model, encoded, Sampling(2.0), range(4))
    with torch.no_grad():
        model.model.layers[0].feed_forward.w2.weight.mul_(-1)
    again = sample_tokens(model, encoded, Sampling(2.0), range(4), "guided")
    fresh = sample_tokens(copy.deepcopy(model), encoded, Sampling(2.0), range(4), "guided")
    assert torch.equal(again.tokens, fresh.tokens) and max_difference(again.logp, fresh.logp) < TOLERANCE


def test_a_seed_gives_the_tokens_that_it_gives_on_a_cpu(device):
    cpu, model = golden_model("A_c2i"), copy.deepcopy(golden_model("A_c2i")).to(device)
    classes = torch.arange(8)
    for settings in ({}, FILTERED):
        sampling = Sampling(2.0, **settings)
        tokens, logp = sample_tokens(cpu, Encoded(classes), sampling, range(8), "guided")
        others, other_logp = sample_tokens(model, Encoded(classes.to(device)), sampling, range(8), "guided")
        assert torch.equal(tokens, others.cpu()) and max_difference(logp, other_logp.cpu()) < TOLERANCE


@pytest.mark.parametrize("family", ["llamagen", "janus", "var"])
def test_every_family_draws_scores_and_decodes_as_on_a_cpu(device, family, tmp_path):
    if family == "llamagen":
        policies, requests = [tiny_policy(), tiny_policy()], [0, 1, 2, 3]
    elif family == "janus":
        policies, requests = [tiny_janus(), tiny_janus()], [*PROMPTS, *PROMPTS]
    else:
        torch.save(var_reference.random_tokenizer(), tmp_path / "vae_ch160v4096z32.pth")
        torch.save(var_reference.random_policy(), tmp_path / "mine.pth")
        policies, requests = [load_policy(tmp_path / "mine.pth") for _ in range(2)], [0, 1, 2, 3]
    cpu, gpu = policies
    gpu.model.to(device)
    gpu.tokenizer.to(device)
    sampling, seeds = Sampling(2.0), range(len(requests))
    drawn, scored, images = [], [], []
    for policy in (cpu, gpu):
        encoded = policy.encode(policy.conditions(requests))
        drawn.append(policy.sample(encoded, sampling, seeds, logp="guided"))
        with torch.no_grad():
            scored.append(policy.model(encoded, drawn[-1].tokens.clone(), sampling, True))
        images.append(policy.decode(drawn[-1].tokens).cpu().int())
    assert torch.equal(drawn[0].tokens, drawn[1].tokens.cpu())
    assert max_difference(drawn[0].logp, drawn[1].logp.cpu()) < TOLERANCE
    for ours, theirs in ((scored[0].logp, scored[1].logp), (scored[0].entropy, scored[1].entropy)):
        assert max_difference(ours, theirs.cpu()) < TOLERANCE
    assert (images[0] - images[1]).abs().max() <= 1


def test_a_text_encoder_is_offloaded_and_reads_the_same(device):
    prompts, there, away = ["a red dog", "a blue cat"], tiny_text_encoder(), tiny_text_encoder()
    there.place(device)
    away.place(device, "offload")
    features, masks = zip(*(encoder.encode(prompts, 6) for encoder in (there, away)), strict=True)
    assert torch.equal(features[0], features[1]) and torch.equal(masks[0], masks[1])
    assert max_difference(features[0], tiny_text_encoder().encode(prompts, 6)[0]) < TOLERANCE
    assert {str(weight.device).split(":")[0] for weight in away.model.parameters()} == {"cpu"}
    policy = tiny_caption_policy()
    policy.model.to(device)
    policy.text_encoder.place(device, "offload")
    encoded = policy.encode(policy.conditions(prompts))
    assert policy.sample(encoded, Sampling(2.0), [0, 1]).tokens.shape == (2, 16)
