"""Random streams of a rank: Python's, numpy's, torch's on the CPU and the current accelerator, and generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ucp.catalog import Catalog
from ucp.errors import FitError, UsageError
from ucp.lazy import read_tree
from ucp.train.state.item import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.train.state.streams import Choice, chosen
from ucp.training import progress
from ucp.tree import Tree

Generator = torch.Generator | np.random.Generator | random.Random

_PYTHON, _NUMPY, _CPU, _CUDA = "python", "numpy", "cpu", "cuda"
_GLOBAL = (_PYTHON, _NUMPY, _CPU, _CUDA)

_SPELLINGS = {
    "python": "random_state random_rng_state python_rng_state",
    "numpy": "numpy_random_seed np_rng_state numpy_rng_state",
    "cpu": "torch_manual_seed torch_rng_state torch cpu_rng_state",
    "cuda": "torch_cuda_manual_seed cuda_rng_state torch_cuda",
}
"""What others call the same streams: accelerate (accelerate/checkpointing.py) and Megatron-Core
(megatron/training/checkpointing.py, ``get_rng_state``); ours are those of transformers (transformers/trainer.py,
``_save_rng_state``)."""


class Rng:
    """The random streams of this process, as a part of what is saved and loaded: ``{"rng": ucp.Rng()}``.

    Python's ``random``, numpy's legacy generator, torch's CPU generator and, where CUDA is in use, that of the current
    device; and `generators` of your own by name: torch's, numpy's, or ``random.Random``.

    On the layout that saved them, each rank goes on with its own streams. On another one a stream that all ranks shared
    goes on on all; one that differed only along axes of the mesh that kept their sizes goes on by its coordinate
    there; any other starts anew from a seed that is a hash of the saved streams and the new coordinate, which is the
    same whenever the load is repeated. The report says which.
    """

    __slots__ = ("generators",)

    def __init__(self, **generators: Generator) -> None:
        for name in generators:
            if name in _GLOBAL:
                raise UsageError(f"Rng: {name} is the name of a stream of the process", hint="choose another name")
        self.generators = generators

    def states(self) -> dict[str, Any]:
        """The state of each stream by name, as its library gives it; Python's as an array."""
        found = {
            _PYTHON: _of_python(random.getstate()),
            _NUMPY: np.random.get_state(),  # noqa: NPY002  the stream that programs use without asking
            _CPU: torch.get_rng_state(),
        }
        if _has_cuda():
            found[_CUDA] = torch.cuda.get_rng_state()
        return found | {name: _state(one) for name, one in self.generators.items()}

    def checked(self, name: str, state: Any, label: str) -> Any:
        """`state` as `set_states` takes it; FitError where it is none of stream `name`. No stream is changed."""
        if name in (_CPU, _CUDA):
            state = _bytes(state)
        try:
            if name == _PYTHON:
                random.Random().setstate(_as_python(state))
            elif name == _NUMPY:
                np.random.RandomState().set_state(state)
            elif name in (_CPU, _CUDA):
                torch.Generator(name).set_state(state)
            else:
                _set_state(_twin(self.generators[name]), state)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            told = str(error).splitlines()[0]
            raise FitError(f"{label}: what the source has is no state of the stream {name} ({told})") from error
        return state

    def set_states(self, states: Mapping[str, Any]) -> None:
        """Set the streams that `states` has."""
        for name, state in states.items():
            if name == _PYTHON:
                random.setstate(_as_python(state))
            elif name == _NUMPY:
                np.random.set_state(state)  # noqa: NPY002  as above
            elif name == _CPU:
                torch.set_rng_state(_bytes(state))
            elif name == _CUDA:
                torch.cuda.set_rng_state(_bytes(state))
            else:
                _set_state(self.generators[name], state)

    def seeded(self, name: str, seed: int) -> Any:
        """The state of stream `name` when it starts from `seed`, 64 bits."""
        if name == _PYTHON:
            return _of_python(random.Random(seed).getstate())
        if name == _NUMPY:
            return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).get_state()
        if name in (_CPU, _CUDA):
            return torch.Generator(name).manual_seed(seed).get_state()
        return _seeded(self.generators[name], seed)


@dataclass(frozen=True, slots=True)
class Streams(Item):
    """An `Rng` under its name."""

    name: str
    rng: Rng = field(default_factory=Rng)
    per_rank: ClassVar[bool] = True
    last: ClassVar[bool] = True

    def saved(self) -> Tree:
        return tree_of(self.rng.states(), self.name)

    def told(self, catalog: Catalog) -> Tree:
        random_states = progress(catalog).rng if self.name == "rng" else None
        return super(Streams, self).told(catalog) if random_states is None else random_states

    def prepare(self, stored: Mapping[int, Tree], *, world: World) -> Prepared:
        ranks = {rank: _known(read_tree(tree), self.name) for rank, tree in stored.items()}
        own, world = self.rng.states(), world.beside(stored)
        states: dict[str, Any] = {}
        told: dict[str, list[str]] = {}
        for name in own:
            held = {rank: tree[name] for rank, tree in ranks.items() if tree.get(name) is not None}
            choice = chosen(name, held, world) if held else Choice("not in the source, goes on as it is")
            if choice.state is not None:
                states[name] = self.rng.checked(name, choice.state, self.name)
            elif choice.seed is not None:
                states[name] = self.rng.seeded(name, choice.seed)
            if choice.told:
                told.setdefault(choice.told, []).append(name)
        if not states:
            raise FitError(f"{self.name}: the source has none of the streams {', '.join(own)}")
        for name in dict.fromkeys(key for tree in ranks.values() for key, state in tree.items() if state is not None):
            if name not in own:
                told.setdefault("in the source alone", []).append(name)
        notes = [f"{', '.join(names)}: {what}" for what, names in told.items()]
        return Prepared(states, f"{self.name}: {'; '.join(notes)}" if notes else None)

    def install(self, state: Any) -> None:
        self.rng.set_states(state)


def _known(tree: Any, name: str) -> dict[str, Any]:
    """The streams of one rank by our names, whatever they were called."""
    if isinstance(tree, list) and len(tree) == 1:
        tree = tree[0]
    if not isinstance(tree, dict):
        raise FitError(f"{name}: a {type(tree).__name__} in the source is no dict of random streams")
    others = {theirs: ours for ours, spellings in _SPELLINGS.items() for theirs in spellings.split()}
    return {others.get(key, str(key)): state for key, state in tree.items()}


def _has_cuda() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _bytes(state: Any) -> torch.Tensor:
    """Torch's generators' states; frameworks that keep one per device keep them in a list."""
    if isinstance(state, list) and state:
        # One for each device of a process: this process's is that of its current one, or the only one.
        number = torch.cuda.current_device() if len(state) > 1 else 0
        state = state[number] if number < len(state) else None
    if not isinstance(state, torch.Tensor):
        raise FitError(f"a {type(state).__name__} is no state of a generator of torch")
    return state.to("cpu", torch.uint8)


def _of_python(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, np.array(words, np.uint32), gauss


def _as_python(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, tuple(int(word) for word in words), gauss


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return _of_python(generator.getstate())


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(_bytes(state))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(_as_python(state))


def _twin(generator: Generator) -> Generator:
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device)
    if isinstance(generator, np.random.Generator):
        return np.random.Generator(type(generator.bit_generator)())
    return random.Random()


def _seeded(generator: Generator, seed: int) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device).manual_seed(seed).get_state().cpu()
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator)(seed).state
    return _of_python(random.Random(seed).getstate())
