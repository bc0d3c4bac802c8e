"""`ucp.load` through a program: jobs whose tensors are parts of the checkpoint's, against parts cut by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import ucp
from tests.train.handmade import make
from tests.train.staged import LOGICAL, PROGRAM, SIZES, Stage, adamw, check, checkpoint, local, without
from ucp.catalog import ProgramRecord
from ucp.checkpoint import Checkpoint
from ucp.errors import FitError, UsageError
from ucp.lang import parse, to_json
from ucp.layout import Mesh

PLACES = [(tp, pp, t, p) for tp, pp in ((1, 1), (2, 1), (1, 4), (2, 2)) for p in range(pp) for t in range(tp)]


def load(target, ckpt, *, tp=1, pp=1, tp_rank=0, pp_rank=0, **options):
    defaults = {"program": parse(PROGRAM), "mesh": {"pp": pp, "tp": tp}, "sizes": SIZES}
    return ucp.load(target, ckpt, **{**defaults, "coordinate": {"tp": tp_rank, "pp": pp_rank}, **options})


@pytest.mark.parametrize(("tp", "pp", "tp_rank", "pp_rank"), PLACES)
def test_every_rank_gets_its_parts_of_values_and_states(tmp_path, tp, pp, tp_rank, pp_rank):
    place = {"tp": tp, "pp": pp, "tp_rank": tp_rank, "pp_rank": pp_rank}
    stage = Stage(**place)
    optimizer = adamw(stage)
    stage().backward()
    optimizer.step()
    report = load((stage, optimizer), checkpoint(tmp_path), **place)
    assert check(stage, optimizer, **place) == report.tensors
    assert not report.unexpected
    stage().backward()
    optimizer.step()


def test_an_optimizer_without_states_gets_them_with_zeros_for_padding(tmp_path):
    place = {"tp": 2, "pp": 1, "tp_rank": 1, "pp_rank": 0}
    stage = Stage(**place)
    optimizer = adamw(stage)
    load((stage, optimizer), checkpoint(tmp_path), **place)
    check(stage, optimizer, **place)
    assert not stage.embed[1:].any()
    assert not optimizer.state[stage.embed]["exp_avg_sq"][1:].any()


def test_a_rank_may_hold_padding_only(tmp_path):
    """Vocabulary 7 padded to 24 over four ranks: 6, 1, 0 and 0 rows."""
    program = parse(
        "format 1\nmesh tp\nsize vocab hidden\nstate exp_avg exp_avg_sq : like param\n"
        "embed [(vocab + _ align 6 * tp)/tp, hidden] <-> embed.weight [vocab, hidden]"
    )
    whole = checkpoint(tmp_path)
    ckpt = Checkpoint(
        replace(whole.catalog, tensors={"embed.weight": whole.catalog.tensors["embed.weight"]}), whole.store
    )
    for rank, rows in enumerate([6, 1, 0, 0]):
        module = nn.Module()
        module.embed = nn.Parameter(torch.full((6, 6), 77.0))
        optimizer = torch.optim.AdamW([module.embed])
        options = {"mesh": {"tp": 4}, "coordinate": {"tp": rank}, "program": program, "sizes": {"vocab": 7}}
        ucp.load((module, optimizer), ckpt, hyper_parameters=False, **options)
        expected = torch.zeros(6, 6)
        expected[:rows] = LOGICAL["embed.weight"][6 * rank : 6 * rank + rows]
        torch.testing.assert_close(module.embed.detach(), expected, rtol=0, atol=0)
        torch.testing.assert_close(optimizer.state[module.embed]["exp_avg"], expected * 10, rtol=0, atol=0)
        assert optimizer.state[module.embed]["step"].item() == 3


def test_a_rank_that_holds_nothing_of_a_tensor_without_dims_gets_zeros(tmp_path):
    ckpt = Checkpoint(*make(str(tmp_path), {"a": {"value": torch.tensor(1.0)}, "b": {"value": torch.tensor(2.0)}}))
    program = parse("format 1\nmesh pp\ns [(_ + 1 + 1)/pp] <-> a [], b []")
    for rank, expected in enumerate([0.0, 1.0, 2.0]):
        room = {"s": torch.full((1,), 77.0)}
        ucp.load(room, ckpt, program=program, mesh={"pp": 3}, coordinate={"pp": rank})
        assert room["s"].tolist() == [expected]


@pytest.mark.parametrize("layout", ["w [a/tp, h] <-> w [a, h]", "w [h, a/tp] <-> w [a, h]"])
def test_a_tensor_without_elements(tmp_path, layout):
    ckpt = Checkpoint(*make(str(tmp_path), {"w": {"value": torch.zeros(0, 3)}, "b": {"value": torch.arange(3.0)}}))
    module = nn.Module()
    module.w, module.b = (
        nn.Parameter(torch.zeros(0, 3) if "[a" in layout[:4] else torch.zeros(3, 0)),
        nn.Parameter(torch.zeros(3)),
    )
    program = parse(f"format 1\nmesh tp\nsize a h\n{layout}\nb [h] <-> b [h]")
    ucp.load(module, ckpt, program=program, mesh={"tp": 2}, coordinate={"tp": 1})
    assert module.b.tolist() == [0, 1, 2]


def test_values_are_cast(tmp_path):
    place = {"tp": 2, "pp": 1, "tp_rank": 0, "pp_rank": 0}
    stage = Stage(**place, dtype=torch.bfloat16)
    report = load(stage, checkpoint(tmp_path, optimizer=False), **place)
    check(stage, None, **place)
    assert {cast.target for cast in report.casts} == {"bfloat16"}


def test_tensors_that_are_not_contiguous_are_filled(tmp_path):
    place = {"tp": 2, "pp": 1, "tp_rank": 1, "pp_rank": 0}
    expected = local(LOGICAL, **place)
    room = {
        name: torch.full((*t.shape, 2), 5.0)[..., 1].t().contiguous().t() for name, t in expected.items() if t.ndim == 2
    }
    room |= {name: torch.full((len(t), 3), 5.0)[:, 2] for name, t in expected.items() if t.ndim == 1}
    load(room, checkpoint(tmp_path, optimizer=False), **place)
    for name, tensor in room.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_names_of_wrappers_do_not_matter(tmp_path):
    place = {"tp": 2, "pp": 1, "tp_rank": 1, "pp_rank": 0}
    wrapped = nn.DataParallel(Stage(**place))
    load(wrapped, checkpoint(tmp_path, optimizer=False), **place)
    check(wrapped.module, None, **place)


def test_a_job_built_otherwise_does_not_fit_and_stays_as_it_is(tmp_path):
    place = {"tp": 2, "pp": 2, "tp_rank": 0, "pp_rank": 0}
    stage = Stage(**place)
    with pytest.raises(FitError, match=r"\bembed\b"):
        load(stage, checkpoint(tmp_path, optimizer=False), **{**place, "tp": 1, "mesh": {"pp": 2, "tp": 1}})
    with pytest.raises(FitError, match="unexpected: norm"):
        load(stage, checkpoint(tmp_path, optimizer=False), **{**place, "pp_rank": 1})
    assert all((p == 77).all() for p in stage.parameters())


def test_a_checkpoint_that_lacks_a_tensor_does_not_fit(tmp_path):
    ckpt = checkpoint(tmp_path, optimizer=False)
    place = {"tp": 2, "pp": 1, "tp_rank": 0, "pp_rank": 0}
    for name in ("layers.2.k.weight", "norm.weight"):
        with pytest.raises(FitError):
            load(Stage(**place), Checkpoint(without(ckpt.catalog, name), ckpt.store), **place)


def test_parts_that_differ_in_steps_dtypes_or_groups_do_not_make_a_tensor(tmp_path):
    ckpt = checkpoint(tmp_path)
    place = {"tp": 2, "pp": 1, "tp_rank": 0, "pp_rank": 0}
    odd = ckpt.catalog.tensors["layers.0.k.weight"]
    stepped = replace(odd, scalars={"step": replace(odd.scalars["step"], value=4.0)})
    bare = replace(odd, states={"value": odd.states["value"]})
    for tensor, match in ((stepped, "different numbers"), (bare, "only")):
        catalog = replace(ckpt.catalog, tensors={**ckpt.catalog.tensors, odd.name: tensor})
        stage = Stage(**place)
        with pytest.raises(FitError, match=match):
            load((stage, adamw(stage)), Checkpoint(catalog, ckpt.store), **place)
    first, second = ckpt.catalog.param_groups
    groups = (
        replace(first, params=tuple(n for n in first.params if n != odd.name)),
        replace(second, params=(*second.params, odd.name)),
    )
    stage = Stage(**place)
    with pytest.raises(FitError, match="different hyper-parameters"):
        load((stage, adamw(stage)), Checkpoint(replace(ckpt.catalog, param_groups=groups), ckpt.store), **place)


def test_the_checkpoints_own_program_serves_another_mesh(tmp_path):
    ckpt = checkpoint(tmp_path)
    with pytest.raises(UsageError, match="keeps no program"):
        load(Stage(tp=1, pp=1, tp_rank=0, pp_rank=0), ckpt, program="source")
    sizes = {**SIZES, "r": 3, "hidden": 6, "vocab": 7, "ffn": 8, "l": 4}
    record = ProgramRecord(to_json(parse(PROGRAM)), Mesh({"pp": 4, "tp": 1}), sizes)
    kept = Checkpoint(replace(ckpt.catalog, program=record), ckpt.store)
    place = {"tp": 2, "pp": 2, "tp_rank": 1, "pp_rank": 1}
    stage = Stage(**place)
    optimizer = adamw(stage)
    load((stage, optimizer), kept, **place, program="source", sizes=None)
    check(stage, optimizer, **place)


def test_where_a_rank_is_must_be_known(tmp_path):
    ckpt = checkpoint(tmp_path, optimizer=False)
    stage = Stage(tp=2, pp=1, tp_rank=0, pp_rank=0)
    with pytest.raises(UsageError, match="where on the mesh"):
        load(stage, ckpt, tp=2, coordinate=None)
    with pytest.raises(UsageError, match="tp=2 is not on the mesh"):
        load(stage, ckpt, tp=2, tp_rank=2)
    with pytest.raises(UsageError, match="program"):
        ucp.load(stage, ckpt, mesh={"tp": 2})


def test_tied_tensors_of_a_job_are_compared(tmp_path):
    program = parse("format 1\nsize a b\nx.w [a, b] <-> one [a, b]\ny.w [a, b] <-> two [a, b]")
    module = nn.Module()
    module.x, module.y = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    module.x.w, module.y.w = nn.Parameter(torch.zeros(4, 3)), None
    del module.x.weight, module.y.weight
    module.y.w = module.x.w
    same = torch.arange(12.0).reshape(4, 3)
    alike = Checkpoint(*make(str(tmp_path / "alike"), {"one": {"value": same}, "two": {"value": same.clone()}}))
    ucp.load(module, alike, program=program)
    torch.testing.assert_close(module.x.w.detach(), same)
    apart = Checkpoint(*make(str(tmp_path / "apart"), {"one": {"value": same}, "two": {"value": same + 1}}))
    with pytest.raises(ucp.ConflictError, match="one tensor in the target"):
        ucp.load(module, apart, program=program)


def test_a_rank_that_holds_several_virtual_stages_names_them(tmp_path):
    """Four layers over two stages of two virtual ones: the second stage has layers 1 and 3."""
    program = parse("format 1\nmesh pp vpp\nsize l n\nlayers.{l/vpp/pp}.w [n] <-> blocks.{l}.w [n]")
    tensors = {
        f"blocks.{i}.w": {"value": torch.full((3,), float(i)), "m": torch.full((3,), i + 10.0)} for i in range(4)
    }
    ckpt = Checkpoint(*make(str(tmp_path), tensors))

    def chunk():
        layer = nn.Module()
        layer.w = nn.Parameter(torch.zeros(3))
        chunk = nn.Module()
        chunk.layers = nn.ModuleList([layer])
        return chunk

    chunks = nn.ModuleList([chunk(), nn.DataParallel(chunk())])
    place = {str(v): {"pp": 1, "vpp": v} for v in range(2)}
    ucp.load(chunks, ckpt, program=program, mesh={"pp": 2, "vpp": 2}, coordinate=place)
    assert [p.detach()[0].item() for p in chunks.parameters()] == [1, 3]
    with pytest.raises(UsageError, match="mixes"):
        ucp.load(chunks, ckpt, program=program, mesh={"pp": 2, "vpp": 2}, coordinate={**place, "pp": 1})


def test_an_alias_that_the_job_does_not_have_is_no_matter(tmp_path):
    made = make(str(tmp_path), {"e": {"value": torch.ones(3)}}, ties={"head": "e"})
    room = {"embed": torch.zeros(3)}
    ucp.load(room, Checkpoint(*made), program=parse("format 1\nsize n\nembed [n] <-> e [n]"))
    assert room["embed"].all()


def test_tensors_that_are_renamed_only_need_no_layout(tmp_path):
    program = parse("format 1\nmodel.{rest}.w <-> {rest}.weight")
    ckpt = Checkpoint(*make(str(tmp_path), {"a.weight": {"value": torch.arange(6.0).reshape(2, 3)}}))
    room = {"model.a.w": torch.zeros(2, 3)}
    ucp.load(room, ckpt, program=program)
    torch.testing.assert_close(room["model.a.w"], torch.arange(6.0).reshape(2, 3))
