"""`argrpo train` from its first word to its last, with a reward of one's own that compares images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from argrpo_cli.cli.app import run
from tests.training.tiny import save_tiny_policy, tiny_recipe


def test_a_run_ends_with_where_everything_is_and_how_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("argrpo_cli.training.job.refresh_report", lambda *args, **keys: None)  # takes its time
    monkeypatch.chdir(tmp_path)
    save_tiny_policy(tmp_path / "policy")
    Path("apart.py").write_text(
        "def apart(images, conditions):\n"
        "    level = images.float().mean((1, 2, 3))\n"
        "    assert len(level) == len(conditions) == 8, 'all of the update'\n"
        "    return (level - level.mean()).abs()\n"
        "apart.scope, apart.family = 'batch', 'quality'\n"
    )
    recipe = tiny_recipe("policy", ["apart.py:apart"], steps=1, grid_images=1).model_dump(mode="json")
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["train", "own.yaml", "--out", "out"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["use", "it"] and last[-5:] == ["sample", "--policy", "out", "--out", "images"]
    (line,) = Path("out/metrics.jsonl").read_text().splitlines()
    (own,) = json.loads(line)["rewards"].values()
    assert own["within_group_std"] > 0
