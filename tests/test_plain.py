"""Plain data as text: what JSON is read as and refused for, where lines end, and that state files have their shape."""

from __future__ import annotations

import csv
import io
import json
import os
from typing import Any, Required

import pytest
from typing_extensions import TypedDict

from argrpo_cli.captions import file_rows, read_captions
from argrpo_cli.shapes import Column, Condition, Result, Value
from argrpo_cli.system.errors import UserError, one_line, printable
from argrpo_cli.system.files import read_json, read_jsonl, read_text, write_json, write_jsonl
from argrpo_cli.system.plain import DEEPEST, check_shape, guarded, lines_of, parse_json, to_json

ENDS = "\u2028\u2029\x85\x0b\x0c\x1c"  # of lines, for `str.splitlines`


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"a": NaN}', "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ("9" * 5000, r"9{20}\.\.\. is no finite number"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        ("[" * 100_000, "more than 64 levels"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), "more than 64 levels"),
    ],
)
def test_what_is_not_read_as_json(text: str, why: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=rf"x\.json: not JSON \(.*{why}"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(f'{{"good": 1}}\n{text or "?"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: not JSON"):
        read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (str(10**29), 1e29),
        (str(2**63 - 1), 2**63 - 1),
        ("-0", 0),
        ("1e29", 1e29),
        ('{"a": {"a": [1, 2.5, true, null]}}', {"a": {"a": [1, 2.5, True, None]}}),
        ("[" * DEEPEST + "]" * DEEPEST, json.loads("[" * DEEPEST + "]" * DEEPEST)),
        (json.dumps([[number] for number in range(200)]), [[number] for number in range(200)]),
    ],
)
def test_what_json_is_read_as(text: str, value: Any) -> None:
    assert parse_json(text) == value and type(parse_json(text)) is type(value)


def test_texts_of_any_kind_come_back_and_no_reader_takes_them_for_more_lines(tmp_path) -> None:
    rows = [{"file": os.fsdecode(b"caf\xe9.png"), "prompt": f"a{ENDS}b\r\n\x1b[31m é 🐕"}, {"file": "b", "prompt": ""}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    write_json(tmp_path / "x.json", rows[0])
    assert read_jsonl(tmp_path / "x.jsonl") == rows and read_json(tmp_path / "x.json") == rows[0]
    text = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2 and "é 🐕" in text and "\x1b" not in text
    (tmp_path / "raw.jsonl").write_text(json.dumps({"a": "x\u2028y"}, ensure_ascii=False) + "\r\n\n", newline="")
    assert read_jsonl(tmp_path / "raw.jsonl") == [{"a": "x\u2028y"}]
    assert parse_json(to_json("\ud800")) == "\ud800"


def test_lines_end_at_a_line_feed_alone(tmp_path) -> None:
    assert lines_of(f"a{ENDS}b\r\nc\n") == [f"a{ENDS}b", "c"]
    assert lines_of("") == [] and lines_of("\n\na") == ["", "", "a"]
    (tmp_path / "prompts.txt").write_text(f"a cat{ENDS}and a dog\r\na bird\n", encoding="utf-8", newline="")
    assert read_captions(str(tmp_path / "prompts.txt")) == [f"a cat{ENDS}and a dog", "a bird"]


def test_a_pipe_is_no_file_to_wait_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "run.json")
    for read in (read_json, read_jsonl, read_text):
        with pytest.raises(UserError, match=r"run\.json: it is a pipe, not a file"):
            read(tmp_path / "run.json")


class Shape(TypedDict, total=False):
    step: Required[int]
    rewards: dict[str, dict[str, float | None]]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"rewards": {}}, "step: field required"),
        ({"step": True}, "step is True: input should be a valid integer"),
        ({"step": "1"}, "step is '1': input should be a valid integer"),
        ({"step": 1, "rewards": [1]}, r"rewards is \[1\]: input should be"),
        ({"step": 1, "rewards": {"a": {"mean": "x" * 999}}}, r"rewards\.a\.mean is 'x{1,40}\.\.\.x+': input should be"),
    ],
)
def test_data_of_another_shape_is_told_by_its_key(value: Any, why: str, tmp_path) -> None:
    with pytest.raises(UserError, match=f"^run.json is damaged: {why}"):
        check_shape(value, Shape, "run.json")
    write_jsonl(tmp_path / "x.jsonl", [{"step": 1}, value])
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2 is damaged: {why}"):
        read_jsonl(tmp_path / "x.jsonl", Shape)


def test_data_of_the_shape_is_as_it_was() -> None:
    value = {"step": 1, "rewards": {"a": {"mean": 1, "std": None}}, "more": [object]}
    assert check_shape(value, Shape, "x") is value


@pytest.mark.parametrize("count", [10**29, 10.5, "3", -1e400])
def test_a_result_with_a_number_that_is_none_is_one_line(count: Any, tmp_path) -> None:
    result = Result("score", {"a": Column("a")}, {"x": {"a": Value(1.0, 0.5, 3)}})
    result.save(tmp_path / "summary.json")
    assert Result.load(tmp_path / "summary.json").rows == result.rows
    content = json.loads((tmp_path / "summary.json").read_text())
    content["rows"]["x"]["a"]["count"] = count
    (tmp_path / "summary.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is a damaged result|not JSON"):
        Result.load(tmp_path / "summary.json")
    content["rows"]["x"]["a"] |= {"count": 3, "value": 10**29}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert Result.load(tmp_path / "summary.json").rows["x"]["a"].text() == f"{1e29:.3f} ± 0.500"


def test_names_in_a_result_are_printable(tmp_path) -> None:
    Result("score", {"a": Column("a")}, {"\x1b[2Jx": {"a": Value(1.0)}}, warnings=["\x07"]).save(tmp_path / "x.json")
    loaded = Result.load(tmp_path / "x.json")
    assert list(loaded.rows) == ["\\x1b[2Jx"] and list(loaded.warnings) == ["\\x07"]


def test_what_a_terminal_may_obey_is_escaped_and_letters_are_not() -> None:
    assert printable("a\x1b[31m\r\n\x9b\u202e\udce9 é 🧑‍🚀") == "a\\x1b[31m\\r\\n\\x9b\\u202e\\udce9 é 🧑‍🚀"
    assert one_line("no\n  file \x1b[2J") == "no file \\x1b[2J"


FORMULAS = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "'=1", "''=1", "＝1"]


@pytest.mark.parametrize("text", [*FORMULAS, "'quoted'", "a=b", "", " =1", "a 'b'", "line\nline", "x\u2028y"])
def test_no_cell_is_a_formula_and_each_comes_back(text: str, tmp_path) -> None:
    cell = guarded(text)
    assert (cell == f"'{text}") == (text in FORMULAS) and (cell == text) == (text not in FORMULAS)
    table = io.StringIO()
    csv.writer(table).writerows([["prompt"], [cell]])
    (tmp_path / "x.csv").write_text(table.getvalue(), newline="", encoding="utf-8")
    assert file_rows(tmp_path / "x.csv") == [{"prompt": text}]
    assert guarded(-0.5) == -0.5 and "\x1b" not in guarded("\x1b=1")


@pytest.mark.parametrize("text", ['prompt\n"' + "x" * 200_000 + '"\n', "a,b\n1,2,3\n"])
def test_an_odd_table_is_one_line(text: str, tmp_path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=r"field larger than|'prompt' is missing; there are a, b"):
        read_captions(str(tmp_path / "x.csv"))


@pytest.mark.parametrize(("value", "why"), [(None, "0 captions"), (["a", "b"], "2 captions"), ([["a"]], "a list")])
def test_a_picture_has_exactly_one_caption(value: Any, why: str, tmp_path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a cat"}, {"prompt": value}])
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2: 'prompt' holds {why}"):
        read_captions(str(tmp_path / "x.jsonl"), each=True)


def test_a_prompt_is_text() -> None:
    with pytest.raises(UserError, match=r"the prompt 'a\\udcff' is not text"):
        Condition(os.fsdecode(b"a\xff"))
