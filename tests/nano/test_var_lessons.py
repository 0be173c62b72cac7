"""The lessons of nano-var: they learn, save what opens, and an interrupted one goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from argrpo_cli.nano.make import build, fit, var
from argrpo_cli.nano.make.fit import Setting
from argrpo_cli.policy import load_policy
from argrpo_cli.policy.var.policy import VAR
from argrpo_cli.shapes import Sampling
from tests.emoji import no_font  # noqa: F401
from tests.nano.test_lessons import SMALL, assert_goes_on_where_it_was_cut_off

pytestmark = pytest.mark.usefixtures("no_font")
TINY = {
    "nano-msvq": {"pool": 24, "unseen": 8, "batch": 4, "quantised_from": 2},
    "nano-var": {"pool": 24, "unseen": 12, "batch": 8},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in TINY.items():
        monkeypatch.setitem(build.LESSONS, name, partial(build.LESSONS[name], **sizes))


def test_every_lesson_is_tested() -> None:
    assert set(build.LESSONS) == {*SMALL, *TINY}


def test_a_build_makes_a_policy_that_draws_with_the_tokenizer_beside_it(small: None, tmp_path: Path) -> None:
    said: list[str] = []
    build.build(tmp_path, ["nano-msvq", "nano-var"], steps=3, log=said.append)
    assert [line.split(":")[0] for line in said if ": built" in line] == ["nano-msvq", "nano-var"]
    assert any("PSNR" in line and "codebook in use" in line for line in said)
    policy = load_policy(tmp_path / "nano-var")
    assert isinstance(policy, VAR) and policy.card.tokens == 130 and policy.card.image_size == 64
    parameters = policy.model.num_parameters(), policy.tokenizer.num_parameters()
    assert sum(parameters) * 2 < 8e6, "with the others in the package, in float16"
    tokens = policy.sample(policy.encode(policy.conditions(["dog", 3])), Sampling(cfg_scale=2.0), [0, 1]).tokens
    assert policy.decode(tokens).shape == (2, 3, 64, 64) and tokens.unique().numel() > 20
    assert policy.tokenise(policy.decode(tokens)).shape == (2, 130)


@pytest.mark.parametrize("name", TINY)
def test_a_lesson_that_was_cut_off_goes_on_to_the_same_end(name: str, small: None, tmp_path: Path) -> None:
    if name == "nano-var":
        setting = Setting("nano-msvq", log=lambda line: None)
        fit.learn(build.LESSONS["nano-msvq"], tmp_path / "nano-msvq", setting, steps=1)
    assert_goes_on_where_it_was_cut_off(name, tmp_path, tmp_path)


def test_the_codes_learn_by_gradients_and_dead_ones_begin_again() -> None:
    setting = Setting("nano-msvq", log=lambda line: None)
    torch.manual_seed(0)
    lesson = var.tokenizer(setting, pool=16, unseen=4, batch=8, quantised_from=0)
    network = lesson.network
    network.uses[:5] = 0.01  # of codes that nobody uses
    before = network.model.quantize.embedding.weight.detach().clone()
    lesson.loss(0).backward()
    codes = network.model.quantize.embedding.weight
    used = codes.grad.abs().sum(-1) > 0
    assert 1 < used.sum() < 512, "those that were chosen, and no others"
    assert all(phi.weight.grad.abs().sum() > 0 for phi in network.model.quantize.phis)
    assert not torch.equal(codes, before) and network.uses.min() > 0.05
