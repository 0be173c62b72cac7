"""GenEval: its prompts, the rules that judge an image by what a detector found in it, and the detectors' names."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.system.errors import UserError, did_you_mean

NANO, MASK2FORMER = "nano", "mask2former"
DETECTORS = (MASK2FORMER, NANO)


def check_detector(detector: str) -> None:
    """UserError for a --detector that is neither a name nor a file or folder; torch is not imported."""
    if detector not in DETECTORS and not Path(detector).exists():
        names = f"give {NANO}, {MASK2FORMER}, the benchmark's .pth file or a folder of transformers' Mask2Former"
        raise UserError(f"--detector {detector}: no such file or folder; {names}{did_you_mean(detector, DETECTORS)}")
