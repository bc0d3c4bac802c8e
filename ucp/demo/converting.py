"""The demo's conversions, run as a user would run them."""

from __future__ import annotations

from ucp.run.convert import convert


def converted(source: str, destination: str, *, to: str = "universal") -> str:
    """Convert and say so in a line."""
    report = convert(source, destination, to=to)
    option = "" if to == "universal" else f" --to {to}"
    megabytes = report.bytes_written / 1e6
    return f"ucp convert {source} {destination}{option}: {megabytes:.1f} MB in {report.seconds:.2f} s"
