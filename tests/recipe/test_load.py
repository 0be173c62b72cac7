"""How recipes are found, merged and written back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from argrpo_cli.recipe import dump_recipe, list_recipes, load_recipe, parse_yaml
from argrpo_cli.system.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", list_recipes())
def test_every_bundled_recipe_loads_and_survives_a_round_trip(name, write):
    recipe = load_recipe(name)
    assert recipe.description
    assert load_recipe(write("recipe.yaml", dump_recipe(recipe))) == recipe


def test_bundled_names_work_with_and_without_folder_and_suffix_and_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nano/c2i" in list_recipes()
    expected = load_recipe("nano/c2i")
    for name in ("nano/c2i.yaml", "recipes/nano/c2i.yaml", "recipes/nano/c2i"):
        assert load_recipe(name) == expected


def test_a_file_of_the_user_comes_before_a_bundled_one(tmp_path, monkeypatch, write):
    write("recipes/nano/c2i.yaml", "seed: 41\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/nano/c2i.yaml").seed == 41


def test_extends_merges_mappings_and_replaces_lists(write):
    write("base.yaml", "name: base\nout: here\nseed: 5\ngrpo: {beta: 0.5, steps: 7}\n")
    child = write(
        "sub/child.yaml",
        "extends: ../base.yaml\ngrpo: {beta: 0}\nrewards: {terms: [{name: nano-critic, weight: 2}]}\n",
    )
    recipe = load_recipe(child)
    assert (recipe.seed, recipe.grpo.beta, recipe.grpo.steps) == (5, 0.0, 7)
    assert [(term.name, term.weight) for term in recipe.rewards.terms] == [("nano-critic", 2.0)]


def test_a_run_has_its_own_name_and_folder_not_those_it_extends(write):
    write("base.yaml", "name: base\nout: here\ndescription: the base\n")
    recipe = load_recipe(write("ablation.yaml", "extends: base.yaml\n"))
    assert (recipe.name, recipe.out, recipe.description) == ("ablation", None, "")
    assert recipe.run_dir.as_posix() == "runs/ablation"


def test_extends_falls_back_on_the_bundled_recipes(write):
    recipe = load_recipe(write("mine.yaml", "extends: nano/c2i\nseed: 3\n"))
    assert recipe.seed == 3 and recipe.grpo == load_recipe("nano/c2i").grpo


def test_overrides_win_in_order_and_reach_into_lists():
    recipe = load_recipe(
        "nano/c2i",
        [
            "grpo.beta=1",
            "grpo.beta=2e-3",
            "rewards.terms.2.weight=3",
            "conditions.classes=[dog, 3]",
            "out=null",
        ],
    )
    assert recipe.grpo.beta == 0.002
    assert recipe.rewards.terms[2].weight == 3 and recipe.rewards.terms[0].weight == 1
    assert recipe.conditions.classes == ["dog", 3]


def test_what_a_start_does_not_say_is_as_in_the_recipe_around_it(write):
    recipe = load_recipe(
        write(
            "mine.yaml",
            "extends: c2i_b256\ndescription: d\nout: o\nseed: 3\nstart:\n  distil: {cfg_scale: [2, 3]}\n"
            "  policy: {trainable: all}\n",
        ),
        ["seed=4", "policy.device=cpu", "start.distil.steps=10", "start.rewards.terms.0.weight=2"],
    )
    start = recipe.start
    assert (start.name, start.method, start.description, start.out) == ("mine-start", "distil", "", None)
    assert (start.seed, start.policy.device, start.policy.trainable) == (4, "cpu", "all")
    assert start.optim == start.distil and (start.distil.steps, start.distil.cfg_scale) == (10, [2.0, 3.0])
    assert start.logging == recipe.logging and start.grpo == recipe.grpo == recipe.optim
    assert [term.weight for term in start.rewards.terms] == [2.0, *[1.0] * 7]
    assert [term.weight for term in recipe.rewards.terms] == [1.0] * 8
    assert load_recipe(write("recipe.yaml", dump_recipe(recipe))) == recipe  # a run directory needs no other file


def test_a_start_may_be_named_and_changed(write):
    write("sub/first.yaml", "description: d\nlogging: {save_every: 7}\ndistil: {steps: 5, lmbda: 1}\n")
    path = write("sub/mine.yaml", "extends: c2i_b256\nstart: first.yaml\n")
    for child in (path, write("child.yaml", "extends: sub/mine.yaml\nstart: {distil: {beta: 1}}\n")):
        start = load_recipe(child, ["start.distil.steps=6"]).start
        assert (start.name, start.description, start.logging.save_every) == (f"{child.stem}-start", "", 7)
        assert (start.distil.steps, start.distil.lmbda, start.distil.beta) == (6, 1.0, float(child != path))
    other = load_recipe(child, ["start=c2i_b256"]).start  # takes the place of the whole start
    assert other.logging == load_recipe("c2i_b256").logging and other.distil.lmbda == 0.3
    assert load_recipe(child, ["start=null"]).start is None
    with pytest.raises(UserError, match=r"first\.yaml: unknown key 'start\.distil\.stps'.*did you mean 'steps'"):
        write("sub/first.yaml", "distil: {stps: 5}\n")
        load_recipe(path)
    with pytest.raises(UserError, match=r"'start' runs in a circle: .*first\.yaml -> .*first\.yaml"):
        write("sub/first.yaml", "start: first.yaml\n")
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.beta", "expected key=value"),
        ("=3", "expected key=value"),
        ("grpo..beta=3", "expected key=value"),
        ("grpo.beta=[1", "not valid YAML"),
        ("rewards.terms.7.weight=1", r"rewards\.terms has 3 entries, counted from 0"),
        ("grpo.beta.0.x=1", r"grpo\.beta is not a list"),
    ],
)
def test_a_malformed_override_is_named(override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("nano/c2i", [override])
    assert "\n" not in str(caught.value)


def test_a_circle_of_extends_is_told_not_followed(write):
    write("a.yaml", "extends: b.yaml\n")
    path = write("b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match=r"'extends' or 'start' runs in a circle: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"):
        load_recipe(path)


def test_an_error_names_the_file_that_said_it(write):
    base = write("base.yaml", "grpo: {beta: -1}\n")
    child = write("child.yaml", "extends: base.yaml\ngrpo: {steps: 3}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(child)
    assert str(caught.value).startswith(f"{base}: grpo.beta = -1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo: [1\n", "line 2: not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: the key 'seed' is given twice"),
        ("- 1\n", "a recipe is a mapping"),
        ("just words\n", "a recipe is a mapping"),
        ("1: 2\n", "the key 1 is not text"),
        ("extends: 3\n", "extends = 3: must be the path or the name of a recipe"),
        ("extends: nowhere\n", r"extends: no recipe 'nowhere'"),
        ("grpo:\n", "grpo = None: must be a mapping"),
        ("seed: !!python/object:os.system 1\n", "not valid YAML"),
        ("a: &a [*a]\n", "it stands for more than 100000 values"),
    ],
)
def test_a_malformed_file_is_told_with_its_line(write, text, message):
    path = write("bad.yaml", text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_text_a_folder_and_a_missing_recipe(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        load_recipe(tmp_path / "image.yaml")
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        load_recipe(tmp_path)
    with pytest.raises(UserError, match=r"no recipe 'nano/c2'.*did you mean 'nano/c2i'"):
        load_recipe("nano/c2")
    with pytest.raises(UserError, match="no recipe 'xxx"):
        load_recipe("x" * 5000)
    with pytest.raises(UserError, match="no recipe"):
        load_recipe("../pyproject")


def test_numbers_and_words_are_read_as_yaml_12_has_them():
    text = "[1e-5, 2e4, 1.5, .5, -3, 010, no, yes, on, true, null, ~, 1_000, 12:30:00, 2024-01-01]"
    assert parse_yaml(text, "x") == [
        1e-5, 2e4, 1.5, 0.5, -3, 10, "no", "yes", "on", True, None, None, "1_000", "12:30:00", "2024-01-01",
    ]  # fmt: skip


def test_a_wrong_recipe_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys; from argrpo_cli.recipe import load_recipe; from argrpo_cli.system.errors import UserError\n"
        "try: load_recipe('nano/c2i', ['grpo.bta=1'])\n"
        "except UserError: print(*sorted({'torch', 'numpy', 'rich'} & sys.modules.keys()), 'told')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "told\n"
