"""The page of a recipe's keys."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.recipe.page import page
from argrpo_cli.recipe.schema import Recipe

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_in_docs_is_that_of_the_schema():
    assert (DOCS / "recipes.md").read_text("utf-8") == page(), "python -m argrpo_cli.recipe.page > docs/recipes.md"


def test_every_key_has_its_values_default_and_comment():
    for row in (
        "| `cfg_scale` | number | `2.0` | Guidance s in l_u + s (l_c - l_u); 1, the least, is none. Where ",
        "| `micro_batch_size` | whole number from 1, or `null` | `null` | images per forward pass of a process; ",
        "| `betas` | list of number from 0 below 1 | `[0.9, 0.95]` | AdamW |",
        "| `start` | recipe, or `null` | `null` | A run before this one, in the folder start ",
        "| `cfg_scale` | number above 1, or list of number above 1 | `2.0` | Guidance of the teacher.",
        '| `importance` | `token`, `sequence` | `"token"` | the ratio of each token',
    ):
        assert f"\n{row}" in page()
    sections = set(Recipe.model_fields) - {"name", "description", "seed", "out", "published", "method", "start"}
    assert all(f"\n## `{name}`\n" in page() for name in sections)
    assert "\n## `published[]`\n" in page() and "\n## `guards.kl`\n" in page()
