"""DeepSpeed: save and resume a live engine on any ZeRO stage and any number of ranks, by the calls that a loop has.

>>> from ucp.integrations.deepspeed import attach                                # doctest: +SKIP
>>> engine, *_ = deepspeed.initialize(model=model, config=config)                # doctest: +SKIP
>>> attach(engine)                                                               # doctest: +SKIP
>>> path, client_state = engine.load_checkpoint("run")     # whatever layout saved it    # doctest: +SKIP
>>> engine.save_checkpoint("run", client_state={"epoch": 3})                     # doctest: +SKIP

DeepSpeed's configuration chooses among its own checkpoint engines alone (deepspeed/runtime/checkpoint_engine/utils.py,
``create_checkpoint_engine``), so that `attach` sets ours. `save`, `async_save` and `resume` need no `attach`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine as _CheckpointEngine

from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.errors import CorruptError, UsageError
from ucp.store import Store, open_store
from ucp.train.items import Item, Value
from ucp.train.load import load
from ucp.train.report import LoadReport
from ucp.train.save import SaveHandle, SaveReport
from ucp.train.save import async_save as _async_save
from ucp.train.save import save as _save
from ucp.tree import Opaque, walk

_CLIENT = "client_state"
_LATEST = "latest"
_OWN = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size ds_config "
    "ds_version checkpoint_parallel_dimensions universal_checkpoint_info num_experts ds_autoep_layers".split()
)
"""What DeepSpeed itself puts beside the client's state (deepspeed/runtime/engine.py, ``_common_checkpoint_state``)."""


class Resumed(NamedTuple):
    """What `resume` found: the checkpoint's `url`, what was loaded, and the state that the training script saved."""

    url: str
    report: LoadReport
    client_state: dict[str, Any]


def save(engine: Any, url: str, *, client_state: Mapping[str, Any] | None = None, form: str = "native") -> SaveReport:
    """Save `engine` at `url`, with its counters, schedule and loss scale. Collective; durable when it returns.

    `client_state` holds numbers, text, tensors and containers of them; rank 0's is kept. Raises what `ucp.save` does,
    FitError in the middle of gradient accumulation, and for experts, tensor parallelism and NVMe.
    """
    return _save(_state_of(engine, client_state), url, step=engine.global_steps, form=form)


def async_save(
    engine: Any,
    url: str,
    *,
    client_state: Mapping[str, Any] | None = None,
    form: str = "native",
    on_error: Literal["raise", "warn"] = "raise",
) -> SaveHandle:
    """Save as `save` does, and return as soon as training may go on; ``handle.result()`` waits until it is durable."""
    state = _state_of(engine, client_state)
    return _async_save(state, url, step=engine.global_steps, form=form, on_error=on_error)


def resume(engine: Any, url: str, *, tag: str | None = None, **options: Any) -> Resumed:
    """Load what any readable checkpoint holds into `engine`, whatever saved it. Collective.

    `url` is a checkpoint, or a folder of them as DeepSpeed keeps them, of which `tag` is taken, or the one that
    ``latest`` names. `options` are those of `ucp.load`, whose errors it raises. Counters that the source lacks are made
    of its step; a dynamic loss scale goes on from the source's.
    """
    found = _located(url, tag) or url
    with open_checkpoint(found) as checkpoint:
        report = load(engine, checkpoint, **options)
        return Resumed(found, report, _client_state(checkpoint))


def attach(engine: Any) -> CheckpointEngine:
    """Let ``engine.save_checkpoint`` and ``engine.load_checkpoint`` work through ucp; returns what was set.

    The first saves to the folder of its tag and writes ``latest`` once that is complete. The second loads whatever
    ``ucp`` reads, from any number of ranks, and returns the path and the client's state as DeepSpeed does: twice None
    where there is no ``latest``. UsageError for arguments that ask for a part of the state: that is what
    ``ucp.load(engine, url, ...)`` is for.
    """
    engine.checkpoint_engine = made = CheckpointEngine(engine)
    engine.load_checkpoint = partial(_load_checkpoint, engine)
    return made


class CheckpointEngine(_CheckpointEngine):  # type: ignore[misc]
    """Saves the engine that it belongs to as a whole, when DeepSpeed says that all files were given to it."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.name = type(self).__module__
        self.engine = engine
        self._client: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins."""
        self._client = {}

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Keep what the training script gave; the tensors are read from the engine itself."""
        if "module" in state_dict:
            self._client = {key: value for key, value in state_dict.items() if key not in _OWN}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Not a file of ucp's: UsageError."""
        raise UsageError(f"{path}: ucp keeps no files of single ranks", hint="ucp.integrations.deepspeed.resume loads")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Save everything; DeepSpeed writes ``latest`` afterwards."""
        client, self._client = self._client, {}
        save(self.engine, f"{info.save_dir}/{info.tag}", client_state=client)
        return True


def _load_checkpoint(
    engine: Any,
    load_dir: str,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """The signature of ``DeepSpeedEngine.load_checkpoint``."""
    if load_module_only or custom_load_fn is not None or not (load_optimizer_states and load_lr_scheduler_states):
        raise UsageError(
            "an engine attached to ucp loads everything or nothing here",
            hint="ucp.load(engine, url, ...) selects; ucp.load(module, url) before deepspeed.initialize loads weights",
        )
    url = _located(load_dir, tag)
    if url is None:
        return None, None
    found = resume(engine, url, strict=load_module_strict)
    return found.url, found.client_state


def _state_of(engine: Any, client_state: Mapping[str, Any] | None) -> tuple[Any, ...]:
    if not client_state or engine.global_rank != 0:
        return (engine,)
    item: Item = Value(_CLIENT, dict(client_state))
    return engine, item


def _located(url: str, tag: str | None) -> str | None:
    """The checkpoint that `tag` or ``latest`` names in the folder `url`; None where nothing does."""
    if tag is None:
        store: Store = open_store(url)
        if not store.exists(_LATEST):
            return None
        tag = store.read(_LATEST).decode(errors="replace").strip()
        if not tag or ".." in tag or tag.startswith("/"):
            raise CorruptError(f"{url}: {_LATEST} names {tag[:100]!r}, which is no folder in it", hint="give tag=...")
    return f"{url.rstrip('/')}/{tag}"


def _client_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the training script saved, without objects of classes, which are never built."""
    held = checkpoint.catalog.state.get(_CLIENT)
    if not isinstance(held, dict):
        return {}
    read = checkpoint.read_state(_CLIENT)
    plain = [key for key, value in held.items() if not any(isinstance(node, Opaque) for _, node in walk(value))]
    return {key: read[key] for key in plain if isinstance(read, dict)}
