"""`ucp.open`: any readable checkpoint as a mapping of lazily sliced tensors.

Opening reads metadata; bytes of tensors are read when a tensor is indexed, and just those asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from ucp.catalog import Catalog, Kind, ParamGroup
from ucp.errors import NotFoundError
from ucp.layout import Mesh, Shape
from ucp.lazy import LazyTensor, Reading, lazy_tree, of_scalar, of_state, read_tree
from ucp.mapping import ProgramLike, read_source
from ucp.store import Store
from ucp.tree import Tree

if TYPE_CHECKING:
    import torch

V = TypeVar("V")
D = TypeVar("D")


def open_checkpoint(
    url: str | os.PathLike[str],
    *,
    family: str | None = None,
    program: ProgramLike | None = None,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    verify: bool = True,
    **options: Any,
) -> Checkpoint:
    """Open the checkpoint at `url`, whatever framework wrote it; this is `ucp.open`.

    Reads metadata only. `verify` sets what is read of tensors later against the checksums that the source keeps: of
    universal and native checkpoints each block of 4 MiB that is touched, of others those of which a read has nearly
    all bytes, and all that training state touches. `family` skips detection; `options` go to the family's reader. A
    conversion `program` (a program, the path of a file, or the name of a program that comes with ucp) puts the
    tensors together and names them; `sizes` and `flags` are the program's, where the checkpoint does not tell.

    >>> ckpt = ucp.open("runs/7/global_step1000")                       # doctest: +SKIP
    >>> ckpt["transformer.h.0.attn.weight"]["exp_avg"][:16, ::2]        # doctest: +SKIP
    >>> ucp.open("hf-checkpoint", program="hf-llama")["layers.0.attn.q.weight"]  # doctest: +SKIP

    Raises NotFoundError where there is no checkpoint, what the family's reader raises for a damaged one, and
    ProgramError or FitError for a program that is wrong or does not fit.
    """
    catalog, store = read_source(os.fspath(url), family=family, program=program, sizes=sizes, flags=flags, **options)
    return Checkpoint(catalog, store, verify)


class _Lookup(Mapping[str, V]):
    """A mapping whose missing names raise NotFoundError, which is a LookupError but no KeyError."""

    @overload
    def get(self, key: str, default: None = None, /) -> V | None: ...
    @overload
    def get(self, key: str, default: V | D, /) -> V | D: ...
    def get(self, key: str, default: Any = None, /) -> Any:
        """The entry, or `default` where there is none."""
        if key not in self:
            return default
        return self[key]


@dataclass(frozen=True, eq=False)
class StoredTensor(_Lookup[LazyTensor]):
    """One logical tensor of a checkpoint: state -> `LazyTensor`.

    States are ``value`` (the highest-precision copy), ``exp_avg``, ``exp_avg_sq``, …; numbers kept per parameter, such
    as ``step``, follow as 0-d tensors.
    """

    name: str
    _reading: Reading

    @property
    def kind(self) -> Kind:
        """Whether it is a ``parameter``, a ``frozen`` parameter or a ``buffer``."""
        return self._catalog.tensors[self.name].kind

    @property
    def shape(self) -> Shape:
        """Shape of the value."""
        return self._main.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the value as it is stored."""
        return self._main.dtype

    @property
    def scalars(self) -> dict[str, int | float | bool]:
        """The numbers kept for this parameter, by name."""
        return {name: scalar.value for name, scalar in self._catalog.tensors[self.name].scalars.items()}

    def __getitem__(self, state: str) -> LazyTensor:
        tensor = self._catalog.tensors[self.name]
        if state in tensor.states:
            return of_state(self._reading, self.name, state)
        if state in tensor.scalars:
            return of_scalar(f"{self.name}[{state}]", tensor.scalars[state])
        raise tensor.lacks(state, self._catalog.url)

    def __contains__(self, state: object) -> bool:
        tensor = self._catalog.tensors[self.name]
        return state in tensor.states or state in tensor.scalars

    def __iter__(self) -> Iterator[str]:
        tensor = self._catalog.tensors[self.name]
        yield from tensor.states
        yield from (name for name in tensor.scalars if name not in tensor.states)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        states = " ".join(self)
        return (
            f"StoredTensor({self.name!r}, {self.kind}, {list(self.shape)}, {self._main.dtype_name}, states: {states})"
        )

    @property
    def _catalog(self) -> Catalog:
        return self._reading.catalog

    @property
    def _main(self) -> LazyTensor:
        return self["value"] if "value" in self else self[next(iter(self))]


@dataclass(frozen=True, eq=False)
class Checkpoint(_Lookup[StoredTensor]):
    """A readable checkpoint: name -> `StoredTensor`, under the names of the model that was saved.

    Iteration and ``len`` count every tensor once; an alias of a tied tensor can be looked up like any other name.
    Use it as a context manager, or `close` it, to release open files.
    """

    catalog: Catalog
    store: Store
    verify: bool = True

    @property
    def url(self) -> str:
        """Where the checkpoint lies."""
        return self.catalog.url

    @property
    def family(self) -> str:
        """The family of the writer, such as ``deepspeed`` or ``universal``."""
        return self.catalog.source.family

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, aliases left out (see `ties`)."""
        return tuple(self.catalog.tensors)

    @property
    def step(self) -> int | None:
        """Optimizer steps done when it was saved, or None where the source does not say."""
        return self.catalog.step

    @property
    def mesh(self) -> Mesh:
        """The mesh of ranks that saved it."""
        return self.catalog.source.mesh

    @property
    def ties(self) -> Mapping[str, str]:
        """Alias -> name of the tensor that it shares."""
        return self.catalog.ties

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The optimizer's hyper-parameters by group, with the names of each group's parameters."""
        return self.catalog.param_groups

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the reader, such as an inference that was made."""
        return self.catalog.notes

    @cached_property
    def state(self) -> dict[str, Tree]:
        """The rest of the training state (schedulers, RNG, client state), tensors as `LazyTensor`.

        Objects of classes stay `ucp.Opaque`: they are never built.
        """
        return {
            name: lazy_tree(self.catalog, self.store, tree, name, verify=self.verify)
            for name, tree in self.catalog.state.items()
        }

    def read_state(self, name: str) -> Tree:
        """One part of `state` with its tensors read, numpy's arrays as such: ready for what it is the state of.

        >>> client = ckpt.read_state("client_state")                              # doctest: +SKIP
        >>> torch.set_rng_state(client["random_states"]["torch"])                 # doctest: +SKIP
        >>> sampler.load_state_dict(client["sampler"])                            # doctest: +SKIP

        NotFoundError, with the parts there are, if there is none of this name.
        """
        if name not in self.catalog.state:
            raise NotFoundError(f"{self.url}: no {name!r} in its state", hint=f"it has: {' '.join(self.catalog.state)}")
        return read_tree(self.state[name])

    def state_dict(self, state: str = "value", *, prefix: str = "") -> dict[str, torch.Tensor]:
        """Read `state` of every tensor that has it: name -> tensor, aliases too, sharing the tensor they are tied to.

        `prefix` selects the names that begin with it and cuts it off: the state of a sub-module.
        """
        canonical = {**{name: name for name in self.catalog.tensors}, **self.catalog.ties}
        read: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        for name, holder in canonical.items():
            if name.startswith(prefix) and state in self[holder]:
                if holder not in read:
                    read[holder] = self[holder][state][...]
                found[name[len(prefix) :]] = read[holder]
        return found

    def close(self) -> None:
        """Release open files. The checkpoint stays usable and opens them again."""
        self.store.close()

    def __getitem__(self, name: str) -> StoredTensor:
        return StoredTensor(self.catalog.resolve(name), self._reading)

    @cached_property
    def _reading(self) -> Reading:
        return Reading(self.catalog, self.store, self.verify)

    def __contains__(self, name: object) -> bool:
        return name in self.catalog.tensors or name in self.catalog.ties

    def __iter__(self) -> Iterator[str]:
        return iter(self.catalog.tensors)

    def __len__(self) -> int:
        return len(self.catalog.tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        states = dict.fromkeys(state for tensor in self.catalog.tensors.values() for state in tensor.states)
        return (
            f"Checkpoint({self.url!r}, {self.family}, step {self.step}, {len(self)} tensors, "
            f"{self.catalog.nbytes / 1e6:.1f} MB, states: {' '.join(states)}, written on {self.mesh})"
        )
