"""What an inert pickle holds beside plain Python values."""

from __future__ import annotations

from ucp.tree import Opaque


class Reference(Opaque):
    """A class, function, enum member or constant that was named and not called, such as ``torch.bfloat16``.

    Equal and hashed by name, so that it can be looked up as a key. `name` of an enum member is ``Class.MEMBER``.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash((self.module, self.name))


class Size(tuple[int, ...]):
    """A ``torch.Size``: a tuple that remembers what it was."""

    __slots__ = ()
