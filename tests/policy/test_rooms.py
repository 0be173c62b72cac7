"""What a batch of images leaves for the next one: the room that graphs are recorded over."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from argrpo_cli.policy.llamagen import sample as sampler
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.shapes import Sampling
from tests.goldens import golden_model, max_difference, tensors
from tests.policy.tape import Taped
from tests.policy.test_sample import condition_of


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: packed weights are copies, which a record would hold on to."""
    monkeypatch.setattr(sampler, "_can_pack", lambda module: False)


def sample(model: torch.nn.Module, seeds: Sequence[int], cfg_scale: float) -> Drawn:
    return sampler.sample_tokens(model, Encoded(torch.tensor([1, 2, 3])), Sampling(cfg_scale), seeds, "guided")


def test_a_room_serves_the_next_batch_that_is_alike(monkeypatch):
    """With what was recorded over it, as the graphs of a GPU are."""
    model, twin = (copy.deepcopy(golden_model("A_c2i")) for _ in range(2))
    made = []
    new_cache, room_of = sampler.new_cache, sampler.rooms.get
    monkeypatch.setattr(sampler, "new_cache", lambda *given: made.append(given) or new_cache(*given))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))
    monkeypatch.setattr(sampler, "keeps_rooms", lambda one: one is model and not one.training)

    def rooms_made(seeds, cfg_scale=2.0):
        """How many, for a batch that is drawn as one without any history is."""
        before = len(made)
        with monkeypatch.context() as taped:
            taped.setattr(sampler, "Decoder", Taped)
            drawn = sample(model, seeds, cfg_scale)
        count = len(made) - before
        expected = sample(twin, seeds, cfg_scale)
        assert torch.equal(drawn.tokens, expected.tokens) and max_difference(drawn.logp, expected.logp) < 1e-4
        return count

    assert [rooms_made([0, 1, 2]), rooms_made([3, 4, 5]), rooms_made([3, 4, 5], 3.0)] == [1, 0, 1]
    with torch.inference_mode():
        for part in (one for pair in room_of(model)[1].past for one in pair):
            part.fill_(torch.nan)  # as weights that were broken for a while leave them
    assert rooms_made([0, 1, 2], 3.0) == 0
    with torch.no_grad():
        for one in (model, twin):
            one.model.layers[0].feed_forward.w2.weight.mul_(-1)
    assert rooms_made([0, 1, 2], 3.0) == 0, "what is recorded reads the weights as they are"
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert rooms_made([0, 1, 2], 3.0) == 1, "a graph would read the weight where it was"
    model.train()
    assert rooms_made([0, 1, 2], 3.0) == 1 and room_of(model) is None
    model.eval()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**10))
    assert [rooms_made([0, 1, 2]), rooms_made([0, 1, 2])] == [1, 1], "it takes too much of the memory to be kept"


@pytest.mark.parametrize("name", ["A_c2i", "B_t2i8"])
@pytest.mark.parametrize(
    "settings",
    [{"cfg_scale": 1.0}, {"cfg_interval": 5}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}],
)
@pytest.mark.parametrize("logp", ["guided", "conditional"])
def test_steps_and_choices_that_are_repeated_from_a_record_draw_the_same(name, settings, logp, monkeypatch):
    model, encoded = golden_model(name), condition_of(name, tensors(name))
    sampling, seeds = Sampling(**{"cfg_scale": 2.5, **settings}), range(len(encoded))
    monkeypatch.setattr(sampler, "BUCKET", 7)
    plain = sampler.sample_tokens(model, encoded, sampling, seeds, logp)
    monkeypatch.setattr(sampler, "Decoder", Taped)
    taped = sampler.sample_tokens(model, encoded, sampling, seeds, logp)
    assert torch.equal(plain.tokens, taped.tokens) and max_difference(plain.logp, taped.logp) < 1e-4


def test_rooms_are_kept_on_a_gpu_alone_and_go_with_their_model(monkeypatch):
    model = copy.deepcopy(golden_model("A_c2i"))
    assert not sampler.keeps_rooms(model)
    sample(model, [0, 1, 2], 2.0)
    assert model not in sampler.rooms
    sampler.rooms[model] = None, None
    count = len(sampler.rooms)
    del model
    gc.collect()
    assert len(sampler.rooms) == count - 1
