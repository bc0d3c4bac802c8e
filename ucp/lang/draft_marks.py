"""What names and shapes cannot tell of a tensor, said in comments: fused parts, transposes, padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ucp.lang.draft_known import Known
from ucp.lang.draft_names import Family
from ucp.layout import Shape

_QKV = re.compile(r"qkv|query_key_value|c_attn|in_proj|kv_proj|query_key|key_value", re.IGNORECASE)
_GATED = re.compile(r"gate_up|gate_and_up|fc1(\.|_|$)|h_to_4h|w12|w13|gate_proj_up|wi(\.|$)", re.IGNORECASE)
_VOCAB = re.compile(r"embed|wte|lm_head|output_layer", re.IGNORECASE)


def fused(family: Family, known: Sequence[Known]) -> str | None:
    """Why a tensor may be several in one, or None."""
    best = known[0] if known else None
    if best is not None:
        return f"several tensors in one? {best.where} has: {best.text}" if best.target is None else None
    if _QKV.search(family.words):
        return "query, key and value in one? For example [heads (d + d + d), …] <-> q …, k …, v …"
    if _GATED.search(family.words):
        return "gate and up in one? For example [ffn + ffn, …] <-> gate …, up …"
    return None


def marks(family: Family, shape: Shape | None, known: Sequence[Known], cut: Sequence[str]) -> Iterator[str]:
    """Comments for the rule of `family`, whose whole shape is `shape` and which is `cut` over these axes."""
    best = known[0] if known else None
    parts = fused(family, known)
    if parts is not None:
        yield f"undecided: {parts}"
    elif best is not None and not best.plain:
        yield f"undecided: transposed? {best.where} has: {best.text}"
    rounded = best is None or "_" in best.text.partition("<->")[0]
    if rounded and shape is not None and len(shape) == 2 and cut and _VOCAB.search(family.words):
        yield "undecided: padding? A vocabulary that was rounded up is `(vocab + _)`"
