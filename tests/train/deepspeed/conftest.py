"""Where DeepSpeed is not installed, no test of its engines runs."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="session")
def needs_deepspeed() -> None:
    """Skip where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; this test runs its engines (pip install deepspeed)")
