"""The columns of `--diversity`: `diversity.py`'s statistics in the features of networks, for any benchmark.

Of each policy how its images of one prompt differ, and all of its images; with a baseline how much of the baseline's
variety the policy still draws. Features lie in POLICY/diversity/NETWORK, batch by batch, so that an interrupted
evaluation goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from argrpo_cli.evals.diversity_networks import FeatureNetwork, check_networks, load_features, name_of
from argrpo_cli.images import file_item, read_runs
from argrpo_cli.kept import Tensors, in_batches, kept
from argrpo_cli.shapes import Column, Result, Shot
from argrpo_cli.system.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from argrpo_cli.evals.benchmark import Subject
    from argrpo_cli.evals.statistics import Measure
    from argrpo_cli.system.processes import Team

FEATURES = "features"  # in a store
WITHIN = {
    "distance": Column("distance within a prompt"),
    "vendi_within": Column("Vendi score within a prompt"),
}
ALL = {"vendi": Column("Vendi score of all images")}
AGAINST = {
    "recall": Column("recall of the baseline", "", "higher", 1, True),
    "coverage": Column("coverage of the baseline", "", "higher", 1, True),
}
ABOUT = (
    "distance: 1 - cosine; recall (k = 3) and coverage (k = 5) of the baseline's images, Euclidean; errors clustered "
    "by prompt, those of the Vendi score of all by a jackknife over prompts"
)


class Diversity:
    """The networks, and what becomes of the images of policies in them.

    Args:
        names: of `diversity_networks.NETWORKS`, see `check_networks`.

    Raises:
        UserError: no such network, one named twice, none, or its package is not installed.
    """

    def __init__(self, names: Sequence[str]):
        check_networks(names)
        self.given, self.names = list(names), [name_of(one) for one in names]
        self.networks: list[FeatureNetwork] = []

    def open(self, team: Team) -> None:
        """Load the networks; UserError where one cannot be had."""
        self.networks = [load_features(one, team.device) for one in self.given]

    @staticmethod
    def check(subjects: Sequence[Subject]) -> None:
        """Refuse before anything is drawn what is too little to measure; UserError."""
        from argrpo_cli.evals.diversity import COVERING

        count = min(len(one.shots) for one in subjects)
        if len(subjects) > 1 and count <= COVERING:
            raise UserError(f"--diversity against a baseline needs at least {COVERING + 1} images; there are {count}")

    def store(self, subject: Subject, network: FeatureNetwork) -> Tensors:
        """Where the features of a policy's images lie."""
        return Tensors(subject.folder / "diversity" / network.name, network.fingerprint, lambda shot: shot.file)

    def look(self, subject: Subject, batch_size: int, team: Team) -> None:
        """Features of all pictures in the subject's folder that there are none of."""
        for network in self.networks:
            kept(
                subject.shots,
                partial(_features, network),
                self.store(subject, network),
                batch_size=batch_size,
                label=f"{network.name} on {subject.name}",
                team=team,
                prepare=partial(_read, subject.pictures),
            )

    def write(self, subject: Subject, batch: Sequence[Shot], images: Tensor) -> None:
        """Keep the features of images uint8 [B, 3, H, W] that are at hand, and nowhere else."""
        for network in self.networks:
            self.store(subject, network).write(batch, {FEATURES: network.features(images).float().cpu()})

    def remove(self, subject: Subject) -> None:
        """Take the features away."""
        for network in self.networks:
            self.store(subject, network).remove()
        with suppress(OSError):  # others are in it
            (subject.folder / "diversity").rmdir()

    def measure(self, subjects: Sequence[Subject], batch_size: int, device: str) -> dict[str, dict[str, Measure]]:
        """Name of a subject to its measures by column; recall and coverage of the first of two against the second."""
        from argrpo_cli.evals import diversity as d

        rows: dict[str, dict[str, Measure]] = {one.name: {} for one in subjects}
        for network in self.networks:
            every = {}
            for one in subjects:
                batches = in_batches(one.shots, batch_size)
                every[one.name] = self.store(one, network).column(batches, FEATURES)
                features, groups = every[one.name], _groups(one.shots)
                own = {"vendi": d.vendi_of_all(features, groups)}
                if len(groups.unique()) < len(groups):
                    own |= {
                        "distance": d.distance_within(features, groups),
                        "vendi_within": d.vendi_within(features, groups),
                    }
                rows[one.name] |= {f"{network.name}/{key}": value for key, value in own.items()}
            if len(subjects) > 1:
                first, base = (every[one.name].to(device) for one in subjects)
                groups = _groups(subjects[1].shots)
                rows[subjects[0].name] |= {
                    f"{network.name}/recall": d.recall(first, base, groups),
                    f"{network.name}/coverage": d.coverage(first, base, groups),
                }
        return rows

    def columns(self) -> dict[str, Column]:
        """All there can be, in order, a group of them for each network."""
        return {
            f"{name}/{key}": replace(column, group=f"diversity, {name}")
            for name in self.names
            for key, column in (WITHIN | ALL | AGAINST).items()
        }

    def added(self, result: Result, measured: Mapping[str, Mapping[str, Measure]]) -> Result:
        """The result with these columns behind its own, and what they are of."""
        from argrpo_cli.evals.statistics import differences

        columns = {key: one for key, one in self.columns().items() if any(key in row for row in measured.values())}
        networks = {one.name: {"network": one.source, "weights": one.fingerprint} for one in self.networks}
        rows = {
            name: {**row, **{key: one.summary() for key, one in measured.get(name, {}).items()}}
            for name, row in result.rows.items()
        }
        return replace(
            result,
            columns={**result.columns, **columns},
            rows=rows,
            difference={**result.difference, **differences(measured, columns)},
            protocol={**result.protocol, "diversity": {**networks, "measures": ABOUT}},
        )


def _read(folder: Path, batch: Sequence[Shot]) -> list[np.ndarray]:
    """The pictures of a batch in order, uint8 [n, 3, H, W] for neighbours of one size."""
    return [pixels for _, pixels in read_runs([file_item(folder, shot.file) for shot in batch])]


def _features(network: FeatureNetwork, batch: Sequence[Shot], pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
    import torch

    return {FEATURES: torch.cat([network.features(torch.from_numpy(one)).float().cpu() for one in pictures])}


def _groups(shots: Sequence[Shot]) -> Tensor:
    """int64 [N], which images show one prompt."""
    import torch

    places = {one: place for place, one in enumerate(dict.fromkeys(shot.condition for shot in shots))}
    return torch.tensor([places[shot.condition] for shot in shots])
