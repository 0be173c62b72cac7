"""What an image is asked to show: the plain record that travels from the sampler to the rewards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """A text prompt and, for class-conditional policies, the class id behind it."""

    prompt: str
    class_id: int | None = None


def with_article(name: str) -> str:
    """`a dog`, `an apple`."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def class_prompt(name: str) -> str:
    """The text of a class condition, for rewards that read: `a photo of a dog`, `a photo of an orange`."""
    return f"a photo of {with_article(name)}"
