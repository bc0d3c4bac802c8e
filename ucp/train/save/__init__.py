"""Saving a running job: every rank writes what it holds, each box once, and rank 0 what makes it a checkpoint, last.

How it works, and where: `engine` (one save after the other, and the thread they are written in), `job` (one save on one
rank), `plan` (who writes what), `staging` (copies in host memory), `lead` (rank 0's part), `form` (the seam to what is
written: `native` is one form), `channel` (messages between ranks).
"""

from __future__ import annotations

import os
from typing import Any, Literal

from ucp.errors import UsageError
from ucp.train.declared import DeclaredLayout
from ucp.train.save.engine import engine_of
from ucp.train.save.forms import form_of
from ucp.train.save.handle import SaveHandle, SaveReport
from ucp.train.save.steps import counted_steps


def save(
    state: Any,
    url: str | os.PathLike[str],
    *,
    step: int | None = None,
    form: str = "native",
    overwrite: bool = False,
    share: bool = False,
    group: Any = None,
    layout: DeclaredLayout | None = None,
) -> SaveReport:
    """Save what the ranks of this job hold together as one checkpoint at `url`. Collective: every rank calls it.

    `state` is what `ucp.load` fills: a module, ``(module, optimizer)``, a dict ``name: tensor``, or a dict of these
    under ``model``, ``optimizer`` and ``lr_scheduler``. DTensors (FSDP2, TP, 2-D meshes) are saved as the shards they
    are. A plain tensor is the same on all ranks that hold one of its name, as under DistributedDataParallel; of a
    buffer, the lowest rank's copy is taken. `step` is the number of optimizer steps done, which a DeepSpeed engine
    knows by itself. `group` holds the ranks that save together, by default all of them.

    What has one name on several ranks is one tensor. `layout` says where each rank has a part of it that does not tell
    by itself, such as experts: ``{"layers.*.experts.*": (mesh, [Shard(0)])}``, globs of names with a DeviceMesh and a
    placement for each of its axes.

    With `overwrite` a checkpoint of the same form that lies there already is replaced, and stays whole until then. With
    `share`, frozen parameters, buffers and what has not changed are stored once for all checkpoints that lie beside
    each other: in the folder ``shared`` there, from which `ucp.gc` removes what no checkpoint needs any more. Only the
    native form shares.

    When it returns, the checkpoint is complete and durable. If anything fails on any rank, all ranks raise and there is
    none: FitError for what cannot be saved, ConflictError for replicas that differ and for a `url` that holds a
    checkpoint already, StorageError where writing fails or a rank is gone.
    """
    step = counted_steps(state) if step is None else step
    return engine_of(group).save(
        state, os.fspath(url), step=step, form=form_of(form, share=share), overwrite=overwrite, layout=layout
    )


def async_save(
    state: Any,
    url: str | os.PathLike[str],
    *,
    step: int | None = None,
    form: str = "native",
    overwrite: bool = False,
    share: bool = False,
    group: Any = None,
    wait: bool = True,
    on_error: Literal["raise", "warn"] = "raise",
    layout: DeclaredLayout | None = None,
) -> SaveHandle:
    """Save as `save` does, without training having to wait for storage. Collective: every rank calls it.

    Returns when what this rank writes is copied to host memory, from when on `state` may change; with ``wait=False`` at
    once, and `state` must not change before ``handle.staged.result()`` has returned. The rest happens in a thread of
    its own: ``handle.result()`` waits until the checkpoint is complete. Up to two saves may be under way; the next
    call waits for the first of them. The host memory, as much as this rank writes, and twice that if saves overlap, is
    kept for the next save. On its first save, and while its layout is new, a rank copies all that it holds of it, or
    waits for the others once; later on it waits for nobody.

    With ``on_error="raise"`` an error of a save that nobody has heard of through its handle is raised by the next
    call; with ``"warn"`` errors are logged (logger ``ucp``) and raised by ``handle.result()`` alone. Either way there
    is no checkpoint at `url` then. Before the interpreter ends it waits for all saves.
    """
    if on_error not in ("raise", "warn"):
        raise UsageError(f"{on_error!r} is no way to take errors", hint="on_error= takes 'raise' or 'warn'")
    engine, strict = engine_of(group), on_error == "raise"
    step = counted_steps(state) if step is None else step
    return engine.start(
        state,
        os.fspath(url),
        step=step,
        form=form_of(form, share=share),
        wait=wait,
        strict=strict,
        overwrite=overwrite,
        layout=layout,
    )


__all__ = ["SaveHandle", "SaveReport", "async_save", "save"]
