"""What a command costs before it does anything, in CPU seconds against `import torch` in the same run: machines differ.

    python -m tests.start_costs        exit code 1 where a goal is missed

A wrong name, class, path or recipe key: at most half of `import torch`. Loading nano-c2i and drawing one image: at most
1.6 times as much.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile

RUNS = 3  # of which the cheapest counts
GOALS = {  # a command, and the share of `import torch` that it may cost
    "sample --class dog --n 1 --device cpu --overwrite --out drawn": 1.6,
    "sample --class dgo --out x": 0.5,
    "sample --policy nano-c3i --out x": 0.5,
    "train nano/c3i": 0.5,
    "train nano/c2i --set grpo.bta=0": 0.5,
    "score gone": 0.5,
    "eval geneval --policy nano-c3i": 0.5,
    "entropy --policy nano-c3i": 0.5,
    "list --json": 0.5,
}


def cpu_seconds(*arguments: str) -> float:
    """Of a Python with these arguments, and of what it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    torch = min(cpu_seconds("-c", "import torch") for _ in range(RUNS))
    print(f"import torch: {torch:.2f} CPU seconds")
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command, goal in GOALS.items():
            share = min(cpu_seconds("-m", "argrpo_cli", *command.split()) for _ in range(RUNS)) / torch
            missed |= share > goal
            print(f"{share:5.2f} of at most {goal:.1f}{'  MISSED' * (share > goal)}   argrpo {command}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
