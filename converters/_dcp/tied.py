"""Tied weights that were saved under each of their names, as FSDP2's state dicts have them.

DCP does not say that two keys are one tensor. Where a tensor that no optimizer has is the same, byte for byte by the
CRC-32 of every item, as one that was trained, they are one: training would have told them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ucp.catalog import Checksum, Tensor
from ucp.plan import Extent, Fragment, Key
from ucp.store import Store

_FEWEST_ELEMENTS = 16
_SAMPLE = 4096

_Place = tuple[str, int, int]
_Print = tuple[tuple[object, ...], ...]


def tied(
    store: Store,
    tensors: Mapping[str, Tensor],
    fragments: Mapping[Key, tuple[Fragment, ...]],
    checksums: Iterable[Checksum],
) -> dict[str, str]:
    """The name that holds the data, for each tensor that is another name of it.

    Vectors, very small tensors and such as hold one number throughout may well be equal by chance, and are left alone.
    """
    known = {(sum_.object, sum_.offset, sum_.length): sum_.value for sum_ in checksums}
    loose = [name for name, tensor in tensors.items() if tensor.kind == "frozen" and _may_be(tensor)]
    if not loose:
        return {}
    trained: dict[_Print, list[str]] = {}
    for name, tensor in tensors.items():
        found = _print(fragments[Key(name, "value")], known) if len(tensor.states) > 1 else None
        if found is not None:
            trained.setdefault(found, []).append(name)
    ties = {}
    for name in loose:
        held = fragments[Key(name, "value")]
        found = _print(held, known)
        names = trained.get(found, []) if found is not None else []
        if len(names) == 1 and not _is_constant(store, held[0].extent):
            ties[name] = names[0]
    return ties


def _may_be(tensor: Tensor) -> bool:
    value = tensor.states["value"]
    return len(tensor.states) == 1 and len(value.shape) > 1 and value.size >= _FEWEST_ELEMENTS


def _print(fragments: tuple[Fragment, ...], known: Mapping[_Place, int]) -> _Print | None:
    """What is known of a tensor's bytes without reading them; None where an item has no checksum of its own."""
    found: list[tuple[object, ...]] = []
    for fragment in fragments:
        extent = fragment.extent
        value = known.get((extent.object, extent.offset, extent.nbytes))
        if value is None:
            return None
        found.append((repr(fragment.region), extent.strides, extent.dtype, value))
    return tuple(sorted(found, key=repr)) if found else None


def _is_constant(store: Store, extent: Extent) -> bool:
    """Whether the first elements are all the same."""
    width = extent.itemsize
    data = store.read(extent.object, extent.offset, min(extent.nbytes, _SAMPLE))
    return data == data[:width] * (len(data) // width)
