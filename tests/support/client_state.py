"""What training scripts put into a checkpoint beside the model: counters, nested settings, random states."""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch

from tests.support.case import Case


def client_state(case: Case) -> dict[str, Any]:
    """The extra state saved with the case; ``universal_checkpoint_info`` only where the case asks for it."""
    state: dict[str, Any] = {"iteration": case.steps}
    if case.rich_client_state:
        state.update(_rich(case))
    if case.universal_info:
        state["universal_checkpoint_info"] = _universal_info(case)
    return state


def _universal_info(case: Case) -> dict[str, Any]:
    info: dict[str, Any] = {"universal_checkpoint_version": 0.2}
    if case.launcher == "pipeline" and case.tied:
        patterns = [r"tied_modules\.embed\.embed\.weight", r"tied_modules\.embed\.position"]
        info["pipeline_replicated_parameter_patterns"] = patterns
    return info


def _rich(case: Case) -> dict[str, Any]:
    random.seed(case.seed)
    np.random.seed(case.seed)
    return {
        "note": "client state",
        "nested": {"list": [1, 2.5, None, True], "deep": {"tuple": (1, "two"), "set": {3, 4}}},
        "args": argparse.Namespace(hidden_size=33, lr=1e-2, layers=[1, 2]),
        "random_states": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        },
        "loss_history": torch.linspace(1.0, 0.5, 5),
    }
