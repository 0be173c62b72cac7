"""Folders of good and torn pictures: `score` keeps the score of each that can be read, and names each other one."""

from __future__ import annotations

import os
from pathlib import Path

from argrpo_cli.system.files import read_jsonl
from tests.fuzz import pictures
from tests.fuzz.command import answer
from tests.fuzz.mutate import Damage, not_a_file

GOOD, TORN = 3, 4
REWARD = "tests.fuzz.pictures:brightness"
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
    there = [name for name in names if os.path.lexists(images / name) and not (images / name).is_dir()]
    bad = [name for name in there if name not in expected]

    out, size = folder / "scores", rng.choice((1, 3, 64))
    said = answer("score", images, "--rewards", REWARD, "--out", out, "--batch-size", size)
    scores = {row["file"]: row["scores"][REWARD] for row in read_jsonl(out / "scores.jsonl")}
    for name, score in expected.items():
        assert scores.get(name) is not None, "a lost score"
        assert abs(scores[name] - score) <= 1e-5 * max(1, score), "another score in a folder than alone"
    for name in bad:
        assert scores.get(name) is None, "a score of no picture"
        assert said.err.count(str(images / name)) == 1, "a bad picture is not named once"
    assert said.code == (2 if bad else 0), f"exit code {said.code} with {len(bad)} bad pictures"
    return f"{len(expected)} scored, {len(bad)} named"
