"""Several rewards at once: ranges, missing scores, memory, waiting, options, quantised ones, one's own."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from argrpo_cli.recipe.sections import RewardSection, RewardTerm
from argrpo_cli.rewards import REWARDS, Reward, RewardSet, check_reward, load_reward, load_rewards, reward_weights
from argrpo_cli.rewards.clip import Clip, quantize
from argrpo_cli.rewards.custom import find_function, reward_of
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from tests.training.objective import advantages

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "reward_shaping.json").read_text())
NAN = float("nan")


def images(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 4, 4)


def conditions(count: int) -> list[Condition]:
    return [Condition(f"a photo of {index}") for index in range(count)]


class Values(Reward):
    """A reward that gives each image the value at the place its pixels say."""

    def __init__(self, *values: float, most: int = 1000, remote: bool = False):
        self.values, self.most, self.remote, self.sizes = torch.tensor(values), most, remote, []

    def score(self, images, conditions):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(images))
        return self.values[images[:, 0, 0, 0].long()]


# --- trust ---


def test_scores_that_are_no_scores_are_missing_and_counted():
    given = Values(0.2, NAN, float("inf"), 7.0, -3.0, 1.0)
    rewards = RewardSet({"clip": given})
    scores = rewards.score(images(6), conditions(6))["clip"]
    assert scores.isnan().tolist() == [False, True, True, True, True, False]
    assert rewards.missing["clip"] == 4 and rewards.last_error["clip"] == "a score of -3"
    given.last_error = "the server said 500"
    given.values = torch.tensor([NAN])
    rewards.score(images(1), conditions(1))
    assert rewards.missing["clip"] == 5 and rewards.last_error["clip"] == "the server said 500"


def test_a_reward_with_the_wrong_number_of_scores_is_named():
    class Short(Reward):
        def score(self, images, conditions):
            return torch.zeros(1)

    with pytest.raises(UserError, match="reward maniqa gave scores of shape"):
        RewardSet({"maniqa": Short()}).score(images(2), conditions(2))


# --- memory and time ---


def test_half_as_many_images_at_a_time_where_memory_ends():
    reward = Values(*range(10), most=3)
    rewards = RewardSet({"aesthetic": reward})
    assert rewards.score(images(10), conditions(10))["aesthetic"].tolist() == list(range(10))
    assert max(reward.sizes) <= 3
    reward.sizes.clear()
    rewards.score(images(10), conditions(10))
    assert max(reward.sizes) == 2, "remembered"
    with pytest.raises(UserError, match="reward aesthetic: the memory of cpu does not suffice for one image"):
        RewardSet({"aesthetic": Values(1.0, most=0)}).score(images(1), conditions(1))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_processor_without_memory_halves_too(error):
    class Narrow(Values):
        def score(self, images, conditions):
            if len(images) > 2:
                raise error
            return super().score(images, conditions)

    rewards = RewardSet({"aesthetic": Narrow(*range(6)), "ocr": reward_of("ocr", Narrow(*[0.5] * 6).score)()})
    scores = rewards.score(images(6), conditions(6))
    assert scores["aesthetic"].tolist() == list(range(6)) and scores["ocr"].tolist() == [0.5] * 6


def test_an_error_is_told_under_the_name_of_its_reward_or_tolerated():
    class Broken(Values):
        def score(self, images, conditions):
            raise RuntimeError("CUDA error: an illegal memory access\nmore of it")

    rewards = RewardSet({"aesthetic": Broken(), "maniqa": Values(0.5, 0.6)})
    message = "reward aesthetic failed: RuntimeError: CUDA error: an illegal memory access$"
    with pytest.raises(UserError, match=message):
        rewards.score(images(2), conditions(2))
    rewards.tolerated = {"aesthetic"}
    scores = rewards.score(images(2), conditions(2))
    assert scores["aesthetic"].isnan().all() and scores["maniqa"].tolist() == pytest.approx([0.5, 0.6])
    assert rewards.missing == {"aesthetic": 2} and "illegal memory access" in rewards.last_error["aesthetic"]


def test_what_is_derived_from_a_reward_that_failed_says_why_that_did():
    class Steps(Values):
        def derive(self, scores):
            return scores.round()

    class Broken(Values):
        def score(self, images, conditions):
            raise RuntimeError("no more of it")

    rewards = RewardSet({"clip-quantized": Steps(), "clip": Broken()}, bases={"clip-quantized": "clip"})
    rewards.tolerated = {"clip", "clip-quantized"}
    assert all(scores.isnan().all() for scores in rewards.score(images(2), conditions(2)).values())
    assert rewards.missing == {"clip-quantized": 2, "clip": 2}
    assert all("no more of it" in why for why in rewards.last_error.values()), rewards.last_error


def test_ranges_let_published_scores_pass():
    """The range of each unit as its paper or its code has it."""
    ranges = {name: (entry.low, entry.high) for name, entry in ((name, check_reward(name)) for name in REWARDS)}
    assert ranges["maniqa"] == (0, math.inf) and ranges["judge-quality"] == (0, 5)
    assert ranges["judge-fake"] == ranges["judge-weird"] == ranges["ocr"] == (0, 1)
    assert ranges["deqa"] == ranges["unified-reward"] == (1, 5)
    for name in ("clip", "hpsv2", "nano-clip"):
        assert ranges[name] == pytest.approx((-1, 1), abs=0.01)
    for name in ("aesthetic", "imagereward", "pickscore", "geneval", "nano-critic"):
        assert ranges[name] == (-math.inf, math.inf)


def test_a_reward_of_ones_own_cannot_change_what_the_others_see():
    def greedy(images, conditions):
        images.fill_(7)
        return [0.0] * len(images)

    given = images(3).clone()
    rewards = RewardSet({"ocr": reward_of("ocr", greedy)(), "aesthetic": Values(0.0, 1.0, 2.0)})
    assert rewards.score(given, conditions(3))["aesthetic"].tolist() == [0, 1, 2]
    assert torch.equal(given, images(3))


def test_remote_rewards_wait_while_the_others_compute():
    """Each of the three goes on only when the others have begun: one after the other they would never end."""
    barrier = threading.Barrier(3, timeout=600)

    class Meets(Values):
        def score(self, images, conditions):
            barrier.wait()
            return super().score(images, conditions)

    rewards = RewardSet(
        {
            "judge-fake": Meets(0.0, 1.0, remote=True),
            "judge-weird": Meets(1.0, 0.0, remote=True),
            "aesthetic": Meets(3.0, 4.0),
        }
    )
    scores = rewards.score(images(2), conditions(2))
    assert {name: column.tolist() for name, column in scores.items()} == {
        "judge-fake": [0, 1], "judge-weird": [1, 0], "aesthetic": [3, 4],
    }  # fmt: skip


def test_what_breaks_off_the_others_breaks_off_the_waiting_too():
    """Ctrl-C comes to the main thread, while others wait for a server."""

    class Waits(Values):
        stopped = threading.Event()

        def stop(self):
            self.stopped.set()

        def score(self, images, conditions):
            assert self.stopped.wait(10), "nobody stopped it"
            return super().score(images, conditions)

    class Interrupted(Values):
        def score(self, images, conditions):
            raise KeyboardInterrupt

    rewards = RewardSet({"judge-fake": Waits(1.0, remote=True), "aesthetic": Interrupted(1.0)})
    with pytest.raises(KeyboardInterrupt):
        rewards.score(images(1), conditions(1))


def test_the_documented_options_are_those_that_there_are():
    """docs/rewards.md against the signatures."""
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    told = {name: row[7] for row in rows for name in re.findall(r"`([^`]+)`", row[1])}
    assert set(REWARDS) <= {*told, *(name for name in REWARDS if name.startswith("nano-"))}
    for name in ("clip", "hpsv2", "maniqa", "aesthetic", "pickscore", "imagereward", "geneval", "ocr"):
        known = inspect.signature(check_reward(name)).parameters
        assert set(re.findall(r"`(\w+)`", told[name])) == set(known) - {"device"}, name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maniqa", {"seed": "x"}, "reward maniqa: seed is 'x'; expected int"),
        ("clip", {"model": 3}, "reward clip: model is 3; expected str"),
        ("clip", {"weights": 5}, "reward clip: weights is 5; expected str | Path | None"),
        ("geneval", {"strict": "maybe"}, "reward geneval: strict is 'maybe'; expected bool"),
        ("ocr", {"threads": 1.5}, "reward ocr: threads is 1.5; expected int"),
        ("ocr", {"threads": 0}, "reward ocr: threads is 0; it must be greater than or equal to 1"),
        ("judge-fake", {"attempts": "x"}, "reward judge-fake: attempts is 'x'; expected int"),
        ("deqa", {"url": 5}, "reward deqa: url is 5; expected str | None"),
        ("unified-reward", {"timeout": "x"}, "reward unified-reward: timeout is 'x'; expected float"),
        ("hpsv2", {"version": 3}, "hpsv2: version '3' is unknown"),
        ("aesthetic", {"dtype": 1}, "reward aesthetic: dtype 1 is unknown; there are float32, bfloat16, float16"),
        (
            "pickscore",
            {"dtype": "float23"},
            "dtype 'float23' is unknown; there are float32, bfloat16, float16; did you mean",
        ),
        ("imagereward", {"vocabulary": 1}, "reward imagereward: vocabulary is 1; expected"),
    ],
)
def test_an_option_of_the_wrong_type_is_told_before_anything_is_fetched(name, options, message):
    with pytest.raises(UserError) as told:
        load_reward(name, options=options)
    assert message in str(told.value)


@pytest.mark.parametrize("name", ["./brightness:reward", "brightness.py/:reward", "bright ness:reward", "a.b/c:reward"])
def test_a_path_is_no_module(name):
    with pytest.raises(UserError, match="write module:function with Python's names"):
        check_reward(name)


def test_wrong_options_of_ones_own_are_told_when_it_is_loaded(own):
    name = own("def reward(images, conditions, scale=1):\n    return [1.0] * len(images)")
    with pytest.raises(UserError, match="unexpected keyword argument 'scael'"):
        load_rewards([name], options={name: {"scael": 2}})


# --- shaping ---


def test_quantised_scores_follow_the_paper_and_the_published_code():
    rows = [row for row in GOLDEN["rows"] if row["clip_or_hpsv2"]["quantized_error"] is None]
    assert len(rows) > 100
    raw = torch.tensor([row["raw"] for row in rows])
    published = torch.tensor([row["clip_or_hpsv2"]["quantized"] for row in rows])
    assert torch.equal(quantize(raw, "code"), published)
    assert torch.equal(quantize(raw, "paper"), published.clamp(min=0.5))
    crashed = [row["raw"] for row in GOLDEN["rows"] if row["clip_or_hpsv2"]["quantized_error"] is not None]
    assert crashed and quantize(torch.tensor(crashed), "code").isnan().all()
    assert (quantize(torch.tensor(crashed), "paper") == 1.5).all()
    assert quantize(torch.tensor([NAN]), "paper").isnan().all()


def test_published_factors():
    """As the published code scales 200 raw scores of each reward, and the judge's."""
    section = RewardSection(
        terms=[RewardTerm(name=name) for name in ("clip", "hpsv2", "clip-quantized", "maniqa", "judge-quality")]
    )
    weights = reward_weights(section, {term.name: check_reward(term.name).family for term in section.terms})
    for row in GOLDEN["rows"]:
        assert row["raw"] * weights["clip"] == pytest.approx(row["clip_or_hpsv2"]["scaled"])
        if row["maniqa"]["scaled_error"] is None:
            assert row["raw"] * weights["maniqa"] == pytest.approx(row["maniqa"]["scaled"])
    for row in GOLDEN["vlm_judge"]:
        assert row["judge_score"] * weights["judge-quality"] == pytest.approx(row["reward"])
    assert weights["hpsv2"] == 5 and weights["clip-quantized"] == 1
    assert {check_reward(name).factor for name in ("judge-fake", "judge-weird")} == {0.25}


@pytest.mark.parametrize("case", GOLDEN["group_advantage"])
def test_published_advantages_of_the_eight_rewards(case):
    gaps = [[NAN if score is None else score for score in row] for row in case["rewards_per_func"]]
    table = torch.tensor(gaps, dtype=torch.float64)  # [images, rewards]; the published code counts a gap as 0
    total = (table * torch.tensor(case["weights"], dtype=torch.float64)).nansum(dim=1)
    assert torch.allclose(total, torch.tensor(case["rewards"], dtype=torch.float64), atol=1e-5)
    actual = advantages(total.view(-1, case["num_generations"]))
    published = torch.tensor(case["advantages"], dtype=torch.float64).view_as(actual)
    equal = torch.tensor(case["std"]) == 0  # there the published -0.0095 is the rounding of a float32 mean over 1e-4
    assert torch.allclose(actual[~equal], published[~equal], atol=1e-4)
    assert (actual[equal] == 0).all()


def test_a_quantised_reward_is_its_base_in_steps(monkeypatch):
    def init(self, device: str, *, model: str = "") -> None:
        self.model = model

    monkeypatch.setattr(Clip, "__init__", init)
    monkeypatch.setattr(Clip, "score", lambda self, images, conditions: torch.tensor([0.2, -0.35, 1.0, NAN]))
    rewards = load_rewards(["clip-quantized"], options={"clip-quantized": {"mapping": "code", "model": "x"}})
    assert rewards.rewards["clip-quantized"].model == "x" and rewards.family["clip-quantized"] == "conditional"
    scores = rewards.score(images(4), conditions(4))["clip-quantized"]
    assert scores[:2].tolist() == [0.5, -1.0] and scores[2:].isnan().all()
    assert rewards.missing["clip-quantized"] == 2 and "no step" in rewards.last_error["clip-quantized"]
    with pytest.raises(UserError, match="mapping 'papre' is unknown"):
        load_rewards(["clip-quantized"], options={"clip-quantized": {"mapping": "papre"}})


@pytest.mark.parametrize("names", [("clip", "clip-quantized"), ("clip-quantized", "clip")])
def test_a_score_and_its_steps_are_one_network_and_one_pass(monkeypatch, names):
    made, passes = [], []

    def init(self, device: str = "cpu", *, model: str = "") -> None:
        self.clip = torch.nn.Linear(1, 1)
        made.append(model)

    monkeypatch.setattr(Clip, "__init__", init)

    def score(self, images, conditions):
        passes.append(len(images))
        return torch.tensor([0.2, 0.3, 0.7, NAN])[: len(images)]

    monkeypatch.setattr(Clip, "score", score)
    rewards = load_rewards(names, options={"clip-quantized": {"mapping": "code"}})
    scores = rewards.score(images(4), conditions(4))
    assert list(scores) == list(names) and made == [""] and passes == [4]
    assert scores["clip"][:3].tolist() == pytest.approx([0.2, 0.3, 0.7])
    assert scores["clip-quantized"][:3].tolist() == [0.5, 1.0, 1.5] and scores["clip-quantized"][3].isnan()
    assert "no step" not in rewards.last_error["clip-quantized"]
    assert rewards.identity()["clip-quantized"]["weights"] == rewards.identity()["clip"]["weights"]
    load_rewards(names, options={"clip-quantized": {"model": "y"}})  # another network
    assert made == ["", "", "y"]


# --- names ---


def test_every_family_is_known_and_unknown_names_are_told():
    assert {check_reward(name).family for name in REWARDS} == {"conditional", "quality", "realism"}
    with pytest.raises(UserError, match="did you mean 'maniqa'"):
        check_reward("manica")
    with pytest.raises(UserError, match="reward nano-clip: no option 'modle'"):
        load_reward("nano-clip", options={"modle": 3})


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""

    def write(source: str) -> str:
        (tmp_path / "brightness.py").write_text(textwrap.dedent(source))
        return "brightness:reward"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield write
    sys.modules.pop("brightness", None)
    find_function.cache_clear()


def test_the_documented_reward_of_ones_own(own):
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")
    name = own(text.split("```python\n")[1].split("```")[0])
    rewards = load_rewards([name])
    assert rewards.family[name] == "quality"
    assert rewards.score(images(3), conditions(3))[name].tolist() == pytest.approx([0, 1 / 255, 2 / 255])


def test_the_documented_reward_of_the_package(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")
    block = next(one for one in text.split("```python\n") if "class Sharpness" in one)
    (tmp_path / "sharpness_documented.py").write_text(block.split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(REWARDS, "sharpness", "sharpness_documented:Sharpness")
    rewards = load_rewards(["sharpness"], options={"sharpness": {"step": 2}})
    assert rewards.family == {"sharpness": "quality"}
    stripes = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).expand(1, 3, 4, 4)
    assert rewards.score(stripes, conditions(1))["sharpness"].tolist() == [1.0]
    with pytest.raises(UserError, match="reward sharpness: step is 'x'; expected int"):
        load_rewards(["sharpness"], options={"sharpness": {"step": "x"}})


def test_it_may_return_a_list_with_gaps_and_take_options(own):
    name = own(
        """
        def reward(images, conditions, scale=1):
            return [None if "1" in one.prompt else scale * len(one.prompt) for one in conditions]
        """
    )
    scores = load_rewards([name], options={name: {"scale": 2}}).score(images(2), conditions(2))[name]
    assert scores[0] == 2 * len("a photo of 0") and scores[1].isnan()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def reward(images, conditions):\n    return {}['x']",
            r"brightness:reward failed: KeyError: 'x' \(brightness.py, line 2\)",
        ),
        ("def reward(images, conditions):\n    return [1.0]", "returned 1 scores for 2 images"),
        ("def reward(images, conditions):\n    pass", "it returned None; return a score for each image"),
        ("import sys\ndef reward(images, conditions):\n    sys.exit(3)", r"SystemExit: 3 \(brightness.py, line 3\)"),
        ("def reward(images):\n    return [1.0]", "takes images, conditions and its options: too many positional"),
        ("def other(images, conditions):\n    return [1.0]", "brightness has no function 'reward'"),
        ("import nothing_of_this_name", "cannot import brightness: ModuleNotFoundError"),
        ("def reward(i, c):\n    return [1.0]\nreward.family = 'nice'", "its family is 'nice'"),
    ],
)
def test_errors_in_it_name_it(own, source, message):
    with pytest.raises(UserError, match=message):
        name = own(source)
        load_rewards([name]).score(images(2), conditions(2))
