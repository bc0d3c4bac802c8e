"""What lies around the tensors: replicas, low-precision copies, numbers, groups, training state, the program itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ucp
from tests.format.schemas import MANIFEST, problems
from tests.mapping.made import numbers, part, put_together, read
from ucp.catalog import ParamGroup, Scalar
from ucp.errors import ConflictError, FitError, UsageError
from ucp.format.documents import parsed
from ucp.lang import parse
from ucp.layout import Mesh
from ucp.layout.block import View
from ucp.mapping import consolidate
from ucp.plan import Key
from ucp.run.convert import carry_out, prepare
from ucp.run.verify import verify
from ucp.store import open_store

MESH = Mesh({"tp": 2})
PROGRAM = """format 1
mesh tp
size a b
w [a/tp, b] <-> weight [a, b]
n [b] <-> norm [b]
state * : like param
"""


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "source"))


def parts_of(store, *, norms=(0, 0), **changes):
    halves = np.split(numbers(4, 3), 2)
    return [
        part(store, {"tp": rank}, {"w": halves[rank], "n": numbers(3, seed=norms[rank])}, **changes) for rank in (0, 1)
    ]


def together(parts, program=PROGRAM, **options):
    return consolidate(parts, parse(program), **{"mesh": MESH, **options})


def test_replicas_that_differ_are_a_conflict_that_names_both_files(store, tmp_path):
    catalog = together(parts_of(store, norms=(1, 2)))
    (finding,) = verify(catalog, store, deep=True).findings
    assert finding.kind == "replica"
    assert finding.where == "norm[value]"
    for name in ("tp0/n/value/0", "tp1/n/value/0"):
        assert name in finding.message
    assert verify(together(parts_of(store)), store, deep=True).ok


def test_replicas_of_the_terms_of_a_mean_are_compared_too(store):
    weights = [numbers(3), numbers(3, seed=1)]
    parts = [part(store, {"tp": t}, {"n": weights[t]}) for t in (0, 1)]
    twice = [
        (c, replace(cat, fragments={k: (*f, replace(f[0], replica=1)) for k, f in cat.fragments.items()}))
        for c, cat in parts
    ]
    program = "format 1\nmesh tp\nsize b\nn [b] mean tp -> norm [b]"
    assert verify(together(twice, program), store, deep=True).ok
    _, spoilt = part(store, {"tp": 7}, {"n": numbers(3, seed=9)})
    damaged = replace(
        twice[1][1],
        fragments={
            Key("n", "value"): (
                parts[1][1].fragments[Key("n", "value")][0],
                replace(spoilt.fragments[Key("n", "value")][0], replica=1),
            )
        },
    )
    (finding,) = verify(together([twice[0], (twice[1][0], damaged)], program), store, deep=True).findings
    assert finding.kind == "replica"
    assert "tp7" in finding.message
    assert "tp1" in finding.message
    assert "tp0" not in finding.message


def test_an_axis_that_any_may_ignore_is_not_compared(store):
    program = PROGRAM.replace("n [b] <->", "n [b] any tp <->")
    catalog = together(parts_of(store, norms=(1, 2)), program)
    assert verify(catalog, store, deep=True).ok
    np.testing.assert_array_equal(read(catalog, store, "norm"), numbers(3, seed=1))


def test_low_precision_copies_follow_their_tensors(store):
    halves = np.split(numbers(4, 3), 2)
    low = [(half.view("<u4") >> 16).astype("<u2") for half in halves]
    exact = [(bits.astype("<u4") << 16).view("<f4") for bits in low]
    program = "format 1\nmesh tp\nsize a b\nw [a/tp, b] <-> weight [b, a]"
    parts = [part(store, {"tp": r}, {"w": exact[r]}, low={"w": low[r]}) for r in (0, 1)]
    catalog = together(parts, program)
    assert verify(catalog, store, deep=True).witnesses == 1
    assert verify(catalog, store, deep=True).ok
    parts[1] = part(store, {"tp": 1}, {"w": exact[1]}, low={"w": low[1] ^ 1})
    (finding,) = verify(together(parts, program), store, deep=True).findings
    assert finding.kind == "low-precision-copy"


def test_numbers_per_parameter_must_agree(store):
    parts = parts_of(store)
    assert together(parts).tensors["weight"].scalars == {"step": Scalar(7, "int")}
    coordinate, other = parts[1]
    tensors = {**other.tensors, "w": replace(other.tensors["w"], scalars={"step": Scalar(8, "int")})}
    with pytest.raises(ConflictError, match=r"weight: step is 7.*w@tp=0 but 8.*w@tp=1"):
        together([parts[0], (coordinate, replace(other, tensors=tensors))])


def test_steps_and_kinds_must_agree(store):
    parts = parts_of(store)
    with pytest.raises(ConflictError, match="different steps: 5 at tp=0 and 6 at tp=1"):
        together([parts[0], (parts[1][0], replace(parts[1][1], step=6))])
    frozen = {name: replace(tensor, kind="frozen") for name, tensor in parts[1][1].tensors.items()}
    with pytest.raises(ConflictError, match="different kinds"):
        together([parts[0], (parts[1][0], replace(parts[1][1], tensors=frozen))])


def test_training_state_is_kept_once_where_all_say_the_same(store):
    parts = parts_of(store, state={"scheduler": {"last": 3}})
    states = [{"scheduler": {"last": 3}, "rng": [rank], "lead": 1} for rank in (0, 1)]
    del states[1]["lead"]
    parts = [(c, replace(catalog, state=state)) for (c, catalog), state in zip(parts, states, strict=True)]
    found = together(parts).state
    assert found == {"scheduler": {"last": 3}, "rng@tp=0": [0], "rng@tp=1": [1], "lead@tp=0": 1}


def test_groups_with_the_same_options_become_one_and_name_logical_tensors(store):
    first, second = parts_of(store)
    groups = (ParamGroup(("n",), {"lr": 0.1}), ParamGroup(("w",), {"lr": 0.2}))
    parts = [(c, replace(catalog, param_groups=groups)) for c, catalog in (first, second)]
    assert together(parts).param_groups == (ParamGroup(("norm",), {"lr": 0.1}), ParamGroup(("weight",), {"lr": 0.2}))
    reverse = (second[0], replace(second[1], param_groups=groups[::-1]))
    assert together([parts[0], reverse]).param_groups == together(parts).param_groups
    other = (ParamGroup(("n", "w"), {"lr": 0.3}),)
    with pytest.raises(ConflictError, match="different hyper-parameters"):
        together([parts[0], (second[0], replace(second[1], param_groups=other))])


def test_an_undecided_tensor_stays_undecided(store):
    coordinate, catalog = parts_of(store)[0]
    tensors = {**catalog.tensors, "w": replace(catalog.tensors["w"], undecided="tell")}
    found = together([(coordinate, replace(catalog, tensors=tensors)), parts_of(store)[1]])
    assert found.tensors["weight"].undecided == "tell"
    assert found.tensors["norm"].undecided is None


def test_what_is_dropped_is_told(store):
    catalog = together(parts_of(store), PROGRAM.replace("n [b] <-> norm [b]", "drop n"))
    assert list(catalog.tensors) == ["weight"]
    assert "the program drops 1 tensor, n" in catalog.notes


def test_a_cast_that_is_none_is_refused(store):
    parts = [part(store, {}, {"i": np.arange(4, dtype="<i4")})]
    with pytest.raises(FitError, match="cast"):
        together(parts, "format 1\nsize a\ni i32[a] -> i f32[a] lossy", mesh=Mesh({}))


def test_a_whole_checkpoint_is_renamed_and_taken_apart(tmp_path, store):
    """One part, no mesh; then again: a program on what a program made."""
    fused = numbers(6, 4)
    parts = [part(store, {}, {"c_attn": fused})]
    catalog = together(parts, "format 1\nsize h n\nc_attn [h + h, n] <-> q [n, h], k [n, h]", mesh=Mesh({}))
    np.testing.assert_array_equal(read(catalog, store, "q"), fused[:3].T)
    np.testing.assert_array_equal(read(catalog, store, "k"), fused[3:].T)
    again = together([({}, catalog)], "format 1\nsize h n\nq [n, h] <-> a [h n]\nk [n, h] <-> b [h, n]", mesh=Mesh({}))
    np.testing.assert_array_equal(read(again, store, "a"), fused[:3].reshape(-1))
    np.testing.assert_array_equal(read(again, store, "b"), fused[3:])


def test_a_universal_checkpoint_keeps_the_program(tmp_path, store):
    source = tmp_path / "plain"
    build = part(open_store(str(source)), {}, {"w": numbers(4, 6)})
    path = tmp_path / "names.ucp"
    path.write_text("format 1\nsize a b r\nflag tied\nw [a, r b] <-> weight [b a, r]\nlm [a] <-> lm [a] when tied\n")
    first = convert_catalog(build[1], tmp_path / "first")
    conversion = prepare(first, str(tmp_path / "second"), program=path, sizes={"r": 2})
    carry_out(conversion)
    ckpt = ucp.open(tmp_path / "second")
    expected = numbers(4, 6).reshape(4, 2, 3).transpose(2, 0, 1).reshape(12, 2)
    np.testing.assert_array_equal(ckpt["weight"]["value"][...].numpy(), expected)
    record = ckpt.catalog.program
    assert record == conversion.catalog.program
    assert {**record.sizes, "a": 4, "b": 3, "r": 2} == record.sizes
    assert record.flags == {"tied": False}
    assert record.mesh == Mesh({})
    assert ckpt.catalog.tensors["weight"].dims == ("b a", "r")
    raw = parsed((tmp_path / "second" / "zarr.json").read_bytes(), where="root")["attributes"]["ucp"]
    assert not problems(MANIFEST, raw)
    assert raw["program"]["sizes"]["r"] == 2
    opened = ucp.open(first, program=str(path), sizes={"r": 2})
    np.testing.assert_array_equal(opened["weight"]["value"][5:7, 1].numpy(), expected[5:7, 1])


def convert_catalog(catalog, destination):
    """A universal checkpoint of a hand-made catalog."""
    from tests.format.build import write
    from ucp.store import LocalStore

    write(catalog, LocalStore(catalog.url), destination)
    return str(destination)


def test_a_view_is_another_conversion_than_the_plain_tensor(tmp_path, store):
    first = convert_catalog(part(open_store(str(tmp_path / "plain")), {}, {"w": numbers(4, 6)})[1], tmp_path / "first")
    programs = [parse(f"format 1\nsize a b\nw [a, b] <-> {name} [a, b]") for name in ("x", "y")]
    prints = {prepare(first, str(tmp_path / "to"), program=program).wanted.fingerprint for program in programs}
    assert len(prints) == 2


def test_sizes_without_a_program_are_an_error(tmp_path):
    with pytest.raises(UsageError, match="program"):
        ucp.open(tmp_path, sizes={"a": 1})


def test_slices_of_a_permuted_tensor_are_read_lazily(tmp_path):
    fused = numbers(4, 6, 5)
    catalog, store = put_together(
        tmp_path / "s",
        "format 1\nsize a b c\nw [a, b, c] <-> w [c a, b]",
        {(): {"w": fused}},
        mesh=Mesh({}),
    )
    expected = fused.transpose(2, 0, 1).reshape(20, 6)
    assert catalog.views[Key("w", "value")] == View(((5, 4), (6,)))
    lazy = ucp.Checkpoint(catalog, store)["w"]["value"]
    np.testing.assert_array_equal(lazy[3:17:2, 1:5].numpy(), expected[3:17:2, 1:5])
    np.testing.assert_array_equal(lazy[-1].numpy(), expected[-1])


@pytest.mark.parametrize(
    ("rules", "ties"),
    [
        ("embed [v, h] <-> e [v, h]\nhead [v, h] <-> l [v, h] unless tied\ntie l to e when tied", {"l": "e"}),
        ("embed [v, h] <-> e [v, h]\nhead [v, h] <-> l [v, h] optional", {"l": "e"}),
        ("embed [v, h] <-> e [v, h]\nhead [v, h] <-> l [v, h]", {"l": "e"}),
        ("embed [v, h] <-> e [v, h]", {}),
    ],
    ids=["tied by the program", "optional", "asked for", "not mentioned"],
)
def test_what_the_source_ties_stays_tied(store, rules, ties):
    flag = "flag tied\n" if "tied" in rules else ""
    weight = numbers(4, 3)
    parts = [part(store, {}, {"embed": weight}, ties={"head": "embed"})]
    catalog = together(parts, f"format 1\nsize v h\n{flag}{rules}", mesh=Mesh({}))
    assert list(catalog.tensors) == ["e"]
    assert catalog.ties == ties
    assert catalog.param_groups[0].params == ("e",)
    np.testing.assert_array_equal(read(catalog, store, "l" if ties else "e"), weight)


def test_an_alias_that_is_laid_out_otherwise_is_a_tensor_of_its_own(store):
    weight = numbers(4, 3)
    parts = [part(store, {}, {"embed": weight}, ties={"head": "embed"})]
    catalog = together(parts, "format 1\nsize v h\nembed [v, h] <-> e [v, h]\nhead [v, h] <-> l [h, v]", mesh=Mesh({}))
    assert catalog.ties == {}
    np.testing.assert_array_equal(read(catalog, store, "l"), weight.T)


@pytest.mark.parametrize("flag", ["when tied", "unless loose"])
def test_a_whole_source_tells_whether_a_tie_of_the_program_holds(store, flag):
    rules = f"embed [v, h] <-> e [v, h]\nhead [v, h] <-> l [v, h] optional\ntie l to e {flag}"
    program = f"format 1\nsize v h\nflag {flag.split()[1]}\n{rules}"
    weight = numbers(4, 3)
    apart = together([part(store, {}, {"embed": weight, "head": weight + 1})], program, mesh=Mesh({}))
    assert list(apart.tensors) == ["e", "l"]
    assert apart.ties == {}
    tied = together([part(store, {}, {"embed": weight}, ties={"head": "embed"})], program, mesh=Mesh({}))
    assert list(tied.tensors) == ["e"]
    assert tied.ties == {"l": "e"}
    stages = [part(store, {"pp": 0}, {"embed": weight}), part(store, {"pp": 1}, {"head": weight + 1})]
    with pytest.raises(FitError, match=f"do not tell whether {flag.split()[1]}"):
        together(stages, program.replace("size", "mesh pp\nsize"), mesh=Mesh({"pp": 2}))


def test_copies_of_a_tied_tensor_on_two_stages_are_compared(store):
    program = (
        "format 1\nmesh pp\nsize v h\nembed [v, h] <-> e [v, h] on pp 0\nhead [v, h] <-> l [v, h] on pp -1\ntie l to e"
    )
    weight = numbers(4, 3)

    def catalog(last):
        parts = [part(store, {"pp": 0}, {"embed": weight}), part(store, {"pp": 1}, {"head": last})]
        return together(parts, program, mesh=Mesh({"pp": 2}))

    assert catalog(weight).ties == {"l": "e"}
    assert verify(catalog(weight), store, deep=True).ok
    (finding,) = verify(catalog(weight + np.float32(1)), store, deep=True).findings
    assert "pp0/embed" in finding.message
    assert "pp1/head" in finding.message


def test_a_state_of_each_replica_group_gets_a_leading_dim(store):
    program = "format 1\nmesh dp\nsize n\nw [n] <-> w [n]\nstate anchor : like param each dp"
    weight, anchors = numbers(5), numbers(2, 5, seed=1)
    parts = [part(store, {"dp": r}, {"w": {"value": weight, "anchor": anchors[r]}}) for r in (0, 1)]
    catalog = together(parts, program, mesh=Mesh({"dp": 2}))
    np.testing.assert_array_equal(read(catalog, store, "w", "anchor"), anchors)
    assert verify(catalog, store, deep=True).ok
