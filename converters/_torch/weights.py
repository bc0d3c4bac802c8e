"""A catalog of the tensors in one state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ucp.catalog import Kind, Tensor
from ucp.layout import Box
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.tree import Tree

from .._deepspeed import nodes

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
"""Components that FSDP1, torch.compile and checkpoint_wrapper put into names."""

_PARALLEL = "module."
"""What DistributedDataParallel puts before all names."""

_FLOATS = ("float", "bfloat", "complex")


@dataclass(slots=True)
class Weights:
    """Tensors of a state dict, second names of the same bytes, and entries that are no tensors."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fragments: dict[Key, tuple[Fragment, ...]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Tree] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_weights(entries: Mapping[str, Tree], kinds: Mapping[str, Kind], *, as_they_are: bool = False) -> Weights:
    """Sort out the entries of a state dict; `kinds` says of some names what they are.

    With `as_they_are`, names are plain and what is not in `kinds` is a parameter.
    """
    found = Weights()
    plain = plain_name(() if as_they_are else entries)
    buffers = set() if as_they_are else batch_norm_buffers(entries)
    holders: dict[Extent, str] = {}
    for raw, node in entries.items():
        name = plain(raw)
        if not nodes.is_tensor(node):
            found.extra[name] = node
            continue
        extent = node.extent
        if extent.size and holders.setdefault(extent, name) != name:
            found.ties[name] = holders[extent]
            continue
        spec = TensorSpec(extent.shape, extent.dtype)
        likely: Kind = "buffer" if raw in buffers or not spec.dtype.startswith(_FLOATS) else "parameter"
        kind = kinds.get(name, "parameter" if as_they_are else likely)
        found.tensors[name] = Tensor(name, kind, {"value": spec})
        found.fragments[Key(name, "value")] = (Fragment(Box.whole(extent.shape), extent),)
    example = next((raw for raw in entries if plain(raw) != raw), None)
    if example is not None:
        found.notes.append(f"wrappers are left out of names: {example} is {plain(example)}")
    return found


def batch_norm_buffers(names: Iterable[str]) -> set[str]:
    """Running statistics, which are floating-point and yet buffers (torch/nn/modules/batchnorm.py, ``_NormBase``)."""
    known = set(names)
    modules = [name.removesuffix("num_batches_tracked") for name in known if name.endswith("num_batches_tracked")]
    return known & {f"{module}{name}" for module in modules for name in ("running_mean", "running_var")}


def plain_name(names: Iterable[str]) -> Callable[[str], str]:
    """Gives names without what wrappers of modules put into them; as they are, where that would make two the same."""
    names = list(names)
    if not names:
        return lambda name: name
    start = len(_PARALLEL) if all(name.startswith(_PARALLEL) for name in names) else 0

    def plain(name: str) -> str:
        return ".".join(part for part in name[start:].split(".") if part not in _WRAPPERS)

    return plain if len({plain(name) for name in names}) == len(names) else lambda name: name
