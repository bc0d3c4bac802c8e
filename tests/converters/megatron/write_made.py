"""Catalogs of logical tensors that lie nowhere, and targets of them: what is planned, before anything is read."""

from __future__ import annotations

from ucp.catalog import Catalog, ParamGroup, ProgramRecord, Scalar, Source, Tensor
from ucp.converter import Layout
from ucp.converters._megatron.target import make_target
from ucp.lang import load_program, to_json
from ucp.layout import Box, Mesh, Shape
from ucp.plan import ZEROS, Extent, Fragment, Key, TensorSpec
from ucp.store import open_store

HEADS = {"heads": 4, "groups": 2, "r": 2, "d": 8}
OPTIONS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def llama(*, experts: int = 0, layers: int = 2) -> dict[str, Shape]:
    """Shapes of a small model's logical tensors."""
    found: dict[str, Shape] = {"embed.weight": (60, 32), "lm_head.weight": (60, 32), "norm.weight": (32,)}
    for layer in range(layers):
        inside: dict[str, Shape] = {"attn.norm.weight": (32,), "mlp.norm.weight": (32,), "attn.q.weight": (32, 32)}
        inside |= {"attn.k.weight": (16, 32), "attn.v.weight": (16, 32), "attn.o.weight": (32, 32)}
        if experts:
            inside |= {"moe.router.weight": (experts, 32), "moe.down": (experts, 32, 24)}
            inside |= {"moe.gate": (experts, 24, 32), "moe.up": (experts, 24, 32)}
        else:
            inside |= {"mlp.gate.weight": (48, 32), "mlp.up.weight": (48, 32), "mlp.down.weight": (32, 48)}
        found |= {f"layers.{layer}.{name}": shape for name, shape in inside.items()}
    return found


def source(
    shapes: dict[str, Shape], *, states: tuple[str, ...] = ("value",), dtype: str = "float32", sizes: dict | None = None
) -> Catalog:
    """A catalog of logical tensors, all of zeros."""
    steps = {"step": Scalar(5.0, "float32")} if len(states) > 1 else {}
    tensors = {
        name: Tensor(name, "parameter", {state: TensorSpec(shape, dtype) for state in states}, steps)
        for name, shape in shapes.items()
    }
    fragments = {
        Key(name, state): (Fragment(Box.whole(shape), Extent.contiguous(ZEROS, 0, shape, dtype)),)
        for name, shape in shapes.items()
        for state in states
    }
    groups = (ParamGroup(tuple(shapes), OPTIONS),) if len(states) > 1 else ()
    program = ProgramRecord(to_json(load_program("hf_llama")), Mesh({}), HEADS if sizes is None else sizes)
    return Catalog("src", Source("hf", "1", Mesh({})), tensors, fragments, program=program, param_groups=groups)


TRAINED = ("value", "exp_avg", "exp_avg_sq")


def make(catalog: Catalog, folder, mesh: dict[str, int] | None = None, *, te: bool = False, **options):
    layout = Layout(Mesh(mesh or {}), None, options.pop("sizes", {}), {"te": te})
    return make_target(catalog, open_store(str(folder)), layout=layout, **options)
