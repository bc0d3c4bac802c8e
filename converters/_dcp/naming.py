"""Keys of a checkpoint and their paths in the nested state dict that a job saves and loads.

``{"model": model_state, "optim": optimizer_state}`` of ``get_state_dict`` (torch/distributed/checkpoint/state_dict.py)
is flattened by joining paths with dots (``_nested_dict.py``). With ``flatten_optimizer_state_dict=True``, which
torchtitan uses, the optimizer's part is flat before, and hyper-parameters are kept per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ucp.errors import UsageError

Path = tuple[str | int, ...]


def joined(path: Path) -> str:
    """The key of a path."""
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True)
class Naming:
    """Where things go: paths of the model's and the optimizer's state, and whether the latter is `flat`."""

    model: Path
    optimizer: Path
    flat: bool = False

    @classmethod
    def of(cls, model: str, optimizer: str, *, flat: bool) -> Naming:
        """From prefixes such as ``model.``; an empty one puts things at the top. UsageError for one that is none."""
        if model == optimizer and model:
            raise UsageError(f"{model!r} cannot be the prefix of model and optimizer", hint="give them one each")
        return cls(_prefix(model), _prefix(optimizer), flat)

    def value(self, name: str) -> Path:
        """Of a parameter or buffer."""
        return (*self.model, name)

    def state(self, name: str, state: str) -> Path:
        """Of an optimizer state or step of a parameter."""
        return self._optimizer("state", name, state)

    def options(self, number: int, names: tuple[str, ...], option: str) -> Iterator[Path]:
        """Of a hyper-parameter of optimizer group `number`, whose parameters are `names`."""
        if not self.flat:
            yield (*self.optimizer, "param_groups", number, option)
        else:
            yield from (self._optimizer("param_groups", name, option) for name in names)

    def _optimizer(self, *path: str) -> Path:
        return (*self.optimizer, ".".join(path)) if self.flat else (*self.optimizer, *path)


def _prefix(prefix: str) -> Path:
    parts = prefix.removesuffix(".").split(".") if prefix else []
    if not all(parts):
        raise UsageError(
            f"{prefix!r} is no prefix of keys", hint="such as 'model.'; an empty one puts things at the top"
        )
    return tuple(parts)
