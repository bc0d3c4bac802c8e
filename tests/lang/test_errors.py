"""Every refusal of the parser, with the exact place; `«»` mark it in the text."""

from __future__ import annotations

import re

import pytest

from ucp.errors import ProgramError
from ucp.lang import parse, program_error
from ucp.lang.error import KINDS, nearest

CASES = [
    # the first statement
    ("«»", "syntax", "expected `format 1`, the first statement of every program, found the end of the program", None),
    ("«size» a", "syntax", "expected `format 1`, the first statement of every program, found `size`", None),
    ("format «2»", "format", "version 2 of the language is not known", "this ucp knows version 1"),
    ("format «x»", "syntax", "expected the version of the language, found `x`", None),
    ("format 1«.0»", "syntax", "expected the end of the statement, found `.0`", None),
    # characters
    ("format 1\na«\0» -> b", "syntax", "the character U+0000 may not be in a program", "plain text"),
    ("format 1\na -> b # «\u202e»", "syntax", "the character U+202E may not be in a program", "direction of writing"),
    ("format 1\na -> b\nc «\r» -> d", "syntax", "the character U+000D may not be in a program", None),
    ("format 1\nb -> «é»", "syntax", "expected a tensor's name, found U+00E9", "double quotes"),
    (
        "format 1\na«\u00a0»-> b",
        "syntax",
        "expected a layout, `any`, `mean`, `sum` or an arrow, found U+00A0",
        None,
    ),
    # names
    (
        "F\n«[»x] -> b",
        "syntax",
        "expected a tensor's name or the first word of a statement, found `[`",
        "double quotes",
    ),
    ("F\na.{«/»tp} -> b", "name", "expected the name of a capture, found `/`", "`{x}`, without blanks"),
    ("F\na.{« »x} -> b", "name", "expected the name of a capture, found ` `", None),
    ("F\na.{x« »} -> b", "name", "expected `}`, found ` `", "without blanks"),
    ("F\na.{«on»} -> b", "syntax", "`on` is a word of the language, not the name of a capture", "reserved: any each"),
    ("F\na.{x/«1»} -> b", "syntax", "expected a mesh axis, found `1`", None),
    ("F\na.{x+«}» -> b", "syntax", "expected a number, a size or a mesh axis, found `}`", None),
    ("F\na.{=«}» -> b", "syntax", "expected a number, a size or a mesh axis, found `}`", None),
    ("F\na.{=x-1« »} -> c", "name", "expected `}`, found ` `", None),
    ("F\na«}» -> b", "name", "`}` without `{`", "`}}`"),
    ("F\na.«**» -> b", "name", "`**` is for `drop` only", "`{x}` matches"),
    ("F\na.«*» -> b", "name", "`*` has no meaning in a name", "`{x}` matches"),
    ("F\ndrop a.**«*»", "name", "`*` has no meaning in a name", None),
    ("F\ndrop a.«****»", "name", "`**` twice in a row", "once is enough"),
    ('F\n"a b«»', "syntax", 'expected `"` at the end of the name, found the end of the program', None),
    ('F\n"a b«»\n" -> c', "syntax", 'expected `"` at the end of the name, found the end of the line', None),
    ('F\n"a«\\»n" -> b', "name", 'after a backslash stands `"`, `\\` or `*`', None),
    ('F\n"a «**»" -> b', "name", "`**` is for `drop` only", None),
    # rules
    ("F\na«»", "syntax", "expected a layout, `any`, `mean`, `sum` or an arrow, found the end of the program", None),
    (
        "F\na [x]  «#» c\nb -> c",
        "syntax",
        "expected a layout, `any`, `mean`, `sum` or an arrow, found a comment",
        None,
    ),
    ("F\na any tp «when» x", "syntax", "expected an arrow, found `when`", None),
    (
        "F\na [x] «[»y] -> b",
        "syntax",
        "expected a layout, `any`, `mean`, `sum` or an arrow, found `[`",
        None,
    ),
    (
        "F\nsizes «hidden» ffn",
        "syntax",
        "expected a layout, `any`, `mean`, `sum` or an arrow, found `hidden`",
        "did you mean `size`?",
    ),
    ("F\na any «->» b", "syntax", "expected a mesh axis, found `->`", None),
    ("F\na -> b «->» c", "syntax", "expected the end of the statement, found `->`", None),
    ("F\na ->«»\nb", "syntax", "expected a tensor's name, found the end of the line", None),
    ("F\na -> b,«»", "syntax", "expected a tensor's name, found the end of the program", None),
    ("F\na -> b optional«,» c", "syntax", "expected the end of the statement, found `,`", None),
    ("F\na -> b optional «optional»", "syntax", "`optional` twice", None),
    ("F\na -> b lossy when x «lossy»", "syntax", "`lossy` twice", None),
    ("F\na -> b when«»", "syntax", "expected a flag or a mesh axis, found the end of the program", None),
    ("F\na -> b on «-1»", "syntax", "expected a mesh axis, found `-1`", None),
    ("F\na -> b on pp «x»", "syntax", "expected a coordinate: a whole number, negative from the last, found `x`", None),
    ("F\na -> b on pp -«0»", "syntax", "a coordinate: a whole number, negative from the last is at least 1", None),
    ("F\na -> b «{»", "syntax", "expected the end of the statement, found `{`", "only `in` begins a block"),
    (
        "F\na -> b\n  when «x»",
        "syntax",
        "expected a layout, `any`, `mean`, `sum` or an arrow, found `x`",
        "`when` stands on the line of the last tensor of its rule",
    ),
    (
        "F\na «=»> b",
        "syntax",
        "expected a layout, `any`, `mean`, `sum` or an arrow, found `=`",
        "`<->` both ways, `->` import only, `<-` export only",
    ),
    # layouts
    ("F\na «bf17»[x] -> b", "dtype", "`bf17` is no element type", "did you mean `bf16`? known: bf16 bool"),
    ("F\na [x,«]» -> b", "syntax", "expected a dim, found `]`", None),
    ("F\na [x y«;» z] -> b", "syntax", "expected `]`, found `;`", None),
    ("F\na [x\n«->» b", "syntax", "expected `]`, found `->`", "it was opened on line 2"),
    ("F\na [(x + y«]» -> b", "syntax", "expected `)`, found `]`", None),
    ("F\na [«_»] -> b", "syntax", "`_` is a part of a concatenation, as in `(vocab + _)`", None),
    ("F\na [x + («_»)] -> b", "syntax", "`_` is a part of a concatenation, as in `(vocab + _)`", None),
    ("F\na [x «_»] -> b", "syntax", "`_` is a part by itself", "write `+ _`"),
    ("F\na [x + _ «y»] -> b", "syntax", "expected `]`, found `y`", None),
    ("F\na [x + «_y»] -> b", "syntax", "a name begins with a letter", None),
    ("F\na [x + _ align 2 «tp»] -> b", "syntax", "expected `+` or `)`, found `tp`", "a product has a `*`"),
    ("F\na [x +«]» -> b", "syntax", "expected a dim, found `]`", None),
    ("F\na [x/«2»] -> b", "syntax", "expected a mesh axis, found `2`", None),
    ("F\na [«any»] -> b", "syntax", "`any` is a word of the language, not a dim", "call it something else"),
    ("F\na [«0»] -> b", "syntax", "a dim that is a number is at least 1", None),
    ("F\na [«007»] -> b", "syntax", "a number does not begin with 0", None),
    ("F\na [2«x»] -> b", "syntax", "a number and a name need a blank between them", None),
    ("F\na [«" + "9" * 19 + "»] -> b", "limit", "a number of 19 digits", "most: 18"),
    ("F\na [«*»x] -> b", "syntax", "`*` is for `pack` only, and in no other `*`", None),
    # declarations
    ("F\nmesh«»", "syntax", "expected a layout, `any`, `mean`, `sum` or an arrow, found the end of the program", None),
    ("F\nmesh tp«,» dp", "syntax", "expected the end of the statement, found `,`", "separated by blanks"),
    ("F\nmesh tp «any»", "syntax", "expected the end of the statement, found `any`", None),
    ("F\naxis tp = kv«»", "syntax", "expected `*`, found the end of the program", "as in `axis tp = kv * rep`"),
    ("F\nsize a b «=» 3", "syntax", "one size at a time has a default", "`size b = …`"),
    ("F\nsize a = «x»", "syntax", "expected a number, found `x`", None),
    ("F\nlet r «heads»", "syntax", "expected `=`, found `heads`", None),
    ("F\nlet r = a +«»\n b", "syntax", "expected a number, a size or a mesh axis, found the end of the line", None),
    ("F\nlet r = min«»", "syntax", "expected `(` after `min`, found the end of the program", "`min(a, b)`"),
    ("F\nlet r = max(a«)»", "syntax", "expected `,`, found `)`", "has two operands"),
    ("F\nlet r = a «max»(b, c)", "syntax", "expected the end of the statement, found `max`", None),
    ("F\ntie a «b»", "syntax", "expected `to`, found `b`", "the second one holds the tensor"),
    ("F\ntie a to b «optional»", "syntax", "`optional` does not belong here", None),
    ("F\nstate «:» like param", "syntax", "expected the name of a state, or `*`, found `:`", None),
    (
        "F\nstate a like param«»",
        "syntax",
        "expected another state or `:`, found the end of the program",
        None,
    ),
    ("F\nstate a : «like» it", "syntax", "expected `like param` or a layout, found `like`", None),
    (
        "F\nstate a : like param lacking «x»",
        "syntax",
        "expected the number of a dim, negative from the last, found `x`",
        None,
    ),
    ("F\nstate a : like param each a «each» b", "syntax", "`each` twice", None),
    ("F\nstate a : [x] «lacking» 1", "syntax", "`lacking` beside a layout", "`like param lacking -1`"),
    ("F\ndrop a«,» b", "syntax", "expected the end of the statement, found `,`", None),
    ("F\npack a «f32»[x]", "syntax", "expected `[`, found `f32`", None),
    ("F\npack a «[x, y]»", "pack", "a flat buffer has one dim", None),
    ("F\npack a [*(x + «*»y)]", "syntax", "`*` is for `pack` only, and in no other `*`", None),
    ("F\npack a [*«*»x]", "syntax", "expected a dim, found `*`", None),
    # blocks
    ("F\nin a «->» b {\n}", "syntax", "expected `<->`, found `->`", "both directions"),
    ("F\nin a <-> b«»", "syntax", "expected `{`, found the end of the program", None),
    ("F\nin a{«»\n}", "name", "expected the name of a capture, found the end of the line", "stands a blank"),
    ("F\nin a { «x» -> y", "syntax", "expected the end of the line after `{`, found `x`", "on a line of its own"),
    ("F\nin a «lossy» {\n}", "syntax", "`lossy` does not belong here", None),
    ("F\nin a {\n} «lossy»", "syntax", "`lossy` does not belong here", None),
    ("F\nin a optional {\n} «optional»", "syntax", "`optional` twice", None),
    (
        "F\nin a {\n} «x» -> y",
        "syntax",
        "expected `on`, `when`, `unless`, `optional` or the end of the line, found `x`",
        None,
    ),
    ("F\n«in a {»\n x -> y\n", "syntax", "this block has no end", "`}` on a line of its own"),
    ("F\n«}»", "syntax", "`}` without a block", None),
    ("F\nin a {\n «size» x\n}", "syntax", "`size` stands outside of blocks only", 'as the name of a tensor: "size"'),
]


BAD, REPLACEMENT, LINE_END = "[\0\r\u202e]", "\ufffd", "\n"


def marked(text: str) -> tuple[str, tuple[int, int, int]]:
    """The text without its marks, and the span between them."""
    text = re.sub(r"\AF\n", "format 1\n", text)
    first, last = text.index("«"), text.index("»") - 1
    bare = text.replace("«", "").replace("»", "")
    start = bare.rfind("\n", 0, first) + 1
    return bare, (bare.count("\n", 0, first) + 1, first - start + 1, max(last, first + 1) - start + 1)


@pytest.mark.parametrize(("text", "kind", "cause", "hint"), CASES, ids=[repr(case[0])[1:50] for case in CASES])
def test_refusals(text: str, kind: str, cause: str, hint: str | None) -> None:
    text, (line, first, last) = marked(text)
    with pytest.raises(ProgramError) as caught:
        parse(text, file="p.ucp")
    head, quoted, marks = caught.value.message.split("\n")
    assert head == f"p.ucp:{line}:{first}: error[{kind}]: {cause}"
    assert kind in KINDS
    assert quoted == f"{line:>5} | {re.sub(BAD, REPLACEMENT, text.split(LINE_END)[line - 1])}"
    assert marks == f"      | {' ' * (first - 1)}{'^' * (last - first)}"
    assert hint is None or (caught.value.hint is not None and hint in caught.value.hint)


def rendered(line: str, first: int, last: int) -> list[str]:
    error = program_error(f"format 1\n{line}\n", at=(2, first, last), kind="dims", cause="no", file="f")
    return error.message.split("\n")


def test_the_form_of_the_design() -> None:
    line = "  mlp.linear_fc2.weight  [hidden, ffn/tp]  <->  mlp.down.weight [hidden, ffm]"
    text = "format 1\n" + "\n" * 18 + line
    known = "d experts ffn groups heads hidden layers vocab".split()
    error = program_error(
        text,
        at=(20, 74, 77),
        kind="dims",
        cause="`ffm` is only on the right",
        hint=nearest("ffm", known),
        file="megatron.ucp",
    )
    assert error.message == (
        "megatron.ucp:20:74: error[dims]: `ffm` is only on the right\n"
        "   20 |   mlp.linear_fc2.weight  [hidden, ffn/tp]  <->  mlp.down.weight [hidden, ffm]\n"
        f"      | {' ' * 73}^^^"
    )
    assert error.hint == "did you mean `ffn`? known: d experts ffn groups heads hidden layers vocab"


def test_marks_stand_under_what_they_mark() -> None:
    assert rendered("\ta\tbad", 4, 7)[2] == "      | \t \t^^^"
    assert rendered('"日本" bad', 6, 9)[2] == f"      | {' ' * 7}^^^"
    assert rendered('"日本" x', 2, 4)[2] == "      |  ^^^^"
    assert rendered('"e\u0301" x', 6, 7)[2] == f"      | {' ' * 4}^"


def test_a_long_line_is_cut() -> None:
    head, quoted, marks = rendered("a" * 5000 + "BAD" + "b" * 5000, 5001, 5004)
    assert head.startswith("f:2:5001: ")
    assert len(quoted) < 180
    assert quoted[marks.index("^") : marks.index("^") + 3] == "BAD"
    assert marks.count("^") == 3
    head, quoted, marks = rendered("BAD" + "b" * 5000, 1, 4000)
    assert len(marks) < 180


def test_a_word_in_a_list_is_marked() -> None:
    program = parse("format 1\nmesh tp_a tp dp\n")
    error = program_error(program, at=program.statements[0].at, kind="axis", cause="no", word="tp")
    assert error.message.split("\n")[0] == "<program>:2:11: error[axis]: no"
    assert error.message.endswith(f"| {' ' * 10}^^")


def test_without_text_there_is_no_quote() -> None:
    assert program_error(None, at=None, kind="size", cause="no", file="f").message == "f: error[size]: no"


def test_nothing_reaches_the_terminal() -> None:
    error = program_error("a\x1b[2J", at=(1, 1, 2), kind="size", cause="no \x1b[2J", file="f")
    assert "\x1b" not in error.message


def test_nearest() -> None:
    assert nearest("x", []) is None
    assert nearest("heds", ["heads", "d"]) == "did you mean `heads`? known: d heads"
    assert nearest("zzz", ["heads", "d"]) == "known: d heads"
    assert (nearest("a", map(str, range(100))) or "").endswith(" …")
