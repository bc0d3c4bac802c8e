"""Plain safetensors files with any names: reading a folder of them.

An index of our own says which tensors are states of others: its ``metadata.ucp`` has ``states``, the names of states
other than the value, which are filed as ``<state>/<name>``; ``scalars``, numbers per parameter with their dtypes;
``kinds`` of tensors that are no parameters; ``ties``; and ``step``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from ucp.catalog import Catalog, Kind, Scalar, Source, Tensor
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.layout import Mesh
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Fragment, Key
from ucp.store import Store

from .._torch.files import candidates as saved_files
from .._torch.files import is_training_folder
from . import places
from .documents import read_document
from .index import Index, check_index, read_index
from .joined import Joined, joined
from .pieces import read_files

FAMILY = "safetensors"
ENDING, INDEX = ".safetensors", ".safetensors.index.json"
DETAILS = "ucp"
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_JOURNAL = ".ucp-journal/"


def detect(store: Store) -> bool:
    """Whether safetensors files lie directly in the folder.

    Those that family ``hf`` or ``torch`` reads and an unfinished conversion are none.
    """
    names = store.children()
    if is_training_folder(names) or places.detect(store):
        return False
    complete = _JOURNAL not in names or any(name.endswith(INDEX) for name in names)
    return complete and any(name.endswith(ENDING) for name in names)


@dataclass(frozen=True, slots=True)
class Details:
    """What our index says beside the places of tensors."""

    states: tuple[str, ...] = ()
    scalars: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None


def read_catalog(store: Store) -> Catalog:
    """The catalog of the folder; see `ucp.converters.safetensors.Safetensors.read`."""
    names = store.children()
    index = _index(store, names)
    paths = index.paths if index else _all(store, names)
    files = read_files(store, paths)
    if index:
        check_index(store, index, {file.entry.path: [piece.name for piece in file.pieces] for file in files})
    found = joined(files, store.url)
    details = _details(store, index) if index else Details()
    tensors, fragments = _with_states(found, details, f"{store.url}/{index.path if index else ''}")
    entries = [*(file.entry for file in files), *([index.entry] if index else [])]
    others = [name for name in saved_files(names) if name not in paths]
    return Catalog(
        url=store.url,
        source=Source(FAMILY, "", Mesh({}), {"files": len(files)}),
        tensors=tensors,
        fragments=fragments,
        step=details.step,
        ties={alias: name for alias, name in details.ties.items() if name in tensors},
        objects={entry.path: (entry.size, entry.fingerprint) for entry in entries},
        notes=tuple(f"{name} lies here as well and is not read; --from torch reads it" for name in others),
    )


def _index(store: Store, names: Sequence[str]) -> Index | None:
    held = [name for name in names if name.endswith(INDEX)]
    if len(held) > 1:
        raise UsageError(f"{store.url}: {' and '.join(held)} are two models", hint="put each into a folder of its own")
    return read_index(store, held[0]) if held else None


def _all(store: Store, names: Sequence[str]) -> list[str]:
    """All safetensors files; NotFoundError if there are none, or if their names tell that some are missing."""
    paths = [name for name in names if name.endswith(ENDING)]
    if not paths:
        raise NotFoundError(f"{store.url}: no safetensors files here")
    numbered = Counter((match[1], int(match[2])) for path in paths if (match := _PART.fullmatch(path)))
    for (stem, count), held in numbered.items():
        if held < count:
            raise NotFoundError(
                f"{store.url}: {held} of {count} files {stem}-… are here", hint="copy the others as well"
            )
    return paths


def _details(store: Store, index: Index) -> Details:
    where = f"{store.url}/{index.path}"
    metadata = read_document(store, index.path)[0].get("metadata")
    told = metadata.get(DETAILS) if isinstance(metadata, dict) else None
    if told is None:
        return Details()
    if not isinstance(told, dict):
        _damaged(where)
    states, step = told.get("states"), told.get("step")
    if not isinstance(states, list) or not all(isinstance(state, str) and state for state in states):
        _damaged(where)
    ties, kinds = _texts(told.get("ties"), where), _texts(told.get("kinds"), where)
    if not set(kinds.values()) <= {"parameter", "frozen", "buffer"}:
        _damaged(where)
    if step is not None and type(step) is not int:
        _damaged(where)
    scalars = told.get("scalars")
    if not isinstance(scalars, dict):
        _damaged(where)
    numbers = {name: _scalars(held, where) for name, held in scalars.items()}
    return Details(tuple(states), numbers, cast("dict[str, Kind]", kinds), ties, step)


def _scalars(held: Any, where: str) -> dict[str, Scalar]:
    if not isinstance(held, dict):
        _damaged(where)
    found = {}
    for state, pair in held.items():
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], int | float | bool):
            _damaged(where)
        if pair[1] not in ("int", "float", "bool", *ITEMSIZE):
            _damaged(where)
        found[state] = Scalar(pair[0], pair[1])
    return found


def _with_states(
    found: Joined, details: Details, where: str
) -> tuple[dict[str, Tensor], dict[Key, tuple[Fragment, ...]]]:
    """Tensors with their states put together."""
    tensors: dict[str, Tensor] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    for filed, tensor in found.tensors.items():
        state, name = _state(filed, details.states)
        held = found.fragments[Key(filed, "value")]
        fragments[Key(name, state)] = held
        spec = tensor.states["value"]
        before = tensors.get(name) or Tensor(name, "parameter", {}, details.scalars.get(name, {}))
        kind = details.kinds.get(name, tensor.kind) if state == "value" else before.kind
        states = {**before.states, state: spec}
        tensors[name] = Tensor(name, kind, _value_first(states), before.scalars)
    for name, tensor in tensors.items():
        if "value" not in tensor.states:
            raise CorruptError(f"{where}: {name} has no value", hint="get the file again from where it was written")
    return tensors, fragments


def _value_first(states: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(states.items(), key=lambda item: item[0] != "value"))


def _state(filed: str, states: Sequence[str]) -> tuple[str, str]:
    """(state, name) of what is filed under a name."""
    head, slash, rest = filed.partition("/")
    return (head, rest) if slash and rest and head in states else ("value", filed)


def _texts(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _damaged(where)
    return value


def _damaged(where: str) -> NoReturn:
    raise CorruptError(
        f"{where}: its metadata.{DETAILS} is damaged", hint="get the file again from where it was written"
    )
