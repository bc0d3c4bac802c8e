"""torch.distributed.checkpoint reads and writes through ucp: one argument changes, the state dict does not.

>>> dcp.load(state_dict, storage_reader=ucp.dcp.Reader("runs/7/global_step1000"))     # doctest: +SKIP
>>> dcp.save(state_dict, storage_writer=ucp.dcp.Writer("runs/7/step-1000"))           # doctest: +SKIP

The interfaces are torch's ``StorageReader`` and ``StorageWriter`` (torch/distributed/checkpoint/storage.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import distributed
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.errors import ConflictError, UsageError
from ucp.format.native_manifest import ROOT
from ucp.integrations._dcp_lookup import Keys, Lookup
from ucp.integrations._dcp_manifest import commit
from ucp.integrations._dcp_read import read_items
from ucp.integrations._dcp_sort import Prefixes, assign
from ucp.integrations._dcp_write import write_items
from ucp.store import Store, open_store
from ucp.train.crew import Crew

Url = str | os.PathLike[str]


class Reader(StorageReader):
    """Lets ``dcp.load`` fill a state dict from any checkpoint that ucp reads, at any layout.

    Keys of the state dict are matched with the names of the checkpoint: those of the model below ``model.`` or the
    like or nothing, of optimizers ``….state.<name>.<state>`` and ``….param_groups``, flattened or not, as
    ``torch.distributed.checkpoint.state_dict.get_state_dict`` makes them; everything else by its path in the training
    state. `model` and `optimizer` say what comes before the names, where that is something else. What the state dict
    asks for and the checkpoint lacks is an error, unless the planner allows a partial load.

    Values keep their dtype: FitError where the state dict has another one, unless `cast` allows it. `verify` checks
    what was read against the checksums of the source, together with the other ranks, and compares replicas. `options`
    are those of `ucp.open`.
    """

    def __init__(
        self,
        source: Url | Checkpoint | None = None,
        *,
        model: str | None = None,
        optimizer: str | None = None,
        cast: bool = False,
        verify: bool = True,
        **options: Any,
    ) -> None:
        if isinstance(source, Checkpoint) and options:
            raise UsageError(f"options are for opening, and {source.url} is open", hint="give them to ucp.open")
        self._source, self._options = source, options
        self._prefixes = Prefixes.of(model, optimizer)
        self._cast, self._verify = cast, verify
        self._keys: Keys | None = None
        self._ckpt: Checkpoint | None = None

    def reset(self, checkpoint_id: Url | None = None) -> None:
        """Begin a load, of `checkpoint_id` if that is given."""
        if checkpoint_id is not None:
            self._source = checkpoint_id
        self._keys = self._ckpt = None

    def read_metadata(self) -> Metadata:
        """Metadata under whose keys the names of the checkpoint are found; what `ucp.open` raises."""
        if self._source is None:
            raise UsageError("there is nothing to load", hint="Reader(url), or dcp.load(…, checkpoint_id=url)")
        held = self._source
        self._ckpt = held if isinstance(held, Checkpoint) else open_checkpoint(held, **self._options)
        self._keys = Keys(Lookup(self._ckpt.catalog, self._prefixes.model, self._prefixes.optimizer))
        return Metadata(self._keys, planner_data=self._keys.paths)  # type: ignore[arg-type]  # torch only looks up

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans, each told how many ranks load together."""
        return [dataclasses.replace(plan, storage_data=len(plans)) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what `plan` asks for; done when it returns."""
        assert self._ckpt is not None and self._keys is not None
        crew = _crew(plan.storage_data)
        read_items(self._ckpt, self._keys, plan.items, planner, crew=crew, cast=self._cast, verify=self._verify)
        if self._ckpt is not self._source:
            self._ckpt.close()
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Url) -> bool:
        """Whether it may be the URL of a checkpoint."""
        return isinstance(checkpoint_id, str | os.PathLike)


class Writer(StorageWriter):
    """Lets ``dcp.save`` and ``dcp.async_save`` write a native checkpoint of ucp.

    Tensors and optimizer states get the model's names, hyper-parameters are kept by parameter, everything else becomes
    training state. `model` and `optimizer` say what comes before the names where that cannot be told. `step` is the
    number of optimizer steps done; by default that of the optimizer's states.

    The checkpoint exists when the save is complete, and not before; ConflictError if there is one already.
    """

    def __init__(
        self,
        url: Url | None = None,
        *,
        step: int | None = None,
        model: str | None = None,
        optimizer: str | None = None,
    ) -> None:
        self._url, self._step = url, step
        self._prefixes = Prefixes.of(model, optimizer)

    def reset(self, checkpoint_id: Url | None = None) -> None:
        """Begin a save, to `checkpoint_id` if that is given."""
        if checkpoint_id is not None:
            self._url = checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse, before anything is written, to write where a checkpoint is, or without a coordinator."""
        if not kwargs.get("use_collectives", True):
            raise UsageError("a native checkpoint is committed by one rank for all", hint="use_collectives=True")
        if is_coordinator and self._store.exists(ROOT):
            raise ConflictError(f"{self._store.url}: there is a checkpoint already", hint="save to a new folder")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans, each with the names under which its items are kept; FitError for what cannot be kept."""
        return assign(plans, self._prefixes)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards, durably; done when it returns."""
        return _done(write_items(self._store, plan, planner))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Put the manifest: from then on there is a checkpoint."""
        commit(self._store, results, step=self._step)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Url) -> bool:
        """Whether it may be a URL."""
        return isinstance(checkpoint_id, str | os.PathLike)

    def storage_meta(self) -> StorageMeta:
        """Where it goes, for planners that want to know."""
        return StorageMeta(checkpoint_id=self._url)

    @property
    def _store(self) -> Store:
        if self._url is None:
            raise UsageError("there is nowhere to save to", hint="Writer(url), or dcp.save(…, checkpoint_id=url)")
        return open_store(os.fspath(self._url))


def _crew(ranks: int | None) -> Crew:
    """The ranks that load together, if they are all there are: of a part of them torch tells no process group."""
    together = distributed.is_available() and distributed.is_initialized() and ranks == distributed.get_world_size()
    return Crew.everybody() if together else Crew()


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


__all__: Sequence[str] = ["Reader", "Writer"]
