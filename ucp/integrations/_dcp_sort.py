"""Sorting what a job saves: which keys are tensors of the model, which states of its optimizer, and which neither."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ucp.errors import FitError, UsageError
from ucp.integrations._dcp_keys import MODEL, OPTIMIZER, Path, splits
from ucp.layout.dtypes import ITEMSIZE
from ucp.train.names import stripped
from ucp.train.shards import dtype_name
from ucp.training import USUAL_NAMES

_GROUPS = re.compile(r"(?:^|\.)param_groups\.")
_LARGE = 1 << 20
"""Bytes of tensors beside model and optimizer from which they are tensors of the checkpoint, and no training state."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What comes before the names of the model and before ``state`` and ``param_groups``; None: to be found."""

    model: str | None = None
    optimizer: str | None = None

    @classmethod
    def of(cls, model: str | None, optimizer: str | None) -> Prefixes:
        """As a caller says it: with or without the last dot."""
        return cls(*(f"{said.removesuffix('.')}." if said else said for said in (model, optimizer)))


@dataclass(frozen=True, slots=True)
class TensorRole:
    """State `state` of tensor `name`; a number beside the parameter where `number`."""

    name: str
    state: str
    number: bool = False


@dataclass(frozen=True, slots=True)
class OptionRole:
    """An option of an optimizer's group: of the group with this number, or of the parameter with this name."""

    optimizer: str
    group: int | str
    option: str


@dataclass(frozen=True, slots=True)
class StateRole:
    """Part of the training state, at `path`."""

    path: Path


Role = TensorRole | OptionRole | StateRole


def assign(plans: Sequence[SavePlan], prefixes: Prefixes) -> list[SavePlan]:
    """`plans` of all ranks, each told its rank and the roles of its items: ``storage_data = (rank, roles)``.

    FitError for tensors of a dtype that cannot be stored, for optimizers that number their parameters, and where it
    cannot be told which of several models an optimizer trains; UsageError where only some ranks reuse a plan.
    """
    if len({plan.usable for plan in plans}) > 1:
        raise UsageError(
            "some ranks give the plan of the save before, and others do not",
            hint="use a planner without enable_plan_caching where state dicts change",
        )
    items: dict[str, WriteItem] = {}
    paths: dict[str, Path] = {}
    for plan in plans:
        items.update({item.index.fqn: item for item in plan.items})
        paths.update(plan.planner_data or {})
    for key, item in items.items():
        _check_dtype(key, item)
    roles = _Sorting(items, paths, prefixes).roles()
    return [
        dataclasses.replace(plan, storage_data=(rank, {item.index.fqn: roles[item.index.fqn] for item in plan.items}))
        for rank, plan in enumerate(plans)
    ]


def _check_dtype(key: str, item: WriteItem) -> None:
    if item.tensor_data is not None:
        dtype = dtype_name(item.tensor_data.properties.dtype)
        if dtype not in ITEMSIZE:
            raise FitError(f"{key}: {dtype} cannot be stored", hint=f"what can: {' '.join(ITEMSIZE)}")


class _Sorting:
    """The keys of one save. `paths` are those in the nested state dict, where the planner flattened one."""

    def __init__(self, items: Mapping[str, WriteItem], paths: Mapping[str, Path], prefixes: Prefixes) -> None:
        self.items, self.paths, self.prefixes = items, paths, prefixes
        self.tops = {str(self._path(key)[0]) for key in items}
        self.optimizers = self._optimizers()
        self.owned = {key: found for key in items if (found := self._section(key)) is not None}

    def roles(self) -> dict[str, Role]:
        """The role of every key."""
        free = [key for key in self.items if key not in self.owned]
        tensors = [key for key in free if self.items[key].tensor_data is not None]
        model = self._model(tensors)
        apart = self._apart([key for key in tensors if key not in model])
        roles: dict[str, Role] = {key: TensorRole(name, "value") for key, name in model.items()}
        roles |= {key: TensorRole(key, "value") for key in apart}
        for key in free:
            roles.setdefault(key, StateRole(self._usual(self._path(key))))
        shapes = {name: self._shape(key) for key, name in model.items()}
        for key, (optimizer, section, rest) in self.owned.items():
            roles[key] = (
                self._state(key, rest, shapes) if section == "state" else self._option(key, optimizer, rest, shapes)
            )
        return roles

    def _section(self, key: str) -> tuple[str, str, str] | None:
        """(optimizer's prefix, ``state`` or ``param_groups``, the rest) of a key that an optimizer has."""
        for prefix in self.optimizers:
            section, _, rest = key[len(prefix) :].partition(".")
            if key.startswith(prefix) and section in ("state", "param_groups") and rest:
                return prefix, section, rest
        return None

    def _optimizers(self) -> list[str]:
        """What comes before ``state`` and ``param_groups``, the longest first."""
        if self.prefixes.optimizer is not None:
            return [self.prefixes.optimizer]
        found = {key[: match.start()] for key in self.items if (match := _GROUPS.search(key))}
        found = {f"{prefix}." if prefix else "" for prefix in found}
        named = {match[0] for key in self.items if (match := OPTIMIZER.match(key))}
        return sorted(found | named, key=lambda prefix: (-len(prefix), prefix))

    def _model(self, tensors: Sequence[str]) -> dict[str, str]:
        """The names of the model's tensors, by key."""
        prefix = self.prefixes.model if self.prefixes.model is not None else self._model_prefix(tensors)
        keys = [key for key in tensors if key.startswith(prefix)]
        if not prefix:
            flat = [key for key in keys if len(self._path(key)) == 1]
            keys = flat or keys
        names = {key: stripped(key[len(prefix) :]) for key in keys}
        if len(set(names.values())) < len(names):
            names = {key: key[len(prefix) :] for key in keys}
        return names

    def _model_prefix(self, tensors: Sequence[str]) -> str:
        """Where the optimizer's parameters are; without one, where the names of levels say that a model is."""
        trained = {name for _, section, rest in self.owned.values() if section == "state" for name, _ in splits(rest)}
        counts: Counter[str] = Counter()
        for key in tensors:
            for prefix, name in [("", key), *((f"{before}.", after) for before, after in splits(key))]:
                counts[prefix] += name in trained or stripped(name) in trained
        most = max(counts.values(), default=0)
        best = [prefix for prefix, count in counts.items() if count == most] if most else []
        best = [prefix for prefix in best if MODEL.fullmatch(prefix)] or best
        if len(best) > 1:
            raise FitError(
                f"the optimizer's parameters are found below each of {' '.join(sorted(best))}",
                hint=f"say which is the model that it trains: Writer(url, model={min(best)!r})",
            )
        if best:
            return best[0]
        named = {match[0] for key in tensors if (match := MODEL.match(key))}
        return min(named, key=len) if named else ""

    def _apart(self, keys: Sequence[str]) -> set[str]:
        """Those of `keys` that are weights all the same, such as averaged ones: in pieces, or large."""
        tops: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            tops[str(self._path(key)[0]).split(".")[0]].append(key)
        return {key for held in tops.values() if self._are_weights(held) for key in held}

    def _are_weights(self, keys: Iterable[str]) -> bool:
        items = [self.items[key] for key in keys]
        nbytes = sum(item.tensor_storage_size() or 0 for item in items)
        return nbytes > _LARGE or any(item.type is WriteItemType.SHARD for item in items)

    def _state(self, key: str, rest: str, shapes: Mapping[str, tuple[int, ...] | None]) -> TensorRole:
        name, state = next(self._named(rest, shapes), None) or self._by_path(key) or _last(rest)
        if name.isdecimal() and name not in shapes:
            raise FitError(
                f"{key} is the state of a parameter that has a number instead of a name",
                hint="make the state dict with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict",
            )
        shape = self._shape(key)
        number = shape is None or (shape == () and (shapes.get(name) != () or state == "step"))
        return TensorRole(name, state, number)

    def _option(
        self, key: str, optimizer: str, rest: str, shapes: Mapping[str, tuple[int, ...] | None]
    ) -> OptionRole | StateRole:
        number, _, option = rest.partition(".")
        path = self._path(key)
        if number.isdecimal() and option and (int(number) in path or number not in shapes):
            return OptionRole(optimizer, int(number), option)
        name, option = next(self._named(rest, shapes), None) or _last(rest)
        return OptionRole(optimizer, name, option)

    @staticmethod
    def _named(rest: str, shapes: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        for before, after in splits(rest):
            for name in (before, stripped(before)):
                if name in shapes:
                    yield name, after

    def _by_path(self, key: str) -> tuple[str, str] | None:
        """Of a parameter that the model does not have: the levels of a nested state dict tell where its name ends."""
        path = [str(part) for part in self._path(key)]
        at = path.index("state") if "state" in path else len(path)
        return (stripped(path[at + 1]), ".".join(path[at + 2 :])) if len(path) > at + 2 else None

    def _shape(self, key: str) -> tuple[int, ...] | None:
        data = self.items[key].tensor_data
        return None if data is None else tuple(data.size)

    def _path(self, key: str) -> Path:
        return self.paths.get(key, (key,))

    def _usual(self, path: Path) -> Path:
        """`path` below the name that ucp has for what is there, unless the job has something else of that name."""
        usual = USUAL_NAMES.get(str(path[0]))
        return path if usual is None or usual in self.tops else (usual, *path[1:])


def _last(rest: str) -> tuple[str, str]:
    name, _, last = rest.rpartition(".")
    return (stripped(name), last) if name else (rest, "value")
