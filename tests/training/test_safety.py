"""No run is lost: damaged checkpoints, full disks, deaths in the middle of a rename, signals while loading."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from argrpo_cli.policy.folder import find_policy
from argrpo_cli.recipe import Recipe
from argrpo_cli.runs import disk
from argrpo_cli.runs.checkpoints import MANIFEST, find_damage
from argrpo_cli.runs.disk import Disk, recover, remove_folder, replace_folder
from argrpo_cli.runs.run import Interrupted, RunDirectory, open_run
from argrpo_cli.system.errors import UserError
from argrpo_cli.training import run_training
from argrpo_cli.training.metrics import MetricsCallback, StopRequest
from argrpo_cli.training.rollout import Stopwatch
from tests.training.test_train import Stopped, assert_same_run, at_batch, die, metrics, send, train
from tests.training.tiny import FakeRewards, tiny_recipe

STEPS = 6


@pytest.fixture(scope="module")
def recipe(policy_folder: Path) -> Recipe:
    return tiny_recipe(policy_folder, steps=STEPS, save_every=2, keep_checkpoints=2, grid_every=3)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, out)
    return out


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint."""
    return Path(shutil.copytree(finished / "checkpoints" / "step_000006", tmp_path / "step_000006"))


@pytest.fixture
def crashed(recipe: Recipe, tmp_path: Path) -> Path:
    """A run that died in update 6, after the checkpoints of steps 2 and 4."""
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", rewards=at_batch(6, die))
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# Checkpoints


def test_a_checkpoint_lists_all_its_files_and_is_whole(checkpoint: Path) -> None:
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert listed.keys() == files - {MANIFEST}
    assert "optimizer.pt" in listed and "tokenizer/model.safetensors" in listed
    assert find_damage(checkpoint, 6) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "tokenizer/config.json"])
def test_a_torn_file_is_found(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    whole = path.read_bytes()
    flip(path)
    assert find_damage(checkpoint, 6) == f"{name} is not what was written"
    path.write_bytes(whole[:-1])
    assert find_damage(checkpoint, 6) == f"{name} has {len(whole) - 1} bytes instead of {len(whole)}"
    path.unlink()
    assert find_damage(checkpoint, 6) == f"{name} is missing"


def test_a_torn_manifest_or_a_checkpoint_of_another_step_is_found(checkpoint: Path) -> None:
    assert find_damage(checkpoint, 4) == "trainer_state.json is of step 6"
    cut(checkpoint / MANIFEST)
    (checkpoint / MANIFEST).write_text((checkpoint / MANIFEST).read_text()[:100])
    assert find_damage(checkpoint, 6) == "checksums.json is unreadable"


def test_an_older_checkpoint_without_manifest_is_looked_through(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    assert find_damage(checkpoint, 6) is None
    flip(checkpoint / "optimizer.pt")
    assert find_damage(checkpoint, 6) == "optimizer.pt is cut off or damaged"
    cut(checkpoint / "model.safetensors")
    assert find_damage(checkpoint, 6) == "model.safetensors is cut off or damaged"
    (checkpoint / "trainer_state.json").unlink()
    assert find_damage(checkpoint, 6) == "trainer_state.json is missing"


def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_used(
    finished: Path, recipe: Recipe, crashed: Path
) -> None:
    flip(crashed / "checkpoints" / "step_000004" / "model.safetensors")
    shown = train(recipe, crashed, resume=True)
    aside = crashed / "checkpoints" / "damaged-step_000004"
    assert (
        f"the checkpoint of step 4 is damaged: model.safetensors is not what was written; moved to {aside} "
        "(it can be deleted), trying the one before"
    ) in shown
    assert "continuing after step 2" in shown
    assert aside.is_dir()
    assert_same_run(finished, crashed, step=6)


def test_without_any_whole_checkpoint_the_run_starts_from_the_start(
    finished: Path, recipe: Recipe, crashed: Path
) -> None:
    (crashed / "checkpoints" / "step_000004" / "optimizer.pt").unlink()
    cut(crashed / "checkpoints" / "step_000002" / "trainer_state.json")
    (crashed / "checkpoints" / "damaged-step_000004").mkdir()  # of an earlier time
    shown = train(recipe, crashed, resume=True)
    assert "no checkpoint is whole, so the run starts from the start" in shown
    assert (crashed / "checkpoints" / "damaged-step_000004-2" / "model.safetensors").exists()
    assert_same_run(finished, crashed, step=6)


def test_checkpoints_of_chosen_steps_are_made_and_stay(policy_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(policy_folder, steps=6, save_every=4, keep_checkpoints=1, keep_steps=[1, 3])
    train(recipe, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000003", "step_000006"]


# Folders


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_death_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, partial = tmp_path / "policy", tmp_path / ".policy.partial"
    really, outcomes = os.replace, []
    for death in range(1, 4):
        renames = 0

        def die_at(source: Path, target: Path, death: int = death) -> None:
            nonlocal renames
            renames += 1
            if renames == death:
                raise KeyboardInterrupt  # nothing between here and the test handles it
            really(source, target)

        for folder, text in ((final, "old"), (partial, "new")):
            folder.mkdir(exist_ok=True)
            (folder / "weights").write_text(text)
        monkeypatch.setattr(disk.os, "replace", die_at)
        with suppress(KeyboardInterrupt):
            replace_folder(partial, final)
        monkeypatch.setattr(disk.os, "replace", really)
        recover(tmp_path)
        outcomes.append(tree(tmp_path))
    assert outcomes == [{"policy/weights": "old"}, {"policy/weights": "old"}, {"policy/weights": "new"}]


def test_a_folder_half_removed_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step_000002").mkdir()
    (tmp_path / "step_000002" / "weights").write_text("")
    monkeypatch.setattr(disk.shutil, "rmtree", lambda *args, **kwargs: None)
    remove_folder(tmp_path / "step_000002")
    assert [path.name for path in tmp_path.iterdir()] == [".removed-step_000002"]
    monkeypatch.undo()
    recover(tmp_path)
    remove_folder(tmp_path / "step_000002")
    assert not list(tmp_path.iterdir())


def test_a_run_that_died_before_its_recipe_was_written_can_be_started_again(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in (".lock", ".tmp-abc-recipe.yaml"):
        (out / name).write_text("x")
    with pytest.raises(UserError, match=r"no recipe\.yaml.*start with: argrpo train RECIPE --out"):
        train(recipe, out, resume=True)
    (out / ".tmp-notes").write_text("not ours")
    with pytest.raises(UserError, match="not empty and not a run"):
        train(recipe, out)
    (out / ".tmp-notes").unlink()
    with open_run(out, recipe, resume=False):
        assert sorted(path.name for path in out.iterdir()) == [".lock", "recipe.yaml", "run.json"]


# One process at a time


def test_a_busy_run_is_refused_before_anything_is_loaded(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argrpo_cli.training.train._load_base_policy", lambda *args: pytest.fail("loaded"))
    with (
        open_run(tmp_path / "run", recipe, resume=False),
        pytest.raises(UserError, match="another process is training in"),
    ):
        train(recipe, tmp_path / "run", resume=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_a_file_system_without_locks_is_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with (
        pytest.raises(UserError, match=r"cannot lock .*: no (locks|flock) .*; choose a folder on another file system"),
        open_run(tmp_path / "run", recipe, resume=False),
    ):
        pass


# Signals while nothing is trained


def test_sigterm_while_loading_leaves_nothing_behind(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argrpo_cli.training.train._load_base_policy", lambda *args: send(signal.SIGTERM)())
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(Interrupted) as stop:
        run_training(recipe, tmp_path / "run", rewards=FakeRewards(), console=console)
    assert stop.value.code == 143
    assert console.file.getvalue() == "stopped before the run began\n"
    assert not (tmp_path / "run").exists()


def test_sigterm_before_the_first_update_leaves_a_run_to_continue(
    finished: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr("argrpo_cli.training.saving.image_grid", lambda *a, **k: send(signal.SIGTERM)())
    with pytest.raises(Interrupted) as stop:
        run_training(recipe, out, rewards=FakeRewards(), console=console)
    assert stop.value.code == 143
    assert console.file.getvalue().splitlines()[-1] == f"stopped; continue with: argrpo train --resume {out}"
    assert not metrics(out)
    monkeypatch.undo()
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=6)


def test_a_run_interrupted_where_a_grid_is_due_draws_it(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", rewards=at_batch(3, send(signal.SIGTERM)))
    assert (tmp_path / "run" / "grids" / "step_000003.png").exists()  # resumed, the run goes on after step 3


# A full disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files can grow to so many bytes and no further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**12, free=free()))


def test_a_checkpoint_waits_for_room_and_the_run_is_the_same(
    finished: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def free() -> int:
        looks.append(1)
        return 10**12 if len(looks) > 7 or len(looks) == 1 else 10**6  # full when step 4 is due

    waited: list[float] = []
    monkeypatch.setattr(MetricsCallback, "leave_out", lambda self, seconds: waited.append(seconds))
    monkeypatch.setattr(disk, "RETRY", 0.3)
    free_bytes(monkeypatch, free)
    out = tmp_path / "run"
    lines = train(recipe, out).splitlines()
    full = [index for index, line in enumerate(lines) if "is full: no room for the checkpoint of step 4" in line]
    assert len(full) == 1
    assert "1 MB free; the run waits up to 60 minutes" in lines[full[0]]
    assert lines[full[0] + 1].startswith("there is room again for the checkpoint of step 4")
    assert_same_run(finished, out, step=6)
    assert max(waited) > 0.9  # 3 x 0.3 seconds, which are no training time


def test_seconds_that_are_left_out_are_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 9.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    callback = MetricsCallback(None, None, Stopwatch(), [], images=1, seconds=5.0)
    for event in (callback.on_train_begin, callback.on_step_end):
        event(None, SimpleNamespace(global_step=0), None)
    callback.leave_out(6.5)
    callback.on_step_end(None, None, None)
    assert callback.seconds == 5.0 + 1.0 + 1.5


def test_a_signal_ends_the_wait_for_room(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, lambda: 10**12 if not (tmp_path / "run/checkpoints/step_000002").exists() else 0)
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: send(signal.SIGTERM)())
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(Interrupted) as stop:
        run_training(recipe, tmp_path / "run", rewards=FakeRewards(), console=console)
    assert stop.value.code == 143
    assert console.file.getvalue().splitlines()[-1].startswith("stopped after step 2; continue with")
    assert find_damage(tmp_path / "run" / "checkpoints" / "step_000002", 2) is None


def test_a_wait_for_room_ends_after_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(disk.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    free_bytes(monkeypatch, lambda: 0)
    told: list[str] = []
    with pytest.raises(
        UserError,
        match=r"was full for 60 minutes.*what was saved is safe; make room and continue with: argrpo train --resume",
    ):
        Disk(tmp_path, told.append, lambda: False).wait_for_room("the checkpoint of step 2", 10**9)
    assert len(told) == 1
    assert now[0] == pytest.approx(3600, abs=30)


def test_other_failures_are_not_waited_for(tmp_path: Path) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        Disk(tmp_path, print, lambda: False).insist("it", refuse)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_one_before_whole(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    limit = largest_file(50_000)  # room for records and grids, not for weights
    try:
        with pytest.raises(UserError, match=r"safe up to step 2: mend this and continue with: argrpo train --resume"):
            train(recipe, out, rewards=at_batch(4, limit.__enter__))
    finally:
        limit.__exit__(None, None, None)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"]
    train(recipe, out, resume=True)
    assert_same_run(finished, out, step=6)


def test_records_that_find_no_room_are_written_later_and_none_is_cut(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 1})
    with largest_file(run.metrics_file.stat().st_size + 5):
        run.append_metrics({"step": 2})
    assert [record["step"] for record in metrics(tmp_path)] == [1]
    run.append_metrics({"step": 3})
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3]


def test_a_picture_that_cannot_be_written_is_told_once_and_ends_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, image: Any) -> None:
        raise UserError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr("argrpo_cli.training.saving.save_png", full)
    shown = train(recipe, tmp_path / "run")
    assert shown.count("no space left on device; the run goes on without it") == 1
    assert "finished at the last step" in shown
    assert not (tmp_path / "run" / "grids").exists()


def test_a_signal_passed_on_by_another_process_is_not_this_ones_first() -> None:
    """Its own comes a moment later, and must not break off the checkpoint that all have agreed on."""
    request = StopRequest()
    request.training = True
    request.agree(SimpleNamespace(exchange=lambda own: [(signal.SIGTERM, None), own]))
    assert request.signal is signal.SIGTERM
    request._handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        request._handle(signal.SIGTERM, None)


def test_fewer_steps_than_were_done_are_refused(policy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = tiny_recipe(policy_folder, steps=4, save_every=2)
    train(recipe, out)
    fewer = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": 3})})
    with pytest.raises(UserError, match=r"grpo\.steps 3: .* is at step 4 already"):
        train(fewer, out, resume=True)


def test_a_run_does_not_end_in_the_middle_of_a_batch(policy_folder: Path) -> None:
    with pytest.raises(ValueError, match="steps 3 would end in the middle of a batch of updates_per_batch 2; use 4"):
        tiny_recipe(policy_folder, steps=3, updates_per_batch=2)


def test_a_run_is_opened_at_its_newest_whole_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "step_000006" / "model.safetensors"
    assert find_policy(run) == newest.parent
    os.truncate(newest, newest.stat().st_size // 2)
    assert find_policy(run) == run / "checkpoints" / "step_000004"


def test_all_that_a_run_writes_may_be_read_by_others(finished: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in (finished / "policy").rglob("*") if path.is_file()}
    modes |= {path.stat().st_mode & 0o777 for path in (finished / "checkpoints").rglob("*") if path.is_file()}
    old = os.umask(0)
    os.umask(old)
    assert modes == {0o666 & ~old}
