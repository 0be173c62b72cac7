"""Recipes: the typed description of one training run, read from YAML."""

from __future__ import annotations

from argrpo_cli.recipe.load import dump_recipe, list_recipes, load_recipe
from argrpo_cli.recipe.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "list_recipes", "load_recipe"]
