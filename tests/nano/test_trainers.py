"""Each trainer of the nano world, two steps long on a handful of scenes: it learns, saves what loads, and repeats."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file

from argrpo_cli.errors import UserError
from argrpo_cli.nano import WEIGHTS, scenes, training

SMALL = {
    "policy": {"POOL": 250, "UNSEEN": 250, "BATCH": 8},
    "t2i": {"POOL": 48, "UNSEEN": 16, "BATCH": 8},
    "clip": {"SCENES": 24, "BROKEN_PER_SCENE": 1, "CAPTION_SCENES": 12, "UNSEEN": 24},
    "quality": {"SCENES": 48, "BROKEN_PER_SCENE": 1, "UNSEEN": 24},
    "critic": {"SCENES": 24, "SAMPLES": 24, "UNSEEN": 24},
    "judge": {"SCENES": 48, "REFERENCES": 24},
    "detector": {"SCENES": 24, "UNSEEN": 12, "BATCH": 8},
}
CASES = [*((name, {}) for name in SMALL), ("quality", {"task": "captions"}), ("critic", {"task": "captions"})]


def font_missing() -> bool:
    try:
        scenes.find_font()
    except UserError:
        return True
    return False


@pytest.mark.skipif(font_missing(), reason="training scenes are rendered with the font Noto Color Emoji")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_trainer_learns_saves_and_repeats(name, options, tmp_path, monkeypatch):
    trainer = importlib.import_module(f"argrpo_cli.nano.train_{name}")
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(trainer, constant, value)
    said = []
    for attempt in ("first", "again"):
        trainer.train(tmp_path / attempt / name, steps=2, weights=WEIGHTS, log=said.append, **options)
    assert any("2/2" in line for line in said)
    first, again = (load_file(tmp_path / attempt / name / "model.safetensors") for attempt in ("first", "again"))
    assert set(first) == set(again)
    for key, value in first.items():
        assert value.float().isfinite().all(), key
        assert torch.equal(value, again[key]), key


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
