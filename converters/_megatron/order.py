"""The parameters of a rank in the order in which its modules register them, by the keys of a ``torch_dist`` checkpoint.

The distributed optimizer lays parameters out in this order, backwards, and keeps no names. Order of modules:
``GPTModel`` (models/gpt/gpt_model.py), ``TransformerLayer``, ``SelfAttention`` (transformer/attention.py: the
projection before queries, keys and values), ``MLP``, ``MoELayer`` (router, experts, shared experts). With Transformer
Engine a norm belongs to the linear layer behind it, which registers the norm's parameters before its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ucp.errors import FitError
from ucp.layout import Box

from .._dcp.metadata import Entry
from .arguments import Arguments, layers_of
from .local import Local, by_index, copy_of, local
from .transposed import Transposed

_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACKED = "decoder.layers."
_BEFORE = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
_AFTER = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias")
_HEAD = "output_layer.weight"
_EXPERTS = "mlp.experts.experts."
BUFFERS = ("mlp.router.expert_bias",)


def _both(*modules: str) -> list[str]:
    return [f"{module}{name}" for module in modules for name in ("weight", "bias")]


_QKV_NORM = ["self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias"]
_MLP_NORM = ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias"]
_PROJ = _both("self_attention.linear_proj.")
_QKV = _both("self_attention.linear_qkv.", "self_attention.q_layernorm.", "self_attention.k_layernorm.")
_PRE_MLP = _both("pre_mlp_layernorm.")
_MLP = _both("mlp.linear_fc1.", "mlp.linear_fc2.")
_ROUTER = _both("mlp.router.")
_SHARED = ["mlp.shared_experts.gate_weight", *_both("mlp.shared_experts.linear_fc1.", "mlp.shared_experts.linear_fc2.")]

_LOCAL_LAYER = (*_QKV_NORM, *_PROJ, *_QKV, *_PRE_MLP, *_MLP_NORM, *_MLP, *_ROUTER, _EXPERTS, *_SHARED)
_TE_LAYER = (*_PROJ, *_QKV_NORM, *_QKV, *_PRE_MLP, *_MLP_NORM, *_MLP, *_ROUTER, _EXPERTS, *_SHARED)
_ONE_BY_ONE = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")


Experts = Literal["one by one", "by layer", "as one"]
"""``SequentialMLP``, ``TEGroupedMLP``, ``GroupedMLP``: an expert after the other, all first layers before all second,
or all first layers as one parameter and all second ones as another.
"""


@dataclass(frozen=True, slots=True)
class Order:
    """One way in which a rank's modules may be registered."""

    te: bool
    experts: Experts


def orders(args: Arguments) -> Iterator[Order]:
    """The orders there may be. Arguments do not say of what kind layers are in the end."""
    ways: dict[bool, tuple[Experts, ...]] = {False: ("one by one", "as one"), True: ("one by one", "by layer")}
    for te in (False, True):
        for experts in ways[te] if args.experts is not None else ways[te][:1]:
            yield Order(te, experts)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands; `tp` is its place among the ranks that cut what is meant, dense or experts."""

    tp: int
    pp: int
    ep: int = 0

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}" + f", ep {self.ep}" * bool(self.ep)


@dataclass(frozen=True)
class Model:
    """The tensors of a model by key, and the arguments of its job."""

    tensors: Mapping[str, Entry]
    args: Arguments
    where: str

    def require_known(self) -> None:
        """FitError for tensors of layers that have no place in any order."""
        inside = {*_LOCAL_LAYER, *BUFFERS} | {_EXPERTS + name for name in _ONE_BY_ONE}
        outside = {*_BEFORE, *_AFTER, _HEAD}
        strange = [key for key in self.tensors if key not in outside and _inside(key) not in inside]
        if strange:
            raise FitError(
                f"{self.where}: the optimizer's flat buffers hold parameters in the order of the model's modules, "
                f"which is not known for {' '.join(strange[:4])}",
                hint="save it as fully_reshardable, which names the states",
            )

    def parameters(self, chunk: int, place: Place, order: Order, *, experts: bool) -> list[Local | Transposed]:
        """Those of one model chunk that lie in the buffers of experts, or in those of the rest."""
        separate = self.args.ep > 1
        if experts and not separate:
            return []
        first = place.pp == 0 and chunk == 0
        last = place.pp == self.args.pp - 1 and chunk == self.args.vpp - 1
        found: list[Local | Transposed]
        found = [] if experts or not first else [self._outside(key, place) for key in _BEFORE if key in self.tensors]
        for layer in layers_of(self.args)[place.pp, chunk]:
            for name in _TE_LAYER if order.te else _LOCAL_LAYER:
                if name != _EXPERTS:
                    found += [] if experts else self._of_layer(layer, name, place)
                elif experts or not separate:
                    found += self._experts(layer, place, order)
        if last and not experts:
            found += [self._outside(key, place) for key in _AFTER if key in self.tensors]
            found += self._head(place)
        return found

    def _head(self, place: Place) -> list[Local]:
        """The last stage's own copy of a tied embedding is not among the tensors."""
        if _HEAD in self.tensors:
            return [self._outside(_HEAD, place)]
        if self.args.pp == 1:
            return []
        return [copy_of(self._outside(_BEFORE[0], place), 1)]

    def _outside(self, key: str, place: Place) -> Local:
        return self._local(key, (), place.tp, self.args.tp)

    def _local(self, key: str, index: tuple[int, ...], rank: int, degree: int) -> Local:
        entry, depth = self.tensors[key], len(index)
        if (key, depth) not in self._chunks:
            self._chunks[key, depth] = by_index(entry, depth)
        found = self._chunks[key, depth].get(index, [])
        return local(key, entry, found, index=index, rank=rank, degree=degree, where=self.where)

    @cached_property
    def _chunks(self) -> dict[tuple[str, int], dict[tuple[int, ...], list[Box]]]:
        return {}

    def _of_layer(self, layer: int, name: str, place: Place) -> list[Local]:
        key, index = self._key(layer, name)
        if key not in self.tensors:
            return []
        return [self._local(key, index, place.tp, self.args.tp)]

    def _key(self, layer: int, name: str) -> tuple[str, tuple[int, ...]]:
        numbered = f"decoder.layers.{layer}.{name}"
        return (numbered, ()) if numbered in self.tensors else (_STACKED + name, (layer,))

    def _experts(self, layer: int, place: Place, order: Order) -> Iterator[Local | Transposed]:
        count = (self.args.experts or 0) // self.args.ep
        held = range(place.ep * count, (place.ep + 1) * count)
        names = [(expert, name) for expert in held for name in _ONE_BY_ONE]
        if order.experts != "one by one":
            names.sort(key=lambda pair: (_ONE_BY_ONE.index(pair[1]), pair[0]))
        found: dict[str, list[Local]] = {}
        for expert, name in names:
            key, index = self._key(layer, _EXPERTS + name)
            if key in self.tensors:
                etp = self.args.etp
                one = self._local(key, (*index, expert), place.tp % etp, etp)
                # Fewer ranks cut experts than cut the rest: the others have copies.
                one = copy_of(one, etp * (place.tp // etp))
                found.setdefault(name if order.experts == "as one" else f"{name} {expert}", []).append(one)
        for alike in found.values():
            yield Transposed(tuple(alike)) if order.experts == "as one" else alike[0]


def _inside(key: str) -> str | None:
    """Name of a layer's tensor without the layer."""
    numbered = _NUMBERED.fullmatch(key)
    if numbered:
        return numbered[2]
    return key.removeprefix(_STACKED) if key.startswith(_STACKED) else None


def is_expert(key: str) -> bool:
    """Whether a tensor is one of routed experts."""
    return ".experts." in key


def is_edge(key: str) -> bool:
    """Whether a tensor is the embedding of words or the head, which stages share where they are tied."""
    return key in (_BEFORE[0], _HEAD)


def is_buffer(key: str) -> bool:
    """Whether a tensor is no parameter: biases that balance experts are set, not trained (moe/router.py)."""
    return key.endswith(tuple(BUFFERS))
