"""``universal_checkpoint_info``: what a DeepSpeed checkpoint says of how tensor-parallel ranks cut its parameters.

Keys: deepspeed/checkpoint/constants.py; what each means: deepspeed/checkpoint/ds_to_universal.py, ``merge_tp_slices``.
Megatron-DeepSpeed gives it in the client state (``GPTModel.universal_checkpoint_info``), AutoTP writes it by itself
(deepspeed/module_inject/layers.py, ``collect_autotp_universal_checkpoint_info``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ucp.catalog import Kind
from ucp.errors import CorruptError, FitError
from ucp.layout import Shape
from ucp.tree import Opaque, Tree

from . import nodes
from .affine import VERSION as AFFINE_VERSION
from .affine import from_affine
from .cuts import Along, Whole, side_by_side
from .patterns import Patterns
from .subparams import Declaration, cut_of, halves

INFO = "universal_checkpoint_info"
PIPELINE_REPLICATED = "pipeline_replicated_parameter_patterns"
PROGRAM_HINT = (
    "give program=, --spec on the command line, which says how parameters are cut: one of `ucp spec list` such as "
    "megatron_deepspeed, or one that `ucp spec new` drafts from the checkpoint"
)
_NEWEST = 0.4


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor as each tensor-parallel rank holds it."""

    name: str
    kind: Kind
    shapes: tuple[Shape, ...]


@dataclass(slots=True)
class Info:
    """The metadata as it is asked: lists of patterns, and what is kept for some of them.

    `joined` are parameters of one dim that no pattern names, whose parts are joined as DeepSpeed joins them.

    `version` 0.1 is BLOOM's, 0.2 of 2022, 0.3 of June and 0.4 of August 2026. From 0.4 on `widths` tell how
    sub-parameters were cut; before, they were cut evenly.
    """

    version: float
    lists: dict[str, Patterns]
    subs: list[tuple[Patterns, Declaration]]
    widths: Mapping[str, Tree]
    affine: dict[str, Tree]
    affine_patterns: Patterns
    unsupported: dict[str, str]
    unsupported_patterns: Patterns
    vocabulary: int | None
    notes: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)

    def cut_of(self, parameter: Parameter) -> Whole | Along:
        """How the ranks hold `parameter`, in the order in which DeepSpeed asks its lists.

        FitError for what the metadata does not allow, CorruptError where it contradicts the shapes.
        """
        self._refuse_unsupported(parameter.name)
        named = {key: self._one(key, parameter.name) for key in _LISTS}
        sub = self._sub(parameter.name)
        cut = self._affine(parameter)
        if cut is None:
            cut = self._listed(parameter, named, sub)
        return self._vocabulary(parameter, cut) if named[_VOCABULARY] else cut

    def _refuse_unsupported(self, name: str) -> None:
        for pattern in self.unsupported_patterns.matching(name):
            raise FitError(
                f"{name}: DeepSpeed's AutoTP does not say how it cut this parameter: {self.unsupported[pattern]}",
                hint=PROGRAM_HINT,
            )

    def _one(self, key: str, name: str) -> str | None:
        found = self.lists[key].matching(name)
        if len(found) > 1:
            raise FitError(f"{name}: {len(found)} patterns of {key} match it: {found[0]!r}, {found[1]!r}")
        return found[0] if found else None

    def _sub(self, name: str) -> tuple[str, Declaration] | None:
        hits = [(pattern, declared) for patterns, declared in self.subs for pattern in patterns.matching(name)]
        return hits[0] if hits else None

    def _affine(self, parameter: Parameter) -> Whole | Along | None:
        found = self.affine_patterns.matching(parameter.name)
        if len(found) > 1:
            raise FitError(f"{parameter.name}: {len(found)} affine maps match it: {found[0]!r}, {found[1]!r}")
        if not found:
            return None
        return from_affine(self.affine[found[0]], parameter.shapes, f"affine map of {parameter.name}")

    def _listed(
        self, parameter: Parameter, named: Mapping[str, str | None], sub: tuple[str, Declaration] | None
    ) -> Whole | Along:
        if named[_REPLICATED]:
            return _whole(parameter, Whole())
        if named[_AVERAGED]:
            return _whole(parameter, Whole(mean=True))
        if named[_TWO]:
            return halves(parameter.name, parameter.shapes)
        if sub is not None:
            pattern, declared = sub
            return cut_of(declared, parameter.name, parameter.shapes, self.widths.get(pattern))
        return self._contiguous(parameter, 1 if named[_ROWS] else 0, listed=any(named.values()))

    def _contiguous(self, parameter: Parameter, dim: int, *, listed: bool) -> Whole | Along:
        shapes = parameter.shapes
        if not listed and parameter.kind == "buffer" and len(set(shapes)) == 1:
            # DeepSpeed's converter takes the first rank's buffers; here the ranks' are compared as well.
            return Whole()
        if any(len(shape) <= dim for shape in shapes):
            if listed:
                raise CorruptError(f"{parameter.name}: listed as cut along dim {dim}, has shape {list(shapes[0])}")
            self.notes.append(f"{parameter.name} has no dims and no pattern names it: its copies are taken as replicas")
            return Whole()
        if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
            raise CorruptError(f"{parameter.name}: ranks hold {_listed(shapes)}, which do not join along dim {dim}")
        if not listed and len(shapes[0]) == 1 and len(set(shapes)) == 1:
            self.joined.append(parameter.name)
        return side_by_side(dim, [shape[dim] for shape in shapes])

    def _vocabulary(self, parameter: Parameter, cut: Whole | Along) -> Whole | Along:
        """`cut` with as many real rows as ``original_vocab_size`` says; rows beyond are padding."""
        rows = self.vocabulary
        if rows is None:
            raise FitError(f"{parameter.name}: is a vocabulary, and there is no original_vocab_size", hint=PROGRAM_HINT)
        first = parameter.shapes[0]
        total = cut.size * cut.outer * cut.inner if isinstance(cut, Along) and not cut.dim else first[0] if first else 0
        if total < rows:
            raise CorruptError(f"{parameter.name}: {total} rows for a vocabulary of {rows}")
        if total == rows:
            return cut
        if isinstance(cut, Along) and not cut.dim and (cut.outer, cut.inner, cut.boundaries is None) != (1, 1, False):
            raise FitError(f"{parameter.name}: a fused vocabulary with padding", hint=PROGRAM_HINT)
        return replace(cut, rows=rows)

    def ask(self, name: str) -> None:
        """Count every pattern that matches `name` as used."""
        for patterns in (*self.lists.values(), *(patterns for patterns, _ in self.subs)):
            patterns.matching(name)

    def is_cut_by_rows(self, name: str) -> bool:
        """Whether ranks hold columns of this weight, that is rows of its transpose."""
        return bool(self.lists[_ROWS].matching(name))

    def is_halved(self, name: str) -> bool:
        """Whether it is two parts, cut each by itself along the first dim."""
        return bool(self.lists[_TWO].matching(name))

    def is_vocabulary(self, name: str) -> bool:
        """Whether its first dim is the vocabulary."""
        return bool(self.lists[_VOCABULARY].matching(name))

    def declaration(self, name: str) -> tuple[str, Declaration] | None:
        """Pattern and declaration of its sub-parameters."""
        return self._sub(name)

    @property
    def is_silent_on_rows(self) -> bool:
        """Whether it speaks of a vocabulary and of nothing else, as a job that is not tensor parallel does."""
        cut = [*self.lists[_ROWS].listed, *self.lists[_REPLICATED].listed, *self.affine]
        return bool(self.lists[_VOCABULARY].listed) and not cut

    @property
    def is_of_other_names(self) -> bool:
        """Whether there are patterns, and none has matched any of the names that were asked for."""
        lists = [*self.lists.values(), *(patterns for patterns, _ in self.subs)]
        listed = [pattern for patterns in lists for pattern in patterns.listed]
        return bool(listed) and not any(patterns.used for patterns in lists)

    @property
    def unused(self) -> list[str]:
        """Patterns that matched no parameter; affine maps do not count, as in DeepSpeed."""
        found = [pattern for patterns in self.lists.values() for pattern in patterns.unused]
        return [*found, *(pattern for patterns, _ in self.subs for pattern in patterns.unused)]


_REPLICATED = "tp_replicated_parameter_patterns"
_AVERAGED = "parameter_to_average_patterns"
_ROWS = "parameter_with_row_parallelism_patterns"
_TWO = "parameter_with_2_sub_params_cat_dim_0"
_VOCABULARY = "vocabulary_parameter_patterns"
_SUBS = "parameter_with_sub_params"
_LISTS = (_REPLICATED, _AVERAGED, _ROWS, _TWO, _VOCABULARY)


def _whole(parameter: Parameter, whole: Whole) -> Whole:
    if len(set(parameter.shapes)) > 1:
        raise CorruptError(f"{parameter.name}: listed as replicated, but ranks hold {_listed(parameter.shapes)}")
    return whole


def _listed(shapes: Sequence[Shape]) -> str:
    return " and ".join(dict.fromkeys(str(list(shape)) for shape in shapes))


def info_of(state: Mapping[str, Tree]) -> Tree:
    """The metadata in a catalog's training state, None if there is none.

    FitError where ranks differ in it: what they have in common would leave out what is cut on some of them.
    """
    per_rank = state.get("per_rank")
    for rank, own in per_rank.items() if isinstance(per_rank, Mapping) else ():
        if isinstance(own, Mapping) and _told(own) is not None:
            raise FitError(f"{INFO} is not the same on all ranks: rank {rank} has its own", hint=PROGRAM_HINT)
    return _told(state)


def _told(state: Mapping[str, Tree]) -> Tree:
    client = state.get("client_state")
    return client.get(INFO) if isinstance(client, Mapping) else None


def read_info(tree: Tree, where: str) -> Info:
    """The metadata in `tree`. FitError for a version or for keys that are not known, CorruptError for no metadata."""
    told = nodes.mapping(tree, where)
    version = _version(told.get("universal_checkpoint_version", 0.0), where)
    for key in ("expert_parameter_patterns", "ds_autoep_layers"):
        if told.get(key):
            raise FitError(
                f"{where}: {key}: mixtures of experts under tensor parallelism cannot be read",
                hint="save it without tensor parallelism",
            )
    affine = nodes.mapping(told.get("affine_map") or {}, f"{where}: affine_map")
    if nodes.integer(affine.get("version", AFFINE_VERSION), f"{where}: affine_map") > AFFINE_VERSION:
        raise FitError(f"{where}: affine_map of version {affine['version']} is not known", hint=PROGRAM_HINT)
    maps = {str(k): v for k, v in nodes.mapping(affine.get("params") or {}, f"{where}: affine_map").items()}
    unsupported = nodes.mapping(told.get("autotp_unsupported_parameter_patterns") or {}, where)
    vocabulary = told.get("original_vocab_size")
    return Info(
        version,
        {key: Patterns.of(_strings(told.get(key), f"{where}: {key}")) for key in _LISTS},
        [_declared(entry, f"{where}: {_SUBS}") for entry in nodes.sequence(told.get(_SUBS) or (), f"{where}: {_SUBS}")],
        nodes.mapping(told.get("sub_param_shard_widths") or {}, f"{where}: sub_param_shard_widths"),
        maps,
        Patterns.of(maps),
        {str(key): str(value) for key, value in unsupported.items()},
        Patterns.of(map(str, unsupported)),
        None if vocabulary is None else nodes.integer(vocabulary, f"{where}: original_vocab_size"),
    )


def _version(told: Tree, where: str) -> float:
    if not nodes.is_number(told) or math.isnan(told):
        raise CorruptError(f"{where}: universal_checkpoint_version is a {type(told).__name__}")
    if told > _NEWEST:
        raise FitError(
            f"{where}: version {told} is newer than {_NEWEST}, the newest that is known",
            hint=f"a newer ucp may know it; or {PROGRAM_HINT}",
        )
    return float(told)


def _strings(tree: Tree, where: str) -> list[str]:
    listed = nodes.sequence(tree or (), where)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise CorruptError(f"{where}: holds something else than patterns")
    return [str(pattern) for pattern in listed]


def _declared(tree: Tree, where: str) -> tuple[Patterns, Declaration]:
    """One entry: a dict, or DeepSpeed's ``SubparamShape`` (deepspeed/checkpoint/universal_checkpoint.py)."""
    keys = ("patterns", "shape", "partition_dim")
    if isinstance(tree, Opaque):
        patterns, shape, dim = (tree.attribute(key) for key in keys)
    else:
        patterns, shape, dim = (nodes.mapping(tree, where).get(key) for key in keys)
    sizes: list[int | tuple[int, ...]] = []
    for size in nodes.sequence(shape, f"{where}: shape"):
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(nodes.shape(size, f"{where}: shape"))
    number = nodes.integer(dim, f"{where}: partition_dim")
    if not 0 <= number < len(sizes) or any(isinstance(n, tuple) for k, n in enumerate(sizes) if k != number):
        raise CorruptError(f"{where}: partition_dim {number} of shape {sizes}")
    return Patterns.of(_strings(patterns, f"{where}: patterns")), Declaration(tuple(sizes), number)
