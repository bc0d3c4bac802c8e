"""Conversion programs: the parser and the checker, from text and from JSON."""

from __future__ import annotations

import json

from tests.fuzz.target import Target
from ucp.errors import CorruptError
from ucp.lang import format_program, from_json, parse, to_json
from ucp.lang.ast import Program
from ucp.lang.check import check

_WORDS = (
    "format 1,mesh ,axis ,size ,let ,flag ,state ,tie ,pack ,drop ,in , <-> , -> , <- ,any,mean,sum,each,lacking,on ,"
    "when ,unless ,optional ,lossy ,min,max,{,},[,],(,),|,*,**,+,-,/,=,:,#,bf16,f32,tp,pp,dp,\n"
)
TOKENS = tuple(word.encode() for word in _WORDS.split(","))


def _use(program: Program) -> None:
    check(program)
    assert to_json(parse(format_program(program))) == to_json(program)


def _text(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    _use(parse(text, file="x.ucp"))


def _document(data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError("no JSON") from error
    _use(from_json(document, file="x.json"))


def targets() -> list[Target]:
    return [
        Target("language", _text, style="text", tokens=TOKENS),
        Target("language-json", _document, style="json"),
    ]
