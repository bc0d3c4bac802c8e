"""What of a source's pickled state may be pickled again, and what is left behind.

DeepSpeed unpickles the files of a universal folder with everything allowed, so a class that the source merely named
would be imported and called by the job. Only classes that are known to be harmless are named again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ucp.container.leaves import LeafBytes
from ucp.container.values import Reference
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree

_CALLED = frozenset(
    {
        "argparse.Namespace",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "torch.Size",
        "torch.device",
        "types.SimpleNamespace",
    }
)

_REFERENCES = frozenset(
    [f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")]
    + ["collections.OrderedDict"]
    + [f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64")]
    + ["torch.bool", "torch.half", "torch.float", "torch.double", "torch.int", "torch.long"]
)

CLASSES = _CALLED | _REFERENCES | {"numpy.ndarray"}
"""All that the files name, by ``module.name``."""

Drop = Callable[[str, str], None]
"""Called with the path of what is left behind and the reason."""


class _NotCarried(Exception):
    """Something inside cannot be pickled again; the reason."""


def carry(tree: dict[Any, Tree], where: str, drop: Drop) -> dict[Any, Tree]:
    """`tree` without what cannot be pickled again.

    The smallest dict entry (or attribute) around such a thing is left out, and reported to `drop`: positions in lists
    and tuples never move.
    """
    kept = {}
    for key, value in tree.items():
        path = f"{where}.{key}"
        try:
            kept[_carry(key, path, drop)] = _carry(value, path, drop)
        except _NotCarried as reason:
            drop(path, str(reason))
    return kept


def _carry(node: Tree, path: str, drop: Drop) -> Tree:
    if node is None or isinstance(node, bool | int | float | complex | str | bytes | TensorLeaf):
        return node
    if isinstance(node, dict):
        return carry(node, path, drop)
    if isinstance(node, Reference):
        return _reference(node)
    if isinstance(node, Opaque):
        return _opaque(node, path, drop)
    if isinstance(node, list):
        return [_carry(item, path, drop) for item in node]
    if isinstance(node, tuple):
        # Through the type, so that a torch.Size stays one.
        return type(node)(_carry(item, path, drop) for item in node)
    if isinstance(node, set | frozenset):
        return type(node)(_carry(item, path, drop) for item in node)
    raise _NotCarried(f"a {type(node).__name__}")


def _reference(node: Reference) -> Reference:
    if node.path not in _REFERENCES:
        raise _NotCarried(f"names {node.path}")
    return node


def _opaque(node: Opaque, path: str, drop: Drop) -> Opaque:
    if node.path not in _CALLED or node.kwargs:
        raise _NotCarried(f"an object of class {node.path}")
    return replace(
        node,
        args=tuple(_carry(arg, path, drop) for arg in node.args),
        state=_carry(node.state, path, drop),
        items=[_carry(item, path, drop) for item in node.items],
        pairs=[(_carry(key, path, drop), _carry(value, path, drop)) for key, value in node.pairs],
    )


def inlined(node: Tree, store: Store) -> Tree:
    """What `carry` gave, with the bytes of its tensors read from `store`. CorruptError as `LeafBytes` raises it."""
    return _inlined(node, LeafBytes(store))


def _inlined(node: Tree, read: LeafBytes) -> Tree:
    if isinstance(node, TensorLeaf):
        return replace(node, inline=read(node))
    if isinstance(node, dict):
        # Through the type, so that an OrderedDict stays one.
        return type(node)((key, _inlined(value, read)) for key, value in node.items())
    if isinstance(node, list | tuple):
        return type(node)(_inlined(item, read) for item in node)
    if isinstance(node, Opaque) and not isinstance(node, Reference):
        return replace(
            node,
            args=_inlined(node.args, read),
            state=_inlined(node.state, read),
            items=_inlined(node.items, read),
            pairs=_inlined(node.pairs, read),
        )
    return node
