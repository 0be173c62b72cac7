"""Rebuilds every network of the nano world from a fixed seed: `make nano`, which also installs and measures them.

    python -m argrpo_cli.nano.make.build [--out build/nano] [--install] [--only NAME ...]

The order matters: the policy learns the tokenizer's codes; the rewards learn from the tokenizer's damaged pictures and,
the critic, from the policy's samples; the judge and the detector learn from scenes alone. A network that already lies
in the output folder is kept, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import time
from pathlib import Path

from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import WEIGHTS

ORDER = {
    "nano-vq": "argrpo_cli.nano.make.train_tokenizer",
    "nano-c2i": "argrpo_cli.nano.make.train_policy",
    "nano-clip": "argrpo_cli.nano.make.train_clip",
    "nano-quality": "argrpo_cli.nano.make.train_quality",
    "nano-critic": "argrpo_cli.nano.make.train_critic",
    "nano-judge": "argrpo_cli.nano.make.train_judge",
    "nano-t2i": "argrpo_cli.nano.make.train_t2i",
    "nano-quality-t2i": "argrpo_cli.nano.make.train_quality",
    "nano-critic-t2i": "argrpo_cli.nano.make.train_critic",
    "nano-detector": "argrpo_cli.nano.make.train_detector",
    "nano-val": "argrpo_cli.nano.make.held_out",
}
CAPTIONS = ("nano-quality-t2i", "nano-critic-t2i")  # which learn the task of captions where they could learn another
COMPANIONS = {"nano-t2i": "nano-t5"}  # the text encoder is trained with the policy


def build(out: Path, only: list[str] | None = None, seed: int = 0, log=print) -> None:
    """Train what is missing below `out`, in order; each trainer finds the earlier networks in the same folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, module in ORDER.items():
        if built(out / name) or (only and name not in only):
            continue
        started = time.time()
        # A single network can be built on the package's tokenizer and the rest of it.
        earlier = {} if name == "nano-vq" else {"weights": out if built(out / "nano-vq") else WEIGHTS}
        task = {"task": "captions"} if name in CAPTIONS else {}
        importlib.import_module(module).train(out / name, seed=seed, log=log, **earlier, **task)
        log(f"{name}: built in {(time.time() - started) / 60:.1f} min")


def built(folder: Path) -> bool:
    """Whether a builder finished, by what it writes last."""
    last = {"nano-val": "tokens.safetensors", "nano-c2i": "policy.json", "nano-t2i": "policy.json"}
    return (folder / last.get(folder.name, "model.safetensors")).is_file()


def install(out: Path, only: list[str] | None = None) -> None:
    """Copy a build, or some of it, over the package's own weights."""
    names = only or list(ORDER)
    missing = [name for name in names if not built(out / name)]
    if missing:
        raise UserError(f"not installed: {out} lacks {', '.join(missing)}")
    for name in [*names, *(COMPANIONS[name] for name in names if name in COMPANIONS)]:
        shutil.rmtree(WEIGHTS / name, ignore_errors=True)
        shutil.copytree(out / name, WEIGHTS / name)


def measure(scratch: Path) -> None:
    """Print the quality of the base policies, as `argrpo eval nano` and `argrpo eval geneval` do."""
    from rich.console import Console

    from argrpo_cli.evals import geneval, nano, nano_table

    Console().print(nano_table.table(nano.evaluate(["nano-c2i"])))
    if not built(WEIGHTS / "nano-t2i"):
        return
    shutil.rmtree(scratch, ignore_errors=True)
    Console().print(geneval.table(geneval.run_geneval(["nano-t2i"], scratch)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the networks of the nano world.")
    parser.add_argument("--out", type=Path, default=Path("build/nano"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(ORDER), help="build only these, if they are missing")
    parser.add_argument(
        "--install", action="store_true", help="replace the weights inside the package and measure them"
    )
    args = parser.parse_args()
    try:
        build(args.out, args.only, args.seed, log=lambda line: print(line, flush=True))
        if args.install:
            install(args.out, args.only)
            measure(args.out / "geneval")
    except UserError as error:
        print(f"nano: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
