"""What a batch of images leaves for the next one: the room that graphs are recorded over."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch

from argrpo_cli.policy.llamagen import sample as sampler
from argrpo_cli.policy.llamagen.model import Encoded
from argrpo_cli.policy.protocol import Drawn
from argrpo_cli.shapes import Sampling
from tests.goldens import golden_model


def sample(model: torch.nn.Module, seeds: Sequence[int], cfg_scale: float) -> Drawn:
    return sampler.sample_tokens(model, Encoded(torch.tensor([1, 2, 3])), Sampling(cfg_scale), seeds, "guided")


def test_a_room_serves_the_next_batch_that_is_alike(monkeypatch):
    """As on a GPU, where graphs are recorded over it."""
    model, twin = copy.deepcopy(golden_model("A_c2i")), golden_model("A_c2i")
    made = []
    new_cache, room_of = sampler.new_cache, sampler.rooms.get
    monkeypatch.setattr(sampler, "new_cache", lambda *given: made.append(given) or new_cache(*given))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))
    monkeypatch.setattr(sampler, "keeps_rooms", lambda one: one is model and not one.training)
    bucketed = partial(sampler.Decoder, bucketed=True)
    monkeypatch.setattr(sampler, "Decoder", bucketed)

    def rooms_made(seeds, cfg_scale=2.0):
        """How many, for a batch that is drawn as one without any history is."""
        before = len(made)
        drawn = sample(model, seeds, cfg_scale)
        count = len(made) - before
        twin_drawn = sample(twin, seeds, cfg_scale)
        assert torch.equal(drawn[0], twin_drawn[0]) and torch.equal(drawn[1], twin_drawn[1])
        return count

    assert [rooms_made([0, 1, 2]), rooms_made([3, 4, 5]), rooms_made([3, 4, 5], 3.0)] == [1, 0, 1]
    with torch.inference_mode():
        for part in (one for pair in room_of(model)[1].past for one in pair):
            part.fill_(torch.nan)  # as weights that were broken for a while leave them
    assert rooms_made([0, 1, 2], 3.0) == 0
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert rooms_made([0, 1, 2], 3.0) == 1, "a graph would read the weight where it was"
    model.train()
    assert rooms_made([0, 1, 2], 3.0) == 1 and room_of(model) is None
    model.eval()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**10))
    assert [rooms_made([0, 1, 2]), rooms_made([0, 1, 2])] == [1, 1], "it takes too much of the memory to be kept"


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
