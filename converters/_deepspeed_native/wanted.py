"""What a native checkpoint is to look like: the options of the target, checked, with what the source suggests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.errors import UsageError
from ucp.training import first_rank
from ucp.tree import Tree

STAGES = (1, 2, 3)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's default (deepspeed/runtime/zero/config.py)."""
_MOST_RANKS = 1 << 16
_KNOWN = "stage dtype tag sub_group_size round_robin bf16_optimizer"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The layout of the job that will resume.

    `stage` of ZeRO over `dp` ranks, beside `tp` that cut tensors; `dtype` of the module's own parameters;
    `sub_group_size` in elements per rank (stage 3); `round_robin` as ``round_robin_gradients`` (stages 1 and 2);
    `bf16_optimizer` for the optimizer that DeepSpeed takes under stage 1 with bf16 parameters and fp32 gradients.
    """

    stage: int
    dp: int
    dtype: str
    tag: str
    tp: int = 1
    sub_group_size: int = _SUB_GROUP_SIZE
    round_robin: bool = False
    bf16_optimizer: bool = False


def wanted(catalog: Catalog, layout: Layout | None, options: Mapping[str, Any]) -> Wanted:
    """The options with defaults for what is not given: as the source was, where that is a DeepSpeed checkpoint.

    UsageError for an unknown option or a value that is none.
    """
    unknown = [name for name in options if name not in _KNOWN.split()]
    if unknown:
        raise UsageError(f"deepspeed: unknown option {unknown[0]!r} of the target", hint=f"known: {_KNOWN}")
    layout = layout or Layout()
    zero = zero_options(catalog)
    stage = _number("stage", options.get("stage", _source_stage(catalog)), 1, 3)
    dtype = _dtype(options.get("dtype"), catalog)
    own = catalog.source.detail.get("wrapper") == "BF16_Optimizer" and (stage, dtype) == (1, "bfloat16")
    bf16_optimizer = _is_on("bf16_optimizer", options.get("bf16_optimizer", own))
    if bf16_optimizer and (stage, dtype) != (1, "bfloat16"):
        raise UsageError("deepspeed: BF16_Optimizer is for stage 1 and bf16 parameters")
    asked = bool(zero.get("round_robin_gradients")) and stage < 3 and not bf16_optimizer
    round_robin = _is_on("round_robin", options.get("round_robin", asked))
    if round_robin and (stage == 3 or bf16_optimizer):
        raise UsageError("deepspeed: round_robin is of ZeRO 1 and 2")
    sub_group_size = options.get("sub_group_size", zero.get("sub_group_size", _SUB_GROUP_SIZE))
    return Wanted(
        stage,
        _dp(catalog, layout),
        dtype,
        _tag(options.get("tag"), catalog),
        _number("tp", layout.mesh["tp"], 1, _MOST_RANKS),
        int(_number("sub_group_size", _whole(sub_group_size), 1, 1 << 62)),
        round_robin,
        bf16_optimizer,
    )


def zero_options(catalog: Catalog) -> Mapping[str, Tree]:
    """``zero_optimization`` of the configuration that the source was saved with."""
    config = first_rank(catalog).get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero if isinstance(zero, dict) else {}


def _source_stage(catalog: Catalog) -> int:
    stage = catalog.source.detail.get("zero_stage")
    return stage if isinstance(stage, int) and stage in STAGES else 1


def _dp(catalog: Catalog, layout: Layout) -> int:
    others = [name for name, size in layout.mesh.axes if name not in ("dp", "tp") and size > 1]
    if others:
        raise UsageError(
            f"deepspeed: native folders are written for data and tensor parallelism, not for {' '.join(others)}",
            hint="convert to deepspeed-universal, from which DeepSpeed's pipelines resume",
        )
    named = any(name == "dp" for name, _ in layout.mesh.axes)
    dp = layout.mesh["dp"] if named else catalog.source.mesh["dp"]
    return _number("dp", dp, 1, _MOST_RANKS)


def _dtype(asked: Any, catalog: Catalog) -> str:
    """The dtype of the module's parameters: as asked, or as the source had them, or that of its values."""
    if asked is not None:
        found: str = DTYPES.get(str(asked), str(asked))
        if found not in DTYPES.values():
            raise UsageError(f"deepspeed: dtype is fp32, bf16 or fp16, not {asked!r}")
        return found
    copies = {spec.dtype for spec, _ in catalog.witnesses.values()}
    values = {
        tensor.states["value"].dtype
        for tensor in catalog.tensors.values()
        if tensor.kind == "parameter" and "value" in tensor.states
    }
    for told in (copies, _configured(catalog), {str(catalog.source.detail.get("model_dtype"))}, values):
        if len(told) == 1 and told <= set(DTYPES.values()):
            return next(iter(told))
    return "float32"


def _configured(catalog: Catalog) -> set[str]:
    """The dtypes that the configuration of the source turns on."""
    config = first_rank(catalog).get("ds_config")
    told = {name: config.get(name) for name in DTYPES} if isinstance(config, dict) else {}
    return {DTYPES[name] for name, entry in told.items() if isinstance(entry, dict) and entry.get("enabled") is True}


def _tag(tag: Any, catalog: Catalog) -> str:
    name = str(tag or f"global_step{catalog.step or 0}")
    if "/" in name or name in (".", "..", "latest") or not name.isprintable() or name != name.strip():
        raise UsageError(f"{name!r} is not a tag", hint="a tag is the name of a folder inside the save root")
    return name


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(name: str, value: Any, least: int, most: int) -> int:
    """A number; the command line gives text."""
    if isinstance(value, bool) or not str(value).isdecimal() or not least <= int(value) <= most:
        raise UsageError(f"deepspeed: {name} is a number from {least} to {most}, not {value!r}")
    return int(value)


def _is_on(name: str, value: Any) -> bool:
    known = {"yes": True, "true": True, "no": False, "false": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise UsageError(f"deepspeed: {name} is yes or no, not {value!r}")
    return known[str(value).lower()]
