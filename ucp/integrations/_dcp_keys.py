"""The keys of state dicts that jobs give to torch.distributed.checkpoint: which level is what.

Jobs choose them: ``{"model": …, "optim": …}`` in torch's tutorials, the model at the top beside ``optimizer`` in
torchtitan, one level more in an application's own state. An optimizer's keys are ``state.<parameter>.<state>`` and
``param_groups`` (torch/distributed/checkpoint/state_dict.py, ``get_optimizer_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ucp.tree import TensorLeaf, Tree

Path = tuple[str | int, ...]
"""Where a key lies in the nested state dict: keys of dicts, and numbers in lists."""

_APP = r"(?:(?:app|app_state|state|checkpoint|ckpt|trainer)\.)?"
MODEL = re.compile(_APP + r"(?:model|module|net|network|state_dict|model_state|model_state_dict)\.")
"""What comes before a model's names."""

OPTIMIZER = re.compile(_APP + r"opt(?:im|imizer)?s?(?:_state)?(?:_dict)?\.")
"""What comes before ``state`` and ``param_groups``."""


def splits(text: str) -> Iterator[tuple[str, str]]:
    """Every (before, after) of a dotted text, the longest `before` first; both hold something."""
    parts = text.split(".")
    for count in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:count]), ".".join(parts[count:])


def leaves(path: Path, tree: Tree) -> Iterator[tuple[Path, Tree]]:
    """What torch makes of a nested state (torch/distributed/checkpoint/_traverse.py, ``traverse_state_dict``)."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves((*path, str(key)), value)
    elif isinstance(tree, list) and not _terminal(tree):
        for number, value in enumerate(tree):
            yield from leaves((*path, number), value)
    else:
        yield path, tree


def _terminal(value: list[Tree]) -> bool:
    """Whether torch keeps a list as one object: neither tensors nor dicts are in it, at any depth of lists."""
    return not any(
        isinstance(one, dict | TensorLeaf) or (isinstance(one, list) and not _terminal(one)) for one in value
    )


def below(tree: Tree, key: str) -> Iterator[Tree]:
    """What lies at a dotted `key` of a nested state; dots may also be part of its own keys."""
    if not key:
        yield tree
        return
    entries: Mapping[Any, Tree] = {}
    if isinstance(tree, dict):
        entries = tree
    elif isinstance(tree, list | tuple):
        entries = dict(enumerate(tree))
    for own, value in entries.items():
        name = str(own)
        if key == name:
            yield value
        elif key.startswith(f"{name}."):
            yield from below(value, key[len(name) + 1 :])


def nested(parts: Mapping[Path, Tree]) -> dict[Any, Tree]:
    """The nested dicts and lists of which `parts` are the leaves, by path."""
    root: dict[Any, Tree] = {}
    for path, value in parts.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return {key: _listed(value, {path[1:] for path in parts if path[0] == key}) for key, value in root.items()}


def _listed(node: Tree, paths: set[Path]) -> Tree:
    """`node` with dicts whose keys are numbers of a list as lists; `paths` are those of the leaves below it."""
    if () in paths or not isinstance(node, dict):
        return node
    made = {key: _listed(value, {path[1:] for path in paths if path[0] == key}) for key, value in node.items()}
    return [made[number] for number in sorted(made)] if all(type(key) is int for key in made) else made
