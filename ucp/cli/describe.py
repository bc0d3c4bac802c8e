"""Facts about a catalog, as plain values for JSON and tables alike. Reads no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ucp.catalog import Catalog, ParamGroup, Tensor
from ucp.errors import UcpError
from ucp.plan import Cover, Key
from ucp.tree import TensorLeaf, Tree


def overview(catalog: Catalog) -> dict[str, Any]:
    """What `ucp info` says."""
    source = catalog.source
    problem = incomplete(catalog)
    return {
        "url": catalog.url,
        "family": source.family,
        "version": source.version,
        "detail": dict(source.detail),
        "mesh": dict(source.mesh.axes),
        "step": catalog.step,
        "complete": problem is None,
        "problem": problem,
        "tensors": len(catalog.tensors),
        "kinds": dict(Counter(tensor.kind for tensor in catalog.tensors.values())),
        "parameters": sum(elements(t) for t in catalog.tensors.values() if t.kind != "buffer"),
        "bytes": catalog.nbytes,
        "states": states(catalog),
        "dtypes": dtypes(catalog),
        "ties": dict(catalog.ties),
        "param_groups": [param_group(group) for group in catalog.param_groups],
        "training_state": sorted(catalog.state),
        "objects": len(catalog.objects),
        "objects_bytes": sum(size for size, _ in catalog.objects.values()),
        "integrity": integrity(catalog),
        "notes": list(catalog.notes),
    }


def incomplete(catalog: Catalog) -> str | None:
    """Why the fragments do not make up every tensor, or None where they do."""
    try:
        for _ in covers(catalog):
            pass
    except UcpError as error:
        return error.message
    return None


def covers(catalog: Catalog) -> Iterator[Cover]:
    """The checked fragments of every state of every tensor; FitError where one is not whole."""
    for name, tensor in catalog.tensors.items():
        for state in tensor.states:
            yield catalog.cover(name, state)


def elements(tensor: Tensor) -> int:
    """Number of elements of a tensor's value, or of its largest state where it has no value."""
    value = tensor.states.get("value")
    return value.size if value else max((spec.size for spec in tensor.states.values()), default=0)


def states(catalog: Catalog) -> dict[str, dict[str, int]]:
    """For each state: how many tensors have it, and its bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in catalog.tensors.values():
        for state, spec in tensor.states.items():
            entry = found.setdefault(state, {"tensors": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["bytes"] += spec.nbytes
    return found


def dtypes(catalog: Catalog) -> dict[str, int]:
    """Bytes by dtype, over all states."""
    found: Counter[str] = Counter()
    for tensor in catalog.tensors.values():
        for spec in tensor.states.values():
            found[spec.dtype] += spec.nbytes
    return dict(found)


def param_group(group: ParamGroup) -> dict[str, Any]:
    """Names and options of a parameter group."""
    return {"params": list(group.params), "options": {key: plain(value) for key, value in group.options.items()}}


def integrity(catalog: Catalog) -> dict[str, Any]:
    """What the checkpoint lets us check: digests by algorithm, low-precision copies, and replicas."""
    digests: Counter[str] = Counter()
    for checksum in catalog.checksums:
        digests[checksum.algorithm] += checksum.length
    replicas = sum(fragment.replica > 0 for fragments in catalog.fragments.values() for fragment in fragments)
    return {"digests": dict(digests), "low_precision_copies": len(catalog.witnesses), "replicas": replicas}


def tensor_row(catalog: Catalog, name: str) -> dict[str, Any]:
    """One tensor as `ucp ls` lists it."""
    tensor = catalog.tensors[name]
    leading = tensor.states.get("value") or next(iter(tensor.states.values()))
    return {
        "name": name,
        "kind": tensor.kind,
        "shape": list(leading.shape),
        "dtype": leading.dtype,
        "states": {state: {"dtype": s.dtype, "shape": list(s.shape), "bytes": s.nbytes} for state, s in _specs(tensor)},
        "bytes": tensor.nbytes,
    }


def _specs(tensor: Tensor) -> Any:
    return tensor.states.items()


def groups_of(catalog: Catalog, name: str) -> list[dict[str, Any]]:
    """Options of the parameter groups that a tensor is in."""
    return [param_group(group)["options"] for group in catalog.param_groups if name in group.params]


def objects_of(catalog: Catalog, key: Key) -> set[str]:
    """Objects that hold some of a state's bytes."""
    return {fragment.extent.object for fragment in catalog.fragments[key]}


def plain(node: Tree) -> Any:
    """A tree's value for JSON: what JSON lacks is spelled as text."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple | set | frozenset):
        return [plain(value) for value in node]
    return node if node is None or isinstance(node, bool | int | float | str) else leaf_text(node)


def leaf_text(node: Tree) -> str:
    """One line for a leaf of a tree."""
    if isinstance(node, TensorLeaf):
        kind = "array" if node.numpy else "tensor"
        return f"{kind} {node.extent.dtype}{list(node.extent.shape)}"
    if isinstance(node, bytes):
        return f"{len(node)} bytes"
    path = getattr(node, "path", None)
    return f"<{path}>" if path else repr(node)
