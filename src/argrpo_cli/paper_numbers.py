"""The numbers that the AR-GRPO paper (Yuan et al. 2025) reports, from their one file `paper/numbers.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, float]  # measure to number
BEFORE, AFTER = "LlamaGen (base)", "AR-GRPO"  # how the paper calls its rows
LABELS = {"inception_score": "IS", "fid": "FID", "sfid": "sFID"}  # of measures that go by other names in its tables


@cache
def _facts() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((Path(__file__).parent / "paper" / "numbers.yaml").read_text("utf-8"))


def table(number: int) -> dict[str, dict[str, Row]]:
    """Table 2 to 8: recipe to its row "base", before training, and "trained"; columns in the paper's order."""
    facts = _facts()
    columns = facts["columns"][facts["measures"][number]]
    return {
        recipe: {when: dict(zip(columns, numbers, strict=True)) for when, numbers in rows.items()}
        for recipe, rows in facts["tables"][number].items()
    }


def before_and_after(number: int, policy: str | None = None) -> dict[str, Row]:
    """The two rows of table 2, 3 or 4, as the paper calls them, of training that begins with `policy`; {} for another.

    Without a policy, those of the only one in the table.
    """
    names, rows = _facts()["policies"], table(number)
    own = [one for recipe, one in rows.items() if names[recipe] == policy or (policy is None and len(rows) == 1)]
    return {BEFORE: own[0]["base"], AFTER: own[0]["trained"]} if own else {}


def ablation(number: int) -> dict[str, Row]:
    """Table 6, 7 or 8: the base, without one family of rewards (A, B, C), and with all (D)."""
    whole = next(iter(table(number - 4).values()))
    rows = {recipe[-1].upper(): one["trained"] for recipe, one in table(number).items()}
    return {"base": whole["base"], **rows, "D": whole["trained"]}


def of_recipe(title: str, recipe: str) -> tuple[list[str], list[float], list[float]]:
    """Measures, and their numbers before and after training, of a recipe's row in "table 2" to "table 8".

    Raises:
        ValueError: there is no such row.
    """
    rows = {f"table {number}": table(number) for number in _facts()["tables"]}
    if recipe not in rows.get(title, {}):
        known = ", ".join(rows[title]) if title in rows else f"no {title}, only {', '.join(rows)}"
        raise ValueError(f"the paper has no row {recipe!r} in {title}; there are {known}")
    row = rows[title][recipe]
    return [LABELS.get(key, key) for key in row["base"]], list(row["base"].values()), list(row["trained"].values())
