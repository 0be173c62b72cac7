"""DrawBench's prompts: files of all kinds, the hub, and the hashes of the authors' list."""

from __future__ import annotations

import json
import sys
import types

import pytest

from argrpo_cli.evals import drawbench_prompts as p
from argrpo_cli.system.errors import UserError

AUTHORS = [
    {"id": f"draw_{i}", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": ""}]}
    for i, text in enumerate(["a dog.", "a cat.", "a dog."])
]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.txt", "a dog.\n\n  a cat. \na dog.\n"),
        ("a.jsonl", '{"prompt": "a dog."}\n{"prompt": "a cat."}\n'),
        ("b.jsonl", '{"Prompts": "a dog.", "Category": "x"}\n{"Prompts": "a cat."}\n'),
        ("a.csv", 'Prompts,Category\n"a dog.",Colors\n"a cat.","Rare, odd"\n'),
        ("a.tsv", "Category\tPrompts\nColors\ta dog.\nOdd\ta cat.\n"),
        ("a.json", json.dumps(AUTHORS)),
        ("b.json", '["a dog.", "a cat."]'),
        ("c.json", '[{"prompt": "a dog."}, {"prompt": "a cat."}]'),
    ],
)
def test_prompt_files_of_all_kinds(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    found = p.read_prompts(str(tmp_path / file))
    assert found.prompts == ("a dog.", "a cat.")
    assert p.read_prompts(str(tmp_path / file), limit=1).prompts == ("a dog.",)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.csv", "Category\nColors\n", r"a.csv: no column of prompts \(it has Category\); name it Prompts or prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "a.jsonl, row 2: its prompt is missing or not text"),
        ("a.json", "{", "a.json: not JSON"),
        ("a.json", '{"a": 1}', "expected a list"),
        ("a.json", '[{"conversations": []}]', "row 1: its prompt is missing"),
        ("a.txt", "\n", "holds no prompts"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        p.read_prompts(str(tmp_path / file))


def test_an_absent_file_is_told_apart_from_a_data_set_of_the_hub():
    with pytest.raises(UserError, match=r"no prompts 'there/is.csv': give a file"):
        p.read_prompts("there/is.csv")
    with pytest.raises(UserError, match="or one of nano"):
        p.read_prompts("nanno")


def test_prompts_of_the_hub_come_from_the_first_split(monkeypatch):
    class Split(dict):
        column_names = ("Prompts", "Category")

    asked = []
    splits = {"train": Split(Prompts=["a dog.", "a cat."])}
    fake = types.SimpleNamespace(load_dataset=lambda name: asked.append(name) or splits)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert p.read_prompts(p.HUB).prompts == ("a dog.", "a cat.") and asked == [p.HUB]

    def unreachable(name):
        raise ConnectionError("no network")

    fake.load_dataset = unreachable
    with pytest.raises(UserError, match="cannot fetch the data set sayakpaul/drawbench of the hub: no network; "):
        p.read_prompts(p.HUB)


def test_prompts_are_held_against_the_hashes_of_drawbench(monkeypatch):
    assert len(p.published_hashes()) == 200
    assert p.PromptList("x", ("A red colored car.", "no such prompt")).matching == 1
    assert "1 of its 200 are among them, and 1 are others" in p.PromptList("x", ("A red colored car.", "no")).remark()
    monkeypatch.setattr(p, "published_hashes", lambda: {p.digest("one"), p.digest("two")})
    assert not p.PromptList("x", ("two", "one")).remark()
    assert p.PromptList("x", ("two", "one", "three")).remark() and p.PromptList("x", ("two",)).remark()
