"""Pickles as inert data: nothing that a pickle names is imported, and nothing that it calls is run.

The shape of what comes out is `ucp.tree.Tree`: tensors are leaves that were not read, torch.Size is `values.Size`,
an OrderedDict is a dict, and every class or function that means nothing to ucp is a `Reference` (named) or an `Opaque`
(named and called).
"""

from __future__ import annotations

from collections.abc import Iterable

from ucp.container import arrays, tensors
from ucp.container.bounds import MOST_NODES, check_bounds
from ucp.container.machine import MOST_OPS, Build, Call, Machine, Persistent
from ucp.container.values import Reference
from ucp.errors import CorruptError, UnsafeError
from ucp.tree import Tree, walk

_FEW = 50_000
_UNFOLDED = 20
"""Nodes that a tree may have in any case, and for each byte of its pickle: what is named twice is there twice."""


def unpickle(data: bytes, *, where: str, persistent: Persistent | None = None, large: bool = False) -> Tree:
    """The value that the pickle `data` describes, `where` naming its file in errors.

    `persistent` gives the value of a persistent id; without it those are an error. CorruptError for a damaged, forged
    or outsized pickle, UnsafeError for one that names what only an attack does. With `large` nothing is outsized that
    is in proportion to its own length.
    """
    return unpickle_at(data, 0, where=where, persistent=persistent, large=large)[0]


def unpickle_at(
    data: bytes, start: int, *, where: str, persistent: Persistent | None = None, large: bool = False
) -> tuple[Tree, int]:
    """Like `unpickle` for a pickle that starts at byte `start` of `data`; also gives the byte after its end."""
    size = len(data) if large else 0
    most = max(MOST_OPS, size)
    machine = Machine(data, where=where, calls=_CALLS, builds=_BUILDS, persistent=persistent, start=start, most=most)
    root = machine.run()
    check_bounds(root, where=where, most=min(max(MOST_NODES, size), _FEW + _UNFOLDED * (machine.position - start)))
    if machine.broken:
        _report(machine, root)
    return root, machine.position


def _report(machine: Machine, root: Tree) -> None:
    """Raise the first fault with its place in the tree."""
    broken, problem = machine.broken[0]
    place = next((path for path, node in walk(root, where=machine.where) if node is broken), "")
    raise CorruptError(
        f"{machine.where}: {place or 'a tensor'}: {problem}", hint="get the file again from where it was written"
    )


def _ordered_dict(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    made: dict[Tree, Tree] = {}
    for pairs in args[:1]:
        if not isinstance(pairs, dict | list | tuple):
            machine.fail("an OrderedDict that is not made of pairs")
        machine.spend(len(pairs))
        items = list(pairs.items() if isinstance(pairs, dict) else pairs)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in items):
            machine.fail("an OrderedDict that is not made of pairs")
        machine.keys(key for key, _ in items)
        made.update(items)
    return made


def _elements(machine: Machine, args: tuple[Tree, ...]) -> Iterable[Tree]:
    values = args[0] if args else ()
    if not isinstance(values, list | tuple | set | frozenset):
        machine.fail("a collection that is not made of a list")
    machine.spend(len(values))
    return values


def _keyed_elements(machine: Machine, args: tuple[Tree, ...]) -> Iterable[Tree]:
    values = _elements(machine, args)
    machine.keys(values)
    return values


def _encode(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``_codecs.encode(text, "latin1")``: how protocol 2 writes bytes."""
    text, codec = args
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        machine.fail("an encoding that no pickle uses")
    machine.spend(len(text))
    return text.encode("latin-1")


def _bytes(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``bytes()`` and ``bytearray(…)``; protocol 2 gives the latter (text, "latin-1"), later ones bytes."""
    if not args:
        return b""
    if isinstance(args[0], str):
        return _encode(machine, args)
    if not isinstance(args[0], bytes):
        machine.fail("bytes that are not made of bytes")
    return args[0]


def _complex(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    if not all(isinstance(part, int | float) for part in args):
        machine.fail("a complex number that is not made of numbers")
    return complex(*args)


def _reconstructor(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``copyreg._reconstructor(class, base, state)``: how protocols 0 and 1 make objects."""
    kind, base, state = args
    plain = isinstance(base, Reference) and base.path == "builtins.object"
    return machine.call(kind, () if plain else (state,))


def _newobj(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    return machine.call(args[0], args[1:])


def _newobj_ex(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    kind, inner, kwargs = args
    return machine.call(kind, inner, kwargs)


def _getattr(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``getattr(Class, "MEMBER")``: enum members as Python 3.11 writes them and nested classes up to protocol 3.

    UnsafeError for any other use of getattr: no honest checkpoint has one.
    """
    owner, name = args
    honest = isinstance(owner, Reference) and isinstance(name, str) and name.isidentifier() and len(name) < 256
    if not honest or name.startswith("_") or owner.module == "builtins":
        raise UnsafeError(
            f"{machine.where}: asks for an attribute with builtins.getattr, which could run arbitrary code",
            hint="nothing of it was run. Get the checkpoint again from a source you trust",
        )
    return machine.reference(owner.module, f"{owner.name}.{name}")


_CALLS: dict[str, Call] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.dict": _ordered_dict,
    "builtins.list": lambda machine, args: list(_elements(machine, args)),
    "builtins.tuple": lambda machine, args: tuple(_elements(machine, args)),
    "builtins.set": lambda machine, args: set(_keyed_elements(machine, args)),
    "builtins.frozenset": lambda machine, args: frozenset(_keyed_elements(machine, args)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _complex,
    "builtins.getattr": _getattr,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _newobj,
    "copyreg.__newobj_ex__": _newobj_ex,
    "torch._utils._rebuild_tensor": tensors.rebuild_v1,
    "torch._utils._rebuild_tensor_v2": tensors.rebuild_v2,
    "torch._utils._rebuild_tensor_v3": tensors.rebuild_v3,
    "torch._utils._rebuild_parameter": tensors.rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": tensors.rebuild_parameter,
    "torch.nn.parameter.Parameter": tensors.rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": tensors.rebuild_from_type,
    "torch._utils._rebuild_device_tensor_from_numpy": tensors.rebuild_from_data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": tensors.rebuild_from_data,
    "torch._utils._rebuild_xla_tensor": tensors.rebuild_from_data,
    "torch.Size": tensors.size,
    "torch.serialization._get_layout": tensors.layout,
    **{f"numpy.{core}.multiarray._reconstruct": arrays.reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": arrays.scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": arrays.from_buffer for core in ("core", "_core")},
}

_BUILDS: dict[str, Build] = {"numpy.ndarray": arrays.build_array}

__all__ = ["Persistent", "unpickle", "unpickle_at"]
