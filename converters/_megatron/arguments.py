"""What a job says of itself: Megatron-LM's arguments, saved as ``args``, and what the shipped programs ask for.

Names of arguments: megatron/training/arguments.py. A ``TransformerConfig`` (megatron/core/transformer) is understood
too, where its names differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ucp.errors import CorruptError, FitError
from ucp.tree import Opaque, Tree

_SIZES = {
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "d": ("kv_channels",),
    "ffn": ("ffn_hidden_size",),
    "ffn_shared": ("moe_shared_expert_intermediate_size",),
    "divisible": ("make_vocab_size_divisible_by",),
}
_MOST = 1 << 22


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments by name; empty where none were saved. `where` names their file in errors."""

    values: Mapping[str, Tree] = field(default_factory=dict)
    where: str = ""

    @classmethod
    def of(cls, tree: Tree, *, where: str) -> Arguments:
        """From a pickled ``argparse.Namespace``, a dict, or None."""
        if isinstance(tree, Opaque):
            tree = tree.state
        if tree is None:
            return cls({}, where)
        if not isinstance(tree, Mapping):
            raise CorruptError(f"{where}: args are a {type(tree).__name__}")
        made = cls({str(name): value for name, value in tree.items()}, where)
        made.check_degrees()
        return made

    def check_degrees(self) -> None:
        """CorruptError for more ranks, chunks or experts than any job has: loops over them would not end."""
        ranks = math.lcm(self.tp, self.etp * self.ep) * self.pp * self.vpp
        if max(ranks, self.experts or 0, self.dp) > _MOST:
            raise CorruptError(
                f"{self.where}: args say tp {self.tp}, pp {self.pp}, vpp {self.vpp}, ep {self.ep}, etp {self.etp}, "
                f"dp {self.dp} and {self.experts or 0} experts, which no job has",
                hint="the file is damaged: copy the folder again",
            )

    def number(self, *names: str) -> int | None:
        """The first of these arguments that is a whole number."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    def truth(self, *names: str) -> bool | None:
        """The first of these arguments that is yes or no."""
        return next((value for name in names if isinstance(value := self.values.get(name), bool)), None)

    def degree(self, *names: str) -> int:
        """A number of ranks or chunks, 1 if not given; CorruptError if it is none."""
        value = self.number(*names)
        if value is not None and value < 1:
            raise CorruptError(f"{self.where}: args say {names[0]} = {value}")
        return value or 1

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks; ``model_parallel_size`` before pipelines came (2020)."""
        return self.degree("tensor_model_parallel_size", "model_parallel_size")

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.degree("pipeline_model_parallel_size")

    @property
    def vpp(self) -> int:
        """Model chunks of a pipeline stage."""
        return self.degree("virtual_pipeline_model_parallel_size") if self.pp > 1 else 1

    @property
    def ep(self) -> int:
        """Expert-parallel ranks."""
        return self.degree("expert_model_parallel_size") if self.experts else 1

    @property
    def etp(self) -> int:
        """Tensor-parallel ranks within experts; those of the rest where not given."""
        return self.degree("expert_tensor_parallel_size") if self.number("expert_tensor_parallel_size") else self.tp

    @property
    def dp(self) -> int:
        """Data-parallel ranks, context-parallel ones counted: they too hold copies."""
        cp = self.degree("context_parallel_size")
        world = self.number("world_size")
        known = self.number("data_parallel_size")
        return known * cp if known else max(1, world // (self.tp * self.pp)) if world else 1

    @property
    def layers(self) -> int | None:
        """Number of transformer layers."""
        return self.number("num_layers", "decoder_num_layers")

    @property
    def experts(self) -> int | None:
        """Number of experts of a layer; None without experts."""
        return self.number("num_experts", "num_moe_experts") or None

    @property
    def local_experts(self) -> int:
        """Experts of one rank."""
        return (self.experts or 0) // self.ep

    @property
    def tied(self) -> bool | None:
        """Whether the head's weights are the embedding's."""
        untied = self.truth("untie_embeddings_and_output_weights")
        return self.truth("share_embeddings_and_output_weights") if untied is None else not untied

    def sizes(self) -> dict[str, int]:
        """The programs' sizes, as far as the arguments tell."""
        found = {size: n for size, names in _SIZES.items() if (n := self.number(*names)) is not None}
        if "heads" in found:
            # Megatron-LM's num_query_groups is 1 and means nothing without --group-query-attention.
            grouped = self.truth("group_query_attention") is not False
            found["groups"] = (self.number("num_query_groups") if grouped else None) or found["heads"]
        if self.experts:
            found["experts"] = self.experts
            ffn = self.number("moe_ffn_hidden_size", "ffn_hidden_size")
            found |= {} if ffn is None else {"ffn_moe": ffn}
        if self.values.get("position_embedding_type") == "learned_absolute":
            positions = self.number("max_position_embeddings")
            found |= {} if positions is None else {"positions": positions}
        return found

    def flags(self) -> dict[str, bool]:
        """The programs' flags, as far as the arguments tell.

        Whether layers are Transformer Engine's is not asked of them: ``transformer_impl`` is set by default, also where
        a job builds its layers by itself.
        """
        told = {
            "swiglu": self.truth("swiglu", "gated_linear_unit"),
            "tied": self.tied,
            "moe": self.experts is not None if self.layers is not None else None,
        }
        return {flag: value for flag, value in told.items() if value is not None}

    def vocab(self, rows: int | None, *, given: int | None = None) -> tuple[int | None, tuple[str, ...]]:
        """Size of the vocabulary without padding, and a remark if it had to be taken to be `rows`, that of the table.

        `given` is what the user says. FitError if either is larger than the table.
        """
        vocab = given or self.number("vocab_size")
        if vocab is None:
            remark = (
                f"{self.where}: the tokenizer's vocabulary is not recorded, so all {rows} rows of the embedding are "
                "kept, padding too; option vocab=N leaves it off"
            )
            return rows, (remark,) if rows else ()
        if rows is not None and vocab > rows:
            who = "the option says" if given else f"{self.where}: args say"
            raise FitError(
                f"{who} vocab{'' if given else '_size'} = {vocab}, but the embedding has {rows} rows",
                hint="give the size of the tokenizer's vocabulary as vocab=N",
            )
        return vocab, ()


def layers_of(args: Arguments) -> dict[tuple[int, int], range]:
    """Layers of each (pipeline stage, model chunk): ``get_num_layers_to_build`` in transformer_block.py.

    FitError for a pipeline layout of the user's own, CorruptError for numbers that do not fit each other.
    """
    total, pp, vpp = args.layers, args.pp, args.vpp
    if total is None:
        raise FitError(f"{args.where}: args do not say num_layers", hint="the checkpoint was saved without its args")
    if args.values.get("pipeline_model_parallel_layout") is not None:
        raise FitError(
            f"{args.where}: which layers a pipeline stage holds was laid out by pipeline_model_parallel_layout",
            hint="save it as fully_reshardable, which records where layers are",
        )
    first = args.number("decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage")
    last = args.number("decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage")
    embedding = bool(args.truth("account_for_embedding_in_pipeline_split"))
    loss = bool(args.truth("account_for_loss_in_pipeline_split"))
    spread = total + embedding + loss if first is None and last is None else total - (first or 0) - (last or 0)
    middle = pp - (first is not None) - (last is not None)
    counts = [spread // middle if middle else 0] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    chunks = {(stage, chunk): counts[stage] // vpp for chunk in range(vpp) for stage in range(pp)}
    chunks[0, 0] -= embedding
    chunks[pp - 1, vpp - 1] -= loss
    if sum(chunks.values()) != total or min(chunks.values()) < 0:
        raise CorruptError(f"{args.where}: args spread {total} layers over {pp} stages of {vpp} chunks unevenly")
    found, start = {}, 0
    for place, count in chunks.items():
        found[place] = range(start, start + count)
        start += count
    return found
