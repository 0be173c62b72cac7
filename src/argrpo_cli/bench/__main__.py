"""Speed on this machine: `python -m argrpo_cli.bench NAME [OPTIONS]`; `NAME --help` says what is measured."""

from __future__ import annotations

import pkgutil
import sys
import time

from argrpo_cli.system.errors import UserError, did_you_mean, exit_code

NAMES = {"nano": "sampler:nano"} | {
    name: f"{name}:main" for name in ("sampler", "rewards", "train", "eval", "roofline", "gpu")
}


def main(arguments: list[str]) -> None:
    """Run the benchmark that the first argument names with the others; UserError when it is none."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(f"{__doc__}\nNAME is one of {', '.join(NAMES)}.")
        return
    if name not in NAMES:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    start = time.perf_counter()
    pkgutil.resolve_name(f"argrpo_cli.bench.{NAMES[name]}")(arguments[1:])
    print(f"measured in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    with exit_code("argrpo_cli.bench"):
        main(sys.argv[1:])
