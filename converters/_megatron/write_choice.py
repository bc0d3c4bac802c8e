"""What is to be written: ranks of each axis, program, sizes and flags, kind of optimizer, dtype of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from ucp.catalog import Catalog, Tensor
from ucp.converter import Layout
from ucp.errors import FitError, UsageError
from ucp.lang import Program, load_program
from ucp.lang.ast import Flags, Sizes
from ucp.layout.dtypes import ITEMSIZE
from ucp.mapping import is_logical

from .._programs import PROGRAMS, from_config
from .arguments import Arguments

FAMILY = "megatron"
AXES = ("pp", "vpp", "tp", "dp", "ep", "etp")
"""Axes of ``--mesh``. Ranks along dp hold copies: they make no difference to the files."""

Form = Literal["torch_dist", "legacy"]
Optimizer = Literal["distributed", "float16", "fp32", "none"]
MOMENTS = ("exp_avg", "exp_avg_sq")
_DIVISIBLE = 128
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_BIASES_OF_EXPERTS = ".expert_bias"
"""Balance the experts. They are set and not trained, and kept in fp32 (megatron/core/transformer/moe/router.py)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a catalog of logical tensors is written.

    `degrees` are the ranks along each axis. `dtype` is that of the model's weights, None for each tensor's own.
    `divisible` is Megatron's ``make_vocab_size_divisible_by``. `alike`: all layers have the same tensors. `each`: keys
    of a torch_dist checkpoint name the layer; else layers are stacked.
    """

    form: Form
    degrees: Mapping[str, int]
    program: Program
    config: Mapping[str, int]
    sizes: Mapping[str, int]
    flags: Mapping[str, bool]
    optimizer: Optimizer
    dtype: str | None
    divisible: int
    alike: bool
    each: bool
    moe: bool
    te: bool
    stages: tuple[int, ...]
    """Layers of each pipeline stage, where they are said; empty where all have as many."""

    args: Arguments

    def known(self, program: Program) -> dict[str, bool]:
        """The flags that `program` has."""
        return {flag: value for flag, value in self.flags.items() if flag in _declared(program, Flags)}

    def weight_dtype(self, name: str, own: str) -> str:
        """The dtype in which the model keeps the value of `name`, which the source keeps in `own`."""
        floating = own in ("float64", "float32", "float16", "bfloat16")
        return self.dtype if self.dtype and floating and not name.endswith(_BIASES_OF_EXPERTS) else own


def is_trained(tensor: Tensor) -> bool:
    """Whether optimizers of Megatron-Core have states of it."""
    return tensor.kind == "parameter" and not tensor.name.endswith(_BIASES_OF_EXPERTS)


def choose(
    catalog: Catalog,
    layout: Layout,
    *,
    form: str,
    optimizer: str | None,
    dtype: str | None,
    layers: str,
    stages: str | None,
) -> Choice:
    """Settle what the options and the source leave open.

    UsageError for options that are none, and for a catalog whose names are not logical ones.
    """
    _check_logical(catalog)
    if form not in ("torch_dist", "legacy"):
        raise UsageError(f"{FAMILY}: form is torch_dist or legacy, not {form!r}")
    if layers not in ("stacked", "each"):
        raise UsageError(f"{FAMILY}: layers is stacked or each, not {layers!r}")
    args = Arguments.of(catalog.state.get("args"), where="args")
    degrees, alike = _degrees(layout), _alike(catalog)
    moe = any(".moe." in name for name in catalog.tensors)
    each = form == "torch_dist" and (layers == "each" or not alike)
    program = layout.program or load_program(_program(form, moe=moe, each=each))
    _check_axes(degrees, moe=moe, form=form)
    told = _told(catalog, args)
    flags = _flags(catalog, layout, args)
    if moe and form == "legacy" and flags["grouped"] and not flags["te"]:
        raise UsageError(
            f"{FAMILY}: experts of Megatron-Core's own GroupedMLP are not written in the legacy form",
            hint="write form=torch_dist, which is the same for all kinds of experts, or give --to-flag grouped=no",
        )
    divisible = layout.sizes.get("divisible") or told.get("divisible") or _DIVISIBLE
    if form == "torch_dist":
        # Files hold the whole table, padded for the ranks that will cut it.
        sizes = {**layout.sizes, "divisible": divisible * degrees["tp"]}
    else:
        sizes = {**layout.sizes, "divisible": divisible}
    chosen = _optimizer(catalog, optimizer, args)
    return Choice(
        cast("Form", form),
        degrees,
        program,
        {size: n for size, n in told.items() if size not in ("divisible", "vocab")},
        {size: n for size, n in sizes.items() if size in _declared(program, Sizes)},
        flags,
        chosen,
        _dtype(catalog, dtype, chosen, args),
        divisible,
        alike,
        each,
        moe,
        flags["te"],
        _stages(catalog, stages, degrees, form),
        args,
    )


def _check_logical(catalog: Catalog) -> None:
    if is_logical(catalog):
        return
    raise UsageError(
        f"{FAMILY}: the tensors of {catalog.url} have the source's own names, of which Megatron's cannot be made",
        hint=f"give the program that fits them, such as --program {PROGRAMS['llama']}; `ucp spec list` shows them",
    )


def _degrees(layout: Layout) -> dict[str, int]:
    asked = dict(layout.mesh.axes)
    for axis in asked:
        if axis not in AXES:
            raise UsageError(f"{FAMILY}: no mesh axis {axis!r}", hint=f"axes are {' '.join(AXES)}")
    found = {axis: asked.get(axis, 1) for axis in AXES}
    found["etp"] = asked.get("etp", found["tp"])
    return found


def _check_axes(degrees: Mapping[str, int], *, moe: bool, form: str) -> None:
    if not moe and degrees["ep"] > 1:
        raise UsageError(f"{FAMILY}: ep={degrees['ep']}, but the model has no experts")
    if degrees["vpp"] > 1 and degrees["pp"] == 1:
        raise UsageError(
            f"{FAMILY}: vpp={degrees['vpp']} interleaves pipeline stages, and there is one", hint="give pp"
        )
    if moe and form == "legacy" and degrees["etp"] != degrees["tp"]:
        raise UsageError(
            f"{FAMILY}: the legacy form names files by tp, pp and ep, so that etp must be tp",
            hint="write form=torch_dist, which every etp loads",
        )


def _stages(catalog: Catalog, asked: str | None, degrees: Mapping[str, int], form: str) -> tuple[int, ...]:
    """Layers of each stage as Megatron-LM can have them: another number in the first, in the last, or in both."""
    if asked is None:
        return ()
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in asked.split(",")]
    layers = 1 + max((int(match[1]) for name in catalog.tensors if (match := _LAYER.match(name))), default=-1)
    if form != "legacy" or degrees["vpp"] > 1:
        raise UsageError(f"{FAMILY}: stages is for form=legacy without vpp", hint="leave it out: torch_dist needs none")
    if len(numbers) != degrees["pp"] or sum(numbers) != layers or min(numbers) < 1:
        raise UsageError(f"{FAMILY}: stages={asked} is not {layers} layers in {degrees['pp']} stages")
    if len(set(numbers[1:-1])) > 1:
        raise UsageError(f"{FAMILY}: stages={asked}: those between the first and the last have as many layers each")
    return tuple(numbers)


def _alike(catalog: Catalog) -> bool:
    """Whether all layers have tensors of the same names and shapes."""
    layers: dict[str, set[tuple[str, object]]] = {}
    for name, tensor in catalog.tensors.items():
        if match := _LAYER.match(name):
            layers.setdefault(match[1], set()).add((match[2], tensor.states["value"].shape))
    return len(set(map(frozenset, layers.values()))) <= 1


def _program(form: str, *, moe: bool, each: bool) -> str:
    if form == "legacy":
        return "megatron_core_moe" if moe else "megatron_core_gpt"
    return "megatron_core_layers" if each else "megatron_core_stacked"


def _declared(program: Program, kind: type[Sizes | Flags]) -> set[str]:
    return {name for one in program.statements if isinstance(one, kind) for name in one.names}


def _told(catalog: Catalog, args: Arguments) -> dict[str, int]:
    """Sizes that the source knows beside the shapes of its tensors: of its configuration, then of its own program."""
    found = dict(catalog.program.sizes) if catalog.program else {}
    config = catalog.state.get("hf_config")
    if isinstance(config, dict) and config.get("model_type") in PROGRAMS:
        found |= from_config(config).sizes
    return {**{size: n for size, n in found.items() if size != "divisible"}, **args.sizes()}


def _flags(catalog: Catalog, layout: Layout, args: Arguments) -> dict[str, bool]:
    kind = args.values.get("transformer_impl")
    told = {"te": kind == "transformer_engine"} if isinstance(kind, str) else {}
    if told.get("te", True) and args.truth("moe_grouped_gemm") is not None:
        told["grouped"] = bool(args.truth("moe_grouped_gemm"))
    return {
        "tied": "lm_head.weight" not in catalog.tensors,
        "moe": any(".moe." in name for name in catalog.tensors),
        "te": True,
        "grouped": False,
        **told,
        **layout.flags,
    }


def _optimizer(catalog: Catalog, asked: str | None, args: Arguments) -> Optimizer:
    if asked not in (None, "distributed", "float16", "fp32", "none"):
        raise UsageError(f"{FAMILY}: optimizer is distributed, float16, fp32 or none, not {asked!r}")
    trained = [tensor for tensor in catalog.tensors.values() if is_trained(tensor)]
    with_moments = [tensor for tensor in trained if set(MOMENTS) <= tensor.states.keys()]
    if asked == "none" or (asked is None and not with_moments):
        return "none"
    for tensor in trained:
        if not set(MOMENTS) <= tensor.states.keys():
            lacks = next(state for state in MOMENTS if state not in tensor.states)
            raise FitError(
                tensor.lacks(lacks, catalog.url).message,
                hint="Megatron-Core loads states of all parameters or none: write weights alone with optimizer=none",
            )
    if asked is not None:
        return cast("Optimizer", asked)
    if args.truth("use_distributed_optimizer") is not False:
        return "distributed"
    return "float16" if args.truth("bf16") or args.truth("fp16") else "fp32"


def _dtype(catalog: Catalog, asked: str | None, optimizer: Optimizer, args: Arguments) -> str | None:
    """The dtype that is asked for; else that of the source's own working copy; else each tensor's own."""
    if asked is not None:
        known = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(asked, asked)
        if known not in ITEMSIZE or known not in ("float32", "float16", "bfloat16"):
            raise UsageError(f"{FAMILY}: dtype is float32, float16 or bfloat16, not {asked!r}")
        if optimizer == "fp32" and known != "float32":
            raise UsageError(f"{FAMILY}: optimizer=fp32 trains the model's own weights, so that dtype is float32")
        return known
    if optimizer == "none":
        return None
    if optimizer == "fp32":
        return "float32"
    said = "bfloat16" if args.truth("bf16") else "float16" if args.truth("fp16") else None
    copies = {spec.dtype for spec, _ in catalog.witnesses.values()}
    return said or (copies.pop() if len(copies) == 1 else "float32" if optimizer == "distributed" else "bfloat16")
