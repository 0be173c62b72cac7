"""Each lesson of the nano world, two steps long on a handful of scenes: it learns, saves what loads, and repeats."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from argrpo_cli.cli.app import app
from argrpo_cli.geneval.nano_detector import load_detector
from argrpo_cli.nano.judge import RecognitionNet
from argrpo_cli.nano.make import build, fit, judges
from argrpo_cli.nano.make.fit import Lesson, Setting
from argrpo_cli.nano.make.policies import RunningCodebook, base_policy
from argrpo_cli.nano.tokens import load_held_out, load_tokenizer
from argrpo_cli.networks.weights import load_weights
from argrpo_cli.policy import load_policy
from argrpo_cli.rewards.nano import NanoClip, NanoCritic, NanoQuality
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import WEIGHTS
from tests.emoji import no_font  # noqa: F401

SMALL = {
    "nano-vq": {"batch": 4, "unseen": 8, "quantised_from": 1},
    "nano-c2i": {"pool": 24, "unseen": 12, "batch": 8},
    "nano-t2i": {"pool": 48, "unseen": 16, "batch": 8},
    "nano-janus": {"pool": 48, "unseen": 16, "batch": 8},
    "nano-clip": {"clean": 24, "broken": 1, "captioned": 12, "unseen": 24},
    "nano-quality": {"clean": 48, "broken": 1, "unseen": 24},
    "nano-quality-t2i": {"clean": 24, "broken": 1, "unseen": 24, "batch": (4, 8)},
    "nano-critic": {"clean": 24, "samples": 12, "unseen": 12},
    "nano-critic-t2i": {"clean": 12, "samples": 6, "unseen": 6},
    "nano-judge": {"count": 48, "references": 24},
    "nano-detector": {"count": 24, "unseen": 12, "batch": 8},
}
CAPTION_TASKS = ("nano-quality-t2i", "nano-critic-t2i")  # of lessons that repeat as their other task does
OPENERS = {
    "nano-vq": load_tokenizer,
    "nano-c2i": load_policy,
    "nano-t2i": base_policy,
    "nano-janus": load_policy,
    "nano-clip": lambda folder: NanoClip(folder=folder),
    "nano-quality": lambda folder: NanoQuality(folder=folder),
    "nano-critic": lambda folder: NanoCritic(folder=folder),
    "nano-judge": lambda folder: load_weights(RecognitionNet(**judges.JUDGE["recogniser"]), folder),
    "nano-detector": load_detector,
}
# The first losses of some lessons in float32 on `shapes`, as the trainers before this loop had them.
FIRST_LOSSES = {
    "nano-vq": (2.270503, 2.047084, 1.930342, 2.074492),
    "nano-detector": (15.593120, 15.597286, 12.389263, 12.498805),
}

pytestmark = pytest.mark.usefixtures("no_font")


@pytest.fixture
def small(monkeypatch):
    """The lessons at small sizes, in the table that `build` reads."""
    for name, sizes in SMALL.items():
        monkeypatch.setitem(build.LESSONS, name, partial(build.LESSONS[name], **sizes))
    monkeypatch.setattr(judges, "held_out", partial(judges.held_out, count=4))
    layout = judges.canonical_layout()[:2]
    monkeypatch.setattr(judges, "canonical_layout", lambda: layout)


@pytest.mark.parametrize("name", SMALL)  # those of nano-var are in test_var_lessons.py
def test_a_lesson_learns_saves_what_opens_and_repeats(name, small, tmp_path):
    said, before, weights = [], {}, []

    def watched(setting: Setting) -> Lesson:
        lesson = build.LESSONS[name](setting)
        before.update({key: value.clone() for key, value in lesson.network.state_dict().items()})
        return lesson

    for attempt in ("first", "again")[: 1 if name in CAPTION_TASKS else 2]:
        folder = tmp_path / attempt / name
        if name == "nano-t2i":  # opened with the tokenizer beside it
            shutil.copytree(WEIGHTS / "nano-vq", folder.with_name("nano-vq"))
        network = fit.learn(watched, folder, Setting(name, log=said.append), steps=2)
        OPENERS[name.removesuffix("-t2i") if name not in OPENERS else name](folder)
        weights.append(load_file(folder / "model.safetensors"))
    assert re.fullmatch(rf"{name}: step 2/2, loss [0-9.+ ]+; unseen: .+, \d+ s", said[-1])
    assert set(weights[0]) == set(weights[-1])
    for key, value in weights[0].items():
        assert value.float().isfinite().all(), key
        assert torch.equal(value, weights[-1][key]), key
    assert not network.training
    assert any(not torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", FIRST_LOSSES)
def test_a_seed_gives_the_losses_it_always_gave(name, small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())  # bfloat16 differs among machines
    losses = []

    def watched(setting: Setting) -> Lesson:
        lesson = build.LESSONS[name](setting)
        loss_of = lesson.loss

        def loss(step: int) -> torch.Tensor:
            losses.append(loss_of(step))
            return losses[-1]

        lesson.loss = loss
        return lesson

    fit.learn(watched, tmp_path / name, Setting(name, log=lambda line: None), steps=4)
    assert [loss.sum().item() for loss in losses] == pytest.approx(FIRST_LOSSES[name], rel=1e-3)


def test_a_build_makes_what_is_asked_for_and_missing(small, tmp_path):
    said = []
    build.build(tmp_path, ["nano-detector", "nano-val"], steps=1, log=said.append)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["nano-detector", "nano-val"]
    assert [line.split(":")[0] for line in said if ": built" in line] == ["nano-detector", "nano-val"]
    tokens, conditions = load_held_out("captions", tmp_path / "nano-val")
    assert tokens.shape == (4, 64) and len(conditions) == 4
    said.clear()
    build.build(tmp_path, ["nano-detector", "nano-val"], log=said.append)
    assert not said, "what is there is kept"


def test_a_build_takes_the_earlier_networks_from_its_own_folder(small, tmp_path):
    build.build(tmp_path, ["nano-vq", "nano-val"], steps=1, log=lambda line: None)
    own, _ = load_held_out("classes", tmp_path / "nano-val")
    shutil.rmtree(tmp_path / "nano-val")
    build.build(tmp_path, ["nano-val"], weights=WEIGHTS, log=lambda line: None)
    assert not torch.equal(own, load_held_out("classes", tmp_path / "nano-val")[0])


def test_nothing_is_installed_of_a_build_that_lacks_something(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "WEIGHTS", tmp_path / "package")
    for name, file in (("nano-t2i", "policy.json"), ("nano-t5", "config.json"), ("nano-vq", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(name))
    with pytest.raises(UserError, match="lacks nano-vq"):
        build.install(tmp_path, ["nano-t2i", "nano-vq"])
    assert not build.WEIGHTS.exists()
    build.install(tmp_path, ["nano-t2i"])
    assert sorted(one.name for one in build.WEIGHTS.iterdir()) == ["nano-t2i", "nano-t5"], "with its text encoder"


def test_the_base_policies_are_measured_by_commands_that_exist(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(build.subprocess, "run", lambda command, check: commands.append(command))
    build.measure(tmp_path / "geneval")
    assert [command[4] for command in commands] == ["nano", "geneval"]
    for command in commands:
        assert command[1:4] == ["-m", "argrpo_cli", "eval"]
        result = CliRunner().invoke(app, [*command[3:], "--help"])  # unknown options are refused before the help
        assert result.exit_code == 0, result.output


def test_the_codebook_follows_the_latents_and_dead_codes_begin_again():
    embedding = torch.nn.functional.normalize(torch.eye(3, 2) + 0.1, dim=-1)
    book = RunningCodebook(embedding.clone(), Setting("nano-vq"))
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


def test_the_optimiser_leaves_the_codebook_alone(small, tmp_path):
    model = fit.learn(build.LESSONS["nano-vq"], tmp_path / "vq", Setting("nano-vq", log=lambda line: None), steps=3)
    weight = model.quantize.embedding.weight
    assert not weight.requires_grad and weight.grad is None
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(len(weight)))


def line_lesson(network: torch.nn.Module, loss, measure, **rest) -> Lesson:
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    return Lesson(network, [optimizer], loss, measure, save=lambda folder: None, steps=5, **rest)


def test_a_lesson_takes_clipped_steps_along_the_curve_and_measures_in_eval_mode(tmp_path):
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(10.0)
    rates, modes, measured, said = [], [], [], []

    def loss(step: int) -> torch.Tensor:
        modes.append(network.training)
        rates.append(lesson.optimizers[0].param_groups[0]["lr"])
        return torch.stack([60 * network.weight.sum(), 40 * network.weight.sum()])  # a gradient of 100, clipped to 0.5

    def measure() -> str:
        measured.append(network.training)
        return "good"

    lesson = line_lesson(network, loss, measure, every=2, warmup=2, max_grad_norm=0.5)
    assert fit.learn(lambda setting: lesson, tmp_path, Setting("line", log=said.append)) is network
    curve = fit.cosine_with_warmup(2, 5)
    assert rates == pytest.approx([curve(step) for step in range(5)])
    assert network.weight.item() == pytest.approx(10 - 0.5 * sum(rates), abs=1e-4)
    assert [line.split(",")[0] for line in said] == [f"line: step {step}/5" for step in (2, 4, 5)]
    assert "; unseen: good, " in said[0] and re.search(r"loss \d+\.\d{3} \+ \d+\.\d{3};", said[0])
    assert all(modes) and not any(measured) and not network.training


def learn_cut_off(name: str, folder: Path, weights: Path, after: int | None = None) -> list[str]:
    """What is said in a lesson of five steps that is kept every two, and may be cut off before one."""
    said: list[str] = []

    def lesson(given: Setting) -> Lesson:
        lesson = build.LESSONS[name](given)
        lesson.every, loss_of = 2, lesson.loss

        def loss(step: int) -> torch.Tensor:
            if step == after:
                raise KeyboardInterrupt
            return loss_of(step)

        lesson.loss = loss
        return lesson

    with pytest.raises(KeyboardInterrupt) if after is not None else contextlib.nullcontext():
        fit.learn(lesson, folder, Setting(name, weights=weights, log=said.append), steps=5)
    return said


def assert_goes_on_where_it_was_cut_off(name: str, folder: Path, weights: Path) -> None:
    """Weights, momenta, the curve of the learning rate and the batches: the end is that of a lesson in one piece."""
    whole, parts = folder / "whole" / name, folder / "parts" / name
    learn_cut_off(name, whole, weights)
    learn_cut_off(name, parts, weights, after=3)
    assert [one.name for one in parts.iterdir()] == ["progress.pt"]
    assert any("goes on after step 2" in line for line in learn_cut_off(name, parts, weights))
    assert not (parts / "progress.pt").exists()
    first, second = (load_file(one / "model.safetensors") for one in (whole, parts))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_kept_lesson_goes_on_where_it_was_cut_off(small, tmp_path):
    assert_goes_on_where_it_was_cut_off("nano-t2i", tmp_path, WEIGHTS)


def test_a_loss_that_is_no_number_ends_the_lesson(tmp_path):
    network = torch.nn.Linear(1, 1)
    lesson = line_lesson(network, lambda step: network.weight.sum() * math.nan, lambda: "")
    with pytest.raises(RuntimeError, match="the loss is nan at step 3"):
        fit.learn(lambda setting: lesson, tmp_path, Setting("line", log=lambda line: None), steps=3)
