"""What all tests share: tools on the path, how hard hypothesis searches, which tests need an accelerator."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.servers.fixtures import served
from tests.support.gloo import forkserver

__all__ = ["served"]

# torch compiles DeepSpeed's operators with the ninja beside the interpreter, which the path leads to only in a shell
# that activated the environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# A job in the background starts with interrupts ignored, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines measure the machine, not the code.
settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile(
    "ci", max_examples=500, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", parent=settings.get_profile("ci"), max_examples=10_000)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("default")
    # One server for a worker's whole life: before a test starts it for something else, with nothing imported.
    forkserver()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Runs of tests that lie side by side: what a module makes for its tests is made by one worker, seldom by all."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _accelerator():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
