"""GenEval 2 (Kamath et al. 2025, arXiv 2512.16853): what is asked about a picture, and what the answers come to.

A prompt is a number of atoms: objects, attributes, counts, positions, verbs. Of each a question is asked; the answer's
worth is the probability that the judge gives to the expected word. Soft-TIFA is the arithmetic mean over a prompt's
questions (AM) or the geometric one (GM, the headline).

The benchmark's own file is CC BY-NC 4.0 and not part of this package. A line of it, and of one's own file:

    {"prompt": "two red cars", "atom_count": 3,
     "vqa_list": [["How many cars are in the image?", "two"], ["Are the cars red?", "Yes"],
                  ["Are there any cars in the image?", "Yes"]],
     "skills": ["count", "attribute", "object"]}

"a" is asked, too ("How many cars ...?", "one"), and is no atom. In the same words prompts of GenEval's grammar are
asked (`questions_of`), those of the nano world among them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from argrpo_cli.geneval.prompts import Prompt, Requirement, parse_prompt, plural, prompt_set
from argrpo_cli.shapes import with_article
from argrpo_cli.system.download import fetch_url
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_jsonl

SKILLS = ("object", "attribute", "count", "position", "verb")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLACES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
COMMIT = "a6e82d2289e8d418f27f0adee77908b07060eea3"
URL = f"https://raw.githubusercontent.com/facebookresearch/GenEval2/{COMMIT}/geneval2_data.jsonl"
SHA256 = "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43"  # of that file
PUBLISHED = "029f4db9fe4beb1acfc5d44e91fa733f3b47b68718f9e29f583afd8c1a4c32be"  # `digest` of what it holds
LICENCE = "GenEval 2's prompts are Meta's, under CC BY-NC 4.0: not for commercial use"
NANO = "geneval2-nano"
PER_ATOMICITY = 20  # of the nano prompts


class Question(NamedTuple):
    """One atom's: the text, the word that answers it ("Yes", or a number), and the skill it is of."""

    text: str
    answer: str
    skill: str


class Item(NamedTuple):
    """A prompt, how many atoms it has, and its questions."""

    prompt: str
    atoms: int
    questions: tuple[Question, ...]


class Likelihood(NamedTuple):
    """What a judge thinks of the expected answer.

    Attributes:
        published: the sum over `variants` of the probability of each one's first token, as the benchmark's code has it:
            a token that two of them begin with counts twice, and one that is a space alone counts in full.
        exact: the probability of the tokens that are variants as a whole, each once; in [0, 1].
        likeliest: the judge's likeliest token is one of the variants.
        reason: why there is no answer, all numbers being NaN then.
    """

    published: float
    exact: float
    likeliest: bool
    reason: str = ""


class _Line(TypedDict):
    prompt: str
    atom_count: int
    vqa_list: list[list[str]]
    skills: list[str]


def variants(answer: str) -> list[str]:
    """The words that count as an answer, in the published order: four, Four, ' four', ' Four', 4, ' 4'."""
    word = answer.lower()
    texts = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
    digit = str(NUMBERS.index(word) + 1) if word in NUMBERS else ""
    return texts + ([digit, f" {digit}"] if digit else [])


def holistic(prompt: str) -> Question:
    """VQAScore's question (Lin et al. 2024) as GenEval 2 asks it, of the prompt as a whole."""
    return Question(f'Does this image show "{prompt}"? Answer the question with Yes or No.', "Yes", "")


def wording(question: Question) -> str:
    """What a language model is asked: of an atom, one word."""
    return f"{question.text} Answer in one word." if question.skill else question.text


def arithmetic_mean(values: Sequence[float]) -> float:
    """Soft-TIFA AM of one prompt's answers; NaN where one of them is missing, which is NaN."""
    return math.fsum(values) / len(values)


def geometric_mean(values: Sequence[float]) -> float:
    """Soft-TIFA GM of one prompt's answers, (prod p_i)^(1/n): 0 where one is 0, NaN where one is missing."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if min(values) <= 0 else math.exp(math.fsum(map(math.log, values)) / len(values))


def questions_of(include: Sequence[Requirement]) -> tuple[Question, ...]:
    """The questions of what GenEval's grammar asks for, object by object in the benchmark's order and words."""
    questions = []
    for part in include:
        questions.append(Question(f"How many {plural(part.name)} are in the image?", NUMBERS[part.count - 1], "count"))
        if part.color is not None:
            questions.append(Question(f"{_verb(part)} {part.color}?", "Yes", "attribute"))
        questions.append(Question(f"Are there any {plural(part.name)} in the image?", "Yes", "object"))
        if part.position is not None:
            relation, target = part.position
            text = f"{_verb(part)} {PLACES[relation]} the {_noun(include[target])}?"
            questions.append(Question(text, "Yes", "position"))
    return tuple(questions)


def atoms_of(include: Sequence[Requirement]) -> int:
    """Objects, colours, positions, and counts above one."""
    return sum(1 + (part.count > 1) + (part.color is not None) + (part.position is not None) for part in include)


def _noun(part: Requirement) -> str:
    return part.name if part.count == 1 else plural(part.name)


def _verb(part: Requirement) -> str:
    return f"{'Is' if part.count == 1 else 'Are'} the {_noun(part)}"


def item_of(prompt: Prompt) -> Item:
    """A prompt of GenEval as one of GenEval 2."""
    return Item(prompt.text, atoms_of(prompt.include), questions_of(prompt.include))


def find_item(text: str) -> Item:
    """The questions of a prompt in GenEval's words, or of the nano world's of five atoms; UserError for another."""
    known = next((item for item in nano_items() if item.prompt == text), None)
    return known or item_of(parse_prompt(text))


@cache
def nano_items() -> tuple[Item, ...]:
    """The nano world's prompts: twenty each of 2, 3, 4 and 5 atoms, in GenEval's words.

    Those of 2 (a count, a colour, a second object), 3 (a position) and 4 (two colours) are captions as the nano
    policies were trained on. Those of 5, two colours and a position ("a photo of a red car left of a blue dog"), use
    the same words in a composition that no caption had.
    """
    groups: dict[int, list[Item]] = {}
    prompts = [*prompt_set("geneval-nano"), *prompt_set("geneval-nano-extra")]
    by_tag = {tag: [one for one in prompts if one.tag == tag] for tag in ("counting", "colors", "two_object")}
    groups[2] = [item_of(one) for three in zip(*by_tag.values(), strict=False) for one in three]  # kinds in turn
    groups[3] = [item_of(one) for one in prompts if one.tag == "position"]
    pairs = [one.include for one in prompts if one.tag == "color_attr"]
    groups[4] = [item_of(one) for one in prompts if one.tag == "color_attr"]
    groups[5] = [_related(*pair, tuple(PLACES)[place % len(PLACES)]) for place, pair in enumerate(pairs)]
    return tuple(item for atoms in sorted(groups) for item in groups[atoms][:PER_ATOMICITY])


def _related(first: Requirement, second: Requirement, relation: str) -> Item:
    """Two coloured objects, the first of them somewhere from the second."""
    words = [with_article(f"{part.color} {part.name}") for part in (first, second)]
    include = (Requirement(first.name, 1, first.color, (relation, 1)), second)
    return Item(f"a photo of {words[0]} {relation} {words[1]}", atoms_of(include), questions_of(include))


def read_items(path: str | Path) -> tuple[Item, ...]:
    """The prompts of a file in the benchmark's format, each once.

    Raises:
        UserError: no such file, or a line that is not one of this kind; it is named.
    """
    items = []
    for number, line in enumerate(read_jsonl(path, _Line), 1):
        where, pairs, skills = f"{path}, line {number}", line["vqa_list"], line["skills"]
        if not pairs or len(pairs) != len(skills):
            raise UserError(f"{where}: {len(pairs)} questions in vqa_list and {len(skills)} skills; give one for each")
        if bad := [skill for skill in skills if skill not in SKILLS]:
            raise UserError(f"{where}: the skill {bad[0]!r} is unknown; there are {', '.join(SKILLS)}")
        if bad := [pair for pair in pairs if len(pair) != 2 or not all(map(str.strip, pair))]:
            raise UserError(f"{where}: {bad[0]!r} is no question and its answer")
        questions = tuple(Question(*pair, skill) for pair, skill in zip(pairs, skills, strict=True))
        items.append(Item(line["prompt"].strip(), line["atom_count"], questions))
    texts = [item.prompt for item in items]
    if not items or "" in texts:
        raise UserError(f"{path} holds {'an empty prompt' if items else 'no prompts'}; give a line for each")
    if twice := next((text for place, text in enumerate(texts) if text in texts[:place]), None):
        raise UserError(f"{path}: the prompt {twice!r} is there twice; give each once")
    return tuple(items)


def published_items() -> tuple[Item, ...]:
    """The benchmark's 800 prompts, as they were at COMMIT; fetched into the user's cache if they are not there.

    Raises:
        UserError: no connection, or another file.
    """
    return read_items(fetch_url(URL, "--prompts", SHA256, LICENCE))


def digest(items: Iterable[Item]) -> str:
    """SHA-256 of prompts and questions, whatever file they come from."""
    return hashlib.sha256(repr([tuple(item) for item in items]).encode()).hexdigest()


def count_skills(items: Iterable[Item]) -> dict[str, int]:
    """Skill to how many questions are of it."""
    skills = [question.skill for item in items for question in item.questions]
    return {skill: skills.count(skill) for skill in SKILLS if skill in skills}
