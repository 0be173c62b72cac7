"""`python -m argrpo_cli` is the `argrpo` command."""

from __future__ import annotations

from argrpo_cli.cli.app import main

if __name__ == "__main__":
    main()
