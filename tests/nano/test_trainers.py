"""Each trainer of the nano world, two steps long on a handful of scenes: it learns, saves what loads, and repeats."""

from __future__ import annotations

import importlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

from argrpo_cli.geneval.nano_detector import load_detector
from argrpo_cli.nano.judge import load_recogniser
from argrpo_cli.nano.make import training
from argrpo_cli.nano.make.study import base_policy
from argrpo_cli.nano.make.train_tokenizer import RunningCodebook
from argrpo_cli.nano.rewards.nano_clip import NanoClip
from argrpo_cli.nano.rewards.nano_critic import NanoCritic
from argrpo_cli.nano.rewards.nano_quality import NanoQuality
from argrpo_cli.nano.tokens import load_tokenizer
from argrpo_cli.policy import load_policy
from argrpo_cli.system.files import WEIGHTS
from tests.emoji import needs_font

SMALL = {
    "tokenizer": {"BATCH": 4, "UNSEEN": 8, "QUANTISED_FROM": 1},
    "policy": {"POOL": 24, "UNSEEN": 12, "BATCH": 8},
    "t2i": {"POOL": 48, "UNSEEN": 16, "BATCH": 8},
    "clip": {"SCENES": 24, "BROKEN_PER_SCENE": 1, "CAPTION_SCENES": 12, "UNSEEN": 24},
    "quality": {"SCENES": 48, "BROKEN_PER_SCENE": 1, "UNSEEN": 24},
    "critic": {"SCENES": 24, "SAMPLES": 24, "UNSEEN": 24},
    "judge": {"SCENES": 48, "REFERENCES": 24},
    "detector": {"SCENES": 24, "UNSEEN": 12, "BATCH": 8},
}
CASES = [*((name, {}) for name in SMALL), ("quality", {"task": "captions"}), ("critic", {"task": "captions"})]
OPENERS = {
    "tokenizer": load_tokenizer,
    "policy": load_policy,
    "t2i": base_policy,
    "clip": NanoClip,
    "quality": NanoQuality,
    "critic": NanoCritic,
    "judge": load_recogniser,
    "detector": load_detector,
}


@needs_font
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_trainer_learns_saves_what_opens_and_repeats(name, options, tmp_path, monkeypatch):
    trainer = importlib.import_module(f"argrpo_cli.nano.train_{name}")
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(trainer, constant, value)
    said, weights = [], {}
    earlier = {} if name == "tokenizer" else {"weights": WEIGHTS}
    for attempt, steps in (("shorter", 1), ("first", 2), ("again", 2)):
        folder = tmp_path / attempt / "network"
        if name == "t2i":  # opened with the tokenizer beside it
            shutil.copytree(WEIGHTS / "nano-vq", folder.with_name("nano-vq"))
        trainer.train(folder, steps=steps, log=said.append, **earlier, **options)
        OPENERS[name](folder)
        weights[attempt] = load_file(folder / "model.safetensors")
    assert any("2/2" in line for line in said)
    assert set(weights["first"]) == set(weights["again"])
    for key, value in weights["first"].items():
        assert value.float().isfinite().all(), key
        assert torch.equal(value, weights["again"][key]), key
    assert any(not torch.equal(value, weights["shorter"][key]) for key, value in weights["first"].items())


def test_the_codebook_follows_the_latents_and_dead_codes_begin_again():
    embedding = torch.nn.functional.normalize(torch.eye(3, 2) + 0.1, dim=-1)
    book = RunningCodebook(embedding.clone(), torch.Generator().manual_seed(0))
    latents = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [1.0, 0.4], [0.1, 1.0]]), dim=-1)
    before = book.sums.clone()
    book.update(latents, torch.tensor([0, 0, 1]))
    for code, total in ((0, latents[0] + latents[1]), (1, latents[2])):
        expected = 0.98 * before[code] + 0.02 * total
        torch.testing.assert_close(book.sums[code], expected)
        torch.testing.assert_close(book.embedding[code], torch.nn.functional.normalize(expected, dim=-1))
    torch.testing.assert_close(book.uses, torch.tensor([1.02, 1.0, 0.98]))
    book.uses[2] = 0.01  # hardly used
    book.update(latents, torch.tensor([0, 0, 1]))
    assert book.uses[2] == 1.0
    assert any(torch.allclose(book.embedding[2], latent) for latent in latents)


@needs_font
def test_the_optimiser_leaves_the_codebook_alone(tmp_path, monkeypatch):
    from argrpo_cli.nano.make import train_tokenizer

    for constant, value in SMALL["tokenizer"].items():
        monkeypatch.setattr(train_tokenizer, constant, value)
    model = train_tokenizer.train(tmp_path / "vq", steps=3, log=lambda line: None)
    weight = model.quantize.embedding.weight
    assert not weight.requires_grad and weight.grad is None
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(len(weight)))


def test_fit_takes_clipped_steps_along_the_curve_and_reports_in_eval_mode():
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(10.0)
    rates, modes = [], []
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)

    def lesson(step):
        modes.append(network.training)
        rates.append(optimizer.param_groups[0]["lr"])
        return 100 * network.weight.sum()  # a gradient of 100, clipped to 0.5

    seen = []
    training.fit(
        network,
        [optimizer],
        5,
        lesson,
        lambda done, loss: seen.append((done, loss, network.training)),
        every=2,
        warmup=2,
        max_grad_norm=0.5,
    )
    curve = training.cosine_with_warmup(2, 5)
    assert rates == pytest.approx([curve(step) for step in range(5)])
    assert network.weight.item() == pytest.approx(10 - 0.5 * sum(rates), abs=1e-4)
    assert [done for done, _, _ in seen] == [2, 4, 5] and not any(training for *_, training in seen)
    assert all(modes) and not network.training
