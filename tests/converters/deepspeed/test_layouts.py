"""Every layout, written from known values by other code, is read back bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.converters.deepspeed.fake import Fake, Written, write
from tests.converters.deepspeed.oracle import read_state, read_witness
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import CorruptError
from ucp.store import open_store

GROUPS = ({"embed": (7, 5), "one": (1,), "scalar": ()}, {"w": (3, 4), "b": (3,)})


def bits(tensor: torch.Tensor) -> np.ndarray:
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    unsigned = {2: "<u2", 4: "<u4"}[tensor.element_size()]
    return tensor.contiguous().view(width).numpy().view(unsigned)


def check(root: Path, catalog: Catalog, written: Written, fake: Fake) -> None:
    assert set(catalog.tensors) == {*written.states, *written.untrained}
    for name, states in written.states.items():
        assert set(catalog.tensors[name].states) == set(states)
        for state, value in states.items():
            assert np.array_equal(read_state(root, catalog, name, state), bits(value)), (name, state)
        if fake.stage != 3:
            assert np.array_equal(read_witness(root, catalog, name), bits(written.low[name])), name
    for name, value in written.untrained.items():
        assert catalog.tensors[name].kind == ("frozen" if name in fake.frozen else "buffer")
        assert np.array_equal(read_state(root, catalog, name, "value"), bits(value)), name


def read(root: Path, **options: object) -> Catalog:
    return CONVERTER.read(open_store(str(root)), **options)


@pytest.mark.parametrize("dp", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    "layout",
    [
        {"stage": 1},
        {"stage": 1, "wrapper": "bf16"},
        {"stage": 1, "wrapper": "elastic"},
        {"stage": 1, "alignment": 8},
        {"stage": 2, "dtype": torch.float32},
        {"stage": 2, "alignment": 4, "dtype": torch.float32},
        {"stage": 3},
        {"stage": 3, "dtype": torch.float16},
    ],
    ids=str,
)
def test_every_layout_is_read_bit_for_bit(tmp_path: Path, layout: dict, dp: int) -> None:
    fake = Fake(GROUPS, dp=dp, frozen={"f": (5, 3)}, buffers={"r": (4,)}, **layout)
    written = write(fake, tmp_path)
    catalog = read(tmp_path)
    check(tmp_path, catalog, written, fake)
    assert catalog.source.mesh["dp"] == dp
    assert catalog.step == 5
    assert len(catalog.objects) == dp * (2 if fake.stage == 3 else 1) + (fake.stage != 3)


shapes = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    sizes=st.lists(shapes, min_size=1, max_size=3),
    dp=st.integers(1, 9),
    layout=st.sampled_from([(1, "zero"), (1, "bf16"), (1, "elastic"), (2, "zero"), (3, "zero")]),
    alignment=st.sampled_from([1, 4, 8]),
)
def test_any_shapes_on_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, sizes: list, dp: int, layout: tuple[int, str], alignment: int
) -> None:
    root = tmp_path_factory.mktemp("any")
    groups = [{f"g{g}.p{i}": shape for i, shape in enumerate(group)} for g, group in enumerate(sizes)]
    stage, wrapper = layout
    fake = Fake(groups, dp=dp, stage=stage, wrapper=wrapper, alignment=alignment if wrapper == "zero" else 1)
    written = write(fake, root)
    check(root, read(root), written, fake)


def test_hyper_parameters_and_steps_are_by_name(tmp_path: Path) -> None:
    write(Fake(GROUPS), tmp_path)
    catalog = read(tmp_path)
    assert [(group.params, group.options["lr"]) for group in catalog.param_groups] == [
        (("embed", "one", "scalar"), 0.1),
        (("w", "b"), 0.05),
    ]
    assert {tensor.scalars["step"].value for tensor in catalog.tensors.values()} == {5.0}
    assert {tensor.scalars["step"].dtype for tensor in catalog.tensors.values()} == {"float32"}


def test_elastic_checkpoints_keep_states_but_no_hyper_parameters(tmp_path: Path) -> None:
    write(Fake(GROUPS, wrapper="elastic"), tmp_path)
    catalog = read(tmp_path)
    assert [group.options for group in catalog.param_groups] == [{}, {}]
    assert any("elastic_checkpoint" in note for note in catalog.notes)
    assert catalog.tensors["w"].scalars["step"].value == 5.0


def test_state_names_are_the_optimizers_own(tmp_path: Path) -> None:
    fake = Fake(GROUPS, states=("momentum_buffer",))
    written = write(fake, tmp_path)
    check(tmp_path, read(tmp_path), written, fake)


def test_a_state_that_is_not_flat_like_the_parameters_is_carried(tmp_path: Path) -> None:
    base = {0: {"row": torch.ones(3), "note": "x"}, 1: {}}
    groups = [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    write(Fake(GROUPS, optim={"base_optimizer_state": {"state": base, "param_groups": groups}}), tmp_path)
    catalog = read(tmp_path)
    assert set(catalog.tensors["embed"].states) == {"value"}
    assert catalog.state["optimizer"]["state"][0]["note"] == "x"
    assert catalog.state["optimizer"]["state"][0]["row"].extent.shape == (3,)
    assert any("row" in note for note in catalog.notes)


def test_aliases_are_ties_and_not_tensors(tmp_path: Path) -> None:
    for stage in (1, 3):
        write(Fake(GROUPS, stage=stage, aliases={"head": "embed"}), tmp_path / str(stage))
        catalog = read(tmp_path / str(stage))
        assert catalog.ties == {"head": "embed"}
        assert "head" not in catalog.tensors
        assert catalog.resolve("head") == "embed"


def test_aliases_are_seen_from_shared_storage_where_they_are_not_listed(tmp_path: Path) -> None:
    write(Fake(GROUPS, aliases={"head": "embed"}, model={"shared_params": {}}), tmp_path)
    assert read(tmp_path).ties == {"head": "embed"}


def test_trap_2_padding_is_rubbish_and_never_read(tmp_path: Path) -> None:
    fake = Fake(GROUPS, dp=3, stage=3, frozen={"f": (7,)})
    written = write(fake, tmp_path)
    catalog = read(tmp_path)
    check(tmp_path, catalog, written, fake)
    for name, states in written.states.items():
        assert np.isfinite(read_state(tmp_path, catalog, name, "value").view("<f4")).all()
        assert sum(f.region.size for f in catalog.fragments[name, "value"]) == states["value"].numel()


def test_trap_1_a_mapping_in_another_order_is_not_believed(tmp_path: Path) -> None:
    config = {"zero_optimization": {"round_robin_gradients": True}}
    fake = Fake([{"a": (3,), "b": (4,), "c": (5,)}], plain_order=("c", "a", "b"), model={"ds_config": config})
    written = write(fake, tmp_path)
    catalog = read(tmp_path)
    check(tmp_path, catalog, written, fake)
    assert [note for note in catalog.notes if note.startswith("round_robin_gradients")]


def test_a_mapping_of_other_parameters_is_refused(tmp_path: Path) -> None:
    write(Fake(GROUPS, model={"param_shapes": [{"x": (7, 5), "one": (1,), "scalar": ()}, GROUPS[1]]}), tmp_path)
    with pytest.raises(CorruptError, match="names embed"):
        read(tmp_path)


def test_sizes_that_contradict_shapes_are_refused(tmp_path: Path) -> None:
    for stage in (1, 3):
        root = tmp_path / str(stage)
        write(Fake(GROUPS, stage=stage), root)
        other = [{"embed": torch.Size((70, 5)), "one": torch.Size((1,)), "scalar": torch.Size(())}, GROUPS[1]]
        write(Fake(GROUPS, stage=stage, model={"param_shapes": other}), root)
        with pytest.raises(CorruptError, match="group 0"):
            read(root)
