"""A catalog as Megatron-LM's own files: a folder for each model-parallel rank, for exactly these ranks.

megatron/training/checkpointing.py: ``get_checkpoint_name``, ``generate_state_dict``. What optimizers put in it is
``state_dict`` of FP32Optimizer and Float16OptimizerWithFloat16Params (megatron/core/optimizer/optimizer.py); the
distributed one keeps states in a file of their own, ``distrib_optim.pt`` (``get_parameter_state_dp_zero``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ucp.catalog import Catalog, ParamGroup
from ucp.container.values import Reference
from ucp.converter import Sharded
from ucp.errors import FitError
from ucp.plan import Cover, Digests, Task
from ucp.tree import Tree

from .._deepspeed_universal.carry import CLASSES, inlined
from .folder import MODEL, PARAMETERS
from .write_around import Around, group_trees, split, step_leaf
from .write_buffer import laid
from .write_choice import FAMILY, MOMENTS, is_trained
from .write_order import is_expert, place
from .write_slots import Slots

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_EXACT = "float32"

Held = tuple[Catalog, str]
"""A parameter: the model chunk that has it, and its name there."""


@dataclass(frozen=True)
class LegacyTarget:
    """A legacy checkpoint in a root of its own, to be written."""

    around: Around
    tasks: tuple[Task, ...]
    losses: tuple[str, ...]
    notes: tuple[str, ...]
    family: str = FAMILY

    @property
    def root(self) -> str:
        """The tracker file."""
        return self.around.tracker[0]

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """The tracker file, which makes the folder a checkpoint."""
        del digests
        yield self.around.tracker


def make_legacy(around: Around, held: Sharded, *, losses: tuple[str, ...]) -> LegacyTarget:
    """Lay out what each rank holds. FitError for a tensor whose place among a rank's modules is not known."""
    ranks: dict[tuple[int, int, int], list[Catalog]] = {}
    for at, part in held.parts:
        ranks.setdefault((at["tp"], at["pp"], at.get("ep", 0)), []).append(part)
    tasks = [task for at, chunks in ranks.items() for task in _Rank(around, at, chunks).tasks()]
    notes = around.notes
    if not around.rng:
        notes = (*notes, "no random states of these ranks: start the job with --no-load-rng")
    return LegacyTarget(around, tuple(tasks), (*around.losses, *losses), notes)


@dataclass(frozen=True)
class _Rank:
    """One model-parallel rank: its place along tp, pp and ep, and its model chunks."""

    around: Around
    at: tuple[int, int, int]
    chunks: Sequence[Catalog]

    def tasks(self) -> Iterator[Task]:
        """Its files."""
        slots, choice = Slots(), self.around.choice
        tree = {**inlined(dict(self.around.common), self.around.store), **dict(self._models(slots))}
        rng = self.around.rng.get((self.at[1], self.at[0]))
        if rng is not None:
            tree["rng_state"] = inlined(rng, self.around.store)
        if choice.optimizer != "none":
            each = [self._optimizer(groups, held, slots) for groups, held in self._optimizers()]
            tree["optimizer"] = each if self._chained else each[0]
        yield slots.task(f"{self._folder}/{MODEL}", tree, classes=CLASSES)
        if choice.optimizer == "distributed":
            slots = Slots()
            states = [self._buffers(held, slots, number) for number, (_, held) in enumerate(self._optimizers())]
            yield slots.task(f"{self._folder}/{PARAMETERS}", states if self._chained else states[0], classes=CLASSES)

    @property
    def _folder(self) -> str:
        tp, pp, ep = self.at
        degrees = self.around.choice.degrees
        stage = f"_{pp:03d}" if degrees["pp"] > 1 else ""
        expert = f"_{ep:03d}" if degrees["ep"] > 1 else ""
        return f"{self.around.folder}mp_rank_{tp:02d}{stage}{expert}"

    @property
    def _chained(self) -> bool:
        return self.around.choice.moe and self.around.choice.degrees["ep"] > 1

    def _models(self, slots: Slots) -> Iterator[tuple[str, Tree]]:
        several = self.around.choice.degrees["vpp"] > 1
        for number, chunk in enumerate(self.chunks):
            yield f"model{number}" if several else "model", self._model(chunk, slots)

    def _model(self, chunk: Catalog, slots: Slots) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        for name in _ordered(chunk):
            cover = chunk.cover(name, "value")
            dtype = self.around.choice.weight_dtype(name, cover.spec.dtype)
            found[name] = slots.tensor(cover, dtype=dtype, witness=chunk.witness(name))
            module, _, last = name.rpartition(".")
            if last == "weight" and module.rpartition(".")[2].startswith(("linear_", "output_layer")):
                # What Megatron-Core's linear layers have for Transformer Engine's sake.
                found[f"{module}._extra_state"] = None
                if self.around.choice.te and module.endswith("linear_proj"):
                    found[module.replace("linear_proj", "core_attention._extra_state")] = None
        return found

    def _optimizers(self) -> list[tuple[list[ParamGroup], list[Held]]]:
        """Groups and parameters of each optimizer."""
        held = [(chunk, name) for chunk in self.chunks for name in _ordered(chunk) if is_trained(chunk.tensors[name])]
        groups = split(self.around.groups, chained=self._chained)
        if not self._chained:
            return [(groups[0], held)]
        return [
            (of, [one for one in held if is_expert(one[1]) is expert])
            for of, expert in zip(groups, (False, True), strict=True)
        ]

    def _optimizer(self, groups: list[ParamGroup], held: list[Held], slots: Slots) -> dict[str, Tree]:
        kind = self.around.choice.optimizer
        if kind == "distributed":
            return {"optimizer": {"param_groups": group_trees(groups, step=True)}, **self.around.scaler()}
        members = [[one for one in held if _same_group(one, group)] for group in groups]
        inner = self._inner(groups, members, slots)
        if kind == "fp32":
            return inner
        masters = [[slots.tensor(_cover(one, "value"), dtype=_EXACT) for one in of] for of in members]
        return {"optimizer": inner, **self.around.scaler(), "fp32_from_fp16_params": masters}

    def _inner(self, groups: list[ParamGroup], members: list[list[Held]], slots: Slots) -> dict[str, Tree]:
        """What torch's own optimizer saves: states by number, numbers of each group."""
        assert self.around.step is not None
        states: dict[int, Tree] = {}
        numbers: list[list[int]] = []
        for of in members:
            numbers.append(list(range(len(states), len(states) + len(of))))
            for one in of:
                moments = {state: slots.tensor(_cover(one, state), dtype=_EXACT) for state in MOMENTS}
                states[len(states)] = {"step": step_leaf(self.around.step), **moments}
        trees = group_trees(groups, step=False)
        listed = [{**tree, "params": of} for tree, of in zip(trees, numbers, strict=True)]
        return {"state": states, "param_groups": listed}

    def _buffers(self, held: list[Held], slots: Slots, optimizer: int) -> dict[object, Tree] | None:
        """The flat buffers of the distributed optimizer, by number of the model chunk.

        The first rank of a data-parallel group writes them. Experts have groups of their own; for the rest, ranks with
        other experts are further members of one group.
        """
        if optimizer == 0 and self.at[2] > 0:
            return None
        found: dict[object, Tree] = {"buckets_coalesced": True}
        number = 0
        for chunk in self.chunks:
            mine = [one for one in held if one[0] is chunk]
            if mine:
                found[number] = {self._dtypes(): self._buffer(mine, slots)}
                number += 1
        return found

    def _buffer(self, held: list[Held], slots: Slots) -> dict[str, Tree]:
        sizes = [_cover(one, "value").spec.size for one in held]
        places, length = laid(sizes, [self._shared(name) for _, name in held])
        order = sorted(range(len(held)), key=places.__getitem__)
        made: dict[str, Tree] = {}
        for key, state in (("param", "value"), *((state, state) for state in MOMENTS)):
            covers = [(places[i], _cover(held[i], state)) for i in order]
            made[key] = slots.flat(covers, length, dtype=_EXACT)
        return {**made, "numel_unpadded": length}

    def _shared(self, name: str) -> bool:
        """Whether it is the table that the first and the last stage share."""
        tied = "lm_head.weight" not in self.around.catalog.tensors
        return tied and self.around.choice.degrees["pp"] > 1 and name in (_EMBEDDING, _HEAD)

    def _dtypes(self) -> tuple[Reference, Reference]:
        """Those of weights and of gradients, which fp16 jobs keep in fp16 if not told otherwise."""
        choice = self.around.choice
        weights = choice.dtype or _EXACT
        exact = choice.args.truth("accumulate_allreduce_grads_in_fp32")
        exact = weights != "float16" if exact is None else exact or weights == "bfloat16"
        return Reference("torch", weights), Reference("torch", _EXACT if exact else weights)


def _same_group(one: Held, group: ParamGroup) -> bool:
    chunk, name = one
    return any(name in own.params and dict(own.options) == dict(group.options) for own in chunk.param_groups)


def _cover(one: Held, state: str) -> Cover:
    chunk, name = one
    return chunk.cover(name, state)


def _ordered(chunk: Catalog) -> list[str]:
    """Names in the order in which modules register them."""
    places = {name: place(name) for name in chunk.tensors}
    for name, at in places.items():
        if at is None:
            raise FitError(
                f"{name}: its place among the modules of a rank is not known, and optimizers go by that",
                hint="write form=torch_dist, or the weights alone with optimizer=none",
            )
    return sorted(places, key=lambda name: places[name] or ())
