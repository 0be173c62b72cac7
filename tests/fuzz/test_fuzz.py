"""Hostile input ends in one line or in the right value: no traceback, no hang, no memory without bounds, no lost score.

`make test` runs a share of the cases, `make fuzz` (`pytest -m fuzz`) all of them. The numbers of a case are drawn from
its kind, seed and index: `python -m tests.fuzz.worker KIND SEED INDEX`, which a failure prints, makes it again.
"""

from __future__ import annotations

import pytest

from tests.fuzz.worker import FAILED, Worker

# Kind of input, which is a module beside this one, to the number of cases of `make test` and of `make fuzz`.
KINDS = {
    "pictures": (300, 5000),
    "scored": (8, 300),
    "recipes": (100, 1000),
    "policies": (30, 200),
    "runs": (2, 100),
    "files": (200, 1000),
    "given": (200, 2000),
    "command": (10, 200),
}
SEED, LONG_SEED = 0, 1
PARTS = 4  # of the long run, for the processes that share it


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("fuzz"))
    yield worker
    worker.close()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_in_one_line_or_read_rightly(worker, kind):
    summary = worker.cases(kind, SEED, range(KINDS[kind][0]))
    assert not summary.failures, f"{summary}\nthe inputs are in {worker.home / 'failed'}"


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_much_damaged_input_is_refused_in_one_line_or_read_rightly(worker, kind, part):
    summary = worker.cases(kind, LONG_SEED, range(part, KINDS[kind][1], PARTS))
    print(f"\n{summary}")
    assert not summary.failures, f"the inputs are in {worker.home / 'failed'}"


@pytest.mark.parametrize(
    ("index", "kind"),
    [(1, "ValueError"), (2, "hang"), (3, "hang"), (4, "crash"), (5, "MemoryError"), (6, "a message of")],
)
def test_the_watch_sees_what_it_is_there_for(worker, monkeypatch, index, kind):
    with monkeypatch.context() as patch:
        if kind == "hang":
            patch.setattr("tests.fuzz.worker.PATIENCE", 0.2)
        outcome = worker.case("faults", 0, index)
    assert outcome.verdict == FAILED and outcome.kind.startswith(kind), outcome
    assert (worker.home / "failed" / f"faults-0-{index}" / "input").is_file()
    assert worker.case("faults", 0, 7).words == "well", "and goes on"
