"""The page that compares methods: errors join drawing and training, and what is said follows from the numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from argrpo_cli import diversity_nano as study
from argrpo_cli.recipe import load_recipe
from argrpo_cli.shapes import Value
from argrpo_cli.system.errors import UserError

N = 48
NOISE = torch.linspace(-1, 1, 20).double()
KEYS = [key for key in study.MEASURES if key != study.GAIN]


def units(total=0.0, **values):
    """Measures over twenty units, and the total reward of two images of each class, which are `total` -1 and +1."""
    spread = torch.tensor([-1.0] * 24 + [1.0] * 24).double()
    return {key: values.get(key, 0.5) + 1e-3 * NOISE for key in KEYS} | {"total_reward": total + spread}


def results(**changed):
    start = units(recall=0.8, entropy=5.0)
    methods = {
        "grpo": [units(1.0 + shift, recall=0.7, entropy=4.8) for shift in (-0.01, 0.0, 0.01)],
        "kl": [units(0.99, recall=0.8, entropy=5.0) for _ in range(3)],
        "eg": [units(0.2, recall=0.8, entropy=5.0) for _ in range(3)],
    }
    both = {name: (own, own) for name, own in (methods | changed).items()}
    seconds = {"grpo": 1.0, "kl": 1.3, "eg": 1.01}
    return study.Results(units(), (start, start), both, {"kl": methods["kl"], "cca": methods["eg"]}, seconds)


def page(some):
    return study.page(some, N, load_recipe("nano/methods/grpo"))


def test_a_gain_is_in_standard_deviations_of_one_class_of_the_start():
    gained = study.with_gain(units(3.0), units())[study.GAIN]
    assert torch.allclose(gained, torch.full((N,), 3 / math.sqrt(2), dtype=torch.float64))  # sd of -1 and 1
    wider = units(3.0)
    wider["total_reward"] = 2 * wider["total_reward"] - 3  # whatever the spread of the policy itself
    assert study.with_gain(wider, units())[study.GAIN].mean().item() == pytest.approx(3 / math.sqrt(2))


def test_the_error_of_a_mean_over_runs_joins_drawing_and_training():
    value = study.over_runs([1.0, 2.0, 3.0], Value(2.0, 0.4, N))
    assert value.error == pytest.approx(math.hypot(0.4, 1 / math.sqrt(3))) and value.value == 2.0
    assert study.over_runs([1.0], Value(1.0, 0.4, N)).error == 0.4


def test_differences_are_of_equal_seeds():
    runs = [units(recall=0.5 + shift) for shift in (0.0, 0.1, 0.2)]
    others = [units(recall=0.4 + shift) for shift in (0.0, 0.1, 0.2)]  # the seeds' luck, which both share
    difference = study.minus(runs, others, "recall")
    assert difference.value == pytest.approx(0.1) and difference.error == pytest.approx(0, abs=1e-12)
    assert study.minus(runs, [others[0]], "recall").error == pytest.approx(0.1 / math.sqrt(3))


def test_the_page_says_what_keeps_diversity_and_what_is_clear():
    text = page(results())
    assert "No further below the distilled policy than one standard error: KL term." in text
    assert "- KL term: recall +0.100 ± 0.000; entropy +0.200 ± 0.000." in text
    assert "- EG-GRPO: reward gain, sd -0.566 ± 0.004;" in text
    assert text.count("| CCA instead of the distillation |") == 1 and "KL term 1.30" in text
    assert ".\n\nWhat takes longer" in text, "a paragraph of its own"
    assert "What they reach there is what was trained" in text
    assert "| FID less its bias |" in text, "what grows with variety would be held against it"
    less = [units(0.8, recall=0.8, entropy=5.0) for _ in range(3)]  # four fifths of the gain
    assert "None does." in page(results(kl=less))
    wider = [units(0.95, recall=0.79, entropy=5.0) for _ in range(3)]
    assert "None does." in page(results(kl=wider))


@pytest.mark.parametrize(("key", "base"), [("recall", 0.8), ("entropy", 5.0)])
def test_what_keeps_both_falls_by_no_more_than_one_standard_error_in_either(key, base):
    """Over three runs 0.01 apart that is 0.0058."""
    start = study.with_gain(units(recall=0.8, entropy=5.0), units())

    def runs(*values):
        return [
            study.with_gain(units(1.0, **{"recall": 0.8, "entropy": 5.0} | {key: value}), start) for value in values
        ]

    plain = runs(base - 0.5, base - 0.5, base - 0.5)
    assert study.keeps(runs(base - 0.015, base - 0.005, base + 0.005), plain, start)
    assert not study.keeps(runs(base - 0.017, base - 0.007, base + 0.003), plain, start)


def write_seconds(run, *durations):
    rows = [{"step": step, "seconds_total": sum(durations[:step])} for step in range(1, len(durations) + 1)]
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_policy_of_equal_time_is_the_last_checkpoint_within_it(tmp_path):
    write_seconds(tmp_path, *[2.0] * 10)
    for step in (3, 6, 10):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert study.within(tmp_path, 0.69) == str(tmp_path / "checkpoints" / "step_000006")
    assert study.within(tmp_path, 1.0).endswith("step_000010")
    assert study.within(tmp_path, 1.0, updates_per_batch=3).endswith("step_000006")
    with pytest.raises(UserError, match=r"no checkpoint of its first 2 updates; lower logging\.save_every"):
        study.within(tmp_path, 0.2)


def test_a_cost_is_that_of_a_batch_that_nothing_disturbs(tmp_path):
    runs = [write_seconds(tmp_path / "0", 4.0, 20.0, 3.0), write_seconds(tmp_path / "1", 5.0, 2.5, 9.0)]
    assert study.cost(runs, 1) == 2.5
    twice = write_seconds(tmp_path / "2", 5.0, 1.0, 20.0, 1.0, 6.0, 2.0)  # a batch is drawn, and used again
    assert study.cost([twice], 2) == 6


def test_everything_starts_from_one_policy_and_has_the_seconds_of_what_it_is_held_against(tmp_path, monkeypatch):
    """Ten updates each: of plain GRPO a second and, of the second seed, two; with a KL term twice as long, as by two
    updates a batch."""
    recipes, drawn = {}, []

    class Recorded(study.Study):
        def trained(self, recipe, name):
            recipes[name], out = recipe, self.root / name
            pace = {"start": 6.0, "kl-seed0": 2.0, "grpo-seed1": 2.0, "kl-seed1": 4.0}.get(name, 1.0)
            for step in (4, 5, 10):
                (out / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
            rows = [{"step": step, "seconds_total": pace * step} for step in range(1, 11)]
            (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return str(out)

        def fidelity(self, policy, cfg_scale=2.0):
            drawn.append((policy.removeprefix(f"{self.root}/"), cfg_scale))
            return {}

    monkeypatch.setattr(study, "take", lambda *_: None)
    found = study.compare(Recorded(tmp_path, N), ["grpo", "kl", "twice"], [0, 1])
    start = str(tmp_path / "start" / "policy")
    for name in ("grpo", "kl", "twice", "pixel", "cca"):
        for seed in (0, 1):
            recipe = recipes[f"{name}-seed{seed}"]
            assert recipe.seed == seed and recipe.policy.checkpoint == ("nano-c2i" if name == "cca" else start)
            seconds = {"pixel": 10 + 10 * seed, "cca": 60}.get(name)
            assert recipe.optim.time_limit_minutes == (seconds and pytest.approx(seconds / 60))
    assert found.seconds == {"grpo": 1.0, "kl": 2.0, "twice": 2.0}
    assert list(found.timed) == ["kl", "twice", "pixel", "cca"]
    methods = ("grpo", "kl", "twice")
    ends = [(f"{name}-seed{seed}/policy", scale) for name in methods for scale in (1, 2) for seed in (0, 1)]
    others = [(f"{name}-seed{seed}/policy", 1) for name in ("pixel", "cca") for seed in (0, 1)]
    halves = ("kl-seed{}/checkpoints/step_000005", "twice-seed{}/checkpoints/step_000004")  # at the end of a batch
    equal_time = [(half.format(seed), 1) for half in halves for seed in (0, 1)]
    base = [("nano-c2i", 2), ("start/policy", 1), ("start/policy", 2)]
    assert sorted(drawn) == sorted([*ends, *others, *equal_time, *base])


def test_what_draws_no_images_trains_for_seconds():
    recipe = study.recipe_of("cca", "nano-c2i", 1, 90.0)
    assert recipe.method == "cca" and recipe.optim.time_limit_minutes == 1.5
    pixel = study.recipe_of("pixel", "a/policy", 1, 30.0)
    assert pixel.optim.time_limit_minutes == 0.5 and pixel.sampling.cfg_scale == 1


@pytest.mark.parametrize("name", study.METHODS)
def test_every_recipe_starts_from_the_distilled_policy_and_draws_the_same_images(name):
    plain, recipe = (study.recipe_of(one, "some/policy", 7) for one in (study.PLAIN, name))
    assert recipe.policy.checkpoint == "some/policy" and recipe.seed == 7 and recipe.start is None
    drawn = [one.grpo.steps // one.grpo.updates_per_batch * one.grpo.batch_size for one in (plain, recipe)]
    assert drawn[0] == drawn[1] and recipe.sampling == plain.sampling


def test_the_picture_shows_every_method(tmp_path):
    study.draw_front(results(), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
