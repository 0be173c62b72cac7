"""A recipe with other guards, for their tests."""

from __future__ import annotations

from typing import Any

from argrpo_cli.recipe import Recipe


def guarded(recipe: Recipe, **guards: Any) -> Recipe:
    """The recipe with other keys of its guards section; a dictionary overrides single keys of one guard."""
    tree = recipe.model_dump()
    for name, value in guards.items():
        tree["guards"][name] = tree["guards"][name] | value if isinstance(value, dict) else value
    return Recipe.model_validate(tree)
