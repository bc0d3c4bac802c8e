"""What a caller of `ucp.load` allows to differ between source and target, each thing by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ucp.errors import UsageError
from ucp.train.names import selected

Globs = str | Iterable[str]
"""One pattern of names, or several."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What need not fit.

    `new`: names of the target that the source may lack. `ignore`: names of the source that the target may lack.
    `resize`: names of the target to the dim along which the source may have another size. All are patterns.
    """

    new: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    resize: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        new: Globs | None = None,
        ignore: Globs | None = None,
        resize: Mapping[str, int] | None = None,
    ) -> Allowed:
        """As a caller gives them; UsageError for a dim that is no number from 0 on."""
        dims: dict[str, Any] = dict(resize or {})
        for name, dim in dims.items():
            if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
                raise UsageError(f"resize={{{name!r}: {dim!r}}}: a dim is a number from 0 on")
        return cls(_globs(new), _globs(ignore), dims)

    def missing(self, subject: str) -> bool:
        """Whether the source may lack it, a name or a name with a state, ``head.weight[exp_avg]``."""
        return _selected(subject, self.new)

    def unexpected(self, subject: str) -> bool:
        """Whether the target may lack it."""
        return _selected(subject, self.ignore)


def _globs(given: Globs | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _selected(subject: str, patterns: tuple[str, ...]) -> bool:
    return selected(subject, patterns) or selected(subject.partition("[")[0], patterns)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` that are trained, by name: what to save and load of adapters on a frozen base.

    >>> ucp.save({"model": ucp.trainable(model), "optimizer": optimizer}, url)    # doctest: +SKIP
    """
    return {name: own for name, own in module.named_parameters() if own.requires_grad}
