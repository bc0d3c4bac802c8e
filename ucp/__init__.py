"""Universal checkpoints: distributed-training state, free from the layout that wrote it.

>>> import ucp
>>> ckpt = ucp.open("runs/7/global_step1000")          # doctest: +SKIP
>>> ckpt["embed.weight"]["exp_avg"][:16]               # doctest: +SKIP
>>> ucp.load((model, optimizer), ckpt.url)             # doctest: +SKIP

Names are imported when they are first used: ``import ucp`` loads neither torch nor zarr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucp import elastic as elastic
    from ucp.catalog import Catalog, Checksum, ParamGroup, Scalar, Source, Tensor
    from ucp.checkpoint import Checkpoint, StoredTensor
    from ucp.checkpoint import open_checkpoint as open
    from ucp.errors import (
        ConflictError,
        ContentError,
        CorruptError,
        FitError,
        InterruptedRunError,
        NotFoundError,
        ProgramError,
        StorageError,
        UcpError,
        UnsafeError,
        UsageError,
    )
    from ucp.integrations import dcp as dcp
    from ucp.layout import Box, FlatRange, Mesh
    from ucp.lazy import LazyTensor
    from ucp.lifecycle.copy import CopyReport, copy
    from ucp.lifecycle.gc import GcReport, gc
    from ucp.lifecycle.repair import RepairReport, repair
    from ucp.lifecycle.sync import SyncReport, sync
    from ucp.plan import Extent, Fragment, Plan, TensorSpec
    from ucp.run.convert import Conversion, Progress, Report, carry_out, convert, prepare
    from ucp.train.items import PerRank, ReshardableLoader, ReshardableSampler, Rng
    from ucp.train.load import load
    from ucp.train.manager import CheckpointManager
    from ucp.train.options import trainable
    from ucp.train.report import LoadReport
    from ucp.train.save import SaveHandle, SaveReport, async_save, save
    from ucp.tree import Opaque

_HOMES = {
    "ucp.catalog": "Catalog Checksum ParamGroup Scalar Source Tensor",
    "ucp.checkpoint": "Checkpoint StoredTensor",
    "ucp.errors": (
        "ConflictError ContentError CorruptError FitError InterruptedRunError NotFoundError ProgramError StorageError "
        "UcpError UnsafeError UsageError"
    ),
    "ucp.layout": "Box FlatRange Mesh",
    "ucp.lazy": "LazyTensor",
    "ucp.lifecycle.copy": "CopyReport copy",
    "ucp.lifecycle.gc": "GcReport gc",
    "ucp.lifecycle.repair": "RepairReport repair",
    "ucp.lifecycle.sync": "SyncReport sync",
    "ucp.plan": "Extent Fragment Plan TensorSpec",
    "ucp.run.convert": "Conversion Progress Report carry_out convert prepare",
    "ucp.train.items": "PerRank ReshardableLoader ReshardableSampler Rng",
    "ucp.train.load": "load",
    "ucp.train.manager": "CheckpointManager",
    "ucp.train.options": "trainable",
    "ucp.train.report": "LoadReport",
    "ucp.train.save": "SaveHandle SaveReport async_save save",
    "ucp.tree": "Opaque",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Box",
    "Catalog",
    "Checkpoint",
    "CheckpointManager",
    "Checksum",
    "ConflictError",
    "ContentError",
    "Conversion",
    "CopyReport",
    "CorruptError",
    "Extent",
    "FitError",
    "FlatRange",
    "Fragment",
    "GcReport",
    "InterruptedRunError",
    "LazyTensor",
    "LoadReport",
    "Mesh",
    "NotFoundError",
    "Opaque",
    "ParamGroup",
    "PerRank",
    "Plan",
    "ProgramError",
    "Progress",
    "RepairReport",
    "Report",
    "ReshardableLoader",
    "ReshardableSampler",
    "Rng",
    "SaveHandle",
    "SaveReport",
    "Scalar",
    "Source",
    "StorageError",
    "StoredTensor",
    "SyncReport",
    "Tensor",
    "TensorSpec",
    "UcpError",
    "UnsafeError",
    "UsageError",
    "__version__",
    "async_save",
    "carry_out",
    "convert",
    "copy",
    "gc",
    "load",
    "open",
    "prepare",
    "repair",
    "save",
    "sync",
    "trainable",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("universal-checkpoint")
    elif name == "open":
        value = import_module("ucp.checkpoint").open_checkpoint
    elif name == "dcp":
        value = import_module("ucp.integrations.dcp")
    elif name == "elastic":
        value = import_module("ucp.elastic")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'ucp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
