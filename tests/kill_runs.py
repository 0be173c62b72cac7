"""Kills runs at random moments, tears checkpoints, takes the runs up again and compares them with an undisturbed one.

    python -m tests.kill_runs [--runs 100] [--seed 0] [--every-write] [--start]

Every life of a run is a process forked from this one, so that the libraries are imported once. A run is lost when it
cannot be taken up to its end, or ends with anything else than the undisturbed run: weights, optimiser, schedule, random
states, trainer state, metrics and grids are compared bit for bit, times left out. With --every-write a run is killed
once at each change that Python makes to its folder, instead of at random moments. With --start runs have a distillation
before them, which is compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork copies the calling thread only

import matplotlib.pyplot  # noqa: F401 (before the forks, like all that a run imports)
import torch
from rich.console import Console
from safetensors.torch import load_file

from argrpo_cli.recipe import Recipe
from argrpo_cli.training import run_training
from tests.training.tiny import FakeRewards, save_tiny_policy, tiny_recipe

STEPS, FEW_STEPS = 20, 4  # the few are for --every-write
TIMES = ("seconds_", "images_per_second", "step_time")  # how the names of measured times begin
AGAIN = 0.5  # how likely a killed run is killed once more
TORN, ALL_TORN = 0.3, 0.2  # how likely a kill also tears the newest checkpoint, and then all the others with it
TERMINATED = 0.1  # how likely SIGTERM comes instead of SIGKILL
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}  # audit events, see the sys module


@dataclass
class Tally:
    """What happened."""

    runs: int = 0
    kills: int = 0
    terminations: int = 0
    torn: int = 0
    found: int = 0
    lost: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)


def live(recipe: Recipe, out: Path, log: Path, kill_at: int | None = None) -> int:
    """Start or take up a run in a process of its own; its id, which is that of its process group too."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if kill_at is not None:
            _die_at(kill_at, out)
        resume = (out / "recipe.yaml").exists()
        run_training(recipe, out, resume, rewards=FakeRewards(), console=Console(width=200))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _die_at(number: int, out: Path) -> None:
    """Kill this process at a certain change of the run's folder, just before it is made."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(str(out)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def wait(process: int, seconds: float = 900.0) -> int | None:
    """The exit code once the process has ended, None when it goes on after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def place(recipe: Recipe, out: Path, ended: bool) -> str:
    """Where in its life a run was killed, by what lies in its folder."""
    steps = [int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")]
    if ended:
        return "after the end, so nobody was killed"
    if not (out / "recipe.yaml").exists():
        return "before its folder was made"
    if list((out / "checkpoints").glob(".partial/checkpoint-*")):
        return "while a checkpoint was written"
    if not steps:
        return "before the first checkpoint"
    if max(steps) < recipe.grpo.steps:
        return "between checkpoints"
    return "after the last checkpoint"


def tear(folder: Path, chance: random.Random) -> None:
    """Do to one file of a checkpoint what the death of a machine may do."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    how = chance.choice(["cut", "flip", "remove"])
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        path.write_bytes(content)


def same(one: Any, other: Any) -> bool:
    """Equal in type and to the last bit, tensors and arrays inside included."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((one == other).all()) if hasattr(one, "dtype") else one == other


def read(path: Path) -> Any:
    """What a file says, without times."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    if path.name == "metrics.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        return state | {"log_history": [without_times(record) for record in state["log_history"]]}
    return path.read_bytes()


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith(TIMES)}


def results(out: Path, step: int) -> dict[str, Path]:
    """The files that a run of so many steps must end with, by name."""
    parts = ("policy", f"checkpoints/step_{step:06d}", "grids", "metrics.jsonl", "before_after.png", "recipe.yaml")
    first = ("policy", f"checkpoints/step_{FEW_STEPS:06d}", "grids", "metrics.jsonl", "before_after.png", "recipe.yaml")
    paths = [out / part for part in (*parts, *(f"start/{part}" for part in first))]
    files = [path for part in paths for path in (part, *part.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path for path in files if path.name != "checksums.json"}  # of times too


def differences(reference: Path, out: Path, step: int) -> list[str]:
    """The files of two runs that are not the same."""
    one, other = results(reference, step), results(out, step)
    odd = sorted(one.keys() ^ other.keys())
    return odd + [name for name in sorted(one.keys() & other.keys()) if not same(read(one[name]), read(other[name]))]


def disturb(recipe: Recipe, out: Path, log: Path, life: float, chance: random.Random, tally: Tally) -> None:
    """Kill a run at random moments, once or several times, and tear its checkpoints."""
    while True:
        steps = [int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")]
        left = 0.4 + 0.6 * (1 - max(steps, default=0) / recipe.grpo.steps)  # loading takes its time again
        process = live(recipe, out, log)
        code = wait(process, chance.uniform(0, 1.05 * life * left))
        kind = signal.SIGTERM if chance.random() < TERMINATED else signal.SIGKILL
        ended = code is not None
        if not ended:
            try:
                os.killpg(process, kind)
            except ProcessLookupError:  # it has not left our group yet
                os.kill(process, kind)
            code = wait(process)
            ended = code == 0  # it was at its end before the signal came
        if not ended:
            tally.kills += kind == signal.SIGKILL
            tally.terminations += kind == signal.SIGTERM
        tally.where[place(recipe, out, ended)] += 1
        expected = {0} if ended else {-signal.SIGKILL} if kind == signal.SIGKILL else {143, -signal.SIGTERM}
        if code not in expected:
            tally.lost.append(f"{out}: ended with {code} instead of one of {expected}")
        whole = sorted((out / "checkpoints").glob("step_*"))
        if whole and chance.random() < TORN:
            for folder in whole if chance.random() < ALL_TORN else whole[-1:]:
                tear(folder, chance)
                tally.torn += 1
        if ended or chance.random() >= AGAIN:
            return


def finish(recipe: Recipe, out: Path, log: Path, reference: Path, tally: Tally) -> None:
    """Take a run up to its end and compare it."""
    code = wait(live(recipe, out, log))
    tally.runs += 1
    tally.found += len(list((out / "checkpoints").glob("damaged-*")))
    wrong = f"ended with {code}" if code != 0 else ", ".join(differences(reference, out, recipe.grpo.steps))
    if wrong:
        tally.lost.append(f"{out}: {wrong}")
    else:
        shutil.rmtree(out)


def undisturbed(recipe: Recipe, out: Path, log: Path) -> float:
    """A run from start to end in one life; the seconds it took."""
    start = time.monotonic()
    if wait(live(recipe, out, log)) != 0:
        sys.exit(f"the undisturbed run failed:\n{log.read_text()}")
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-write", action="store_true")
    parser.add_argument("--start", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, chance, tally = time.monotonic(), random.Random(options.seed), Tally()
    work = Path(tempfile.mkdtemp(prefix="kill_runs-"))
    log = work / "log.txt"
    save_tiny_policy(work / "tiny")
    steps = FEW_STEPS if options.every_write else STEPS
    keep = 1 if options.every_write else 2  # with one, a removal comes even in the short run
    recipe = tiny_recipe(work / "tiny", steps=steps, save_every=2, keep_checkpoints=keep, grid_every=3, grid_images=2)
    if options.start:
        distil = {"steps": FEW_STEPS, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "lmbda": 0.5}
        recipe = Recipe.model_validate(recipe.model_dump() | {"start": {"distil": distil}})
    reference = work / "reference"
    undisturbed(recipe, reference, log)
    life = undisturbed(recipe, work / "again_0000", log)  # the first one reads the libraries from disk
    print(f"undisturbed run: {steps} updates, a checkpoint every 2, {life:.1f} s", flush=True)

    for number in range(1, (10**9 if options.every_write else options.runs) + 1):
        out = work / f"run_{number:04d}"
        if options.every_write:
            code = wait(live(recipe, out, log, kill_at=number))
            if code == 0:  # there are no more changes than that
                break
            tally.kills += 1
            tally.where[place(recipe, out, ended=False)] += 1
        else:
            disturb(recipe, out, log, life, chance, tally)
        finish(recipe, out, log, reference, tally)
        if number % 10 == 0:
            life = undisturbed(recipe, work / f"again_{number:04d}", log)  # the machine may have more or less to do now
            print(f"{number} runs, {tally.kills} kills, {len(tally.lost)} lost", flush=True)
    print(f"runs {tally.runs}, SIGKILL {tally.kills}, SIGTERM {tally.terminations}")
    for where, count in tally.where.most_common():
        print(f"  {count:4d} {where}")
    print(f"checkpoints torn {tally.torn}, found when the run was taken up {tally.found}")
    print(f"runs lost {len(tally.lost)}, {time.monotonic() - start:.0f} s in all")
    for line in tally.lost:
        print(f"  {line}")
    if tally.lost:
        sys.exit(f"see {log}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
