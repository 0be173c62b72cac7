"""Studies in the nano world: recipes trained and policies measured, once each, in a folder; a stopped one goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from argrpo_cli.evals.nano import CORRECTED, measure_policy
from argrpo_cli.evals.statistics import mean_of
from argrpo_cli.policy import load_policy
from argrpo_cli.shapes import Sampling, Value
from argrpo_cli.system.files import save_tensors
from argrpo_cli.training import run_training

if TYPE_CHECKING:
    from torch import Tensor

    from argrpo_cli.recipe import Recipe

Units = dict[str, Any]  # measure to its values over units, a tensor [U]
SEED, BATCH_SIZE = 0, 64  # of all samples


@dataclass(frozen=True)
class Study:
    """Where runs and results lie.

    Attributes:
        images: drawn of each policy, with the same classes and seeds.
    """

    root: Path
    images: int

    def trained(self, recipe: Recipe, name: str) -> str:
        """The run directory of a recipe; trains it, or what is left of it."""
        out = self.root / "runs" / name
        if not (out / "policy" / "policy.json").is_file():
            run_training(recipe, out, resume=(out / "recipe.yaml").is_file())
        return str(out)

    def fidelity(self, policy: str, cfg_scale: float = 2.0) -> Units:
        """The measures of `argrpo eval nano` as values over units."""
        opened = load_policy(policy)
        path = self.root / "results" / f"{opened.fingerprint()[:16]}-cfg{cfg_scale:g}.safetensors"
        if not path.is_file():
            folder = path.with_suffix(".drawn")
            measures = measure_policy(opened, self.images, Sampling(cfg_scale=cfg_scale), SEED, folder, BATCH_SIZE)
            save_tensors(path, {key: one.strata[0] for key, one in measures.items()})
            shutil.rmtree(folder)
        return load_file(path)


def corrected(units: Units, key: str) -> Tensor:
    """Values over units; those of FID and sFID without their bias."""
    return units.get(f"{key}{CORRECTED}", units[key]).double()


def mean_row(runs: Sequence[Units], keys: Iterable[str]) -> dict[str, Value]:
    """The means over runs of some measures, with the errors of drawing the samples."""
    return {key: mean_of(sum(units[key].double() for units in runs) / len(runs)).summary() for key in keys}


def paired(one: Sequence[Units], other: Sequence[Units], key: str) -> Value:
    """Difference of the means over runs, with the error of drawing the samples, unit by unit."""
    first, second = (sum(corrected(units, key) for units in runs) / len(runs) for runs in (one, other))
    return mean_of(first - second).summary()


def markdown(
    rows: Mapping[str, Mapping[str, Value]], columns: Mapping[str, str], paper: Mapping[str, Mapping[str, float]]
) -> str:
    """Rows of measures, each followed by the paper's numbers where it has some, for the first of the columns."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in rows.items():
        lines.append(" | ".join([f"| {name}", *(row[key].text() for key in columns)]) + " |")
        if name in paper:
            numbers = [f"{paper[name][key]:g}" if key in paper[name] else "" for key in columns]
            lines.append(" | ".join([f"| *{name}, in the paper*", *numbers]) + " |")
    return "\n".join(lines)
