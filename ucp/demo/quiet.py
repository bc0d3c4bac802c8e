"""Keeping libraries quiet, and their processes on the CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def prepare_environment() -> None:
    """Processes of the demo run on the CPU, with one thread each, and talk over the loopback device."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Send what libraries print while they are imported to nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, null):
            os.close(descriptor)
