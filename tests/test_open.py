from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ucp
from tests.train.handmade import Counting, columns, flat, make, whole
from ucp.checkpoint import Checkpoint
from ucp.errors import ConflictError
from ucp.lazy import LazyTensor
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]
CUTS = [whole, flat(1), flat(2), flat(3), flat(7), columns(2), columns(3)]


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 37 % 251 % (2 if dtype == torch.bool else 251)).to(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


@st.composite
def slices(draw: st.DrawFn, size: int) -> slice:
    edge = st.none() | st.integers(-size - 2, size + 2)
    return slice(draw(edge), draw(edge), draw(st.none() | st.integers(1, size + 2)))


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    count = draw(st.integers(0, len(shape)))
    front = draw(st.integers(0, count))
    dims = [*range(front), *range(len(shape) - (count - front), len(shape))]
    parts: list[Any] = [
        draw(st.integers(-shape[d], shape[d] - 1) | slices(shape[d]) if shape[d] else slices(shape[d])) for d in dims
    ]
    if front != count or draw(st.booleans()):
        parts.insert(front, ...)
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


@given(st.data())
def test_indexing_is_what_torch_does(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4), label="shape"))
    truth = tensor_of(shape, data.draw(st.sampled_from(DTYPES), label="dtype"))
    catalog, store = make("memory://open-indexing", {"x": {"value": truth}}, cut=data.draw(st.sampled_from(CUTS)))
    index = data.draw(indices(shape), label="index")
    got, wanted = Checkpoint(catalog, store)["x"]["value"][index], truth[index]
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert bits(got) == bits(wanted)
    assert got.is_contiguous()
    assert got.untyped_storage().nbytes() == got.nbytes, "holds more memory than it needs"


@pytest.fixture
def lazy(tmp_path: Path) -> LazyTensor:
    catalog, store = make(str(tmp_path), {"x": {"value": tensor_of((4, 5), torch.float32)}})
    return Checkpoint(catalog, store)["x"]["value"]


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (slice(None, None, -1), "step -1"),
        (None, "NoneType"),
        (True, "bool"),
        ([0, 1], "list"),
        (torch.tensor([0, 1]), "Tensor"),
        (torch.tensor(True), "Tensor"),
        (torch.tensor(1, dtype=torch.uint8), "Tensor"),
        (1.5, "float"),
        ("0", "str"),
    ],
)
def test_other_indices_are_refused_with_a_reason(lazy: LazyTensor, index: Any, problem: str) -> None:
    with pytest.raises(ucp.UsageError, match=problem):
        lazy[index]


@pytest.mark.parametrize("index", [4, -5, (0, 5), (0, 0, 0), (..., ...)])
def test_out_of_bounds_is_an_index_error(lazy: LazyTensor, index: Any) -> None:
    with pytest.raises(IndexError, match="x"):
        lazy[index]


def test_ints_of_numpy_and_torch_are_ints(lazy: LazyTensor) -> None:
    assert torch.equal(lazy[torch.tensor(2)], lazy[2])
    assert torch.equal(torch.stack(list(lazy)), lazy[...])
    assert len(lazy) == 4


def test_truth_of_what_was_not_read_is_not_guessed(lazy: LazyTensor) -> None:
    with pytest.raises(ucp.UsageError, match="x"):
        bool(lazy)


def test_a_slice_reads_just_its_bytes(tmp_path: Path) -> None:
    truth = torch.randn(1000, 300)
    catalog, inner = make(str(tmp_path), {"big": {"value": truth, "exp_avg": truth * 2}}, cut=flat(4))
    store = Counting(inner)
    ckpt = Checkpoint(catalog, store)
    assert repr(ckpt)
    assert ckpt["big"].shape == (1000, 300)
    assert store.bytes_read == 0
    assert torch.equal(ckpt["big"]["exp_avg"][240:260], truth[240:260] * 2)
    assert store.bytes_read == 20 * 300 * 4
    store.bytes_read = 0
    assert torch.equal(ckpt["big"]["value"][500:508:3, 7], truth[500:508:3, 7])
    assert store.bytes_read <= 8 * 300 * 4


@pytest.fixture
def ckpt(tmp_path: Path) -> Checkpoint:
    leaf = TensorLeaf(Extent.contiguous("state.bin", 3, (2, 2), "int16"))
    inline = TensorLeaf(Extent.contiguous("", 0, (3,), "uint32"), numpy=True, inline=bytes(range(12)))
    catalog, store = make(
        str(tmp_path),
        {
            "embed.weight": {"value": torch.ones(3, 2), "exp_avg": torch.zeros(3, 2)},
            "block.norm.bias": {"value": torch.ones(2, dtype=torch.bfloat16)},
            "calls": {"value": torch.tensor(5)},
        },
        kinds={"calls": "buffer"},
        steps={"embed.weight": 6.0},
        ties={"head.weight": "embed.weight"},
        groups=[(["embed.weight"], {"lr": 0.1})],
        state={"rng": {"cuda": [leaf, 1], "numpy": ("MT19937", inline)}, "args": Opaque("argparse", "Namespace")},
    )
    store.put("state.bin", b"abc" + torch.arange(4, dtype=torch.int16).numpy().tobytes())
    return Checkpoint(catalog, store)


def test_a_checkpoint_is_a_mapping(ckpt: Checkpoint) -> None:
    assert list(ckpt) == list(ckpt.names) == ["embed.weight", "block.norm.bias", "calls"]
    assert len(ckpt) == 3
    assert "head.weight" in ckpt
    assert "nothing" not in ckpt
    assert ckpt.get("nothing") is None
    assert ckpt.get("calls").kind == "buffer"
    assert ckpt.step == 7
    assert ckpt.param_groups[0].options == {"lr": 0.1}
    assert {name: dict(entry).keys() for name, entry in ckpt.items()} == {
        "embed.weight": {"value", "exp_avg", "step"},
        "block.norm.bias": {"value"},
        "calls": {"value"},
    }


def test_an_alias_is_the_tensor_that_it_shares(ckpt: Checkpoint) -> None:
    assert ckpt["head.weight"].name == "embed.weight"
    assert torch.equal(ckpt["head.weight"]["value"][...], torch.ones(3, 2))


def test_scalars_are_tensors_without_dims(ckpt: Checkpoint) -> None:
    step = ckpt["embed.weight"]["step"]
    assert torch.equal(step[...], torch.tensor(6.0))
    assert step[...].dtype == step.dtype == torch.float32
    assert ckpt["embed.weight"].scalars == {"step": 6.0}


def test_what_is_not_there_is_named_with_its_neighbours(ckpt: Checkpoint) -> None:
    with pytest.raises(ucp.NotFoundError, match=r"embd\.weight") as missing:
        ckpt["embd.weight"]
    assert "embed.weight" in str(missing.value.hint)
    with pytest.raises(ucp.NotFoundError, match="exp_avg_sq") as missing:
        ckpt["embed.weight"]["exp_avg_sq"]
    assert missing.value.hint == "it has: value exp_avg step"


def test_state_dict_loads_into_a_module_and_shares_ties(ckpt: Checkpoint) -> None:
    state = ckpt.state_dict()
    assert state.keys() == {"embed.weight", "block.norm.bias", "calls", "head.weight"}
    assert state["head.weight"] is state["embed.weight"]
    assert ckpt.state_dict(prefix="block.").keys() == {"norm.bias"}
    assert ckpt.state_dict("exp_avg").keys() == {"embed.weight", "head.weight"}


def test_training_state_is_a_tree_with_lazy_tensors(ckpt: Checkpoint) -> None:
    rng = ckpt.state["rng"]
    assert torch.equal(rng["cuda"][0][...], torch.tensor([[0, 1], [2, 3]], dtype=torch.int16))
    assert rng["cuda"][1] == 1
    assert isinstance(rng["numpy"], tuple)
    assert bits(rng["numpy"][1][1:]) == bytes(range(4, 12))
    assert ckpt.state["args"].path == "argparse.Namespace"


def test_a_tree_without_end_is_refused(ckpt: Checkpoint) -> None:
    endless: list[Any] = []
    endless.append(endless)
    catalog, store = make("memory://endless", {"x": {"value": torch.ones(1)}}, state={"client": endless})
    with pytest.raises(ucp.CorruptError, match="client"):
        Checkpoint(catalog, store).state  # noqa: B018


def test_a_part_of_the_state_can_be_handed_on(ckpt: Checkpoint) -> None:
    rng = ckpt.read_state("rng")
    assert torch.equal(rng["cuda"][0], torch.arange(4, dtype=torch.int16).reshape(2, 2))
    assert rng["cuda"][1] == 1
    kind, keys = rng["numpy"]
    assert (kind, type(keys).__name__, keys.dtype) == ("MT19937", "ndarray", "uint32")
    assert keys.tolist() == [0x03020100, 0x07060504, 0x0B0A0908]
    with pytest.raises(ucp.NotFoundError, match="no 'sampler'") as no:
        ckpt.read_state("sampler")
    assert "rng args" in str(no.value.hint)


def test_everything_travels_to_workers(tmp_path: Path, ckpt: Checkpoint) -> None:
    truth = tensor_of((4, 5), torch.float32)
    catalog, store = make(str(tmp_path / "other"), {"x": {"value": truth}}, steps={"x": 3.0}, state=ckpt.catalog.state)
    store.put("state.bin", bytes(100))
    other = Checkpoint(catalog, store)
    other.state  # noqa: B018  kept on the object from now on
    again = pickle.loads(pickle.dumps(other))
    lazy, step, keys = pickle.loads(
        pickle.dumps([other["x"]["value"], other["x"]["step"], other.state["rng"]["numpy"][1]])
    )
    assert torch.equal(again["x"]["value"][1:], truth[1:])
    assert torch.equal(lazy[1:], truth[1:])
    assert step[...] == 3
    assert keys[0] == 0x03020100


def test_reprs_show_the_essentials(ckpt: Checkpoint) -> None:
    assert "handmade, step 7, 3 tensors" in repr(ckpt)
    assert "states: value exp_avg step" in repr(ckpt["embed.weight"])
    assert repr(ckpt["calls"]["value"]) == "LazyTensor('calls[value]', [], int64)"


def test_closing_keeps_it_usable(ckpt: Checkpoint) -> None:
    with ckpt as same:
        assert same is ckpt
    assert torch.equal(ckpt["calls"]["value"][...], torch.tensor(5))


def test_opening_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ucp.NotFoundError, match="no such folder"):
        ucp.open(str(tmp_path / "nothing"))


def test_using_the_mapping_loads_torch_only_for_data(tmp_path: Path) -> None:
    program = """
import sys, ucp
ckpt = ucp.Checkpoint(ucp.Catalog("memory://x", ucp.Source("x", "1", ucp.Mesh({})), {}, {}), None)
repr(ckpt), len(ckpt), ckpt.state
assert not {"torch", "zarr"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_place_with_two_checkpoints_is_not_chosen_from(tmp_path):
    """Two jobs that save in different forms to one place at the same time both put their root."""
    model = torch.nn.Linear(3, 2)
    for form in ("native", "universal"):
        ucp.save(model, str(tmp_path / form), form=form)
    both = tmp_path / "both"
    for form in ("native", "universal"):
        shutil.copytree(tmp_path / form, both, dirs_exist_ok=True)
    with pytest.raises(ConflictError, match="holds two checkpoints") as caught:
        ucp.open(both)
    assert "--family" in caught.value.hint
    for form in ("native", "universal"):
        assert ucp.open(both, family=form).family == form
