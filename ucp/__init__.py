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
    from ucp.layout import Box, FlatRange, Mesh
    from ucp.lazy import LazyTensor
    from ucp.plan import Extent, Fragment, Plan, TensorSpec
    from ucp.run.convert import Conversion, Progress, Report, carry_out, convert, prepare
    from ucp.train.load import load
    from ucp.train.report import LoadReport
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
    "ucp.plan": "Extent Fragment Plan TensorSpec",
    "ucp.run.convert": "Conversion Progress Report carry_out convert prepare",
    "ucp.train.load": "load",
    "ucp.train.report": "LoadReport",
    "ucp.tree": "Opaque",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Box",
    "Catalog",
    "Checkpoint",
    "Checksum",
    "ConflictError",
    "ContentError",
    "Conversion",
    "CorruptError",
    "Extent",
    "FitError",
    "FlatRange",
    "Fragment",
    "InterruptedRunError",
    "LazyTensor",
    "LoadReport",
    "Mesh",
    "NotFoundError",
    "Opaque",
    "ParamGroup",
    "Plan",
    "ProgramError",
    "Progress",
    "Report",
    "Scalar",
    "Source",
    "StorageError",
    "StoredTensor",
    "Tensor",
    "TensorSpec",
    "UcpError",
    "UnsafeError",
    "UsageError",
    "__version__",
    "carry_out",
    "convert",
    "load",
    "open",
    "prepare",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("universal-checkpoint")
    elif name == "open":
        value = import_module("ucp.checkpoint").open_checkpoint
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'ucp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
