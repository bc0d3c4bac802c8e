"""Conformance vectors of the conversion language: what a program means at a mesh, for any implementation to compare.

A vector is a JSON document: some entries are given (program, mesh, sizes, …) and the rest is what they mean (`shards`,
`buffers` or `refused`); spec/conversion-language.md says what each entry is. ``python -m ucp.testing.vectors FILE …``
computes the second kind anew and rewrites the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ucp.errors import UcpError
from ucp.lang import parse
from ucp.lang.ast import Pack, Program
from ucp.lang.bind import bind
from ucp.lang.export import export
from ucp.lang.held import Held
from ucp.layout import Block, Mesh, Setting, View, compile_pack

Vector = dict[str, Any]
MEANING = ("shards", "buffers", "refused")
"""Entries that are computed. `refused` is the code of the error."""


def compute(vector: Mapping[str, Any]) -> Vector:
    """`vector` with its meaning computed anew."""
    given = {key: value for key, value in vector.items() if key not in MEANING}
    try:
        program = program_of(given)
        if "parameters" in given:
            return {**given, "buffers": list(_buffers(given, program))}
        return {**given, "shards": list(_saved(given, program) if "saved" in given else _shards(given, program))}
    except UcpError as error:
        return {**given, "refused": error.code}


def program_of(vector: Mapping[str, Any]) -> Program:
    """The program, which a vector holds as a list of lines."""
    return parse("\n".join(vector["program"]) + "\n", file=f"{vector['name']}.ucp")


def setting_of(vector: Mapping[str, Any]) -> dict[str, Any]:
    """Mesh, sizes, flags and recorded geometry of a vector, as the arguments of `export` and `bind`."""
    return {
        "mesh": Mesh(vector["mesh"]),
        "sizes": vector.get("sizes", {}),
        "flags": vector.get("flags", {}),
        "cuts": {(cut["dim"], tuple(cut["axes"])): tuple(cut["at"]) for cut in vector.get("cuts", [])},
        "placements": {
            (place["dim"], place["axis"]): {rank: tuple(held) for rank, held in enumerate(place["held"])}
            for place in vector.get("placements", [])
        },
    }


def read(path: Path) -> Vector:
    """A vector from its file."""
    found: Vector = json.loads(path.read_text())
    return found


def write(vector: Mapping[str, Any]) -> str:
    """A vector as text: nothing longer than a line is on one line."""
    return "".join(_lines(vector, "")) + "\n"


def _shards(given: Mapping[str, Any], program: Program) -> Iterator[Vector]:
    logical = {name: tuple(shape) for name, shape in given["logical"].items()}
    exporter = export(program, logical, **setting_of(given), ties=given.get("ties", {}))
    for coordinate in Mesh(given["mesh"]).coordinates():
        found = list(exporter.shards([coordinate], state=given.get("state", "value")))
        for shard in sorted(found, key=lambda shard: shard.name):
            blocks = [_block(wanted.name, wanted.view, wanted.block) for wanted in shard.blocks]
            yield _shard(coordinate, shard.name, shard.shape, blocks)


def _saved(given: Mapping[str, Any], program: Program) -> Iterator[Vector]:
    """Blocks of tensors whose shapes at every coordinate are given: these decide how much padding there is."""
    held = [
        Held(name, tuple(shape), "float32", coordinate)
        for coordinate in Mesh(given["mesh"]).coordinates()
        for name, shape in sorted(given["saved"].items())
    ]
    bound = bind(program, held, **setting_of(given))
    blocks: dict[int, list[Vector]] = {}
    for (name, _), pieces in bound.pieces.items():
        for piece in pieces:
            blocks.setdefault(piece.held, []).append(_block(name, bound.tensors[name, "value"].view, piece.block))
    for number, shard in enumerate(held):
        yield _shard(shard.coordinate, shard.name, shard.shape, blocks.get(number, []))


def _buffers(given: Mapping[str, Any], program: Program) -> Iterator[Vector]:
    (pack,) = (statement for statement in program.statements if isinstance(statement, Pack))
    mesh = Mesh(given["mesh"])
    setting = Setting(mesh, given.get("sizes", {}))
    for coordinate in mesh.coordinates():
        buffer = compile_pack(
            pack.expr, given["parameters"], setting=setting, coordinate=coordinate, reverse=pack.reverse
        )
        parts = [[part.param, part.range.start, part.range.length, part.offset] for part in buffer.parts]
        yield {"coordinate": coordinate, "length": buffer.length, "parts": parts}


def _shard(coordinate: Mapping[str, int], name: str, shape: Sequence[int], blocks: Sequence[Vector]) -> Vector:
    ordered = sorted(blocks, key=lambda block: (block["tensor"], block["start"]))
    return {"coordinate": dict(coordinate), "name": name, "shape": list(shape), "blocks": ordered}


def _block(name: str, view: View, block: Block) -> Vector:
    return {
        "tensor": name,
        "view": [list(group) for group in view.factors],
        "start": list(block.box.start),
        "shape": list(block.box.shape),
        "at": list(block.start),
        "steps": [list(step) for step in block.steps],
    }


def _lines(value: Any, indent: str) -> Iterator[str]:
    short = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(short) <= 110 or not isinstance(value, dict | list) or not value:
        yield short
        return
    inner = indent + "  "
    mapping = isinstance(value, dict)
    yield "{" if mapping else "["
    for number, item in enumerate(value):
        yield ("," if number else "") + "\n" + inner
        if mapping:
            yield f"{json.dumps(item)}: "
        yield from _lines(value[item] if mapping else item, inner)
    yield "\n" + indent + ("}" if mapping else "]")


def main(paths: Sequence[str]) -> None:
    """Rewrite the vectors in the files `paths`."""
    for path in map(Path, paths):
        path.write_text(write(compute(read(path))))


if __name__ == "__main__":
    main(sys.argv[1:])
