"""Why a bound program has the sizes it has: for each, the shape, name or setting that told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp.lang.bind import Bound
from ucp.lang.choose import choose
from ucp.lang.held import Held
from ucp.lang.observe import lengths, numbers
from ucp.lang.solve import Cuts, solve


def evidence(
    bound: Bound,
    held: Sequence[Held],
    *,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    cuts: Cuts | None = None,
) -> dict[str, str]:
    """What told each size of `bound`, which binds `held`; the other arguments are those it was bound with."""
    checked, mesh = bound.checked, bound.setting.mesh
    known = {**checked.defaults, **(config or {}), **(sizes or {})}
    matches, _ = choose(checked, [shard.name for shard in held], dict(bound.flags), mesh, known)
    solver = solve(
        checked.flat,
        lengths(checked, matches, held),
        numbers(checked, matches, held),
        mesh=mesh,
        sizes=sizes or {},
        config=config or {},
        cuts=cuts or {},
    )
    return {name: solver.why.get(name, "given") for name in solver.sizes}
