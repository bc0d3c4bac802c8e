"""The shards of two large jobs as every rank holds them, by name, shape and coordinate, and no byte of them.

Sizes: Llama 3.1 405B (arXiv 2407.21783, table 3) and DeepSeek-V3 (arXiv 2412.19437, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ucp.lang import Program, load_program
from ucp.lang.held import Held
from ucp.layout import Mesh, Shape

Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True, slots=True)
class Job:
    """A program and its flags, a mesh, sizes of the configuration, and what each rank holds."""

    program: Program
    mesh: Mesh
    held: list[Held]
    flags: Mapping[str, bool]
    config: Mapping[str, int]
    parameters: int
    """Elements of all logical tensors."""


def dense(*, dp: int) -> Job:
    """405B: TP 8, PP 16 with four chunks of layers per stage, `dp` replicas of everything.

    126 layers on 64 chunks: the first and the last chunk have one layer, as embedding and loss count as one each.
    """
    mesh = Mesh({"pp": 16, "vpp": 4, "tp": 8, "dp": dp})
    layers = (0, *range(1, 126, 2), 126)
    held = []
    for coordinate in mesh.coordinates():
        chunk = coordinate["vpp"] * 16 + coordinate["pp"]
        shards = _dense_chunk(layers[chunk + 1] - layers[chunk], first=chunk == 0, last=chunk == 63)
        held += [Held(name, shape, "bfloat16", coordinate) for name, shape in shards]
    config = {"vocab": 128256, "groups": 8, "d": 128, "r": 16}
    flags = {"tied": False, "swiglu": True}
    return Job(load_program("megatron_core_gpt"), mesh, held, flags, config, 405_853_388_800)


def _dense_chunk(layers: int, *, first: bool, last: bool) -> Named:
    hidden, ffn, vocab = 16384, 53248 // 8, 129024 // 8
    if first:
        yield "embedding.word_embeddings.weight", (vocab, hidden)
    for layer in range(layers):
        start = f"decoder.layers.{layer}."
        yield start + "input_layernorm.weight", (hidden,)
        yield start + "self_attention.linear_qkv.weight", ((16 + 2) * 128, hidden)
        yield start + "self_attention.linear_proj.weight", (hidden, 16 * 128)
        yield start + "pre_mlp_layernorm.weight", (hidden,)
        yield start + "mlp.linear_fc1.weight", (2 * ffn, hidden)
        yield start + "mlp.linear_fc2.weight", (hidden, ffn)
    if last:
        yield "decoder.final_layernorm.weight", (hidden,)
        yield "output_layer.weight", (vocab, hidden)


def moe(*, dp: int) -> Job:
    """671B: PP 16, EP 64, `dp` replicas of everything. 61 layers on 16 stages: the last three have one layer less."""
    mesh = Mesh({"pp": 16, "ep": 64, "dp": dp})
    layers = (*range(0, 53, 4), 55, 58, 61)
    held = []
    for coordinate in mesh.coordinates():
        span = list(pairwise(layers))[coordinate["pp"]]
        held += [Held(name, shape, "bfloat16", coordinate) for name, shape in _moe_stage(range(*span))]
    path = Path(__file__).with_name("deepseek.ucp")
    config = {"vocab": 129280, "heads": 128, "nope": 128, "v": 128, "rope": 64, "kv_rank": 512}
    return Job(load_program(path), mesh, held, {}, config, 671_026_419_200)


def _moe_stage(layers: range) -> Named:
    hidden, vocab = 7168, 129280
    if layers.start == 0:
        yield "embedding.word_embeddings.weight", (vocab, hidden)
    for layer in layers:
        start = f"decoder.layers.{layer - layers.start}."
        yield start + "input_layernorm.weight", (hidden,)
        yield start + "pre_mlp_layernorm.weight", (hidden,)
        yield from ((f"{start}self_attention.{name}.weight", shape) for name, shape in _LATENT.items())
        inner = ((f"{start}mlp.{name}", shape) for name, shape in (_DENSE if layer < 3 else _SPARSE).items())
        yield from inner
    if layers.stop == 61:
        yield "decoder.final_layernorm.weight", (hidden,)
        yield "output_layer.weight", (vocab, hidden)


_LATENT = {
    "linear_q_down_proj": (1536, 7168),
    "q_layernorm": (1536,),
    "linear_q_up_proj": (128 * (128 + 64), 1536),
    "linear_kv_down_proj": (512 + 64, 7168),
    "kv_layernorm": (512,),
    "linear_kv_up_proj": (128 * (128 + 128), 512),
    "linear_proj": (7168, 128 * 128),
}
_DENSE = {"linear_fc1.weight": (2 * 18432, 7168), "linear_fc2.weight": (7168, 18432)}
_SPARSE = {
    "router.weight": (256, 7168),
    "router.expert_bias": (256,),
    **{f"experts.local_experts.{e}.linear_fc1.weight": (2 * 2048, 7168) for e in range(4)},
    **{f"experts.local_experts.{e}.linear_fc2.weight": (7168, 2048) for e in range(4)},
    "shared_experts.linear_fc1.weight": (2 * 2048, 7168),
    "shared_experts.linear_fc2.weight": (7168, 2048),
}
