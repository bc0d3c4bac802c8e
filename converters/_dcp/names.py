"""Names in keys: prefixes, wrappers that modules were in, and the longest known name at the start of a key."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from .contents import Path

# Put in by FSDP1 in torch/distributed/fsdp/_common_utils.py, by torch.compile in torch/_dynamo/eval_frame.py and by
# activation checkpointing in distributed/algorithms/_checkpoint/checkpoint_wrapper.py; DDP puts "module." before all.
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_DDP = "module."
_NUMBER = re.compile(r"[0-9]{1,18}")


def clean(name: str) -> str:
    """`name` without the wrappers that a module may be in."""
    return _WRAPPERS.sub("", name)


def cleaned(names: Iterable[str]) -> dict[str, str]:
    """The clean name of each of a module's tensors; they are as they are if that would make two of them one."""
    names = list(names)
    clear = {name: clean(name) for name in names}
    if names and all(name.startswith(_DDP) for name in clear.values()):
        clear = {name: short.removeprefix(_DDP) for name, short in clear.items()}
    return clear if len(set(clear.values())) == len(names) else {name: name for name in names}


def known_as(name: str, known: Collection[str]) -> str:
    """The name under which `known` has what an optimizer calls `name`, or `name`."""
    short = clean(name)
    for candidate in (name, short, short.removeprefix(_DDP)):
        if candidate in known:
            return candidate
    return short


def below(path: Path, prefix: str) -> Path:
    """What is left of `path` after `prefix`, which is empty or ends in a dot; a dot may lie inside one of its parts."""
    left = prefix.removesuffix(".")
    parts = list(path)
    while left:
        head = str(parts.pop(0))
        if left == head:
            break
        if left.startswith(f"{head}."):
            left = left[len(head) + 1 :]
            continue
        parts.insert(0, head[len(left) + 1 :])
        break
    return tuple(parts)


def split_name(rest: Path, known: Collection[str]) -> tuple[str | int, Path]:
    """(parameter, what follows) of a path that starts with a parameter's name, in one part or flattened.

    A flattened name is the longest that is `known`, else all but the last part.
    """
    if len(rest) > 1 and (isinstance(rest[0], int) or known_as(rest[0], known) in known):
        return _number(rest[0]), rest[1:]
    parts = ".".join(map(str, rest)).split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        if known_as(name, known) in known:
            return name, tuple(parts[count:])
    if len(rest) > 1:
        return _number(rest[0]), rest[1:]
    if len(parts) > 1 and _NUMBER.fullmatch(parts[0]):
        return int(parts[0]), tuple(parts[1:])
    return ".".join(parts[:-1]), tuple(parts[-1:])


def suffix_counts(keys: Iterable[str], names: Collection[str]) -> Mapping[str, int]:
    """For each prefix, how many of `keys` are that prefix and one of `names`."""
    counts: dict[str, int] = {}
    for key in keys:
        parts = key.split(".")
        for start in range(len(parts)):
            if known_as(".".join(parts[start:]), names) in names:
                prefix = "".join(f"{part}." for part in parts[:start])
                counts[prefix] = counts.get(prefix, 0) + 1
    return counts


def _number(part: str | int) -> str | int:
    return int(part) if isinstance(part, str) and _NUMBER.fullmatch(part) else part
