"""Every layout that torch.distributed.checkpoint saves is read back byte for byte; real jobs write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import dcp_jobs
from tests.support.dcp_jobs import Kept, Saved
from tests.support.dcp_model import BUFFERS, FROZEN
from tests.support.gloo import spawn
from ucp.catalog import Catalog
from ucp.container.torchfile import leaf_numpy
from ucp.converter import find_converter
from ucp.layout import Box
from ucp.run.gather import read_region
from ucp.store import Store, open_store
from ucp.train.load import load

WORLD = 4
NUMBERED = {"ddp_plain", "numbered"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Saved]]:
    """The folder with one checkpoint per layout, and what each job had."""
    root = tmp_path_factory.mktemp("dcp")
    return root, spawn(dcp_jobs.run_all, WORLD, str(root), list(dcp_jobs.LAYOUTS), timeout=300)[0]


def read(url: Path, **options: object) -> tuple[Catalog, Store]:
    converter, store = find_converter(str(url))
    assert converter.family == "dcp"
    return converter.read(store, **options), store


def content(store: Store, catalog: Catalog, name: str, state: str) -> Kept:
    cover = catalog.cover(name, state)
    data = read_region(store, cover, Box.whole(cover.spec.shape)).tobytes()
    return Kept(cover.spec.shape, cover.spec.dtype, data)


@pytest.mark.parametrize("layout", dcp_jobs.LAYOUTS)
def test_every_state_is_what_the_job_had(saved: tuple[Path, dict[str, Saved]], layout: str) -> None:
    root, truths = saved
    catalog, store = read(root / layout, frozen=["adapter.*", "mean"] if layout in NUMBERED else ())
    truth = truths[layout].truth
    assert set(catalog.tensors) == set(truth)
    for name, states in truth.items():
        for state, expected in states.items():
            if state == "value" or layout != "model_only":
                assert content(store, catalog, name, state) == expected, (name, state)


@pytest.mark.parametrize("layout", sorted(dcp_jobs.LAYOUTS.keys() - {"model_only", "fsdp1_flat_parameter"}))
def test_groups_kinds_and_steps(saved: tuple[Path, dict[str, Saved]], layout: str) -> None:
    root, truths = saved
    catalog, _ = read(root / layout, frozen=["adapter.*", "mean"] if layout in NUMBERED else ())
    expected = [(sorted(names), decay) for names, decay in truths[layout].groups]
    assert [(sorted(g.params), g.options["weight_decay"]) for g in catalog.param_groups] == expected
    assert catalog.step == dcp_jobs.STEPS
    for name, tensor in catalog.tensors.items():
        trained = any(name in names for names, _ in expected)
        assert (tensor.kind == "parameter") is trained
        assert ("step" in tensor.scalars) is trained
        if trained:
            assert (tensor.scalars["step"].value, tensor.scalars["step"].dtype) == (float(dcp_jobs.STEPS), "float32")
    assert all(catalog.tensors[name].kind == "frozen" for name in FROZEN)
    assert catalog.tensors[BUFFERS[1]].kind == "buffer"


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "fsdp2_tp", "fsdp1", "torchtitan", "threads"])
def test_a_whole_tensor_among_cut_ones_is_a_buffer(saved: tuple[Path, dict[str, Saved]], layout: str) -> None:
    catalog, _ = read(saved[0] / layout)
    assert catalog.tensors["mean"].kind == "buffer"


def test_without_an_optimizer_every_float_is_a_parameter(saved: tuple[Path, dict[str, Saved]]) -> None:
    catalog, _ = read(saved[0] / "model_only")
    assert {name for name, tensor in catalog.tensors.items() if tensor.kind == "buffer"} == {"calls"}
    assert any("no optimizer was saved" in note for note in catalog.notes)
    assert catalog.param_groups == ()


def test_flat_parameters_are_whole_tensors_in_dcp(saved: tuple[Path, dict[str, Saved]]) -> None:
    """FSDP1 with use_orig_params=False: torch writes parameters and states by name and shape all the same."""
    catalog, _ = read(saved[0] / "fsdp1_flat_parameter")
    trained = {name for name, tensor in catalog.tensors.items() if tensor.kind == "parameter"}
    assert trained == set(catalog.tensors) - set(BUFFERS)
    for name in trained:
        states = catalog.tensors[name].states
        assert states["exp_avg"] == states["exp_avg_sq"] == states["value"]
        assert catalog.cover(name, "exp_avg_sq").fragments


def test_state_around_has_the_names_of_all_families(saved: tuple[Path, dict[str, Saved]]) -> None:
    catalog, store = read(saved[0] / "fsdp2")
    assert catalog.state["extra"] == {"step": 2, "note": "kept"}
    assert catalog.state["lr_scheduler"] == {"last_epoch": 2, "base_lrs": [1e-2, 4e-3]}
    torch.manual_seed(7)
    assert leaf_numpy(store, catalog.state["rng"]).size == torch.get_rng_state().numel()


def test_torchtitan_keeps_its_own_state(saved: tuple[Path, dict[str, Saved]]) -> None:
    catalog, store = read(saved[0] / "torchtitan")
    assert catalog.state["dataloader"] == {"dp_rank_0": b"rows 0 to 9", "world_size": 1}
    assert leaf_numpy(store, catalog.state["train_state"]["ntokens_seen"]).item() == 99
    assert catalog.state["lr_scheduler"] == {"last_epoch": 2}


def test_expert_parallel_chunks_are_one_tensor(saved: tuple[Path, dict[str, Saved]]) -> None:
    catalog, _ = read(saved[0] / "fsdp2_ep")
    assert catalog.tensors["experts.w"].states["value"].shape == (4, 10, 7)
    assert len(catalog.fragments["experts.w", "value"]) == WORLD  # type: ignore[index]


def test_strided_shards_lie_in_an_order_of_their_own(saved: tuple[Path, dict[str, Saved]]) -> None:
    """FSDP over TP cuts rows that TP has cut: ranks hold rows 0, 2, 1, 3 (torch's _StridedShard)."""
    catalog, _ = read(saved[0] / "fsdp2_tp")
    starts = [f.region.start[0] for f in catalog.fragments["blocks.0.up.weight", "value"]]  # type: ignore[index, union-attr]
    assert len(starts) == WORLD
    assert starts != sorted(starts)


def test_a_tied_weight_is_one_tensor(saved: tuple[Path, dict[str, Saved]]) -> None:
    """FSDP2 saves it under both names; the second is compared with the first when it is copied."""
    catalog, _ = read(saved[0] / "tied")
    assert catalog.ties == {"head.weight": "embed.weight"}
    cover = catalog.cover("embed.weight", "value")
    assert len(cover.fragments) == len(cover.replicas) == WORLD
    assert any("head.weight is embed.weight, byte for byte" in note for note in catalog.notes)


def test_numbers_that_shapes_leave_open_stay_open(saved: tuple[Path, dict[str, Saved]]) -> None:
    """Biases, norms and the buffer have one shape, so that nothing tells which of them the optimizer owns."""
    catalog, _ = read(saved[0] / "ddp_plain")
    left = [name for name, tensor in catalog.tensors.items() if tensor.undecided is not None]
    assert left
    assert "mean" in left
    assert len(catalog.state["optimizer"]["unnamed"]) < len(left)
    assert set(catalog.tensors["blocks.0.up.weight"].states) == {"value", "exp_avg", "exp_avg_sq"}
    with pytest.raises(Exception, match="cannot be told which 'exp_avg'"):
        catalog.cover(left[0], "exp_avg")


def test_states_in_doubt_that_lie_in_pieces_are_tensors(saved: tuple[Path, dict[str, Saved]]) -> None:
    catalog, store = read(saved[0] / "numbered")
    unnamed = catalog.state["optimizer"]["unnamed"]
    assert unnamed
    found = [content(store, catalog, held["states"]["exp_avg"], "value") for held in unnamed]
    truth = saved[1]["numbered"].truth
    moments = [states["exp_avg"] for states in truth.values() if "exp_avg" in states]
    assert all(held in moments for held in found)


def test_load_into_another_layout(saved: tuple[Path, dict[str, Saved]]) -> None:
    root, truths = saved
    layouts = {"fsdp2": "fsdp2", "fsdp2_tp": "fsdp2", "torchtitan": "fsdp2", "ddp": "fsdp2", "tied": "tied"}
    urls = {str(root / layout): target for layout, target in layouts.items()}
    found = spawn(load_all, 2, urls, timeout=120)
    assert found[0] == [truths[layout].truth for layout in layouts]


def load_all(rank: int, world: int, urls: dict[str, str]) -> list[dcp_jobs.Truth]:
    """`ucp.load` each into a job of the layout given for it; what the job has then."""
    found = []
    for url, layout in urls.items():
        torch.manual_seed(99)
        job = dcp_jobs.LAYOUTS[layout](world)
        dcp_jobs.train_step(job, rank, 5)
        load((job.model, job.optimizer), url)
        found.append(dcp_jobs.truth_of(job))
    return found


def test_family_is_found_among_all(saved: tuple[Path, dict[str, Saved]]) -> None:
    for layout in dcp_jobs.LAYOUTS:
        assert find_converter(str(saved[0] / layout))[0].family == "dcp"
    assert open_store(str(saved[0])).children()
