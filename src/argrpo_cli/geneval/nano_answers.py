"""The nano world's detector answers GenEval 2's questions: the probability that it gives to the expected word.

With p_i the probability of each object of a class that was found, and objects taken for independent:

    Are there any dogs ...?        max p_i
    How many dogs ...? two         the probability that two of them are there (Poisson-binomial)
    Is the dog red?                max p_i times the mean probability of red, weighted by p_i
    Is the dog above the cat?      the product of the likeliest dog's and cat's, where GenEval's rule says so, else 0

Nothing learnt from language: it reads the words that `questions.questions_of` writes and no others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from argrpo_cli.geneval.nano_detector import Found
from argrpo_cli.geneval.prompts import NANO_COLORS, NANO_OBJECTS, plural
from argrpo_cli.geneval.questions import NUMBERS, PLACES, Likelihood, Question
from argrpo_cli.geneval.rules import relative_position
from argrpo_cli.system.errors import UserError

NAMES = {name: name for name in NANO_OBJECTS} | {plural(name): name for name in NANO_OBJECTS}
_NAME = f"({'|'.join(sorted(NAMES, key=len, reverse=True))})"
_RELATIONS = {words: relation for relation, words in PLACES.items()}
COUNT = re.compile(rf"How many {_NAME} are in the image\?")
OBJECT = re.compile(rf"Are there any {_NAME} in the image\?")
COLOR = re.compile(rf"(?:Is|Are) the {_NAME} ({'|'.join(NANO_COLORS)})\?")
POSITION = re.compile(rf"(?:Is|Are) the {_NAME} ({'|'.join(_RELATIONS)}) the {_NAME}\?")


def check_question(question: Question) -> None:
    """UserError for a question that is not in these words, or about what the nano world has not."""
    kinds = {COUNT: NUMBERS, OBJECT: ("Yes",), COLOR: ("Yes",), POSITION: ("Yes",)}
    if not any(kind.fullmatch(question.text) and question.answer in answers for kind, answers in kinds.items()):
        raise UserError(
            f"the nano detector cannot be asked {question.text!r} ({question.answer}); "
            "its questions are those of the nano world's prompts: give another judge"
        )


def answer(objects: Sequence[Found], question: Question) -> Likelihood:
    """How likely the expected word is, from the objects found in a picture.

    Raises:
        UserError: a question that it cannot read.
    """
    check_question(question)
    if match := COUNT.fullmatch(question.text):
        shares = count_distribution([one.score for one in _of(objects, match[1])])
        count = NUMBERS.index(question.answer) + 1
        own = shares[count] if count < len(shares) else 0.0
        return Likelihood(own, own, own > 0 and own == max(shares))
    if match := OBJECT.fullmatch(question.text):
        share = max((one.score for one in _of(objects, match[1])), default=0.0)
    elif match := COLOR.fullmatch(question.text):
        own, place = _of(objects, match[1]), NANO_COLORS.index(match[2])
        weighted = sum(one.score * one.colors[place] for one in own)
        share = max(one.score for one in own) * weighted / sum(one.score for one in own) if own else 0.0
    else:
        match = POSITION.fullmatch(question.text)
        first, second = (max(_of(objects, name), key=lambda one: one.score, default=None) for name in match.group(1, 3))
        holds = first and second and _RELATIONS[match[2]] in relative_position(first.box, second.box)
        share = first.score * second.score if holds else 0.0
    return Likelihood(share, share, share > 0.5)


def count_distribution(scores: Sequence[float]) -> list[float]:
    """The probability of 0, 1, ..., N objects, of N that are there with these probabilities, each for itself."""
    shares = [1.0]
    for score in scores:
        shares = [
            here * (1 - score) + before * score for here, before in zip([*shares, 0.0], [0.0, *shares], strict=True)
        ]
    return shares


def _of(objects: Sequence[Found], name: str) -> list[Found]:
    return [one for one in objects if one.name == NAMES[name]]
