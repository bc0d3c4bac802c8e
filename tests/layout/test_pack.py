"""Flat buffers of many parameters: against a list of elements, against known layouts, against real checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.converters.deepspeed.oracle import load_truth
from ucp.container.torchfile import leaf_numpy, read_torch_file
from ucp.errors import FitError
from ucp.lang import parse
from ucp.lang.ast import Pack
from ucp.layout import FlatRange, LayoutError, Mesh, Setting
from ucp.layout.expr import Expr
from ucp.layout.pack import Buffer, Packed, compile_pack
from ucp.store import open_store

STAGE_1 = "(*param + _ align 2*dp)/dp"
STAGE_3 = "*((param + _)/dp)"
BUCKET = "(*(param + _ align 64) + _ align 128)/dp"
CORPUS = Path(__file__).parents[3] / "shared" / "corpus" / "cases"
needs_corpus = pytest.mark.skipif(
    not CORPUS.is_dir(), reason="the corpus of real checkpoints is not beside this repository"
)


def pack(text: str) -> Expr:
    (statement,) = [s for s in parse(f"format 1\nmesh dp tp\npack flat [{text}]\n").statements if isinstance(s, Pack)]
    return statement.expr


def buffers(text: str, sizes: list[int], dp: int, **more: Any) -> list[Buffer]:
    at = Setting(Mesh({"dp": dp}), {})
    return [compile_pack(pack(text), sizes, setting=at, coordinate={"dp": rank}, **more) for rank in range(dp)]


def elements(buffer: Buffer) -> list[tuple[int, int] | None]:
    """The buffer element by element: (parameter, element of it), None for padding."""
    found: list[tuple[int, int] | None] = [None] * buffer.length
    for part in buffer.parts:
        for k in range(part.range.length):
            assert found[part.offset + k] is None
            found[part.offset + k] = (part.param, part.range.start + k)
    return found


def padded(row: list[Any], multiple: int) -> list[Any]:
    return row + [None] * (-len(row) % multiple)


sizes = st.lists(st.integers(0, 9), max_size=6)


@given(sizes, st.integers(1, 5), st.booleans())
def test_stage_1_is_one_flat_tensor_cut(numbers: list[int], dp: int, reverse: bool) -> None:
    order = list(range(len(numbers)))[:: -1 if reverse else 1]
    flat = padded([(k, i) for k in order for i in range(numbers[k])], 2 * dp)
    each = len(flat) // dp
    found = buffers(STAGE_1, numbers, dp, reverse=reverse)
    assert [elements(buffer) for buffer in found] == [flat[r * each : (r + 1) * each] for r in range(dp)]


@given(sizes, st.integers(1, 5))
def test_stage_3_cuts_each_parameter(numbers: list[int], dp: int) -> None:
    for rank, buffer in enumerate(buffers(STAGE_3, numbers, dp)):
        flat: list[tuple[int, int] | None] = []
        for k, n in enumerate(numbers):
            whole = padded([(k, i) for i in range(n)], dp)
            flat += whole[rank * len(whole) // dp : (rank + 1) * len(whole) // dp]
        assert elements(buffer) == flat


@given(st.lists(st.integers(1, 200), max_size=5), st.sampled_from([1, 2, 3, 4]))
def test_buckets_align_each_parameter_and_the_end(numbers: list[int], dp: int) -> None:
    flat: list[Any] = []
    for k in reversed(range(len(numbers))):
        flat = padded(flat + [(k, i) for i in range(numbers[k])], 64)
    flat = padded(flat, math.lcm(dp, 128))
    each = len(flat) // dp
    found = buffers(BUCKET, numbers, dp, reverse=True)
    assert [elements(buffer) for buffer in found] == [flat[r * each : (r + 1) * each] for r in range(dp)]


def test_an_example_by_hand() -> None:
    first, second = buffers(STAGE_1, [40, 25], 2)
    assert first == Buffer(34, (Packed(0, FlatRange(0, 34), 0),))
    assert second == Buffer(34, (Packed(0, FlatRange(34, 6), 0), Packed(1, FlatRange(0, 25), 6)))
    thirds = buffers(STAGE_3, [1024], 3)
    assert [buffer.parts[0].range for buffer in thirds] == [FlatRange(0, 342), FlatRange(342, 342), FlatRange(684, 340)]
    assert [buffer.length for buffer in thirds] == [342] * 3


def test_a_saved_buffer_may_lack_padding_or_have_more() -> None:
    at = Setting(Mesh({"dp": 2}), {})
    expr = pack(STAGE_1)
    lean = compile_pack(expr, [40, 25], setting=at, coordinate={"dp": 1}, saved=31)
    assert (lean.length, lean.parts[-1]) == (31, Packed(1, FlatRange(0, 25), 6))
    more = compile_pack(expr, [40, 25], setting=at, coordinate={"dp": 1}, saved=36)
    assert more == Buffer(36, (Packed(0, FlatRange(36, 4), 0), Packed(1, FlatRange(0, 25), 4)))
    with pytest.raises(FitError, match="has 30 elements, but"):
        compile_pack(expr, [40, 25], setting=at, coordinate={"dp": 1}, saved=30)
    with pytest.raises(FitError, match="has 34 elements, but"):
        compile_pack(pack(STAGE_3), [40, 25], setting=at, coordinate={"dp": 1}, saved=34)


@pytest.mark.parametrize("text", ["param", "*hidden", "*(param param)", "(*param)@dp", "*(param + _ + _)", "_"])
def test_what_is_no_pack_is_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        buffers(text if text != "_" else "_ + _", [4], 2)


def test_a_cut_that_is_not_even_is_refused() -> None:
    with pytest.raises(FitError, match="size 5, which `/dp` of 2 ranks"):
        buffers("(*param)/dp", [5], 2)


def test_many_parameters_on_many_ranks_are_quick() -> None:
    found = buffers(STAGE_1, [1_000_000 + k for k in range(3000)], 512)
    assert sum(part.range.length for buffer in found for part in buffer.parts) == sum(range(3000)) + 3_000_000_000
    assert max(len(buffer.parts) for buffer in found) < 10


# Parameters of a Llama of four layers at tp 2 in the order of the model: embedding; per layer the norm before
# attention, the output projection, QKV, the norm before the MLP, gate and up, down; last norm, output layer.
LLAMA = [2688, *[48, 1152, 2304, 48, 3648, 1824] * 4, 48, 2688]


def test_a_bucket_of_megatron() -> None:
    first, second = buffers(BUCKET, LLAMA, 2, reverse=True)
    assert first.length == second.length == 20928
    assert [(part.offset, part.range.length) for part in first.parts[:6]] == [
        (0, 2688), (2688, 48), (2752, 1824), (4608, 3648), (8256, 48), (8320, 2304),
    ]  # fmt: skip
    assert second.parts[0] == Packed(12, FlatRange(0, 1824), 0)


@needs_corpus
def test_a_bucket_that_megatron_saved() -> None:
    from torch.distributed.checkpoint import FileSystemReader

    case = CORPUS / "mc_tp2dp2_llama_bf16_distopt" / "ckpt_dp_reshardable" / "iter_0000005"
    metadata = FileSystemReader(case).read_metadata().state_dict_metadata
    (name, *_) = [name for name in metadata if name.endswith("bucket_idx_0.param")]
    saved = {(chunk.offsets[0], chunk.sizes[0]) for chunk in metadata[name].chunks}
    found = buffers(BUCKET, LLAMA, 2, reverse=True)
    ours = {(rank * 20928 + part.offset, part.range.length) for rank, b in enumerate(found) for part in b.parts}
    assert ours <= saved
    # The rest of what was saved are the gaps between parameters.
    assert all(size < 64 for _, size in saved - ours)
    assert sum(size for _, size in saved) == metadata[name].size[0]


@needs_corpus
@pytest.mark.parametrize(
    "name",
    ["ds_z1_fp32_dp2", "ds_z1_bf16_dp2", "ds_z2_fp32_dp4", "ds_z2_bf16_dp4_rr", "ds_z3_fp32_dp4", "ds_z3_bf16_dp2"],
)
def test_flat_buffers_that_deepspeed_saved(name: str) -> None:
    """The values in every rank's buffer are those of the parameters' elements that are said to lie there."""
    layout = json.loads((CORPUS / name / "case.json").read_text())["layout"]
    truth = load_truth(CORPUS / name / "truth.safetensors")
    folder = next((CORPUS / name / "ckpt").glob("global_step*"))
    text = STAGE_3 if layout["zero"] == 3 else STAGE_1
    at = Setting(Mesh({"dp": layout["dp"]}), {})
    groups = shapes(folder)
    assert len(groups) == 2
    for rank in range(layout["dp"]):
        for number, group in enumerate(groups):
            saved = moments(folder, rank, number)
            values = [truth[f"exp_avg/{key}"][1].view(np.float32).reshape(-1) for key in group]
            found = compile_pack(
                pack(text), [v.size for v in values], setting=at, coordinate={"dp": rank}, saved=saved.size
            )
            assert sum(part.range.length for part in found.parts) > 0
            for part in found.parts:
                held = saved[part.offset : part.offset + part.range.length]
                assert np.array_equal(held, values[part.param][part.range.start : part.range.stop])


def shapes(folder: Path) -> list[list[str]]:
    """Names of the parameters of each group in their recorded order."""
    file = next(folder.glob("*mp_rank_00_model_states.pt"))
    return [list(group) for group in read_torch_file(open_store(str(folder)), file.name).root["param_shapes"]]


def moments(folder: Path, rank: int, group: int) -> np.ndarray:
    """The first moments of a group, as `rank` holds them."""
    (file,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    store = open_store(str(folder))
    state = read_torch_file(store, file.name).root["optimizer_state_dict"]
    state = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    return leaf_numpy(store, state["state"][group]["exp_avg"]).reshape(-1)
