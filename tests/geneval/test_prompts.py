"""The prompts of GenEval: the official list from a table of facts, and the sets of the nano world."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from argrpo_cli.geneval import prompts
from argrpo_cli.geneval.prompts import (
    COLORS,
    OBJECT_NAMES,
    RELATIONS,
    TAGS,
    Requirement,
    compose,
    parse_prompt,
    plural,
)
from argrpo_cli.nano import scenes
from argrpo_cli.system.errors import UserError
from tests.geneval.goldens import prompt_from
from tests.geneval.nano_extra import chosen_prompts

NANO_SETS = ("geneval-nano", "geneval-nano-extra")


def test_the_rebuilt_list_is_the_official_file_byte_for_byte():
    text = prompts.official_jsonl(prompts.prompt_set("geneval"))
    assert len(text) == 85209
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    )


def test_the_553_prompts_come_in_six_categories_in_the_order_of_tags():
    official = prompts.official_prompts()
    assert [prompt.index for prompt in official] == list(range(553))
    assert list(Counter(prompt.tag for prompt in official).items()) == list(
        zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True)
    )
    assert len({prompt.text for prompt in official}) == 553


def test_a_changed_table_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "_read_facts", lambda path: iter([("single_object", "dog")]))
    with pytest.raises(UserError, match="not the official ones"):
        prompts.official_prompts.__wrapped__()


def test_the_licence_stands_beside_the_table():
    table = (prompts.Path(prompts.__file__).with_name("prompts.txt")).read_text()
    assert "Copyright (c) 2023 Dhruba Ghosh" in table and "Permission is hereby granted" in table


def test_every_object_colour_and_relation_is_a_known_one_and_every_object_is_used():
    parts = [part for prompt in prompts.official_prompts() for part in prompt.include]
    assert len(OBJECT_NAMES) == 80
    assert {part.name for part in parts} == set(OBJECT_NAMES)
    assert {part.color for part in parts} == {None, *COLORS}
    assert {part.position[0] for part in parts if part.position} == set(RELATIONS)
    # The order is COCO's: a detector's class ids point into it.
    names = "\n".join(OBJECT_NAMES) + "\n"
    assert (
        hashlib.sha256(names.encode()).hexdigest() == "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"
    )


def test_the_colours_are_in_the_order_of_the_classifier():
    assert " ".join(COLORS) == "red orange yellow green blue purple pink brown black white"


@pytest.mark.parametrize(
    ("tag", "include", "text"),
    [
        ("single_object", [Requirement("umbrella")], "a photo of an umbrella"),
        ("two_object", [Requirement("oven"), Requirement("bed")], "a photo of an oven and a bed"),
        ("counting", [Requirement("wine glass", 3)], "a photo of three wine glasses"),
        ("counting", [Requirement("knife", 4)], "a photo of four knifes"),
        ("colors", [Requirement("apple", color="orange")], "a photo of an orange apple"),
        (
            "position",
            [Requirement("apple"), Requirement("dog", position=("left of", 0))],
            "a photo of a dog left of an apple",
        ),
        (
            "color_attr",
            [Requirement("skis", color="green"), Requirement("airplane", color="brown")],
            "a photo of a green skis and a brown airplane",
        ),
    ],
)
def test_templates(tag, include, text):
    assert compose(tag, tuple(include)).text == text


def test_only_counting_excludes_and_it_excludes_one_more():
    assert compose("counting", (Requirement("dog", 3),)).exclude == (Requirement("dog", 4),)
    for prompt in prompts.official_prompts():
        assert bool(prompt.exclude) == (prompt.tag == "counting")


def test_metadata_is_the_official_dictionary_and_reads_back():
    include = (Requirement("teddy bear"), Requirement("dog", position=("right of", 0)))
    prompt = compose("position", include, 353)
    assert json.dumps(prompt.metadata()) == (
        '{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, '
        '{"class": "dog", "count": 1, "position": ["right of", 0]}], '
        '"prompt": "a photo of a dog right of a teddy bear"}'
    )
    for name in prompts.SETS:
        for prompt in prompts.prompt_set(name):
            assert prompt_from(json.loads(json.dumps(prompt.metadata())), prompt.index) == prompt


def test_the_nano_set_is_the_official_prompts_of_nano_objects_and_colours():
    nano, official = prompts.prompt_set("geneval-nano"), prompts.official_prompts()
    assert all(official[prompt.index] is prompt for prompt in nano)
    assert Counter(prompt.tag for prompt in nano) == dict(zip(TAGS, (24, 4, 24, 22, 9, 1), strict=True))
    left_out = set(official) - set(nano)
    known = {*scenes.CLASS_NAMES}, {None, *scenes.COLORS}
    assert all(any(p.name not in known[0] or p.color not in known[1] for p in out.include) for out in left_out)


def test_the_extra_set_fills_every_category_with_compositions_the_official_list_lacks():
    nano, extra = prompts.prompt_set("geneval-nano"), prompts.prompt_set("geneval-nano-extra")
    counts = Counter(prompt.tag for prompt in nano + extra)
    assert counts.pop("single_object") == len(scenes.CLASS_NAMES) == 24  # there are no more
    assert set(counts.values()) == {40}
    official = prompts.official_prompts()
    assert [prompt.index for prompt in extra] == list(range(len(official), len(official) + len(extra)))
    contents = [(prompt.tag, frozenset(prompt.include)) for prompt in (*official, *extra)]
    assert len(set(contents)) == len({prompt.text for prompt in (*official, *extra)}) == len(contents)
    for part in (part for prompt in extra for part in prompt.include):
        assert part.name in scenes.CLASS_NAMES and (part.color is None or part.color in scenes.COLORS)
    for prompt in extra:
        assert prompt == compose(prompt.tag, prompt.include, prompt.index)


def test_the_extra_set_is_what_its_rule_chooses():
    assert prompts.nano_extra_prompts() == chosen_prompts()


def test_the_extra_set_is_the_same_on_every_machine():
    text = prompts.official_jsonl(prompts.nano_extra_prompts())
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "54fbd3155f3043eae4f1ae5c087fceecaa1ab7dcfc2ee6def4132796b0828ce6"
    )


def test_the_nano_sets_together_ask_evenly_for_relations_counts_and_pairs_of_colours():
    both = [prompt for name in NANO_SETS for prompt in prompts.prompt_set(name)]
    relations = Counter(prompt.include[1].position[0] for prompt in both if prompt.tag == "position")
    assert relations == dict.fromkeys(RELATIONS, 10)
    counts = Counter(prompt.include[0].count for prompt in both if prompt.tag == "counting")
    assert counts == {2: 13, 3: 14, 4: 13}
    colors = Counter(part.color for prompt in both if prompt.tag == "color_attr" for part in prompt.include)
    assert colors == dict.fromkeys(scenes.COLORS, 10)


def test_plurals_are_the_benchmarks():
    assert [plural(name) for name in ("bus", "sheep", "apple")] == ["buses", "sheeps", "apples"]


def test_nano_captions_say_what_their_scenes_show():
    rng = np.random.default_rng(0)
    seen = set()
    for place in range(1500):
        tag = TAGS[place % len(TAGS)]
        scene = scenes.caption_scene(rng, tag)
        shown = Counter((scenes.CLASS_NAMES[placed.class_id], placed.color) for placed in scene.objects)
        assert shown == {(part.name, part.color): part.count for part in scene.prompt.include}
        parsed = parse_prompt(scene.prompt.text)
        assert parsed == scene.prompt
        seen.add((tag, parsed.tag))
    # One object of the category counting is asked for as a single object.
    assert seen == {*zip(TAGS, TAGS, strict=True), ("counting", "single_object")}


def test_a_prompt_is_understood_from_its_text_alone():
    for name in prompts.SETS:
        for prompt in prompts.prompt_set(name):
            parsed = parse_prompt(prompt.text)
            assert (parsed.tag, parsed.include, parsed.exclude) == (prompt.tag, prompt.include, prompt.exclude)


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "a photo of a dgo",
        "a photo of five dogs",
        "a photo of a an dog",
        "a photo of a dog and",
        "",
        "a photo of a cat and a dog and a bus",
        "a photo of a red cat and a dog",
        "a photo of a red dog left of a cat",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="GenEval has no such prompt"):
        parse_prompt(text)


def test_an_unknown_set_is_named_with_the_allowed_ones_and_the_nearest():
    with pytest.raises(UserError, match=r"'geneval-nan'.*geneval-nano-extra; did you mean 'geneval-nano'\?"):
        prompts.prompt_set("geneval-nan")
