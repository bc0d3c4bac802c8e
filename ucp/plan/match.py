"""Matching: the fragments of a checkpoint against one wanted region, with proof that the region is covered once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from operator import lt

from ucp.errors import FitError
from ucp.layout import FlatRange, as_flat, boxes
from ucp.plan.fragment import Copy, Fragment, Key, TensorSpec, common


@dataclass(frozen=True, slots=True)
class Cover:
    """The fragments of one tensor, checked: together they hold every element exactly once.

    `fragments` are primary copies (replica 0) in row-major order of their first element; `replicas` are the further
    copies, to be compared and not read. `flat` says that every fragment is one flat run, so that lookup is a bisection.
    """

    key: Key
    spec: TensorSpec
    fragments: tuple[Fragment, ...]
    replicas: tuple[Fragment, ...]
    flat: bool

    @classmethod
    def of(cls, key: Key, spec: TensorSpec, fragments: Sequence[Fragment]) -> Cover:
        """Check and sort `fragments`.

        Raises FitError naming the tensor for a fragment outside the shape, a hole, or two primary copies that overlap.
        Further replicas may overlap and need not be whole.
        """
        for fragment in fragments:
            if not fragment.region.within(spec.shape):
                raise FitError(f"{key}: fragment {fragment.region} lies outside shape {list(spec.shape)}")
        primary = tuple(f for f in fragments if f.replica == 0 and f.region.size)
        flats = [f.as_flat(spec.shape) for f in primary]
        if all(f is not None for f in flats):
            ordered = tuple(sorted((f for f in flats if f is not None), key=_flat_start))
            _check_flat(key, spec, ordered)
            flat = True
        else:
            ordered = primary
            _check_boxes(key, spec, ordered)
            flat = False
        return cls(key, spec, ordered, tuple(f for f in fragments if f.replica), flat)

    def copies_into(self, target: Fragment) -> list[Copy]:
        """The copies that fill `target` wholly, in row-major order of their sources."""
        copies: list[Copy] = []
        for fragment in self._near(target):
            copies.extend(common(fragment, target, self.spec.shape))
        return copies

    def replica_copies_into(self, target: Fragment) -> list[list[Copy]]:
        """For each further replica that meets `target`, the copies that bring it there."""
        copies: dict[int, list[Copy]] = {}
        for fragment in self.replicas:
            met = common(fragment, target, self.spec.shape)
            if met:
                copies.setdefault(fragment.replica, []).extend(met)
        return [copies[number] for number in sorted(copies)]

    def _near(self, target: Fragment) -> Sequence[Fragment]:
        wanted = as_flat(target.region, self.spec.shape)
        if not self.flat or wanted is None:
            return self.fragments
        first = max(0, bisect_right(self.fragments, wanted.start, key=_flat_start) - 1)
        last = bisect_right(self.fragments, wanted.stop - 1, key=_flat_start)
        return self.fragments[first:last]


def _flat_start(fragment: Fragment) -> int:
    assert isinstance(fragment.region, FlatRange)
    return fragment.region.start


def _check_flat(key: Key, spec: TensorSpec, ordered: Sequence[Fragment]) -> None:
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


def _check_boxes(key: Key, spec: TensorSpec, fragments: Sequence[Fragment]) -> None:
    """Disjoint boxes inside the shape whose sizes add up to it cover it: no grid needed."""
    cut = [(box.start, box.stop, f) for f in fragments for box in boxes(f.region, spec.shape)]
    dim = max(range(len(spec.shape)), key=lambda d: len({start[d] for start, _, _ in cut}), default=0)
    cut.sort(key=lambda held: held[0][dim : dim + 1])
    for i, (start, stop, fragment) in enumerate(cut):
        for other_start, other_stop, holder in islice(cut, i + 1, None):
            if spec.shape and other_start[dim] >= stop[dim]:
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
