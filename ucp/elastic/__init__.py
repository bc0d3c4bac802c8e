"""Elastic training: workers die and come back, and the job goes on in a layout that fits.

>>> from ucp.elastic import Batch, keep
>>> keep(tp=2).layouts(7)[0]
Mesh(axes=(('dp', 3), ('tp', 2)))
>>> Batch(64, micro=4).count(3)
6

Names are imported when they are first used: ``import ucp.elastic`` does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucp.elastic.batch import Batch, seat
    from ucp.elastic.feed import Feed
    from ucp.elastic.fits import Choice, Needs, choose, estimate
    from ucp.elastic.options import Local, Memory
    from ucp.elastic.policy import Policy, keep, prefer
    from ucp.elastic.report import RunReport
    from ucp.elastic.run import Run

_HOMES = {
    "ucp.elastic.batch": "Batch seat",
    "ucp.elastic.feed": "Feed",
    "ucp.elastic.fits": "Choice Needs choose estimate",
    "ucp.elastic.options": "Local Memory",
    "ucp.elastic.policy": "Policy keep prefer",
    "ucp.elastic.report": "RunReport",
    "ucp.elastic.run": "Run",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Batch",
    "Choice",
    "Feed",
    "Local",
    "Memory",
    "Needs",
    "Policy",
    "Run",
    "RunReport",
    "choose",
    "estimate",
    "keep",
    "prefer",
    "seat",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'ucp.elastic' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
