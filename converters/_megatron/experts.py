"""Experts of ``GroupedMLP``, which are one parameter, as the tensors of single experts that others keep.

megatron/core/transformer/moe/experts.py: ``weight1`` is [hidden, experts x ffn] and ``weight2`` [experts x ffn, hidden]
by name, but in memory expert follows expert, each transposed against a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from ucp.errors import CorruptError
from ucp.plan import Extent

_NAMES = {".experts.weight1": "linear_fc1", ".experts.weight2": "linear_fc2"}


def single(name: str, extent: Extent, *, experts: int) -> Iterator[tuple[str, Extent]]:
    """(name, where it lies) of each of a rank's `experts`, or the tensor itself if it is no ``GroupedMLP``'s.

    CorruptError if it cannot be divided by the number of experts.
    """
    suffix = next((suffix for suffix in _NAMES if name.endswith(suffix)), None)
    if suffix is None:
        yield name, extent
        return
    if not extent.is_contiguous or len(extent.shape) != 2 or not experts or extent.size % experts:
        raise CorruptError(f"{name} of shape {list(extent.shape)} is not that of {experts} experts")
    hidden = extent.shape[0] if suffix.endswith("1") else extent.shape[1]
    ffn = extent.size // experts // hidden
    # [hidden, ffn] of an expert is seen as [ffn, hidden], and the other way round.
    shape, inner = ((ffn, hidden), ffn) if suffix.endswith("1") else ((hidden, ffn), hidden)
    for number in range(experts):
        offset = extent.offset + number * hidden * ffn * extent.itemsize
        one = Extent(extent.object, offset, shape, (1, inner), extent.dtype)
        yield f"{name.removesuffix(suffix)}.experts.local_experts.{number}.{_NAMES[suffix]}.weight", one
