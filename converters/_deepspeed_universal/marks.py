"""What a state's file says, beside the tensor, of how a tensor-parallel job is to cut it.

``load_hp_checkpoint_state`` of deepspeed/checkpoint/universal_checkpoint.py reads ``cat_dim``, ``param_n_sub_params``,
``sub_param_shape`` and ``vocab_tensor``; parameters that AutoTP made know by themselves. The source's
``universal_checkpoint_info`` tells, which also DeepSpeed's own converter goes by (``merge_tp_slices`` of
deepspeed/checkpoint/ds_to_universal.py). It is part of the client state, so it survives in other forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ucp.catalog import Catalog
from ucp.errors import ContentError, FitError
from ucp.layout import Shape
from ucp.tree import Opaque, Tree

from .._deepspeed.info import Info, info_of, read_info
from .._deepspeed.subparams import whole_view

SHAPE_CLASS = "deepspeed.checkpoint.universal_checkpoint.SubparamShape"


class Marks:
    """The marks of every parameter of `catalog`; none where the source says nothing or nothing that is known."""

    def __init__(self, catalog: Catalog) -> None:
        self._info: Info | None = None
        self._problem: str | None = None
        try:
            told = info_of(catalog.state)
            if isinstance(told, Mapping):
                self._info = read_info(told, "universal_checkpoint_info")
        except (ContentError, FitError) as error:
            self._problem = error.message

    def of(self, name: str, shape: Shape) -> dict[str, Tree]:
        """Entries beside ``param`` for the parameter `name` of `shape`."""
        found: dict[str, Tree] = {"cat_dim": 0}
        if self._info is None:
            return found
        self._info.ask(name)
        if self._info.is_cut_by_rows(name) and len(shape) > 1:
            found["cat_dim"] = 1
        if self._info.is_halved(name):
            found["param_n_sub_params"] = 2
        elif (view := self._view(self._info, name, shape)) is not None:
            found["sub_param_shape"] = view
        if self._info.is_vocabulary(name) and len(shape) == 2:
            found["vocab_tensor"] = True
        return found

    def _view(self, info: Info, name: str, shape: Shape) -> Opaque | None:
        """DeepSpeed's ``SubparamShape`` of the whole parameter."""
        declared = info.declaration(name)
        if declared is None:
            return None
        pattern, declaration = declared
        try:
            view = whole_view(declaration, name, shape, info.widths.get(pattern))
        except (ContentError, FitError) as error:
            self._problem = error.message
            return None
        module, _, called = SHAPE_CLASS.rpartition(".")
        return Opaque(module, called, state={"patterns": [pattern], "shape": view, "partition_dim": declaration.dim})

    def notes(self, catalog: Catalog) -> Iterator[str]:
        """Remarks on jobs that cannot go by the marks."""
        if self._problem is not None:
            yield f"resume without tensor parallelism, or under AutoTP: {self._problem}"
        elif self._info is None and catalog.source.mesh["tp"] > 1:
            yield (
                "there is no universal_checkpoint_info, so the folder does not say how parameters are cut: resume "
                "without tensor parallelism, or under AutoTP"
            )
        elif self._info is not None and self._info.is_of_other_names:
            yield (
                "universal_checkpoint_info speaks of other names than these, so the folder does not say how parameters "
                "are cut: resume without tensor parallelism, or under AutoTP"
            )
        elif self._info is not None and self._info.is_silent_on_rows and catalog.source.mesh["tp"] == 1:
            yield (
                "the source was not tensor parallel, and its universal_checkpoint_info does not say which weights are "
                "cut along their input: a job of Megatron's layers must resume it with tensor parallelism of degree 1"
            )
