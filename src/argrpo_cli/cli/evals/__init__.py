"""`argrpo eval`: one module per benchmark."""

from __future__ import annotations

from argrpo_cli.cli.evals.drawbench import drawbench
from argrpo_cli.cli.evals.geneval import geneval
from argrpo_cli.cli.evals.nano import nano

BENCHMARKS = {"nano": nano, "geneval": geneval, "drawbench": drawbench}
