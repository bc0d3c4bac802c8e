"""What a program alone gets wrong: each defect, its place, its kind and the remedy."""

from __future__ import annotations

import pytest

from ucp.errors import ProgramError
from ucp.lang import parse
from ucp.lang.check import check

HEAD = "format 1\nmesh tp dp\nsize hidden ffn heads d\nflag tied\n"
# Uses everything that HEAD declares.
USES = "all.of.them [hidden, ffn/tp, heads d] <-> all.of.them unless tied\n"
LINE = 6

DEFECTS = [
    # (program, column, kind, cause, part of the hint)
    ("w [hidden, ffn/tp] <-> w [hidden, ffm]", 35, "size", "`ffm` is not declared", "did you mean `ffn`"),
    ("w [hidden, ffn/tp] <-> w [ffn]", 4, "dims", "`hidden` is only on the left", None),
    ("w [hidden] <-> w [hidden, ffn]", 27, "dims", "`ffn` is only on the right", None),
    ("w [ffn/tpp] <-> w [ffn]", 8, "axis", "`tpp` is no axis", "did you mean `tp`"),
    ("w [ffn/tp/tp] <-> w [ffn]", 10, "axis", "axis `tp` cuts the tensor twice", None),
    ("w [ffn/tp, hidden/tp] <-> w [ffn, hidden]", 18, "axis", "axis `tp` cuts the tensor twice", None),
    ("w.{l/tp} [ffn/tp] <-> w.{l}", 5, "axis", "axis `tp` cuts the tensor twice", None),
    ("w [ffn + hidden] <-> w [ffn]", 3, "dims", "2 parts on the left, 1 tensor on the right", "is one tensor"),
    ("w [ffn] <-> a [ffn], b [ffn]", 3, "dims", "1 part on the left, 2 tensors on the right", None),
    ("w [ffn, ffn] <-> w [ffn, ffn]", 4, "dims", "stands twice in one part", "let ffn2 = ffn"),
    ("w [2 2 ffn] <-> w [2 ffn 2]", 4, "dims", "stands twice", "let half = 2"),
    ("w [ffn] <-> w [ffn/tp]", 15, "dims", "a logical tensor is whole", None),
    ("w [ffn] <-> w [ffn + hidden]", 15, "dims", "a logical tensor is whole", None),
    ("w.{l} [ffn] <-> w [ffn]", 3, "name", "`{l}` is only on the left", "as {l} or as a dim"),
    ("w [ffn] <-> w.{l} [ffn]", 15, "name", "`{l}` is only on the right", None),
    ("w.{l} [ffn] <-> w.{l/tp} [ffn]", 19, "name", "cuts stand on the left", None),
    ("w.{e} [ffn] <-> w.{e} [e, ffn]", 24, "dims", "is a dim and in the name", None),
    ("w [ffn/tp] mean tp <-> w [ffn]", 12, "axis", "no replicas to average", None),
    ("w [ffn] sum tp <-> w [ffn]", 9, "inverse", "a sum cannot be undone", "->"),
    ("w [ffn] mean pp <-> w [ffn]", 14, "axis", "`pp` is no axis", "known: dp tp"),
    ("w [ffn] any tp mean dp <-> w", 16, "axis", "`any` and `mean` in one rule", None),
    ("w f32[ffn] <-> w bf16[ffn]", 1, "lossy", "f32 to bf16 loses digits", "lossy"),
    ("w bf16[ffn] <-> w f32[ffn]", 1, "lossy", "f32 to bf16 loses digits", "lossy"),
    ("w f32[ffn] -> w bf16[ffn]", 1, "lossy", "f32 to bf16 loses digits", None),
    ("w [ffn] <-> w when tie", 15, "flag", "`tie` is no flag", "did you mean `tied`"),
    ("w [ffn] <-> w on pp 0", 18, "axis", "`pp` is no axis", None),
    ("w [ffn] <-> w on tp 0 on tp 1", 23, "place", "two places on `tp`", None),
    ("w [(ffn + _ align hiden)/tp] <-> w [ffn]", 19, "size", "`hiden` is no size", "did you mean `hidden`"),
    ("w <-> a, b", 1, "dims", "several tensors on the right need a layout", None),
    ("tie a.{l} to b\nw [ffn] <-> q", 5, "tie", "without captures", None),
    ("state value : like param\nw [ffn] <-> q", 7, "state", "`value` is always there", None),
    ("state a a : like param\nw [ffn] <-> q", 7, "state", "described twice", None),
    ("state m : like param each zz\nw [ffn] <-> w", 27, "axis", "`zz` is no axis", None),
    ("size zap\nw [ffn] <-> q", 6, "size", "declared and never used", None),
    ("size ffn\nw [ffn] <-> q", 6, "name", "`ffn` is declared twice", None),
    ("mesh tp\nw [ffn] <-> q", 6, "name", "`tp` is declared twice", None),
    ("flag zap\nw [ffn] <-> q", 6, "flag", "declared and never used", None),
    ("axis tq = a * b\nw [ffn] <-> q", 1, "axis", "`tq` is no axis", None),
    ("let r = heads / groups\nw [r] <-> q", 17, "size", "`groups` is no size", None),
    ("pack {g} [(*param + _)/zz]\nw [ffn] <-> q", 24, "axis", "`zz` is no axis", None),
]


def text(program: str) -> str:
    return f"{HEAD}{USES}{program}\n"


@pytest.mark.parametrize(("program", "column", "kind", "cause", "hint"), DEFECTS, ids=[d[0] for d in DEFECTS])
def test_a_defect_is_refused_at_its_place(program: str, column: int, kind: str, cause: str, hint: str | None) -> None:
    with pytest.raises(ProgramError) as caught:
        check(parse(text(program), file="x.ucp"))
    message = str(caught.value)
    assert message.startswith(f"x.ucp:{LINE}:{column}: error[{kind}]:"), message
    assert cause in message
    assert message.splitlines()[-1].index("^") - message.splitlines()[-2].index(program.splitlines()[0]) == column - 1
    if hint is not None:
        assert hint in (caught.value.hint or "")


SECOND_LINE = [
    ("w.{a} [ffn] <-> w.{a}\nw.3 [ffn] <-> q", "match", "`w.3` would match this rule and that of line 6"),
    ("w.{a} [ffn] <-> w.{a}\nw.{b} [ffn] <-> q.{b}", "match", "would match this rule"),
    ("w.{l/tp}x [ffn] <-> w.{l}\nw.{b} [ffn] <-> q.{b}", "match", "would match this rule"),
    ("w [ffn] <-> q\nv [ffn] <-> q", "cover", "produce the same logical tensor"),
    ("axis tp = a * b\nw [ffn/tp/a] <-> q", "axis", "axis `a` cuts the tensor twice"),
    ("axis tp = a * b\nw [ffn/a, hidden/tp] <-> q", "axis", "axis `a` cuts the tensor twice"),
]


@pytest.mark.parametrize(("program", "kind", "cause"), SECOND_LINE, ids=[d[0] for d in SECOND_LINE])
def test_a_defect_between_two_statements_is_marked_at_the_second(program: str, kind: str, cause: str) -> None:
    with pytest.raises(ProgramError, match=rf"^x.ucp:{LINE + 1}:") as caught:
        check(parse(text(program), file="x.ucp"))
    assert f"error[{kind}]" in str(caught.value) and cause in str(caught.value)


SOUND = [
    "w [2 ffn] <-> w [ffn 2]",
    "w [1, ffn] <-> w [ffn]",
    "w.{e} [ffn] <-> w [e, ffn]",
    "w [e/tp ffn, hidden] <-> w.{e} [ffn, hidden]",
    "w [ffn] <-> w [dp, ffn]",
    "w [ffn] <-> replica.{dp}.w",
    "w [ffn] sum tp -> w [ffn]",
    "w f32[ffn] <-> w bf16[ffn] lossy",
    "w bf16[ffn] -> w f32[ffn]",
    "w f32[ffn] <- w bf16[ffn]",
    "w.{a}x [ffn] <-> w.{a}\nw.3{b} [ffn] <-> q.{b}",
    "w [ffn] <-> q when tied\nv [ffn] <-> q unless tied",
    "w [ffn] <-> q when tied\nw [ffn, hidden] <-> p unless tied",
    "w [ffn] <-> q optional\nv [ffn] <-> q optional",
    "w [ffn] -> q\nw [ffn] <- q",
    "a.b <-> c.d",
    "axis tp = a * b\nw [ffn/a/b] <-> q",
    "let ffn2 = ffn\nw [ffn, ffn2/tp] <-> w [ffn2, ffn]",
]


@pytest.mark.parametrize("program", SOUND)
def test_what_is_sound_passes(program: str) -> None:
    check(parse(text(program), file="x.ucp"))


def test_inverse_classes() -> None:
    program = parse(
        "format 1\nmesh tp dp\nsize a b\n"
        "p [a/tp, b/dp] <-> p\nq [a/tp, b] <-> q\nr [a] mean tp <-> r\ns [a, b] -> s\nt f32[b] <-> t bf16[b] lossy\n"
    )
    checked = check(program)
    assert [ready.inverse(checked.axes) for ready in checked.rules] == [
        "exact",
        "replica-checked",
        "lossy",
        "one-way",
        "lossy",
    ]


def test_places_are_those_of_the_program_at_hand() -> None:
    """Equal layouts elsewhere must not lend their positions."""
    check(parse("format 1\nsize a b\nw [a, b] <-> w [b, a]\n", file="first.ucp"))
    with pytest.raises(ProgramError, match=r"^second.ucp:5:6: error\[dims\]: `b` is only on the left"):
        check(parse("format 1\n\n\nsize a b\nw [a,b] <-> w [a]\n", file="second.ucp"))
