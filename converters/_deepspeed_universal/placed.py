"""The part of a stored tensor that a rank of a job holds.

Of experts where AutoEP made the layer, which knows its rank (deepspeed/module_inject/auto_ep_layer.py); of a cut tensor
where AutoTP marks it on the parameter, with ``ds_autotp_universal_checkpoint_meta`` and its ``conversion.affine_map``
(deepspeed/module_inject/layers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ucp.errors import FitError
from ucp.lazy import LazyTensor

from .._deepspeed import nodes
from .._deepspeed.affine import from_affine
from .._deepspeed.cuts import Along, merged, side_by_side

if TYPE_CHECKING:
    import torch

_MARK = "ds_autotp_universal_checkpoint_meta"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint, or the indices `cut` of rank `rank` out of it."""

    whole: LazyTensor
    cut: Along | None = None
    rank: int = 0

    def read(self) -> torch.Tensor:
        """The values."""
        import torch

        value: torch.Tensor = self.whole[...]
        if self.cut is None:
            return value
        runs = merged(self.cut.runs[self.rank])
        return torch.cat([value.narrow(self.cut.dim, start, length) for start, length in runs], self.cut.dim)


def stored_for(name: str, tensor: Any, whole: LazyTensor, url: str) -> Stored:
    """What of `whole` belongs into `tensor` of the job; FitError if that is not all and nothing says what."""
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    if whole.shape == shape:
        return Stored(whole)
    mark = getattr(tensor, _MARK, None)
    entry = mark.get("conversion", {}).get("affine_map") if isinstance(mark, Mapping) else None
    if entry is not None:
        ranks = nodes.mapping(entry["ranks"], name)
        shapes = [nodes.shape(ranks[rank]["shard_shape"], name) for rank in sorted(ranks)]
        cut, rank = from_affine(entry, shapes, f"AutoTP's mark on {name}"), _tensor_parallel_rank()
        fits = nodes.shape(entry["logical_shape"], name) == whole.shape and shapes[rank] == shape
        if isinstance(cut, Along) and fits and merged(cut.runs[rank]):
            return Stored(whole, cut, rank)
    raise FitError(f"{name}: has shape {list(shape)} in the job and {list(whole.shape)} in {url}")


def stored_experts(layer: Any, name: str, tensor: Any, whole: LazyTensor, url: str) -> Stored:
    """What of `whole`, all experts of a layer of AutoEP, belongs into `tensor` of the job, which has the rank's own.

    FitError for another number of experts or another shape of each.
    """
    shape, ep = tuple(tensor.shape), int(layer.ep_size)
    if whole.shape != (shape[0] * ep, *shape[1:]):
        raise FitError(f"{name}: has shape {list(shape)} on each of {ep} ranks, and {list(whole.shape)} in {url}")
    return Stored(whole, side_by_side(0, [shape[0]] * ep), int(layer.ep_rank))


def _tensor_parallel_rank() -> int:
    from deepspeed.utils import groups

    return int(groups.get_tensor_model_parallel_rank())
