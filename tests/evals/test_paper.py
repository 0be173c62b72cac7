"""The page of the nano twins: fed with the paper's own numbers, it must find every finding of the paper."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from argrpo_cli import paper_nano as paper
from argrpo_cli import paper_numbers
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import load_recipe
from argrpo_cli.system.errors import UserError

SPREAD = torch.linspace(-1e-3, 1e-3, 20)  # over twenty units a measure, so that there is an error
EVERY = [prompt for name in ("geneval-nano-extra", "geneval-nano") for prompt in prompt_set(name)]


def units(numbers, entropy=3.0, shift=0.0):
    values = dict(zip(paper.FIDELITY, numbers.values() if isinstance(numbers, dict) else numbers, strict=True))
    values |= {"match": 14.0, "recognised": 0.9, "entropy": entropy}
    return {key: value + SPREAD + shift for key, value in values.items()}


def verdicts(numbers, shift=0.0):
    return [(prompt, numbers[prompt.tag] + shift) for prompt in EVERY]


def three(make, *args, spread=1e-3):
    """Runs of one recipe that differ by chance."""
    return [make(*args, shift=shift) for shift in (-spread, 0.0, spread)]


def entropy_rows(names, changes, error=0.001):
    return [
        {"policy": name, "mode": mode, "step": step, "mean": 3 + change, "standard_error": 0.01}
        | ({"change": change, "change_error": error} if step else {})
        for step, (name, change) in enumerate(zip(names, changes, strict=True))
        for mode in ("conditional", "guided")
    ]


@pytest.fixture
def results():
    designs, t2i_designs = paper_numbers.ablation(6), paper_numbers.ablation(7)
    c2i = {"base": [units(designs["base"])], "c2i": three(units, designs["D"], 2.9)}
    c2i |= {f"c2i_{letter.lower()}": [units(designs[letter])] for letter in "ABC"}
    c2i |= {"c2i_no_kl": [units(paper_numbers.table(5)["c2i_b256_no_kl"]["trained"])]}
    c2i |= {f"c2i_cfg_{scale}": [units(designs["D"])] for scale in (1, 4, 7)}
    swept = {s: units([100 + 29 * s, 5 + abs(s - 2), 8, 0.8, 0.4]) for s in paper.SAMPLING_SCALES}
    t2i = {"base": [verdicts(t2i_designs["base"])], "t2i": three(verdicts, t2i_designs["D"])}
    t2i |= {f"t2i_{letter.lower()}": [verdicts(t2i_designs[letter])] for letter in "ABC"}
    real = entropy_rows(["base", "0", "1", "2"], [0, -0.2, -0.21, -0.19])
    return paper.Results(c2i, swept, t2i, real, entropy_rows(["base", "20", "40"], [0, -0.2, -0.4]))


def findings(results):
    return [line for line in paper.page(results, 1008, 4).splitlines() if line.startswith("- ")]


def line(results, start):
    (found,) = [line for line in findings(results) if line.startswith(f"- {start}")]
    return found


def test_the_papers_own_numbers_show_all_of_its_findings(results):
    lines = findings(results)
    assert len(lines) == 25
    for one in lines:
        assert "**shows**" in one, one


def test_without_any_difference_nothing_is_found(results):
    flat = [{**row, "change": 0.0, "change_error": 0.1} for row in results.curve if row["step"]]
    same = paper.Results(
        {name: results.c2i["base"] * len(runs) for name, runs in results.c2i.items()},
        dict.fromkeys(results.swept, results.swept[2.0]),
        {name: [verdicts(dict.fromkeys(paper.TAGS, 0.25))] * len(runs) for name, runs in results.t2i.items()},
        flat,
        flat,
    )
    assert all("**not clear**" in one for one in findings(same))


def test_the_opposite_of_a_finding_is_said(results):
    turned = {**results.c2i, "base": results.c2i["c2i"][1:2], "c2i": results.c2i["base"] * 3}
    assert "the opposite shows" in line(dataclasses.replace(results, c2i=turned), "Quality up: IS")


@pytest.mark.parametrize(("errors", "word"), [(2.5, "not clear"), (3.5, "shows"), (-3.5, "does not repeat")])
def test_a_difference_is_held_against_three_errors_of_the_pairs(results, errors, word):
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()
    common = 50 * torch.randn(
        1000, generator=torch.Generator().manual_seed(1)
    )  # both policies have it: it must not count
    base = {**results.c2i["base"][0], "recall": common}
    run = {**results.c2i["c2i"][0], "recall": common + noise - errors / 1000**0.5}
    c2i = {name: [run] * 3 for name in results.c2i} | {"base": [base]}
    assert f"**{word}" in line(dataclasses.replace(results, c2i=c2i), "Diversity down")


@pytest.mark.parametrize(("spread", "word"), [(0.05, "shows"), (0.2, "not clear")])
def test_the_spread_of_the_trainings_counts(results, spread, word):
    """D is the mean of three trainings, C is one: the error is spread * sqrt(1/3 + 1)."""
    numbers = [211.67, 5.91, 8.58, 0.86, 0.40 + 0.3]
    c2i = {**results.c2i, "c2i": three(units, numbers, spread=spread)}
    own = line(dataclasses.replace(results, c2i=c2i), "Realism rewards keep recall")
    assert f"**{word}**" in own
    mean, error = (float(part) for part in own.rpartition("(")[2].rstrip(")").split(" ± "))
    assert (mean, error) == (pytest.approx(0.33, abs=1e-3), pytest.approx(spread * (4 / 3) ** 0.5, abs=1e-3))


@pytest.mark.parametrize(("wins", "word"), [(0.3, "shows"), (0.02, "not clear")])
def test_geneval_is_compared_prompt_by_prompt(results, wins, word):
    """Verdicts of 0 and 1, alike in both policies but for a share of the prompts that only one gets right."""
    rng = random.Random(0)
    base = [(prompt, float(rng.random() < 0.4)) for prompt in EVERY]
    trained = [(prompt, 1.0 if rng.random() < wins else value) for prompt, value in base]
    t2i = {**results.t2i, "base": [base], "t2i": [trained] * 3}
    assert f"**{word}**" in line(dataclasses.replace(results, t2i=t2i), "GenEval rises overall")


def test_prompts_that_were_trained_on_are_told_apart(results):
    numbers = dict.fromkeys(paper.TAGS, 0.3)
    gained = [(prompt, 0.3 + 0.5 * (prompt.tag in ("single_object", "counting"))) for prompt in EVERY]
    t2i = {**results.t2i, "base": [verdicts(numbers)], "t2i": [gained] * 3}
    changed = dataclasses.replace(results, t2i=t2i)
    assert "**shows**" in line(changed, "GenEval rises overall")
    assert "**not clear**" in line(changed, "GenEval rises on prompts that GRPO did not ask for")


def test_fid_is_compared_without_its_bias(results):
    base = {**results.c2i["base"][0], "fid": 5.0 + SPREAD, "fid_corrected": 3.0 + SPREAD}
    run = {**results.c2i["c2i"][0], "fid": 4.0 + SPREAD, "fid_corrected": 3.5 + SPREAD}
    c2i = {**results.c2i, "base": [base], "c2i": [run] * 3}
    assert "**shows** (+0.500" in line(dataclasses.replace(results, c2i=c2i), "FID rises")


def test_every_result_lands_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(paper.PaperStudy, "claim", lambda self: None)
    monkeypatch.setattr(paper.PaperStudy, "run", lambda self, name, seed=0: f"{name}/{seed}")
    monkeypatch.setattr(paper.PaperStudy, "fidelity", lambda self, policy, cfg_scale=2.0: (policy, cfg_scale))
    monkeypatch.setattr(paper.PaperStudy, "geneval", lambda self, policy: policy)
    monkeypatch.setattr(paper, "subjects_of_run", lambda run: [paper.NamedPolicy(str(run), "run")])
    asked = lambda self, subjects, question: ([one.path for one in subjects], question.prompts)  # noqa: E731
    monkeypatch.setattr(paper.PaperStudy, "entropy", asked)
    results = paper.repeat_the_paper(paper.PaperStudy(tmp_path, 96, 1))
    assert results.c2i["base"] == [("nano-c2i", 2.0)] and results.t2i["base"] == ["nano-t2i"]
    assert results.c2i["c2i"] == [(f"c2i/{seed}", 2.0) for seed in (0, 1, 2)]
    assert results.t2i["t2i"] == ["t2i/0", "t2i/1", "t2i/2"] and results.t2i["t2i_b"] == ["t2i_b/0"]
    assert results.c2i["c2i_no_kl"] == [("c2i_no_kl/0", 2.0)]
    assert results.swept == {scale: ("c2i_cfg_7/0", scale) for scale in paper.SAMPLING_SCALES}
    assert results.real == (["nano-c2i", "c2i/0", "c2i/1", "c2i/2"], None)
    assert results.curve == (["t2i/0"], "geneval")


def test_entropies_are_measured_once(tmp_path, monkeypatch):
    asked = [paper.NamedPolicy("nano-c2i", "base")], paper.Question(limit=2)
    rows = paper.PaperStudy(tmp_path, 96, 1).entropy(*asked)
    assert [row["mode"] for row in rows] == ["conditional", "guided"] and rows[0]["images"] == 2
    assert len(list((tmp_path / "results").iterdir())) == 1
    monkeypatch.setattr(paper, "measure_entropy", lambda *call: pytest.fail("measures again"))
    assert paper.PaperStudy(tmp_path, 96, 1).entropy(*asked) == rows


def test_the_page_has_every_table_with_the_papers_numbers_beside(results, tmp_path):
    text = paper.page(results, 1008, 4)
    for heading in ("Table 2", "Table 5", "Table 6", "Table 3", "Table 7", "Figures 4 and 6", "findings"):
        assert heading in text
    rows = [line for line in text.splitlines() if line.startswith("| *")]
    assert "| *AR-GRPO, in the paper* | 211.67 | 5.91 | 8.58 | 0.86 | 0.4 |  |  |  |" in rows
    assert "| *C, in the paper* | 0.025 | 0.484 | 0.018 | 0.15 | 0.684 | 0.197 | 0.26 |" in rows
    measured = next(line for line in text.splitlines() if line.startswith("| AR-GRPO | 211"))
    assert measured.split(" | ")[1].startswith("211.670 ± 0.000")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(paper.MEASURES) + 2, len(paper.TAGS) + 3}
    paper.draw_figures(results, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 1000


@pytest.mark.parametrize("name", [*paper.C2I, *paper.T2I])
def test_each_recipe_changes_one_thing_of_its_parent(name):
    recipe = load_recipe(f"nano/paper/{name}").model_dump()
    parent = load_recipe(f"nano/paper/{name[:3]}").model_dump()
    changed = [
        f"{section}.{key}"
        for section, keys in recipe.items()
        if isinstance(keys, dict)
        for key in keys
        if keys[key] != parent[section][key]
    ]
    expected = {
        "no_kl": ["grpo.beta"],
        "a": ["rewards.lambda_conditional"],
        "b": ["rewards.lambda_quality"],
        "c": ["rewards.lambda_realism"],
        "": [],
    }
    assert changed == (["sampling.cfg_scale"] if "cfg" in name else expected[name[4:]])


def test_results_of_other_settings_are_not_mixed_in(tmp_path, monkeypatch):
    known = {name: load_policy("nano-c2i") for name in ("nano-c2i", "nano-t2i")}
    monkeypatch.setattr(paper, "load_policy", known.__getitem__)
    judge = SimpleNamespace(recogniser=torch.nn.Linear(1, 1))
    monkeypatch.setattr(paper, "load_judge", lambda: judge)
    paper.PaperStudy(tmp_path, 96, 1).claim()
    (tmp_path / "runs").mkdir()
    paper.PaperStudy(tmp_path, 96, 1).claim()
    with pytest.raises(UserError, match=r"holds results of other settings, .* \(images\)"):
        paper.PaperStudy(tmp_path, 192, 1).claim()
    with pytest.raises(UserError, match="--per-prompt 0: give 1 to 64"):
        paper.PaperStudy(tmp_path / "new", 96, 0).claim()
    with pytest.raises(UserError, match="--n 95: give 96 or more"):
        paper.PaperStudy(tmp_path / "new", 95, 1).claim()
