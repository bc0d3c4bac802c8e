"""Only harmless classes are named again in files that DeepSpeed unpickles."""

from __future__ import annotations

from ucp.container.values import Reference, Size
from ucp.converters._deepspeed_universal.carry import carry
from ucp.tree import Opaque


def carried(tree):
    dropped: list[str] = []
    kept = carry(tree, "state", lambda path, reason: dropped.append(f"{path}: {reason}"))
    return kept, dropped


def test_plain_values_and_known_classes_are_carried():
    tree = {
        "list": [1, 2.5, None, True, "x", b"y", 1j],
        "nested": {"tuple": (1, ("a",)), "set": {1, 2}, "frozen": frozenset({3})},
        "size": Size((2, 3)),
        "args": Opaque("argparse", "Namespace", state={"lr": 0.1, "dtype": Reference("torch", "bfloat16")}),
        7: "a key that is no text",
    }
    kept, dropped = carried(tree)
    assert dropped == []
    assert kept["nested"] == tree["nested"]
    assert type(kept["size"]) is Size
    assert kept["args"].state == tree["args"].state
    assert kept["args"] is not tree["args"]
    assert kept[7] == tree[7]


def test_unknown_classes_are_left_behind_with_the_entry_around_them():
    evil = Opaque("os", "system", ("true",))
    tree = {
        "call": evil,
        "name": Reference("os", "system"),
        "inside": {"list": [1, [evil]], "kept": 1},
        "args": Opaque("argparse", "Namespace", state={"good": 1, "bad": evil}),
        "argument": Opaque("collections", "deque", ([evil],)),
    }
    kept, dropped = carried(tree)
    assert kept.keys() == {"inside", "args"}
    assert kept["inside"] == {"kept": 1}
    assert kept["args"].state == {"good": 1}
    assert dropped == [
        "state.call: an object of class os.system",
        "state.name: names os.system",
        "state.inside.list: an object of class os.system",
        "state.args.bad: an object of class os.system",
        "state.argument: an object of class os.system",
    ]


def test_the_source_tree_is_left_alone():
    inner = {"bad": Opaque("os", "system"), "good": 1}
    carried({"inner": inner})
    assert inner.keys() == {"bad", "good"}
