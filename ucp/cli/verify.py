"""``ucp verify``: is a checkpoint whole, and does it say the same as another."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ucp.cli import text
from ucp.cli.command import Reading, reading_options
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.progress import shown
from ucp.errors import ContentError, UsageError

if TYPE_CHECKING:
    from ucp.run.verify import Verdict

KEYS = {
    "url": "where the checkpoint lies",
    "against": "URL of the other checkpoint, or null",
    "deep": "whether everything was read and checked",
    "training_state": "whether the training state beside the tensors was compared",
    "ok": "whether nothing is wrong; the exit code is then 0, else 6",
    "findings": "list of what is wrong: `where` (tensor, state or object), `message`, and `kind`: `incomplete`, "
    "`missing-object`, `object-size`; with --deep `checksum`, `shared` (a shared object has another content than its "
    "name says), `low-precision-copy`, `replica`, or the error code of a failed read; with --against `step`, "
    "`tensor`, `kind`, `state`, `form` (dtype or shape), `scalar`, `option`, `data`, `training-state`",
    "bytes_read": "bytes of data read",
    "checksums": "number of digests that were set against the bytes",
    "low_precision_copies": "number of copies that were compared with their tensor",
    "replicas": "number of replicas that were compared",
    "nan": "object: number of NaN by `name[state]`, where there are any (deep only)",
    "inf": "object: number of infinite elements by `name[state]`, where there are any (deep only)",
}


@declare("verify", json_keys=KEYS)
@click.argument("url")
@click.option("--deep", is_flag=True, help="Read everything: digests, low-precision copies, replicas, NaN and Inf.")
@click.option("--against", metavar="URL", help="Compare with this checkpoint of any family, bit for bit.")
@click.option("--training-state", is_flag=True, help="With --against: compare what `ucp state` shows, too.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; the number of cores by default.")
@reading_options
def command(
    out: Output,
    url: str,
    deep: bool,
    against: str | None,
    training_state: bool,
    workers: int | None,
    reading: Reading,
) -> None:
    """Check that a checkpoint is whole, or equals another.

    Lists what is wrong, and leaves with exit code 6 then. Without options, metadata and the sizes of objects are
    checked. --against compares step, tensors, states, hyper-parameters and every byte; --family, --tag,
    -o and --spec are for the first URL alone, so that what was converted through a program is compared
    with `ucp verify SOURCE --spec PROGRAM --against RESULT`. NaN and infinite elements are reported and
    are no fault.
    """
    from ucp.run.verify import verify

    if training_state and against is None:
        raise UsageError("--training-state needs --against", hint="`ucp verify --help` shows what is possible")
    side = reading.catalog(url)
    with shown(out, "verifying") as show:
        verdict = verify(*side, deep=deep, workers=workers, on_progress=show)
    if against is not None:
        from ucp.run.compare import compare

        other = Reading().catalog(against)
        with shown(out, "comparing") as show:
            verdict.take(compare(side, other, training_state=training_state, workers=workers, on_progress=show))
    if out.mode == "json":
        out.json(_document(side[0].url, against, deep, training_state, verdict))
    else:
        _print(out, side[0].url, against, deep, verdict)
    if not verdict.ok:
        _fail(out, side[0].url, against, verdict)


def _document(url: str, against: str | None, deep: bool, training_state: bool, verdict: Verdict) -> dict[str, Any]:
    return {
        "url": url,
        "against": against,
        "deep": deep,
        "training_state": training_state,
        "ok": verdict.ok,
        "findings": [{"kind": f.kind, "where": f.where, "message": f.message} for f in verdict.findings],
        "bytes_read": verdict.bytes_read,
        "checksums": verdict.checksums,
        "low_precision_copies": verdict.witnesses,
        "replicas": verdict.replicas,
        "nan": verdict.nan,
        "inf": verdict.inf,
    }


def _print(out: Output, url: str, against: str | None, deep: bool, verdict: Verdict) -> None:
    for finding in verdict.findings:
        out.line((finding.kind, "red"), "  ", (finding.where, "bold"), "  ", finding.message)
    if not out.human:
        return
    for word, counts in (("NaN", verdict.nan), ("infinite", verdict.inf)):
        for where, count in counts.items():
            out.line((word, "yellow"), "  ", (where, "bold"), f"  {text.plural(count, 'element')}")
    if verdict.ok:
        out.line(("ok", "green"), f"  {url}", f"  equals {against}" if against else "", f"  {_done(deep, verdict)}")
    if verdict.ok and not deep and against is None:
        out.hint("--deep reads and checks every byte")


def _done(deep: bool, verdict: Verdict) -> str:
    parts = ["metadata and sizes"]
    if deep:
        parts += [
            text.plural(verdict.checksums, "digest"),
            text.plural(verdict.witnesses, "low-precision copy", "low-precision copies"),
            text.plural(verdict.replicas, "replica"),
        ]
    return f"({', '.join(parts)}; {text.size(verdict.bytes_read)} read)"


def _fail(out: Output, url: str, against: str | None, verdict: Verdict) -> None:
    """Leave with the exit code of differing content; in JSON mode the document has said it all."""
    if out.mode == "json":
        sys.exit(ContentError.exit_code)
    count = text.plural(len(verdict.findings), "difference" if against else "problem")
    raise ContentError(
        f"{url}: {count}",
        hint="`ucp repair URL --from COPY` puts damaged objects right"
        if not against
        else f"`ucp show URL TENSOR --stats` looks closer; the other checkpoint is {against}",
    )
