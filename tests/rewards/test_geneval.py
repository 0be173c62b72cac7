"""geneval as a reward: the published server's scores, its options, and the nano detector behind the same class."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS
from argrpo_cli.geneval.rules import OFFICIAL
from argrpo_cli.rewards.geneval import GenEval
from argrpo_cli.rewards.nano import NanoGenEval
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.geneval import goldens

CASES = [case for case in goldens.decisions() if "line" in case and "reward" in case["expected"]]


class GoldenObserver:
    """Sees in image i what the golden case i has."""

    thresholds = OFFICIAL

    def observe(self, images, prompts):
        assert [prompt.text for prompt in prompts] == [goldens.prompt_of(case).text for case in CASES]
        assert len(images) == len(CASES)
        return [(goldens.detections_of(case), goldens.classifier_of(case)) for case in CASES]


@pytest.mark.parametrize(("strict", "key"), [(False, "score"), (True, "strict_correct")])
def test_scores_are_the_published_servers(monkeypatch, strict, key):
    monkeypatch.setattr("argrpo_cli.geneval.observers.load_observer", lambda *rest: GoldenObserver())
    conditions = [Condition(goldens.prompt_of(case).text) for case in CASES]
    reward = GenEval(strict=strict)
    reward.check(conditions)
    scores = reward.score(torch.zeros(len(CASES), 3, 8, 8, dtype=torch.uint8), conditions)
    assert scores.dtype == torch.float32 and len(CASES) > 100
    assert scores.tolist() == pytest.approx([float(case["expected"]["reward"][key]) for case in CASES], abs=1e-6)
    assert len(set(scores.tolist())) > 1


def test_the_nano_detector_is_an_option_and_a_reward_of_its_own():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    conditions = [Condition("a photo of a dog"), Condition("a photo of a red car")] * 2
    reward = GenEval(detector="nano")
    assert reward.observer.thresholds == NanoGenEval().observer.thresholds == NANO_THRESHOLDS
    assert torch.equal(reward.score(images, conditions), NanoGenEval().score(images, conditions))
    with pytest.raises(ValueError, match="3 images but 4 prompts"):
        reward.score(images[:3], conditions)


def test_a_prompt_that_no_template_makes_is_refused():
    with pytest.raises(UserError, match="GenEval has no such prompt: 'a painting of a dog'"):
        GenEval(detector="nano").check([Condition("a photo of a dog"), Condition("a painting of a dog")])


def test_an_unknown_detector_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match="detector 'mask2fromer' is unknown; there are mask2former, nano; did you mean"):
        GenEval(detector="mask2fromer")


def test_weights_that_the_nano_detector_does_not_use_are_refused():
    with pytest.raises(UserError, match="the detector nano has no CLIP"):
        GenEval(detector="nano", clip_weights="clip.safetensors")


def test_missing_weights_of_the_detector_are_named(tmp_path):
    with pytest.raises(UserError, match=r"weights not found: .*config\.json"):
        GenEval(weights=tmp_path)
