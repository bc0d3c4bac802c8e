"""Which keys are the model's, which an optimizer's, and which neither.

Jobs choose the keys themselves: ``{"model": …, "optim": …}`` in the tutorials of torch, a flat model beside
``optimizer`` in torchtitan, one more level in an application's own state. What an optimizer is, its keys show:
``state.<parameter>.<state>`` and ``param_groups`` (torch/distributed/checkpoint/state_dict.py). The model is what lies
where the optimizers' parameters are found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ucp.errors import FitError

from .contents import Contents
from .names import cleaned, suffix_counts

_GROUPS = re.compile(r"(?:^|\.)param_groups(?=\.|$)")
_NAMED = re.compile(r"(?:^|\.)(?:optim|optimizer)[^.]*(?=\.state\.)")
_MOMENTS = re.compile(r"(?:^|\.)state\..*\.(?:exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq|square_avg|sum)$")
_OPTIMIZER = re.compile(r"(?:^|\.)(?:optim|optimizer)[^.]*$")
_MODELS = frozenset({"model", "module", "state_dict", "model_state", "model_state_dict", "net", "network"})
_AROUND = frozenset(
    "train_state lr_scheduler lr_schedulers scheduler schedulers sched dataloader dataloaders data_loader rng "
    "rng_state rng_states extra extra_state trainer loops callbacks meta metadata scaler grad_scaler "
    "train_dataloader".split()
)


@dataclass(frozen=True, slots=True)
class Sections:
    """The keys of a checkpoint by what they are.

    `model` has the tensors' names (without `prefix` and wrappers) with their keys, in order. `optimizers` are the keys
    below each optimizer's prefix; `rest` are all others.
    """

    prefix: str
    model: Mapping[str, str]
    optimizers: Mapping[str, tuple[str, ...]]
    rest: tuple[str, ...]


def sections(
    contents: Contents, owned: Mapping[str, tuple[str, ...]], parameters: Collection[str], *, prefix: str | None = None
) -> Sections:
    """Sort the keys that no optimizer has, where `owned` are those that one has.

    `parameters` are the names that optimizers have; `prefix` says where the model is, if that is known.
    """
    taken = {key for keys in owned.values() for key in keys}
    free = [key for key in contents.paths if key not in taken]
    tensors = [key for key in free if key in contents.tensors]
    if prefix is None:
        prefix = _model_prefix(contents, tensors, parameters)
    keys = [key for key in tensors if key.startswith(prefix)] if prefix else _unprefixed(contents, tensors)
    short = cleaned(key.removeprefix(prefix) for key in keys)
    model = {short[key.removeprefix(prefix)]: key for key in keys}
    chosen = set(keys)
    return Sections(prefix, model, owned, tuple(key for key in free if key not in chosen))


def optimizer_keys(contents: Contents) -> dict[str, tuple[str, ...]]:
    """The keys of each optimizer, by its prefix."""
    prefixes = sorted(_optimizer_prefixes(contents), key=len, reverse=True)
    found: dict[str, list[str]] = {prefix: [] for prefix in reversed(prefixes)}
    for key in contents.paths:
        for prefix in prefixes:
            if key.startswith(prefix) and _is_part(key.removeprefix(prefix), prefix):
                found[prefix].append(key)
                break
    return {prefix: tuple(keys) for prefix, keys in found.items() if keys}


def _optimizer_prefixes(contents: Contents) -> set[str]:
    prefixes = set()
    for key in contents.paths:
        groups, named, moments = _GROUPS.search(key), _NAMED.search(key), _MOMENTS.search(key)
        if groups:
            prefixes.add(key[: groups.start()])
        elif named:
            prefixes.add(key[: named.end()])
        elif moments:
            prefixes.add(key[: moments.start()])
    return {f"{prefix}." if prefix else "" for prefix in prefixes}


def _is_part(rest: str, prefix: str) -> bool:
    """Whether a key that goes on with `rest` is the optimizer's at `prefix`, where other things may lie as well."""
    return rest.split(".", 1)[0] in ("state", "param_groups") or bool(_OPTIMIZER.search(prefix.removesuffix(".")))


def _model_prefix(contents: Contents, tensors: Sequence[str], parameters: Collection[str]) -> str:
    """Where most of the optimizers' parameters are; without such, where the names of levels say that a model is."""
    counts = suffix_counts(tensors, parameters)
    if counts:
        most = max(counts.values())
        best = [prefix for prefix, count in counts.items() if count == most]
        named = [prefix for prefix in best if _is_model(prefix)] or best
        # A wrapper of the model has all its names too; the outermost is meant.
        named = [prefix for prefix in named if not any(prefix != a and prefix.startswith(a) for a in named)]
        if len(named) > 1:
            raise FitError(
                f"{contents.where}: the optimizer's parameters are found below each of {' '.join(sorted(named))}",
                hint=f"say which of them is the model that it trains, for example model={min(named)}",
            )
        return named[0]
    paths = [contents.paths[key] for key in tensors]
    levels = {".".join(map(str, path[:depth])) for path in paths for depth in range(1, len(path))}
    named = sorted((level for level in levels if _is_model(level)), key=lambda level: (level.count("."), level))
    if named:
        return f"{named[0]}."
    tops = {str(path[0]) for path in paths} - _AROUND
    flat = any(len(path) == 1 for path in paths)
    return f"{tops.pop()}." if len(tops) == 1 and not flat else ""


def _is_model(level: str) -> bool:
    return level.removesuffix(".").rpartition(".")[2] in _MODELS


def _unprefixed(contents: Contents, tensors: Sequence[str]) -> list[str]:
    """The model's keys where nothing comes before their names."""
    free = [key for key in tensors if key.split(".")[0] not in _AROUND]
    flat = [key for key in free if len(contents.paths[key]) == 1]
    return flat or free
