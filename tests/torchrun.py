"""Several processes of a program, as `torchrun` starts them, each with one thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(program: Sequence[str], processes: int = 2, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    """Start `program` (`-m NAME ...`, or a path and its arguments) and wait for its end; what it printed is text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
         *program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
