"""From fragments and wanted regions to block copies with known costs: pure data, no torch, no I/O."""

from ucp.plan.fragment import ZEROS, Copy, Extent, Fragment, Key, TensorSpec, common, split
from ucp.plan.match import Cover, Reduction
from ucp.plan.task import BLOCK_BYTES, HULL_BYTES, Chain, Cost, Digests, Frame, Plan, Section, Task, Witness

__all__ = [
    "BLOCK_BYTES",
    "HULL_BYTES",
    "ZEROS",
    "Chain",
    "Copy",
    "Cost",
    "Cover",
    "Digests",
    "Extent",
    "Fragment",
    "Frame",
    "Key",
    "Plan",
    "Reduction",
    "Section",
    "Task",
    "TensorSpec",
    "Witness",
    "common",
    "split",
]
