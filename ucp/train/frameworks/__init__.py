"""Frameworks whose live objects keep their state in ways of their own: one walker for each.

A walker is a module with ``take(found, value) -> bool``: it adds what `value` holds to `found`, or says that `value` is
not its own. It is imported once its framework is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucp.train.targets import Targets

_WALKERS: dict[str, str] = {
    "megatron": "megatron.core",
    "deepspeed": "deepspeed.runtime.engine",
    "pipeline": "torch.distributed.pipelining",
    "fsdp1": "torch.distributed.fsdp",
    "state_dict": "torch",
}
"""Walker (a module here) -> the framework's module, without which no object of it can exist. Tried in this order."""


def take(found: Targets, value: Any) -> bool:
    """Whether a framework knows `value`; then what it holds is in `found`. FitError for what cannot be taken apart."""
    present = (walker for walker, framework in _WALKERS.items() if framework in sys.modules)
    return any(import_module(f"{__name__}.{walker}").take(found, value) for walker in present)
