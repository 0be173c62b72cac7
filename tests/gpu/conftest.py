"""What only a GPU can show: `pytest -m gpu tests/gpu`. Without one all of it is skipped.

`ARGRPO_GPU_TESTS=cpu` runs the same tests on a CPU, to see that they run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = os.environ.get("ARGRPO_GPU_TESTS", "cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")  # from here, and not from a fixture: one line for all of them


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """The GPU, float32 in all of its digits."""
    assert torch.get_float32_matmul_precision() == "highest", "as torch has it: no TF32"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield DEVICE
