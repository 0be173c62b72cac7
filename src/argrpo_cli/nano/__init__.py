"""The nano world: 64x64 scenes of everyday objects, small models of the paper's architectures, and their judge."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"  # the bundled networks, a folder each
