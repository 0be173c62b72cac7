"""YAML as recipes have it: what is written reads back as it was, and nothing that is read hangs or escapes."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import yaml

from argrpo_cli.cli.options import read_rewards
from argrpo_cli.recipe import dump_recipe, load_recipe, parse_yaml
from argrpo_cli.recipe.schema import Recipe
from argrpo_cli.recipe.text import write_yaml
from argrpo_cli.system.errors import UserError

WORDS = [
    "", "~", "null", "no", "On", "true", "1e-5", "1E5", "012", "09", "0x1F", "0o7", "1_0", "12:30", "2024-01-01", ".5",
    "+1", "-0", ".inf", "-.INF", ".NaN", "<<", "=", "- a", "? a", "a: b", "a #b", "#", "*a", "&a", "!a", "|", ">", "%",
    "@", "`", "{a", "[a", "'", '"', "\\", "---", "...", " a", "a ", "a\n", "\na", "a\nb\n\n c", "\t", "a\r\nb",
    "a\x85b", "a\u2028b", "a\u2029b", "\ufeffa", "\x07", "\x1b[31m", "\xa0", "\u200b", "ü", "😀", "y " * 90, "y" * 300,
    "1" * 30,
]  # fmt: skip
NUMBERS = [0, -1, 2**62, 1e-5, 1.5e300, 5e-324, -0.0, 1e22, 0.1, math.inf, -math.inf, math.nan]


def test_what_is_written_reads_back_as_it_was():
    draw = random.Random(0)
    characters = "".join(WORDS) + "".join(map(chr, range(1, 0x100)))
    texts = WORDS + ["".join(draw.choices(characters, k=draw.randint(1, 12))) for _ in range(300)]
    tree = {"texts": texts, "numbers": NUMBERS, "keys": dict.fromkeys(texts, 1), "others": [None, True, {}, []]}
    for read in (partial(parse_yaml, source="x"), yaml.safe_load):  # 1.1 as well, which other programs read
        assert repr(read(write_yaml(tree))) == repr(tree)  # repr, since nan is not itself


def test_a_recipe_keeps_its_name_and_every_text_and_number_of_an_option(tmp_path):
    options = {"words": WORDS, "numbers": NUMBERS}
    for name in ("1e-5", "012", "no", "null", "1_0", "2024-01-01", "09"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(write_yaml({"description": name, "rewards": {"terms": [{"name": "a:b", "options": options}]}}))
        recipe = load_recipe(path)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
        again = load_recipe(tmp_path / "recipe.yaml")
        assert (again.name, again.description) == (name, name)
        assert repr(again.rewards.terms[0].options) == repr(options)


def test_every_number_of_a_recipe_is_kept_to_the_last_digit():
    draw = random.Random(0)
    for rate in [10 ** draw.uniform(-12, 2) for _ in range(20)]:
        written = dump_recipe(Recipe(name="x", grpo={"learning_rate": rate}))
        assert parse_yaml(written, "x")["grpo"]["learning_rate"] == rate


def test_an_emoji_in_two_halves_as_json_writes_it_is_one():
    assert parse_yaml(r'"\ud83d\ude00"', "x") == "😀"


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "it stands for more than 100000 values, with its aliases"),
        ("description: &a {b: *a}", "it stands for more than 100000 values"),
        ("seed: " + "1" * 5000, r"line 1: .* '1+\.\.\.1+' is too large a number"),
        ("seed: !!int abc", "line 1: .* 'abc' is no int"),
        ("seed: !!int 1e5", "'1e5' is no int"),
        ("seed: !!bool maybe", "'maybe' is no bool"),
        ("seed: !!float abc", "'abc' is no float"),
        ("seed: !!null abc", "'abc' is no null"),
        ("seed: !!timestamp 2024-01-01", "the tag '!!timestamp' means nothing here; leave it out"),
        ("seed: !!binary aGk=", "the tag '!!binary'"),
        ("seed: !!set {a}", "the tag '!!set'"),
        ("seed: !own 3", "the tag '!own'"),
        ("grpo: !!map x", "expected a mapping node, but found scalar"),
        ("grpo: !!seq x", "expected a sequence node"),
        ("description: !!str [1]", "expected a scalar node"),
        ("out: \"a\\0b\"", "text with a null byte or half a character in it"),
        (r'out: "\ud800"', "text with a null byte or half a character in it"),
        (r'"\udfff": 1', "half a character"),
        ("a: \0", "special characters are not allowed"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)), "nested too deeply"),
        ("a: *" + "x" * 5000, "undefined alias"),
        ("grpo: {beta: 1e999}", "'1e999' is too large a number"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_s_yaml_is_one_short_line(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_without_end_is_not_read(tmp_path):
    (tmp_path / "r.yaml").write_text("# " + "x" * 10**6)
    with pytest.raises(UserError, match=r"1\.0 MB, and a recipe has less than 1"):
        load_recipe(tmp_path / "r.yaml")


def test_options_of_rewards_read_alike_in_a_recipe_by_set_and_by_score(tmp_path, monkeypatch):
    (tmp_path / "taken.py").write_text("def reward(images, conditions, **options): return images")
    monkeypatch.syspath_prepend(tmp_path)
    name = "taken:reward"
    values = {"1e-5": 1e-5, "no": "no", "012": 12.0, "1_0": "1_0", "12:30": "12:30", "[1, .5]": [1, 0.5]}
    for text, value in values.items():
        (tmp_path / "r.yaml").write_text(f"rewards: {{terms: [{{name: '{name}', options: {{a: {text}}}}}]}}")
        in_file = load_recipe(tmp_path / "r.yaml").rewards.terms[0].options
        by_set = load_recipe(tmp_path / "r.yaml", [f"rewards.terms.0.options.a={text}"]).rewards.terms[0].options
        assert in_file == by_set == read_rewards(name, [f"{name}.a={text}"])[1][name] == {"a": value}
    with pytest.raises(UserError, match="an option is inf or nan"):
        read_rewards(name, [f"{name}.a=[.inf]"])
    with pytest.raises(UserError, match="api_key is a secret") as caught:
        read_rewards(name, [f"{name}.api_key=hunter2"])
    assert "hunter2" not in str(caught.value)
