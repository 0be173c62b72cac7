"""How the tests are shared by the processes of `make test`, and what they find there."""

from __future__ import annotations

import gc
import signal
from functools import cache

import pytest

SLOW = ("tests/training/test_together.py", "tests/test_shown.py")  # few tests that take long: they come first


def pytest_configure(config: pytest.Config) -> None:
    """What a shell starts in the background (`make test &`) ignores Ctrl-C, which some tests send and wait for."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Nothing that was imported by now is garbage later. Each small training has the trainer look for garbage, and the
    millions of objects of torch and transformers made that a quarter of its time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """For `--dist loadfile`: a file's tests stay together, and so do all that load the nano world's judge, which takes
    twenty seconds. xdist begins with the files of most tests."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        @staticmethod
        @cache
        def _split_scope(nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "judge" if "load_judge" in (config.rootpath / file).read_text(encoding="utf-8") else file

        def _assign_work_unit(self, node: object) -> None:
            for file in SLOW:
                if file in self.workqueue:
                    self.workqueue.move_to_end(file, last=False)
            super()._assign_work_unit(node)

    return ByFile(config, log)
