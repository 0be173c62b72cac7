"""The published caption cleaning, rule by rule; expectations follow from the published rules, not from this code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argrpo_cli.policy.llamagen.text import clean_caption, published_caption


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("A Photo of a DOG", "a photo of a dog"),
        ("a+dog%20and%21", "a dog and!"),
        ("<person> riding a horse", "person riding a horse"),
        ("a cat https://cats.org/cat?id=1", "a cat ?id=1"),
        ("a cat at www.cats.com/best", "a cat at"),
        ("write to me@cats.com now", "write to me now"),
        ("a <b>bold</b> dog", "a bold dog"),
        ("a dog by @photographer today", "a dog by today"),
        ("狗 dog ㈱ ㍿ 㐀 ䷀", "dog"),
        ("a dog — a cat – a bird", "a dog - a cat - a bird"),
        ("a «dog» and a “cat”", 'a "dog" and a "cat"'),
        ("the dog’s bone", "the dog's bone"),
        ("black &quot;white", 'black "white'),
        ("dog 192.168.10.1 cat", "dog cat"),
        (r"a dog\non a mat", "a dog on a mat"),
        ("dog #12 cat", "dog cat"),
        ("dog #123456 cat", "dog cat"),
        ("dog 1234567 cat", "dog cat"),
        ("dog my_file.jpg cat", "dog cat"),
        ('a """big""" dog', 'a "big" dog'),
        ("a dog... a cat", "a dog a cat"),
        ("***dog*** (cat) [bird] {fish} a|b", "dog cat bird fish a b"),
        ("dog . cat", "dog cat"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("a well-known black-and-white dog", "a well-known black-and-white dog"),
        ("a dog jc6640 runs", "a dog runs"),
        ("a dog jc6640vc runs", "a dog runs"),
        ("a dog 6640vc231 runs", "a dog runs"),
        ("dog worldwide free shipping", "dog"),
        ("free download free dog", "dog"),
        ("click for details of a dog", "of a dog"),
        ("a png image of a dog", "a of a dog"),
        ("dog page 12", "dog"),
        ("dog j2d1a2a cat", "dog cat"),
        ("dog 640x480 cat", "dog cat"),
        ("dog 640х480 cat", "dog cat"),  # a Cyrillic letter
        ("dog  : cat", "dog: cat"),
        ("a dog,a cat", "a dog, a cat"),
        ('"a dog"', "a dog"),
        ("-a dog-", "a dog"),
        (".dog", ""),
        ("ｄｏｇ and ﬁsh", "dog and fish"),  # ftfy: wide letters, ligatures
        ("cats &amp;lt; dogs", "cats lt; dogs"),  # the ampersand goes before it is unescaped
    ],
)
def test_each_rule(given, cleaned):
    assert clean_caption(given) == cleaned


def test_the_cleaning_is_applied_twice():
    assert clean_caption("a%252520dog") == "a%2520dog"
    assert published_caption("a%252520dog") == "a%20dog"


def test_captions_of_the_benchmarks_are_left_alone():
    from argrpo_cli.geneval.prompts import official_prompts

    for prompt in official_prompts():
        assert published_caption(prompt.text) == prompt.text


def test_303_captions_as_the_published_function_cleaned_them():
    """Made of what the rules look for, in random order; cleaned by LlamaGen's language/t5.py, twice as it does."""
    rows = json.loads((Path(__file__).parents[1] / "data/policy/captions_cleaned.json").read_text("utf-8"))
    assert len(rows) > 290
    assert [published_caption(given) for given, _ in rows] == [cleaned for _, cleaned in rows]
