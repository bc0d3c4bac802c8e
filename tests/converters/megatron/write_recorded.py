"""What a job's ranks recorded, as a catalog of logical tensors: a source that no reader of Megatron's files made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.converters.megatron.write_support import Ran
from tests.programs.megatron.models import axes, cuts, flags, program, sizes
from tests.support.megatron import Grid
from ucp.catalog import Catalog, ParamGroup, Scalar, Source, Tensor
from ucp.container.safetensors import read_header
from ucp.container.torchfile import read_torch_file
from ucp.converter import Layout
from ucp.converters._megatron.target import make_target
from ucp.layout import Box, Mesh
from ucp.mapping import consolidate
from ucp.plan import Extent, Fragment, Key, Plan, TensorSpec
from ucp.run.convert import Conversion, carry_out
from ucp.run.destination import Wanted
from ucp.store import Store, open_store


def recorded(ran: Ran, *, step: int, checkpoint: Path | None = None) -> tuple[Catalog, Store]:
    """The logical tensors of what `ran` recorded after `step` steps, and the store they lie in.

    Arguments and schedule are those of Megatron-Core's own `checkpoint` of that moment.
    """
    state = {} if checkpoint is None else _beside(checkpoint)
    job, store = ran.job, open_store(ran.job.out)
    using = program(job.model)
    known = axes(using)
    parts = {}
    for entry in json.loads((Path(job.out) / "ranks.json").read_text()):
        at = tuple((axis, entry["at"][axis]) for axis in known)
        parts.setdefault(at, _part(store, entry["file"], ran, step, state))
    catalog = consolidate(
        [(dict(at), part) for at, part in parts.items()],
        using,
        mesh=Mesh({axis: size for axis, size in job.grid.mesh.items() if axis in known}),
        sizes=sizes(job.model),
        flags=flags(job.model),
        cuts=cuts(job.model, job.grid),
    )
    return catalog, store


def _beside(checkpoint: Path) -> dict:
    common = read_torch_file(open_store(str(checkpoint)), "common.pt").root
    args = common["args"].state
    return {
        "args": args,
        "lr_scheduler": common["opt_param_scheduler"],
        "consumed_samples": args["consumed_train_samples"],
    }


def written(catalog: Catalog, store: Store, folder: Path, grid: Grid, **options: Any) -> Path:
    """Write `catalog` for the ranks of `grid`; the folder of its one checkpoint."""
    axes = ("tp", "pp", "vpp", "ep", "etp")
    flags = {"te": False}
    sizes = {} if "args" in catalog.state else {"divisible": 8}
    if grid.first_stage is not None and options["form"] == "legacy":
        options["stages"] = ",".join(map(str, _depths(catalog, grid)))
    layout = Layout(Mesh({axis: grid.mesh[axis] for axis in axes}), None, sizes, flags)
    target = make_target(catalog, store, layout=layout, **options)
    assert target.losses == ()
    plan = Plan.of(target.tasks)
    wanted = Wanted(target, "a test's")
    carry_out(Conversion(catalog, target, plan, "megatron", store, open_store(str(folder)), wanted, "new"))
    (inside,) = (path for path in folder.iterdir() if path.is_dir())
    return inside


def _depths(catalog: Catalog, grid: Grid) -> list[int]:
    """Layers of each stage."""
    layers = len({name.split(".")[1] for name in catalog.tensors if name.startswith("layers.")})
    first = grid.first_stage or 0
    return [first, *[(layers - first) // (grid.pp - 1)] * (grid.pp - 1)]


def _part(store: Store, path: str, ran: Ran, step: int, state: dict) -> Catalog:
    file = read_header(store, path)
    tensors, fragments, witnesses = {}, {}, {}
    for key, extent in file.tensors.items():
        kind, _, name = key.partition("/")
        if kind != "value":
            continue
        trained = f"param/{name}" in file.tensors
        held = {"value": file.tensors[f"param/{name}"] if trained else extent}
        if trained:
            held |= {moment: file.tensors[f"{moment}/{name}"] for moment in ("exp_avg", "exp_avg_sq")}
        specs = {what: TensorSpec(at.shape, at.dtype) for what, at in held.items()}
        steps = {"step": Scalar(float(step), "float32")} if trained else {}
        tensors[name] = Tensor(name, "parameter" if trained else "buffer", specs, steps)
        fragments |= {Key(name, what): (_whole(at),) for what, at in held.items()}
        if trained and extent.dtype != "float32":
            witnesses[name] = TensorSpec(extent.shape, extent.dtype), (_whole(extent),)
    return Catalog(
        store.url,
        Source("recorded", "1", Mesh({})),
        tensors,
        fragments,
        step=step,
        witnesses=witnesses,
        param_groups=_groups(ran, tensors),
        state=state,
        objects={path: (file.entry.size, file.entry.fingerprint)},
    )


def _whole(extent: Extent) -> Fragment:
    return Fragment(Box.whole(extent.shape), extent)


def _groups(ran: Ran, tensors: dict[str, Tensor]) -> tuple[ParamGroup, ...]:
    """Members as Megatron-Core chooses them (megatron/core/optimizer/__init__.py, ``_get_param_groups``)."""
    members: dict[tuple[float, bool], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.kind == "parameter":
            flat = len(tensor.states["value"].shape) == 1 or name.endswith(".bias")
            expert = ran.job.grid.ep > 1 and ".mlp.experts." in name
            members.setdefault((0.0 if flat else 1.0, expert), []).append(name)
    return tuple(
        ParamGroup(tuple(members.get((group["wd_mult"], group["is_expert_parallel"]), ())), group)
        for group in ran.groups
    )
