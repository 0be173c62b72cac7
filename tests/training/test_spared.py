"""What a run can do without ends no run: plots, grids, pages and what is concluded at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.test_guarded_runs import metrics, train
from tests.training.tiny import tiny_recipe

SPARED = {  # where it is made, and its name in the line about it
    "training.saving.image_grid": "grids",
    "training.job.before_after": "before_after.png",
    "training.job.conclusions": "conclusions",
    "training.job.spread_at_start": "start and result compared",
    "training.instruments.Start.kl": "what is measured with a grid",
    "runs.report.write_report": "report.html",
    "runs.curves.draw_curves": "curves.png",
}


def broken(error: BaseException) -> Any:
    def fail(*args: Any, **keys: Any) -> None:
        raise error

    return fail


@pytest.mark.usefixtures("pages")
def test_whatever_fails_in_a_picture_is_said_once_and_training_goes_on(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in SPARED:
        monkeypatch.setattr(f"argrpo_cli.{place}", broken(ZeroDivisionError("division by zero\nand so on")))
    shown = train(tiny_recipe(policy_folder, steps=4, grid_every=1, save_every=1, transfer_images=2), tmp_path / "run")
    for what in SPARED.values():
        assert shown.count(f"warning: {what}: ZeroDivisionError: division by zero; the run goes on without it\n") == 1
    assert "finished at the last step: 4 updates" in shown
    assert [one["step"] for one in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "policy").is_dir() and not list((tmp_path / "run").glob("*.png"))


def test_images_that_cannot_be_drawn_for_a_grid_end_nothing_and_ctrl_c_does(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argrpo_cli.training.saving.draw_batch", broken(RuntimeError("out of memory")))
    shown = train(tiny_recipe(policy_folder, steps=2, grid_every=1), tmp_path / "run")
    assert shown.count("warning: grids: RuntimeError: out of memory") == shown.count("warning") == 1
    assert metrics(tmp_path / "run")[-1].get("kl_start") is None
    monkeypatch.setattr("argrpo_cli.training.saving.draw_batch", broken(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe(policy_folder, steps=2, grid_every=1), tmp_path / "other")
