"""Folders of good and torn pictures: `score` keeps the score of each that can be read, and names each other one."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.system.files import read_jsonl
from tests.fuzz import pictures
from tests.fuzz.command import command
from tests.fuzz.mutate import Damage, not_a_file

GOOD, TORN = 3, 4
seeds = pictures.seeds


def case(seeds: pictures.Seeds, rng: Damage, folder: Path) -> str:
    """One `argrpo score` of a folder."""
    images = folder / "images"
    images.mkdir()
    names = [f"dog-{number}.png" for number in range(GOOD + TORN)]
    for place in range(GOOD + TORN):
        content = rng.choice(seeds["png"]) if place < GOOD else pictures.mutant(seeds, rng)
        (images / names[place]).write_bytes(content)
    if not rng.none and rng.random() < 0.3:
        not_a_file(images / names[-1], rng)
    expected = {name: pictures.readable_score(images / name) for name in names if (images / name).is_file()}
    expected = {name: score for name, score in expected.items() if score is not None}
    bad = [name for name in names if name not in expected]

    arguments = ["score", str(images), "--rewards", "tests.fuzz.pictures:brightness", "--out", str(folder / "scores")]
    code, told = command([*arguments, "--batch-size", str(rng.choice((1, 3, 64)))])
    rows = {row["file"]: row["scores"] for row in read_jsonl(folder / "scores" / "scores.jsonl")}
    scores = {name: row["tests.fuzz.pictures:brightness"] for name, row in rows.items()}
    lost = [name for name in expected if name not in scores]
    assert not lost, "a lost score"
    for name, score in expected.items():
        assert abs(scores[name] - score) <= 1e-5 * max(1, score), "another score in a folder than alone"
    unnamed = [name for name in bad if name not in told and not (images / name).is_dir()]
    assert not unnamed, "a bad picture is not named"
    assert code == (2 if bad else 0), f"exit code {code} with {len(bad)} bad pictures"
    return f"{len(expected)} scored, {len(bad)} named"
