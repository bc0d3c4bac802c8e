"""Steps that a job counts by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def counted_steps(state: Any) -> int | None:
    """The optimizer steps that a DeepSpeed engine in `state` has counted (``global_steps``); None without one.

    Fact: deepspeed/runtime/engine.py, whose own checkpoints are named by it.
    """
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is not None and isinstance(state, module.DeepSpeedEngine):
        return int(state.global_steps)
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return next((steps for part in parts if (steps := counted_steps(part)) is not None), None)
