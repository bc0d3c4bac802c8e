"""ZeRO 0: names for the numbers of the optimizer, from shapes, from values, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.converters.deepspeed.audit import audit_bytes, audit_entries
from tests.converters.deepspeed.oracle import read_state, read_witness
from ucp.catalog import Catalog
from ucp.checkpoint import open_checkpoint
from ucp.container.torchfile import leaf_numpy
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import CorruptError, FitError
from ucp.run.convert import convert
from ucp.store import open_store
from ucp.train.load import load

MODULE = {"embed": (7, 4), "a.w": (4, 4), "a.b": (4,), "frozen.w": (3, 4), "c.w": (4, 4), "c.b": (4,)}
DECAY, PLAIN = ["embed", "a.w", "c.w"], ["a.b", "c.b"]


def save(folder: Path, module: Mapping[str, Tensor], optimizer: Any, **entries: Any) -> None:
    root = {"module": dict(module), "buffer_names": [], "optimizer": optimizer, "param_shapes": None}
    root |= {"global_steps": 3, "skipped_steps": 0, "dp_world_size": 2, "mp_world_size": 1, "ds_version": "0.19.8"}
    torch.save({**root, **entries}, folder / "mp_rank_00_model_states.pt")


def make(shapes: Mapping[str, Sequence[int]] = MODULE, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tuple(shape)).to(dtype) for name, shape in shapes.items()}


def adam(module: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A torch optimizer's state dict over the named groups; ``exp_avg`` is the parameter plus one."""
    names = [name for group in groups for name in group]
    state = {i: {"step": torch.tensor(3.0), "exp_avg": module[name].float() + 1} for i, name in enumerate(names)}
    numbers = iter(range(len(names)))
    listed = [{"lr": 0.1 * (g + 1), "params": [next(numbers) for _ in group]} for g, group in enumerate(groups)]
    return {"state": state, "param_groups": listed}


def read(folder: Path, **options: Any) -> Catalog:
    return CONVERTER.read(open_store(str(folder)), **options)


def numbers(folder: Path, catalog: Catalog, name: str, state: str) -> np.ndarray:
    return read_state(folder, catalog, name, state).view("<f4")


def check_moments(folder: Path, catalog: Catalog, values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        assert np.array_equal(numbers(folder, catalog, name, "value"), values[name].float().numpy()), name
        assert np.array_equal(numbers(folder, catalog, name, "exp_avg"), (values[name].float() + 1).numpy()), name


def test_two_groups_are_named_by_the_order_of_shapes(tmp_path: Path) -> None:
    module = make()
    save(tmp_path, module, adam(module, [DECAY, PLAIN]))
    catalog = read(tmp_path)
    check_moments(tmp_path, catalog, module, [*DECAY, *PLAIN])
    assert [group.params for group in catalog.param_groups] == [tuple(DECAY), tuple(PLAIN)]
    assert catalog.tensors["frozen.w"].kind == "frozen"
    assert any("inferred" in note for note in catalog.notes)
    assert not catalog.witnesses


UNTOLD = {**MODULE, "frozen.w": (4, 4)}
OPEN = {"a.w", "frozen.w", "c.w"}


def test_where_shapes_leave_a_choice_the_rest_is_placed_and_nothing_is_lost(tmp_path: Path) -> None:
    module = make(UNTOLD)
    save(tmp_path, module, adam(module, [DECAY, PLAIN]))
    catalog = read(tmp_path)
    assert {name for name, tensor in catalog.tensors.items() if tensor.undecided} == OPEN
    check_moments(tmp_path, catalog, module, ["embed", *PLAIN])
    for name in OPEN:
        assert np.array_equal(numbers(tmp_path, catalog, name, "value"), module[name].numpy())
        assert set(catalog.tensors[name].states) == {"value"}
    unnamed = catalog.state["optimizer"]["unnamed"]
    assert [(held["group"], held["number"]) for held in unnamed] == [(0, 1), (0, 2)]
    for held, name in zip(unnamed, ["a.w", "c.w"], strict=True):
        found = leaf_numpy(open_store(str(tmp_path)), held["states"]["exp_avg"])
        assert np.array_equal(found, (module[name] + 1).numpy())
    assert [group.params for group in catalog.param_groups] == [("embed",), tuple(PLAIN)]
    (note,) = [note for note in catalog.notes if "cannot be told apart" in note]
    assert "a.w frozen.w c.w" in note and "frozen=" in note
    assert audit_bytes(tmp_path, catalog) == audit_entries(tmp_path, catalog) == []


@pytest.mark.parametrize("told", ["frozen.*", ["frozen.w"]])
def test_told_what_is_frozen_everything_is_placed(tmp_path: Path, told: str | list[str]) -> None:
    module = make(UNTOLD)
    save(tmp_path, module, adam(module, [DECAY, PLAIN]))
    catalog = read(tmp_path, frozen=told)
    check_moments(tmp_path, catalog, module, [*DECAY, *PLAIN])
    assert not any(tensor.undecided for tensor in catalog.tensors.values())
    assert catalog.tensors["frozen.w"].kind == "frozen"


def is_undecided(error: pytest.ExceptionInfo[FitError]) -> bool:
    told = error.value.message.replace("_", ".")
    return "frozen=" in str(error.value.hint) and any(name in told for name in OPEN)


@pytest.mark.parametrize("converted", [False, True], ids=["deepspeed", "universal"])
def test_states_that_nobody_can_place_are_never_taken_for_absent(tmp_path: Path, converted: bool) -> None:
    module = make(UNTOLD)
    url = tmp_path / "source"
    url.mkdir()
    save(url, module, adam(module, [DECAY, PLAIN]))
    if converted:
        convert(str(url), str(tmp_path / "universal"))
        url = tmp_path / "universal"
    live = torch.nn.ParameterDict({name.replace(".", "_"): torch.nn.Parameter(v * 0) for name, v in module.items()})
    names = {name.replace(".", "_"): name for name in module}
    with open_checkpoint(str(url)) as ckpt:
        assert all(torch.equal(ckpt[name]["value"][...], value) for name, value in module.items())
        assert torch.equal(ckpt["embed"]["exp_avg"][...], module["embed"] + 1)
        assert ckpt["a.w"].get("exp_avg") is None
        with pytest.raises(FitError) as asked:
            ckpt["a.w"]["exp_avg"]
        with pytest.raises(FitError) as resumed:
            load((live, torch.optim.Adam(live.parameters())), ckpt, map=names, strict=False, hyper_parameters=False)
        with pytest.raises(FitError) as filled:
            load({"c.w": {"exp_avg": torch.zeros(4, 4)}}, ckpt, strict=False)
        assert not any(parameter.any() for parameter in live.values())
        load(live, ckpt, map=names)
        certain = [live["embed"], live["a_b"], live["c_b"]]
        load((live, torch.optim.Adam(certain)), ckpt, map=names, strict=False, hyper_parameters=False)
    with pytest.raises(FitError) as written:
        convert(str(url), str(tmp_path / "new"), to="deepspeed-universal")
    assert all(map(is_undecided, (asked, resumed, filled, written)))
    assert torch.equal(live["frozen_w"], module["frozen.w"])
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    module = make()
    save(tmp_path, module, adam(module, [DECAY, PLAIN]))
    with pytest.raises(FitError, match="forzen"):
        read(tmp_path, frozen="forzen.*")


@pytest.mark.parametrize("shapes", [MODULE, {"w": (4,)}], ids=["several", "one"])
def test_another_order_than_the_modules_leaves_all_open(tmp_path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    module = make(shapes)
    groups = [["c.b", "c.w", "embed", "a.w"], ["a.b"]] if len(shapes) > 1 else [["w"], ["w"]]
    save(tmp_path, module, adam(module, groups))
    catalog = read(tmp_path)
    assert all(tensor.undecided and set(tensor.states) == {"value"} for tensor in catalog.tensors.values())
    assert len(catalog.state["optimizer"]["unnamed"]) == sum(map(len, groups))
    assert any("not in the module's order" in note for note in catalog.notes)


def test_names_that_the_optimizer_saved_are_used_in_any_order(tmp_path: Path) -> None:
    module = make({**MODULE, "frozen.w": (4, 4)})
    groups = [["c.w", "a.w", "embed"], ["c.b", "a.b"]]
    optimizer = adam(module, groups)
    for group, names in zip(optimizer["param_groups"], groups, strict=True):
        group["param_names"] = names
    save(tmp_path, module, optimizer)
    catalog = read(tmp_path)
    check_moments(tmp_path, catalog, module, [*DECAY, *PLAIN])
    assert not any("inferred" in note for note in catalog.notes)
    assert "param_names" not in catalog.param_groups[0].options


def test_factored_states_have_shapes_of_their_own(tmp_path: Path) -> None:
    module = make({"w": (5, 4), "v": (4, 5), "b": (4,)})
    state = {
        0: {"row_var": torch.ones(5, 1), "col_var": torch.ones(1, 4)},
        1: {"row_var": torch.ones(4, 1), "col_var": torch.ones(1, 5)},
        2: {"variance": torch.ones(4)},
    }
    save(tmp_path, module, {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]})
    catalog = read(tmp_path)
    assert catalog.tensors["w"].states["row_var"].shape == (5, 1)
    assert catalog.tensors["v"].states["col_var"].shape == (1, 5)
    assert set(catalog.tensors["b"].states) == {"value", "variance"}


def test_a_parameter_that_never_had_a_gradient_has_no_states(tmp_path: Path) -> None:
    module = make({"w": (5, 4), "unused": (2, 2), "b": (4,)})
    optimizer = adam(module, [["w", "unused", "b"]])
    del optimizer["state"][1]
    save(tmp_path, module, optimizer)
    catalog = read(tmp_path)
    assert set(catalog.tensors["unused"].states) == {"value"}
    assert not catalog.tensors["unused"].scalars
    check_moments(tmp_path, catalog, module, ["w", "b"])


def wrapped(base: Mapping[str, Any], **masters: Any) -> dict[str, Any]:
    return {"dynamic_loss_scale": False, "cur_scale": 4.0, "optimizer_state_dict": base, **masters}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_of_a_16_bit_model_decide_where_shapes_do_not(tmp_path: Path, dtype: torch.dtype) -> None:
    exact = make({**MODULE, "frozen.w": (4, 4)})
    masters = [[exact[name] for name in group] for group in (DECAY, PLAIN)]
    low = {name: value.to(dtype) for name, value in exact.items()}
    save(tmp_path, low, wrapped(adam(exact, [DECAY, PLAIN]), fp32_groups=masters))
    catalog = read(tmp_path)
    check_moments(tmp_path, catalog, exact, [*DECAY, *PLAIN])
    assert catalog.tensors["frozen.w"].kind == "frozen"
    assert catalog.state["optimizer"]["cur_scale"] == 4.0
    width = low["a.w"].view(torch.int16).numpy().view("<u2")
    assert np.array_equal(read_witness(tmp_path, catalog, "a.w"), width)
    assert any("low-precision copies decided" in note for note in catalog.notes)


def flat_module(exact: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """The module as FP16_Optimizer leaves it: each group's parameters are views of one flat tensor."""
    low = {name: value.half() for name, value in exact.items()}
    for group in groups:
        flat = torch.cat([low[name].reshape(-1) for name in group])
        for name, view in zip(group, flat.split([low[name].numel() for name in group]), strict=True):
            low[name] = view.view(exact[name].shape)
    return low


def test_flat_masters_are_named_by_the_modules_views(tmp_path: Path) -> None:
    exact = make({**MODULE, "frozen.w": (4, 4)})
    groups = [["c.w", "embed", "a.w"], PLAIN]
    flats = [torch.cat([exact[name].reshape(-1) for name in group]) for group in groups]
    state = {i: {"step": 3, "exp_avg": flat + 1} for i, flat in enumerate(flats)}
    base = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]}
    save(tmp_path, flat_module(exact, groups), wrapped(base, fp32_groups_flat=flats))
    catalog = read(tmp_path)
    check_moments(tmp_path, catalog, exact, [*DECAY, *PLAIN])
    assert [group.params for group in catalog.param_groups] == [tuple(group) for group in groups]
    assert catalog.tensors["a.w"].scalars["step"].dtype == "int"


def test_flat_masters_that_the_module_does_not_show_are_carried(tmp_path: Path) -> None:
    exact = make()
    flats = [torch.cat([exact[name].reshape(-1) for name in group]) for group in (DECAY, PLAIN)]
    state = {i: {"step": 3, "exp_avg": flat + 1} for i, flat in enumerate(flats)}
    base = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]}
    low = flat_module(exact, [PLAIN])
    save(tmp_path, low, wrapped(base, fp32_groups_flat=flats))
    catalog = read(tmp_path)
    check_moments(tmp_path, catalog, exact, PLAIN)
    assert {name for name, tensor in catalog.tensors.items() if tensor.undecided} == {*MODULE} - {*PLAIN}
    (held,) = catalog.state["optimizer"]["unnamed"]
    assert held["group"] == 0
    assert np.array_equal(leaf_numpy(open_store(str(tmp_path)), held["master"]), flats[0].numpy())
    assert audit_bytes(tmp_path, catalog) == []


def test_an_unknown_structure_is_refused(tmp_path: Path) -> None:
    save(tmp_path, make(), {"shards": []})
    with pytest.raises(FitError, match="no known optimizer") as error:
        read(tmp_path)
    assert error.value.hint


def test_masters_that_do_not_match_the_groups_are_refused(tmp_path: Path) -> None:
    exact = make()
    save(tmp_path, exact, wrapped(adam(exact, [DECAY, PLAIN]), fp32_groups=[[exact["embed"]]]))
    with pytest.raises(CorruptError, match="masters"):
        read(tmp_path)


def test_a_model_without_an_optimizer(tmp_path: Path) -> None:
    module = make()
    save(tmp_path, module, None)
    catalog = read(tmp_path)
    assert {t.kind for t in catalog.tensors.values()} == {"parameter"}
    assert np.array_equal(numbers(tmp_path, catalog, "a.w", "value"), module["a.w"].numpy())
    assert any("no optimizer was saved" in note for note in catalog.notes)


def test_aliases_are_seen_from_shared_storage(tmp_path: Path) -> None:
    module = make()
    module["head"] = module["embed"]
    save(tmp_path, module, adam(module, [DECAY, PLAIN]))
    catalog = read(tmp_path)
    assert catalog.ties == {"head": "embed"}
    check_moments(tmp_path, catalog, module, [*DECAY, *PLAIN])
