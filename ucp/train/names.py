"""Matching names: the target's against the source's, past the prefixes that wrappers add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from ucp.catalog import Catalog

Rename = Mapping[str, str] | Callable[[str], str]
"""From a target's name to the source's; a mapping leaves out what keeps its name."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that wrappers insert: DistributedDataParallel and DataParallel, torch.compile, FSDP1, activation
checkpointing (the attribute names in torch/nn/parallel, torch/_dynamo/eval_frame.py, torch/distributed/fsdp and
torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py)."""


def stripped(name: str) -> str:
    """`name` without the components that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def match(names: Iterable[str], catalog: Catalog, rename: Rename | None = None) -> dict[str, str]:
    """Target name -> canonical source name, for every target name that the source knows.

    The exact name wins. Else names are compared without wrappers' components, where only one name on each side is left
    with that spelling: an ambiguous one matches nothing.
    """
    names = list(names)
    known = {**{name: name for name in catalog.tensors}, **catalog.ties}
    by_source = _by_stripped(known)
    by_target = _by_stripped(names)
    found: dict[str, str] = {}
    for name in names:
        wanted = renamed(name, rename)
        if wanted in known:
            found[name] = known[wanted]
        elif len(by_target[stripped(name)]) == 1 and len(by_source.get(stripped(wanted), ())) == 1:
            found[name] = known[by_source[stripped(wanted)][0]]
    return found


def renamed(name: str, rename: Rename | None) -> str:
    """The source's name of target `name`; a mapping may leave wrappers' components out of its keys."""
    if rename is None:
        return name
    if callable(rename):
        return rename(name)
    return rename.get(name, rename.get(stripped(name), name))


def selected(name: str, only: Iterable[str] | None) -> bool:
    """Whether `name`, as it is or without wrappers' components, matches one of the globs `only`."""
    if only is None:
        return True
    return any(fnmatchcase(spelling, glob) for glob in only for spelling in (name, stripped(name)))


def _by_stripped(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[stripped(name)].append(name)
    return found
