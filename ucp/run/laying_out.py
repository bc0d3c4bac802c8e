"""The target of a conversion: laid out as the user asks, and refused where it would not be exact."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout, Target, converter
from ucp.errors import FitError, UsageError
from ucp.layout import Mesh
from ucp.mapping import ProgramLike, as_program
from ucp.store import Store
from ucp.tree import Opaque, Tree, walk

_KEEPS_ALL = "universal"
_REBUILT = ("torch._utils._rebuild_", "torch._tensor._rebuild_")
"""What torch pickles tensors as (torch/_tensor.py, ``_reduce_ex_internal``)."""


def layout_of(
    *,
    mesh: Mesh | Mapping[str, int] | None,
    program: ProgramLike | None,
    sizes: Mapping[str, int] | None,
    flags: Mapping[str, bool] | None,
) -> Layout:
    """What is asked of the layout of a target, as one object."""
    found = mesh if isinstance(mesh, Mesh) else Mesh(mesh or {})
    return Layout(found, None if program is None else as_program(program), sizes or {}, flags or {})


def make_target(to: str, catalog: Catalog, store: Store, *, lossy: bool, **options: Any) -> Target:
    """`catalog`, which lies in `store`, laid out as a checkpoint of family `to`.

    Raises what the family's converter raises; UsageError for a layout where the family has none, FitError for losses
    that are not accepted.
    """
    writer = converter(to)
    if "layout" in options and "layout" not in inspect.signature(writer.target).parameters:
        raise UsageError(f"{to} checkpoints have no layout to choose", hint="leave out --mesh and the --to-... options")
    target = writer.target(catalog, store, **options)
    losses = losses_of(to, catalog, target)
    if losses and not lossy:
        raise FitError(
            f"{catalog.url}: a {to} checkpoint would not be exact: {'; '.join(losses)}",
            hint="--lossy accepts that; the universal form keeps everything",
        )
    return target


def losses_of(to: str, catalog: Catalog, target: Target) -> tuple[str, ...]:
    """What of `catalog` is not exact in `target`: what that tells, and weights that no target can write."""
    return (*target.losses, *(_unread(catalog) if to != _KEEPS_ALL else ()))


def _unread(catalog: Catalog) -> Iterator[str]:
    """Weights of a dtype or kind that is not known, which are carried as they were pickled."""
    module = catalog.state.get("module")
    names = [name for name, held in module.items() if _holds_tensor(held)] if isinstance(module, dict) else []
    if names:
        shown = " ".join(map(str, names[:8])) + (" …" if len(names) > 8 else "")
        yield f"weights of a dtype or kind that ucp does not know are left out: {shown}"


def _holds_tensor(tree: Tree) -> bool:
    return any(isinstance(node, Opaque) and node.path.startswith(_REBUILT) for _, node in walk(tree))
