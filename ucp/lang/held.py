"""What a program is bound to: tensors as coordinates of the mesh hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ucp.layout import Shape


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor as one coordinate of the mesh holds it: its name there, local shape and dtype.

    Axes that `coordinate` leaves out are not distinguished: one copy stands for all of them.
    """

    name: str
    shape: Shape
    dtype: str
    coordinate: Mapping[str, int] = field(default_factory=dict)
    state: str = "value"

    def __str__(self) -> str:
        where = " ".join(f"{axis} {index}" for axis, index in self.coordinate.items())
        state = "" if self.state == "value" else f"[{self.state}]"
        return f"{self.name}{state}" + (f" at {where}" if where else "")
