"""`argrpo eval`: one module per benchmark."""

from __future__ import annotations

from argrpo_cli.cli.evals.drawbench import drawbench
from argrpo_cli.cli.evals.geneval import geneval
from argrpo_cli.cli.evals.imagenet import imagenet
from argrpo_cli.cli.evals.nano import nano
from argrpo_cli.cli.evals.report import report

BENCHMARKS = {"nano": nano, "geneval": geneval, "imagenet": imagenet, "drawbench": drawbench, "report": report}
