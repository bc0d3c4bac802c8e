"""Run every layout from every other, and write the page and the picture: ``python -m tests.layouts [folder]``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ucp
from tests.layouts.figure import Curve, Panel, figure
from tests.layouts.jobs import BEFORE
from tests.layouts.layouts import LAYOUTS
from tests.layouts.results import Resumed, Saved, everything

DOCS = Path(__file__).parents[2] / "docs"
ONE = "PP 2 × FSDP2 2 × TP 2"
MANY = ("DDP on 2", "FSDP1 on 3", "FSDP2 4 × TP 2", "PP 4", "ZeRO-2 on 3", "ZeRO-3 on 4")

_PAGE = """\
# Saved in one layout, gone on with in another

Every job below is saved by `ucp.save` after {before} steps and gone on with by `ucp.load` in each of the layouts, by
real processes over gloo: torch's DDP, FSDP1 (flat parameters and original ones), FSDP2, HSDP, tensor, expert and
pipeline parallelism and their products, and DeepSpeed's ZeRO engines. The model is the same small transformer with
experts, and the batches are the same.

- **Every state is the same, bit for bit.** What a job has loaded it saves again, and the two checkpoints are compared:
  all {tensors} parameters, both moments, steps and hyper-parameters. {pairs} pairs, {wrong} with any difference.
- **Losses go on as if never interrupted.** The table has the largest relative difference of the {after} losses after
  the checkpoint from those of the job that was not interrupted: all of it is the order in which layouts sum up in
  float32. `0` means that every digit is the same.

![Losses over steps: one job gone on with in many layouts, and many in one](layouts.svg)

(a) is a job of 8 ranks, pipeline 2 × FSDP2 2 × tensor parallel 2, gone on with in other layouts; (b) are jobs in
others, gone on with in that one, as in the figures of [Lian et al.](https://arxiv.org/abs/2406.18820). The page and the
picture are made by `python -m tests.layouts`.

Rows have saved, columns have gone on; the number of a column is that of its row.

{table}
"""


def page(sources: Mapping[str, Saved], found: Mapping[str, Mapping[str, Resumed]]) -> str:
    """The page, from what was measured."""
    names = list(sources)
    head = ["saved by", *(str(number) for number, _ in enumerate(names, 1))]
    rows = [
        [f"{number}. {name}", *(_cell(found[target][name], sources[name]) for target in names)]
        for number, name in enumerate(names, 1)
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    results = [result for by_source in found.values() for result in by_source.values()]
    return _PAGE.format(
        before=BEFORE,
        after=len(sources[names[0]].after),
        tensors=len(ucp.open(sources[names[0]].url)),
        pairs=len(results),
        wrong=sum(bool(result.differences) for result in results),
        table=table,
    )


def _cell(result: Resumed, source: Saved) -> str:
    if result.differences:
        return "**differs**"
    drift = result.drift(source.after)
    return f"{drift:.0e}".replace("e-0", "e-") if drift else "0"


def picture(sources: Mapping[str, Saved], found: Mapping[str, Mapping[str, Resumed]]) -> str:
    """Figures (a) and (b)."""
    one = sources[ONE]
    a = [Curve(f"{ONE}, until its checkpoint", 0, one.before, 0)]
    a += [Curve(f"gone on with: {name}", BEFORE, found[name][ONE].losses, 1 + n) for n, name in enumerate(MANY)]
    b = [Curve(f"{name}, until its checkpoint", 0, sources[name].before, n) for n, name in enumerate(MANY)]
    b += [Curve(f"gone on with, from {name}", BEFORE, found[ONE][name].losses, n) for n, name in enumerate(MANY)]
    return figure(
        [Panel("(a) one source, many targets", BEFORE, a), Panel(f"(b) many sources, one target: {ONE}", BEFORE, b)]
    )


def main(arguments: Sequence[str]) -> None:
    """Write both files, or fail if any pair is not the same."""
    with tempfile.TemporaryDirectory() as scratch:
        sources, found = everything(Path(arguments[0] if arguments else scratch), LAYOUTS)
        (DOCS / "layouts.md").write_text(page(sources, found), encoding="utf-8")
        (DOCS / "layouts.svg").write_text(picture(sources, found), encoding="utf-8")
    wrong = [f"{target} from {name}" for target, by in found.items() for name, one in by.items() if one.differences]
    if wrong:
        sys.exit("not the same: " + ", ".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
