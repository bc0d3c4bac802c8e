"""Counters and the loss scale: what other frameworks' checkpoints tell of them, without a DeepSpeed job."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ucp.catalog import Catalog, Source
from ucp.errors import FitError
from ucp.layout import Mesh
from ucp.train.frameworks.deepspeed_items import Counter, LossScale, items_of
from ucp.train.items import World
from ucp.tree import Opaque, Tree

WORLD = World(0, 1, 1, same_layout=True)


def engine(*, accumulation: int = 2, micro_steps: int = 0, scaler: Any = None, fp16: bool = False) -> Any:
    return SimpleNamespace(
        global_steps=0,
        skipped_steps=0,
        global_samples=0,
        micro_steps=micro_steps,
        pipeline_parallelism=False,
        optimizer=SimpleNamespace(loss_scaler=scaler),
        fp16_enabled=lambda: fp16,
        gradient_accumulation_steps=lambda: accumulation,
        train_batch_size=lambda: 12,
    )


def dynamic(scale: float = 65536.0) -> Any:
    return SimpleNamespace(
        dynamic=True,
        cur_scale=scale,
        cur_iter=0,
        last_overflow_iter=-1,
        cur_hysteresis=2,
        scale_factor=2.0,
        scale_window=4,
    )


def catalog(step: int | None = None, **state: Tree) -> Catalog:
    return Catalog("here", Source("native", "1", Mesh({})), {}, {}, step=step, state=state)


def restored(made: Any, source: Catalog) -> list[str | None]:
    return [item.restore(item.told(source), world=WORLD) for item in items_of(made)]


def counters(made: Any) -> tuple[int, int, int, int]:
    return made.global_steps, made.skipped_steps, made.global_samples, made.micro_steps


def test_counters_come_back() -> None:
    made = engine()
    state = {"global_steps": 7, "skipped_steps": 2, "global_samples": 84, "micro_steps": 14}
    assert restored(made, catalog(5, **state)) == [None] * 4
    assert counters(made) == (7, 2, 84, 14)
    assert {item.name: item.saved() for item in items_of(made)} == state


def test_counters_are_made_of_the_step() -> None:
    made = engine()
    restored(made, catalog(5))
    assert counters(made) == (5, 0, 60, 10)
    restored(made, catalog(5, consumed_samples=55))
    assert counters(made) == (5, 0, 55, 10)


def test_counters_are_made_of_each_other() -> None:
    made = engine()
    restored(made, catalog(global_steps=4))
    assert counters(made) == (4, 0, 48, 8)


def test_another_accumulation_begins_at_a_boundary() -> None:
    made = engine(accumulation=4)
    restored(made, catalog(5, global_steps=5, micro_steps=10))
    assert made.micro_steps == 20


def test_a_source_without_a_step_leaves_the_engine_alone() -> None:
    made = engine(micro_steps=4)
    notes = restored(made, catalog())
    assert counters(made) == (0, 0, 0, 4)
    assert notes == [
        f"{name}: the source tells no step; the engine's own stays"
        for name in ("global_steps", "skipped_steps", "global_samples", "micro_steps")
    ]


def test_damaged_counters_are_refused() -> None:
    with pytest.raises(FitError, match="global_steps: -3 is no count"):
        restored(engine(), catalog(5, global_steps=-3))


def test_nothing_is_saved_or_loaded_between_two_steps() -> None:
    item = Counter("global_steps", engine(micro_steps=3))
    with pytest.raises(FitError, match="it added up 1 of 2 gradients"):
        item.saved()
    with pytest.raises(FitError, match="it added up 1 of 2 gradients"):
        item.prepare(5, world=WORLD)


def test_the_scale_goes_on() -> None:
    first, second = dynamic(), dynamic()
    first.cur_scale, first.cur_iter, first.last_overflow_iter, first.cur_hysteresis = 256.0, 9, 5, 1
    saved = LossScale("loss_scale", engine(scaler=first, fp16=True)).saved()
    assert restored(engine(scaler=second, fp16=True), catalog(5, loss_scale=saved))[-1] is None
    assert second == first


@pytest.mark.parametrize("word", ["_growth_tracker", "growth_tracker"])
def test_the_scale_of_torchs_scaler(word: str) -> None:
    """The scale grows after as many steps as it would have."""
    scaler = dynamic()
    restored(engine(scaler=scaler, fp16=True), catalog(5, loss_scale={"scale": 512.0, word: 3}))
    assert (scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter - 1) == (512.0, 3)


def test_the_scale_of_deepspeeds_own_folders() -> None:
    state: dict[Any, Tree] = {"cur_scale": 128.0, "dynamic": True, "cur_iter": 6, "last_overflow_iter": 2}
    saved = Opaque("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", state=state)
    scaler = dynamic()
    restored(engine(scaler=scaler, fp16=True), catalog(5, optimizer={"loss_scaler": saved}))
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (128.0, 6, 2)


def test_a_fixed_scale_stays_and_says_so() -> None:
    fixed = SimpleNamespace(dynamic=False, cur_scale=64.0)
    notes = restored(engine(scaler=fixed, fp16=True), catalog(5, loss_scale={"scale": 512.0}))
    assert notes[-1] == "loss_scale: 512 in the source; the engine's own 64 is fixed and stays"
    assert fixed.cur_scale == 64.0


def test_sources_that_did_not_scale() -> None:
    scaler = dynamic()
    notes = restored(engine(scaler=scaler, fp16=True), catalog(5))
    assert notes[-1] == "loss_scale: the source has none; the engine begins with its own 65536"
    assert [item.name for item in items_of(engine(scaler=scaler))][-1] == "micro_steps"
