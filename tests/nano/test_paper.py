"""The page of the nano twins: fed with the paper's own numbers, it must find every finding of the paper."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from argrpo_cli.errors import UserError
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.nano import paper, paper_numbers, paper_page
from argrpo_cli.policy import load_policy
from argrpo_cli.recipe import load_recipe

SPREAD = torch.tensor([-1e-3, 1e-3])  # two units a measure, so that there is an error


def units(numbers, entropy=3.0):
    values = dict(zip(paper_page.FIDELITY, numbers, strict=True))
    return {
        key: value + SPREAD for key, value in {**values, "match": 14.0, "recognised": 0.9, "entropy": entropy}.items()
    }


def verdicts(numbers):
    means = dict(zip(paper_page.CATEGORIES, numbers, strict=True))
    return [(prompt, means[prompt.tag]) for prompt in prompt_set("geneval-nano-extra") + prompt_set("geneval-nano")]


@pytest.fixture
def results():
    p = paper_numbers
    c2i = {"base": units(p.TABLE_2["LlamaGen (base)"]), "c2i": units(p.TABLE_6["D"], entropy=2.9)}
    c2i |= {f"c2i_{letter.lower()}": units(p.TABLE_6[letter]) for letter in "ABC"}
    c2i |= {"c2i_no_kl": units(p.TABLE_5["without KL"])}
    c2i |= {f"c2i_cfg_{scale}": units(p.TABLE_6["D"]) for scale in (1, 4, 7)}
    swept = {s: units([100 + 29 * s, 5 + abs(s - 2), 8, 0.8, 0.4]) for s in paper.SAMPLING_SCALES}
    t2i = {"base": verdicts(p.TABLE_7["base"]), "t2i": verdicts(p.TABLE_7["D"])}
    t2i |= {f"t2i_{letter.lower()}": verdicts(p.TABLE_7[letter]) for letter in "ABC"}
    curve = [
        {"mode": mode, "step": step, "mean": 3 - step / 100, "standard_error": 0.01}
        | ({"change": -step / 100, "change_error": 0.001} if step else {})
        for step in (0, 20, 40)
        for mode in ("conditional", "guided")
    ]
    return paper_page.Results(c2i, swept, t2i, curve)


def test_the_papers_own_numbers_show_all_of_its_findings(results):
    lines = paper_page.findings(results)
    assert len(lines) == 19
    for line in lines:
        assert "**shows**" in line, line


def test_without_any_difference_nothing_is_found(results):
    same = paper_page.Results(
        dict.fromkeys(results.c2i, results.c2i["base"]),
        dict.fromkeys(results.swept, results.swept[2.0]),
        dict.fromkeys(results.t2i, results.t2i["base"]),
        [{**row, "change": 0.0, "change_error": 0.1} for row in results.curve],
    )
    assert all("**not clear**" in line for line in paper_page.findings(same))


def test_the_opposite_of_a_finding_is_said(results):
    turned = {**results.c2i, "base": results.c2i["c2i"], "c2i": results.c2i["base"]}
    lines = paper_page.findings(paper_page.Results(turned, results.swept, results.t2i, results.curve))
    assert "the opposite shows" in lines[0]


def test_the_page_has_every_table_with_the_papers_numbers_beside(results, tmp_path):
    text = paper_page.page(results, 1008, 4)
    for heading in ("Table 2", "Table 5", "Table 6", "Table 3", "Table 7", "Figures 4 and 6", "findings"):
        assert heading in text
    rows = [line for line in text.splitlines() if line.startswith("| *")]
    assert "| *AR-GRPO, in the paper* | 211.67 | 5.91 | 8.58 | 0.86 | 0.4 |  |  |  |" in rows
    assert "| *C, in the paper* | 0.025 | 0.484 | 0.018 | 0.15 | 0.684 | 0.197 | 0.26 |" in rows
    measured = next(line for line in text.splitlines() if line.startswith("| AR-GRPO | 211"))
    assert measured.split(" | ")[1].startswith("211.670 ± 0.001")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(paper_page.MEASURES) + 2, len(paper_page.CATEGORIES) + 2}
    paper_page.draw_figures(results, tmp_path / "figure.png")
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
    paper.Workplace(tmp_path, 96, 1).claim()
    paper.Workplace(tmp_path, 96, 1).claim()
    with pytest.raises(UserError, match="holds results of other settings"):
        paper.Workplace(tmp_path, 192, 1).claim()
