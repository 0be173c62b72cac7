"""Rebuilds every network of the nano world from a fixed seed: `make nano`, which also installs and measures them.

    python -m argrpo_cli.nano.make.build [--out build/nano] [--install] [--only NAME ...] [--steps N] [--weights FOLDER]

The order matters: the policy learns the tokenizer's codes; the rewards learn from the tokenizer's damaged pictures and,
the critic, from the policy's samples; the judge and the detector learn from scenes alone. A network that already lies
in the output folder is kept, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from argrpo_cli.nano.make import janus, judges, policies, rewards, var
from argrpo_cli.nano.make.fit import Lesson, Setting, learn
from argrpo_cli.system.errors import UserError, exit_code
from argrpo_cli.system.files import WEIGHTS, make_dir

LESSONS: dict[str, Callable[[Setting], Lesson]] = {
    "nano-vq": policies.tokenizer,
    "nano-c2i": policies.c2i,
    "nano-clip": rewards.clip,
    "nano-quality": rewards.quality,
    "nano-critic": rewards.critic,
    "nano-judge": judges.judge,
    "nano-t2i": policies.t2i,
    "nano-janus": janus.janus,
    "nano-quality-t2i": partial(rewards.quality, task="captions"),
    "nano-critic-t2i": partial(rewards.critic, task="captions"),
    "nano-detector": judges.detector,
    "nano-msvq": var.tokenizer,
    "nano-var": var.policy,
}
TOKENIZERS = {"nano-var": "nano-msvq"}  # of a network, where that is not nano-vq
HELD_OUT = "nano-val"
ORDER = (*LESSONS, HELD_OUT)
# What a folder has once it is whole, where that is not the weights.
POLICIES = ("nano-c2i", "nano-t2i", "nano-janus", "nano-var")
LAST_FILE = {HELD_OUT: "tokens.safetensors"} | dict.fromkeys(POLICIES, "policy.json")


def build(
    out: Path,
    only: list[str] | None = None,
    seed: int = 0,
    log: Callable[[str], None] = partial(print, flush=True),
    steps: int | None = None,
    weights: Path | None = None,
) -> None:
    """Train what is missing below `out`, in order.

    Args:
        steps: instead of each lesson's own number.
        weights: folder of the networks that others build on. By default those in `out`; where it has no tokenizer, a
            single network is built on the package's.
    """
    make_dir(out)
    for name in ORDER:
        if built(out / name) or (only and name not in only):
            continue
        below = weights or (out if built(out / TOKENIZERS.get(name, "nano-vq")) else WEIGHTS)
        setting = Setting(name, seed, below, log, compiles=steps is None and shutil.which("g++") is not None)
        if name == HELD_OUT:
            judges.held_out(setting, out / name)
        else:
            learn(LESSONS[name], out / name, setting, steps)
        setting.say("built")


def built(folder: Path) -> bool:
    """Whether a network was saved whole."""
    return (folder / LAST_FILE.get(folder.name, "model.safetensors")).is_file()


def install(out: Path, only: list[str] | None = None) -> None:
    """Copy a build, or some of it, over the package's own weights.

    Raises:
        UserError: the build lacks something; nothing is copied then.
    """
    names = only or list(ORDER)
    missing = [name for name in names if not built(out / name)]
    if missing:
        raise UserError(f"not installed: {out} lacks {', '.join(missing)}")
    for name in [*names, *(["nano-t5"] if "nano-t2i" in names else [])]:  # the text encoder learns with the policy
        shutil.rmtree(WEIGHTS / name, ignore_errors=True)
        shutil.copytree(out / name, WEIGHTS / name)


def measure(scratch: Path) -> None:
    """Print the quality of the base policies by the commands that users have."""
    shutil.rmtree(scratch, ignore_errors=True)
    commands = [["nano", "--policy", "nano-c2i"]]
    if built(WEIGHTS / "nano-t2i"):
        commands.append(["geneval", "--policy", "nano-t2i", "--out", str(scratch)])
    for command in commands:
        subprocess.run([sys.executable, "-m", "argrpo_cli", "eval", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the networks of the nano world.")
    parser.add_argument("--out", type=Path, default=Path("build/nano"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=ORDER, help="build only these, if they are missing")
    parser.add_argument("--steps", type=int, help="of training, instead of each network's own number")
    parser.add_argument("--weights", type=Path, help="folder of the earlier networks: --out, else the package")
    parser.add_argument("--install", action="store_true", help="replace the package's weights, and measure them")
    args = parser.parse_args()
    with exit_code("nano"):
        build(args.out, args.only, args.seed, steps=args.steps, weights=args.weights)
        if args.install:
            install(args.out, args.only)
            measure(args.out / "geneval")


if __name__ == "__main__":
    main()
