"""nano-geneval, the task reward of the nano world: `geneval` on what the nano detector finds."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.rewards.geneval import GenEval


class NanoGenEval(GenEval):
    """`GenEval` with the bundled detector, for images seen at 64x64."""

    def __init__(self, folder: str | Path | None = None, device: str = "cpu"):
        super().__init__(device, detector="nano", weights=folder)
