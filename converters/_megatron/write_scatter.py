"""The tensors of a catalog as Megatron-Core's programs cut and name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Sharded
from ucp.errors import FitError
from ucp.lang import Program, load_program
from ucp.lang.export import export
from ucp.lang.solve import Cuts
from ucp.layout import Mesh
from ucp.mapping import scatter
from ucp.plan import Key

from .write_choice import FAMILY, Choice

_DENSE_AXES = ("pp", "vpp", "tp", "dp")
_EXPERT_AXES = ("pp", "vpp", "tp", "dp", "ep", "etp", "edp")
_NORM = re.compile(r"(decoder\.layers\.\d+\.)pre_mlp_layernorm\.(weight|bias)")
_PROGRAM = re.compile(r"--(size|flag) ")


def scattered(catalog: Catalog, choice: Choice) -> Sharded:
    """What each model-parallel rank holds, or the whole under the keys of torch_dist.

    FitError for sizes that the ranks do not divide, also where files hold the whole.
    """
    with _of_the_target():
        if choice.form == "legacy":
            parts = _scatter(catalog, choice, mesh=_mesh(choice), coordinates=coordinates(choice), cuts=_cuts(choice))
        else:
            _check_cuts(catalog, choice)
            parts = _scatter(catalog, choice, mesh=Mesh({}), coordinates=[{}])
    if not (choice.te and choice.moe and not choice.alike):
        return parts
    return replace(parts, parts=[(at, _engine_norms(part)) for at, part in parts.parts])


def coordinates(choice: Choice) -> list[dict[str, int]]:
    """Every model chunk of every model-parallel rank, the chunks of a rank side by side.

    Ranks of experts are cut like the rest; copies along dp and edp make no difference.
    """
    degrees = choice.degrees
    found = [
        {"pp": pp, "tp": tp, "ep": ep, "vpp": vpp, "etp": tp, "dp": 0, "edp": 0}
        for pp in range(degrees["pp"])
        for tp in range(degrees["tp"])
        for ep in range(degrees["ep"])
        for vpp in range(degrees["vpp"])
    ]
    axes = _EXPERT_AXES if choice.moe else _DENSE_AXES
    return [{axis: index for axis, index in at.items() if axis in axes} for at in found]


def _mesh(choice: Choice) -> Mesh:
    degrees = {**choice.degrees, "dp": 1, "edp": 1}
    return Mesh({axis: degrees[axis] for axis in (_EXPERT_AXES if choice.moe else _DENSE_AXES)})


def _cuts(choice: Choice) -> Cuts:
    """Where stages begin, if they differ."""
    return {("l", ("vpp", "pp")): (0, *accumulate(choice.stages))} if choice.stages else {}


def _scatter(catalog: Catalog, choice: Choice, **where: Any) -> Sharded:
    return scatter(
        catalog, choice.program, sizes=choice.sizes, config=choice.config, flags=choice.known(choice.program), **where
    )


def _check_cuts(catalog: Catalog, choice: Choice) -> None:
    """That the ranks which are to load the files can cut what is in them: the first and the last are looked at.

    Not layers: Megatron-LM has stages of different depth too.
    """
    choice = replace(choice, degrees={**choice.degrees, "pp": 1, "vpp": 1})
    if all(n == 1 for n in choice.degrees.values()):
        return
    program: Program = load_program("megatron_core_moe" if choice.moe else "megatron_core_gpt")
    exporter = export(
        program,
        {name: tensor.states["value"].shape for name, tensor in catalog.tensors.items()},
        mesh=_mesh(choice),
        sizes={**choice.sizes, "divisible": choice.divisible},
        config=choice.config,
        flags=choice.known(program),
        ties=catalog.ties,
    )
    last = {axis: size - 1 for axis, size in _mesh(choice).axes}
    for _ in exporter.shards([dict.fromkeys(last, 0), last]):
        pass


@contextmanager
def _of_the_target() -> Iterator[None]:
    """Hints speak of the result's program, whose options have names of their own."""
    try:
        yield
    except FitError as error:
        hint = _PROGRAM.sub(r"--to-\1 ", error.hint) if error.hint else None
        raise type(error)(f"{FAMILY}: {error.message}", hint=hint) from error


def _engine_norms(part: Catalog) -> Catalog:
    """Transformer Engine's dense layers have the norm before the MLP in its first linear layer, others by itself.

    A program knows one spelling for all layers (megatron/core/models/gpt/gpt_layer_specs.py,
    ``get_gpt_layer_with_transformer_engine_spec``).
    """
    names = {name: _engine_norm(name, part) for name in part.tensors}
    groups = tuple(replace(group, params=tuple(names[name] for name in group.params)) for group in part.param_groups)

    def keyed(held: Mapping[Key, Any]) -> dict[Key, Any]:
        return {Key(names[key.name], key.state): value for key, value in held.items()}

    return replace(
        part,
        tensors={names[name]: replace(tensor, name=names[name]) for name, tensor in part.tensors.items()},
        fragments=keyed(part.fragments),
        views=keyed(part.views),
        reductions=keyed(part.reductions),
        witnesses={names[name]: witness for name, witness in part.witnesses.items()},
        param_groups=groups,
    )


def _engine_norm(name: str, part: Catalog) -> str:
    match = _NORM.fullmatch(name)
    if match is None or f"{match[1]}mlp.linear_fc1.weight" not in part.tensors:
        return name
    return f"{match[1]}mlp.linear_fc1.layer_norm_{match[2]}"
