"""What judges GenEval's pictures: the nano world's detector, or Mask2Former and CLIP, with the label of the results."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from argrpo_cli import __version__
from argrpo_cli.geneval.nano_detector import NanoObserver
from argrpo_cli.geneval.observing import Observer, OfficialObserver
from argrpo_cli.networks.weights import fingerprint
from argrpo_cli.rewards.geneval import load_observer
from argrpo_cli.system.errors import UserError, did_you_mean

NANO, MASK2FORMER = "nano", "mask2former"
BENCHMARKS_OWN = "743b7d99"  # how the SHA-256 of the benchmark's file begins, as its name says


@dataclass(frozen=True)
class Judge:
    """An observer, and what the results say of it.

    Attributes:
        label: name, source and hash of the weights, of the network for colours too; identifies the figures.
        least_told: objects of a lower score are left out of results.jsonl; they cannot have counted.
        names_every_color: colours are known of all objects, not only of those that a prompt asks them of.
    """

    observer: Observer
    label: dict[str, Any]
    packages: tuple[str, ...] = ()
    least_told: float = 0.0
    names_every_color: bool = False

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that compute."""
        return {"argrpo": __version__, **{name: version(name) for name in ("torch", *self.packages)}}


def open_judge(
    detector: str, device: str = "cpu", colors: str | Path | None = None, detector_batch_size: int = 8
) -> Judge:
    """The judge of a name or of weights.

    Args:
        detector: `nano`, `mask2former` for the published weights, the benchmark's own .pth file, or a folder of
            transformers' Mask2Former.
        colors: a local file of CLIP ViT-L/14 in the place of the published one.
        detector_batch_size: images in Mask2Former at a time.

    Raises:
        UserError: no such detector, weights that are missing, damaged or of another network.
    """
    path = Path(detector)
    local = detector not in (NANO, MASK2FORMER)
    if local and not path.exists():
        names = f"give {NANO}, {MASK2FORMER}, the benchmark's .pth file or a folder of transformers' Mask2Former"
        raise UserError(
            f"--detector {detector}: no such file or folder; {names}{did_you_mean(detector, (NANO, MASK2FORMER))}"
        )
    if detector == NANO and colors is not None:
        raise UserError(f"--colors {colors}: the detector nano names colours itself; leave it out")
    observer = load_observer(MASK2FORMER if local else detector, device, path if local else None, colors)
    if isinstance(observer, NanoObserver):
        label = {"name": "nano-detector", "weights": fingerprint([observer.detector.network])}
        return Judge(observer, label, names_every_color=True)
    observer.detector.batch_size = detector_batch_size
    label = {"name": "Mask2Former Swin-S", **_source(path if local else None), **_hashes(observer, colors)}
    return Judge(observer, label, ("transformers", "open_clip_torch"), least_told=0.1)


def _hashes(observer: OfficialObserver, colors: str | Path | None) -> dict[str, Any]:
    from argrpo_cli.geneval.clip_colors import MODEL, PRETRAINED

    source = PRETRAINED if colors is None else Path(colors).name

    return {
        "weights": fingerprint([observer.detector.network]),
        "colors": {"name": f"CLIP {MODEL}, {source}", "weights": fingerprint([observer.colors.clip.network])},
    }


def _source(path: Path | None) -> dict[str, Any]:
    """Where the detector's weights are from; whether they are the benchmark's own, the file's hash says."""
    from argrpo_cli.geneval.mask2former import REPO

    if path is None or path.is_dir():
        return {"source": REPO if path is None else path.name, "benchmarks_own": False}
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"source": path.name, "sha256": digest, "benchmarks_own": digest.startswith(BENCHMARKS_OWN)}
