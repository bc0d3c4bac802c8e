"""Matching: the fragments of a checkpoint against one wanted region, with proof that the region is covered once."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from operator import lt
from typing import Literal

from ucp.errors import FitError
from ucp.layout import FlatRange, Shape, boxes, ravel
from ucp.layout.block import View
from ucp.plan.fragment import Copy, Fragment, Key, TensorSpec, common
from ucp.plan.views import refined, refinement, spelled_out

Reduction = Literal["mean", "sum"]
"""What makes one tensor of several terms: copies that ranks hold and that are not equal."""


@dataclass(frozen=True, slots=True)
class Cover:
    """The fragments of one tensor, checked: together they hold every element exactly once.

    Boxes are in the coordinates of `view`. `fragments` are primary copies (replica 0) in row-major order of their first
    element; `replicas` are the further copies, to be compared and not read. `ends[i]` is one past the last position
    that fragments up to `i` reach.

    With `reduce` the tensor is the mean or the sum of `terms`, each a cover of its own, in this order; then `fragments`
    and `replicas` are those of all terms, and cannot be copied from.
    """

    key: Key
    spec: TensorSpec
    view: View
    fragments: tuple[Fragment, ...]
    replicas: tuple[Fragment, ...]
    ends: tuple[int, ...]
    reduce: Reduction | None = None
    terms: tuple[Cover, ...] = ()

    @classmethod
    def of(
        cls,
        key: Key,
        spec: TensorSpec,
        fragments: Sequence[Fragment],
        *,
        view: View | None = None,
        reduce: Reduction | None = None,
    ) -> Cover:
        """Check and sort `fragments`, whose boxes are in the coordinates of `view` (default: the tensor's dims).

        Raises FitError naming the tensor for a fragment outside the shape, a hole, or two primary copies that overlap.
        Further replicas may overlap and need not be whole. With `reduce` all this holds for each of the terms.
        """
        view = view or View.plain(spec.shape)
        if view.tensor != spec.shape:
            raise FitError(f"{key}: view {view.factors} is not one of shape {list(spec.shape)}")
        if reduce is not None:
            return cls._of_terms(key, spec, fragments, view, reduce)
        shape = view.shape
        for fragment in fragments:
            if not fragment.region.within(shape):
                raise FitError(f"{key}: fragment {fragment.region} lies outside shape {list(shape)}")
        primary = [f for f in fragments if f.replica == 0 and f.region.size]
        flats = [flat for f in primary if (flat := f.as_flat(shape)) is not None]
        whole = len(flats) == len(primary)
        placed = sorted(((*_bounds(f, shape), f) for f in (flats if whole else primary)), key=lambda held: held[0])
        ordered = tuple(fragment for _, _, fragment in placed)
        (_check_flat if whole else _check_boxes)(key, spec, shape, ordered)
        ends = tuple(accumulate((stop for _, stop, _ in placed), max))
        return cls(key, spec, view, ordered, tuple(f for f in fragments if f.replica), ends)

    @classmethod
    def _of_terms(
        cls, key: Key, spec: TensorSpec, fragments: Sequence[Fragment], view: View, reduce: Reduction
    ) -> Cover:
        by_term: dict[int, list[Fragment]] = {}
        for fragment in fragments:
            by_term.setdefault(fragment.term, []).append(fragment)
        terms = []
        for number in sorted(by_term):
            dtypes = {fragment.extent.dtype for fragment in by_term[number]}
            own = TensorSpec(spec.shape, dtypes.pop()) if len(dtypes) == 1 else spec
            terms.append(cls.of(key, own, by_term[number], view=view))
        held = tuple(f for term in terms for f in term.fragments)
        return cls(key, spec, view, held, tuple(f for term in terms for f in term.replicas), (), reduce, tuple(terms))

    @property
    def sources(self) -> tuple[Cover, ...]:
        """What can be copied from: the terms of a reduction, else the cover itself."""
        return self.terms or (self,)

    def copies_into(self, target: Fragment, view: View | None = None) -> list[Copy]:
        """The copies that fill `target` wholly, in row-major order of their sources.

        A target that is a box is in the coordinates of `view` (default: the tensor's dims).
        """
        copies: list[Copy] = []
        for part, fine in self._parts(target, view):
            for fragment in self._near(part, fine.shape):
                for held in refined(fragment, self.view, fine):
                    copies.extend(common(held, part, fine.shape))
        return copies

    def replica_copies_into(self, target: Fragment, view: View | None = None) -> list[list[Copy]]:
        """For each further replica that meets `target`, the copies that bring it there."""
        copies: dict[int, list[Copy]] = {}
        for part, fine in self._parts(target, view):
            for fragment in self.replicas:
                met = [copy for held in refined(fragment, self.view, fine) for copy in common(held, part, fine.shape)]
                if met:
                    copies.setdefault(fragment.replica, []).extend(met)
        return [copies[number] for number in sorted(copies)]

    def _parts(self, target: Fragment, view: View | None) -> Iterator[tuple[Fragment, View]]:
        """`target` as fragments in a view that refines ours, with that view."""
        assert self.reduce is None, "the terms of a reduction are copied one by one"
        view = view or View.plain(self.spec.shape)
        target = target.as_flat(view.shape) or target
        if isinstance(target.region, FlatRange):
            yield target, self.view
            return
        fine = refinement(self.view, view)
        parts = [target] if fine else spelled_out(target, view)
        if fine is None:
            fine, view = self.view, View.plain(self.spec.shape)
        for part in parts:
            yield from ((box, fine) for box in refined(part, view, fine))

    def _near(self, target: Fragment, shape: Shape) -> Sequence[Fragment]:
        """Fragments that may meet `target`, a region of a view of `shape`."""
        start, stop = _bounds(target, shape)
        own = self.view.shape
        first = bisect_right(self.ends, start)
        last = bisect_left(self.fragments, stop, key=lambda fragment: _bounds(fragment, own)[0])
        return self.fragments[first:last]


def _bounds(fragment: Fragment, shape: Shape) -> tuple[int, int]:
    """Row-major position of the first element, and one past that of the last; equal for an empty region."""
    region = fragment.region
    if isinstance(region, FlatRange):
        return region.start, region.stop
    first = ravel(region.start, shape)
    return first, ravel(tuple(a - 1 for a in region.stop), shape) + 1 if region.size else first


def _check_flat(key: Key, spec: TensorSpec, _: Shape, ordered: Sequence[Fragment]) -> None:
    end = 0
    for fragment in ordered:
        assert isinstance(fragment.region, FlatRange)
        if fragment.region.start < end:
            raise FitError(
                f"{key}: elements {fragment.region.start}..{end} are stored twice, last in {fragment.extent.object}"
            )
        if fragment.region.start > end:
            raise _hole(key, end, fragment.region.start)
        end = fragment.region.stop
    if end != spec.size:
        raise _hole(key, end, spec.size)


def _hole(key: Key, start: int, stop: int) -> FitError:
    return FitError(
        f"{key}: elements {start}..{stop} are in no fragment",
        hint="a rank's file is missing, or the checkpoint's metadata describes another layout",
    )


def _check_boxes(key: Key, spec: TensorSpec, shape: Shape, fragments: Sequence[Fragment]) -> None:
    """Disjoint boxes inside the shape whose sizes add up to it cover it: no grid needed."""
    cut = [(box.start, box.stop, f) for f in fragments for box in boxes(f.region, shape)]
    dim = max(range(len(shape)), key=lambda d: len({start[d] for start, _, _ in cut}), default=0)
    cut.sort(key=lambda held: held[0][dim : dim + 1])
    for i, (start, stop, fragment) in enumerate(cut):
        for other_start, other_stop, holder in islice(cut, i + 1, None):
            if shape and other_start[dim] >= stop[dim]:
                break
            if all(map(lt, start, other_stop)) and all(map(lt, other_start, stop)):
                names = f"{fragment.extent.object} and {holder.extent.object}"
                raise FitError(f"{key}: {fragment.region} and {holder.region} overlap, in {names}")
    held = sum(fragment.region.size for fragment in fragments)
    if held != spec.size:
        raise FitError(
            f"{key}: fragments hold {held} of {spec.size} elements",
            hint="a rank's file is missing, or the checkpoint's metadata describes another layout",
        )
