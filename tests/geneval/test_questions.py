"""GenEval 2's questions: the benchmark's file, the same words for GenEval's grammar, and the means of the answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

import pytest
from scipy.stats import gmean

from argrpo_cli.geneval import questions as q
from argrpo_cli.geneval.prompts import Requirement, parse_prompt
from argrpo_cli.nano.scenes import vocabulary
from argrpo_cli.system.errors import UserError

LINE = {
    "prompt": "two red cars",
    "atom_count": 3,
    "vqa_list": [
        ["How many cars are in the image?", "two"],
        ["Are the cars red?", "Yes"],
        ["Are there any cars in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object"],
}


def save(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_means_are_those_of_hand_and_scipy():
    answers = [0.5, 0.8, 0.9, 0.4]  # 0.144^(1/4) = 0.61601...
    assert q.arithmetic_mean(answers) == pytest.approx(0.65, abs=1e-12)
    assert q.geometric_mean(answers) == pytest.approx(0.144**0.25, abs=1e-12) == pytest.approx(gmean(answers))
    assert q.geometric_mean([1.0, 0.0, 1.0]) == 0.0 and q.arithmetic_mean([1.0, 0.0, 1.0]) == pytest.approx(2 / 3)
    assert q.geometric_mean([1e-300] * 7) == pytest.approx(1e-300), "no product that underflows"
    assert q.geometric_mean([1.2, 0.3]) == pytest.approx(gmean([1.2, 0.3])), "published sums may pass 1"
    for mean in (q.arithmetic_mean, q.geometric_mean):
        assert math.isnan(mean([0.0, math.nan])), "a missing answer is none of 0"


def test_the_variants_of_an_answer_are_the_published_ones():
    assert q.variants("four") == ["four", "Four", " four", " Four", "4", " 4"]
    assert sorted(q.variants("Yes")) == sorted(["Yes", "yes", " yes", " Yes"])
    assert q.variants("ten")[-2:] == ["10", " 10"] and len(q.variants("eleven")) == 4


def test_what_is_asked_is_worded_as_published():
    assert q.wording(q.Question("Is the dog red?", "Yes", "attribute")) == "Is the dog red? Answer in one word."
    text = 'Does this image show "a dog"? Answer the question with Yes or No.'
    assert q.wording(q.holistic("a dog")) == text


def test_a_composition_is_asked_about_in_the_words_of_the_benchmark():
    """The benchmark's own questions of 'two green suitcases to the left of a blue giraffe'."""
    include = (Requirement("suitcase", 2, "green", ("left of", 1)), Requirement("giraffe", 1, "blue"))
    assert [(one.text, one.answer, one.skill) for one in q.questions_of(include)] == [
        ("How many suitcases are in the image?", "two", "count"),
        ("Are the suitcases green?", "Yes", "attribute"),
        ("Are there any suitcases in the image?", "Yes", "object"),
        ("Are the suitcases to the left of the giraffe?", "Yes", "position"),
        ("How many giraffes are in the image?", "one", "count"),
        ("Is the giraffe blue?", "Yes", "attribute"),
        ("Are there any giraffes in the image?", "Yes", "object"),
    ]
    assert q.atoms_of(include) == 6


def test_prompts_of_geneval_have_questions_too():
    item = q.find_item("a photo of a dog above a cat")
    assert item.atoms == 3 and [one.text for one in item.questions if one.skill == "position"] == [
        "Is the dog above the cat?"
    ]
    with pytest.raises(UserError, match="GenEval has no such prompt: 'a dog in a hat'"):
        q.find_item("a dog in a hat")


def test_nano_prompts_ask_for_two_to_five_atoms_in_words_that_captions_have():
    items = q.nano_items()
    assert Counter(item.atoms for item in items) == {2: 20, 3: 20, 4: 20, 5: 20}
    assert {word for item in items for word in item.prompt.split()} <= set(vocabulary())
    for item in items:
        assert q.find_item(item.prompt) == item
        if item.atoms < 5:
            assert parse_prompt(item.prompt).text == item.prompt, "captions are of this grammar"
        else:
            with pytest.raises(UserError):
                parse_prompt(item.prompt)
    assert q.count_skills(items) == {"object": 146, "attribute": 87, "count": 146, "position": 40}


def test_a_file_in_the_benchmarks_format(tmp_path):
    (item,) = q.read_items(save(tmp_path / "one.jsonl", LINE))
    assert item == q.Item("two red cars", 3, q.questions_of([Requirement("car", 2, "red")]))
    again = q.read_items(save(tmp_path / "two.jsonl", {**LINE, "more": 1}))
    assert q.digest(again) == q.digest([item]) != q.digest([item._replace(atoms=4)])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"skills": ["count"]}, "line 1: 3 questions in vqa_list and 1 skills; give one for each"),
        ({"skills": ["count", "attribute", "colour"]}, "the skill 'colour' is unknown; there are object,"),
        ({"vqa_list": [["x"], ["y", "z"], ["a", "b"]]}, r"\['x'\] is no question and its answer"),
        ({"vqa_list": 3}, "line 1"),
        ({"prompt": " "}, "holds an empty prompt"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, change, why):
    with pytest.raises(UserError, match=why):
        q.read_items(save(tmp_path / "bad.jsonl", LINE | change))


def test_files_without_prompts_or_with_one_twice(tmp_path):
    with pytest.raises(UserError, match="holds no prompts"):
        q.read_items(save(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="'two red cars' is there twice"):
        q.read_items(save(tmp_path / "twice.jsonl", LINE, LINE))


def test_the_benchmarks_file_is_fetched_once_with_its_licence_and_held_against_its_hash(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = save(tmp_path / "geneval2_data.jsonl", LINE)
    monkeypatch.setattr(q, "URL", file.as_uri())
    with pytest.raises(UserError, match=r"another file than the published one; download file:.* with --prompts"):
        q.published_items()
    monkeypatch.setattr(q, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    capsys.readouterr()
    assert len(q.published_items()) == 1
    assert "CC BY-NC 4.0" in capsys.readouterr().err
    file.unlink()
    assert len(q.published_items()) == 1 and capsys.readouterr().err == ""
