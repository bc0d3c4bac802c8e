"""Pickles made to attack their reader: refused with a typed error, and nothing of them is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.container.torchfiles import read, save, torch_zip
from ucp.container.unpickle import unpickle
from ucp.errors import ContentError, CorruptError, UnsafeError
from ucp.tree import Opaque, walk


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


def named(module: str, name: str, *args: Any) -> bytes:
    """A pickle that calls ``module.name``, which need not exist."""
    inner = b"".join(pickle.dumps(arg, 2)[2:-1] for arg in args)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + inner + b"tR."


def sentinel_attacks(sentinel: str) -> dict[str, bytes]:
    code = f"open({sentinel!r}, 'w').close()"
    command = f"touch {sentinel}"
    return {
        "os.system": pickle.dumps(Calls(os.system, command), 2),
        "protocol 4": pickle.dumps([Calls(os.system, command)], 4),
        "protocol 0": pickle.dumps({"a": Calls(os.system, command)}, 0),
        "eval": pickle.dumps(Calls(eval, code), 2),
        "exec": pickle.dumps(Calls(exec, code), 3),
        "nested": pickle.dumps({"a": [torch.Size([1]), ({"b": Calls(exec, code)},)]}, 2),
        "argument": pickle.dumps(Calls(list, Calls(exec, code)), 2),
        "open": pickle.dumps(Calls(open, sentinel, "w"), 2),
        "os.open inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "subprocess": named("subprocess", "Popen", ["touch", sentinel]),
        "dotted": b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c"
        + struct.pack("<B", len(command))
        + command.encode()
        + b"\x85R.",
        "getattr": named("__builtin__", "getattr", "a", "upper"),
        "getattr of a class": b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\nobject\n"
        b"X\x0e\x00\x00\x00__subclasses__tR)R.",
        "import": named("__builtin__", "__import__", "os"),
        "runpy": named("runpy", "_run_code", code),
        "torch.hub": named("torch.hub", "load", "a"),
        "torch.load": named("torch", "load", sentinel),
        "pickle in pickle": named("_pickle", "loads", pickle.dumps(Calls(exec, code))),
        "persistent": b"\x80\x02" + pickle.dumps(Calls(exec, code), 2)[2:-1] + b"Q.",
        "state": b"\x80\x02capp\nThing\n)\x81" + pickle.dumps(Calls(exec, code), 2)[2:-1] + b"b.",
    }


@pytest.mark.parametrize("attack", sentinel_attacks(""))
def test_code_is_refused_and_not_run(tmp_path: Path, attack: str) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(sentinel_attacks(str(sentinel))[attack]))
    with pytest.raises(UnsafeError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert not sentinel.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """What is refused above does run elsewhere."""
    for name in ("os.system", "exec", "nested", "argument", "pickle in pickle"):
        sentinel = tmp_path / name.replace(" ", "-")
        with contextlib.suppress(TypeError):
            pickle.loads(sentinel_attacks(str(sentinel))[name])
        assert sentinel.exists()


def test_the_global_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsafeError, match=r"x\.pt: asks for posix\.system"):
        unpickle(pickle.dumps(Calls(os.system, "true")), where="x.pt")


def test_a_legacy_file_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(Calls(os.system, f"touch {tmp_path / 'sentinel'}"), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeError):
        read(path)
    assert not (tmp_path / "sentinel").exists()


def test_importing_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that would do harm when imported is not imported for being named."""
    (tmp_path / "harmful_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    tree = unpickle(named("harmful_module", "Thing", 1), where="x")
    assert isinstance(tree, Opaque)
    assert (tree.path, tree.args) == ("harmful_module.Thing", (1,))


def bomb_of_tuples(depth: int) -> bytes:
    return b"\x80\x02)" + b"".join(b"2\x86" for _ in range(depth))


def rebuilt(*, offset: int = 0, shape: Any = (2,), strides: Any = (1,), count: int = 4, rest: bytes = b"") -> bytes:
    """A tensor over storage 0 of `count` float32 elements."""
    dump: Callable[[Any], bytes] = lambda value: pickle.dumps(value, 2)[2:-1]  # noqa: E731
    storage = b"(" + dump("storage") + b"ctorch\nFloatStorage\n" + dump("0") + dump("cpu") + dump(count) + b"tQ"
    view = dump(offset) + dump(shape) + dump(strides)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89}tR" + rest


HUGE = 1 << 62
ILL_FORMED: dict[str, bytes] = {
    "nothing": b"",
    "no stop": b"\x80\x02N",
    "nothing to stop at": b"\x80\x02.",
    "unknown opcode": b"\x80\x02\xffN.",
    "protocol 9": b"\x80\x09N.",
    "text length": b"\x80\x02X\xff\xff\xff\xffabc.",
    "text of 2**63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", (1 << 63) - 1) + b"abc.",
    "bytes of 2**64 bytes": b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",
    "bytearray of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
    "negative text length": b"\x80\x02T\xff\xff\xff\xffabc.",
    "long of 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "long of 1 MiB": b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "memo that is not there": b"\x80\x02h\x07.",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "mark that is not there": b"\x80\x02Nt.",
    "odd dict": b"\x80\x02}(Nu.",
    "unhashable key": b"\x80\x02}]Ns.",
    "dict as element": b"\x80\x04\x8f(}\x90.",
    "append to a number": b"\x80\x02K\x01Na.",
    "call a number": b"\x80\x02K\x01)R.",
    "arguments that are no tuple": b"\x80\x02capp\nThing\nNR.",
    "state of a class": b"\x80\x02capp\nThing\n}b.",
    "state twice": b"\x80\x02capp\nThing\n)\x81K\x01bK\x02b.",
    "global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "extension": b"\x80\x02\x82\x01.",
    "buffer": b"\x80\x05\x97.",
    "persistent id of nothing": b"\x80\x02NQ.",
    "persistent text": b"P1\n.",
    "text not utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "stack underflow": b"\x80\x02\x86.",
    "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "deep key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "deep marks": b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".",
    "bomb": bomb_of_tuples(60) + b".",
    "bomb as key": b"\x80\x02}" + bomb_of_tuples(60)[2:] + b"Ns.",
    "bomb in a set": b"\x80\x04\x8f(" + bomb_of_tuples(60)[2:] + b"\x90.",
    "bomb as shape": rebuilt().replace(b"K\x02\x85", bomb_of_tuples(60)[2:], 1) + b".",
    "cycle": b"\x80\x02]q\x00h\x00a.",
    "large key": b"\x80\x02}\x8a\x09\x01\x00\x00\x00\x00\x00\x00\x00\x01Ns.",
    "multiplied bytes": b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x01("
    + b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 100_000 + b"l.",
    "multiplied lists": b"\x80\x02c__builtin__\nlist\nq\x00](" + b"N" * (1 << 20) + b"eq\x01("
    + b"h\x00h\x01\x85R" * 100_000 + b"l.",
    "growing names": b"\x80\x02c__builtin__\ngetattr\nq\x00capp\nThing\nq\x01"
    + b"h\x00h\x01X\x01\x00\x00\x00a\x86Rq\x010" * 100_000 + b"N.",
    "long name called often": b"\x80\x02c" + b"a" * (1 << 20) + b"\nb\nq\x00(" + b"h\x00)R" * 100_000 + b"l.",
    "many arguments unpacked": b"\x80\x02ccopyreg\n__newobj__\nq\x00(capp\nThing\n" + b"N" * (1 << 20) + b"tq\x01("
    + b"h\x00h\x01R" * 100_000 + b"l.",
    "negative offset": rebuilt(offset=-1) + b".",
    "negative stride": rebuilt(strides=(-1,)) + b".",
    "negative size": rebuilt(shape=(-2,)) + b".",
    "past the end": rebuilt(offset=3) + b".",
    "huge stride": rebuilt(strides=(HUGE,)) + b".",
    "huge size": rebuilt(shape=(HUGE, HUGE)) + b".",
    "huge empty": rebuilt(shape=(0, HUGE, HUGE), strides=(1, 1, 1)) + b".",
    "strides of another length": rebuilt(strides=(1, 1)) + b".",
    "sizes that are text": rebuilt(shape=("a",)) + b".",
    "more elements than the storage": rebuilt(count=5) + b".",
    "fewer elements than the storage": rebuilt(count=3) + b".",
    "too many dims": rebuilt(shape=(1,) * 65, strides=(1,) * 65) + b".",
    "no arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "unknown storage": rebuilt().replace(b"FloatStorage", b"FlossStorage") + b".",
    "missing storage": rebuilt().replace(b"\x01\x00\x00\x000", b"\x01\x00\x00\x009") + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", ILL_FORMED)
def test_ill_formed_pickles_are_corrupt(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(ILL_FORMED[name], {"0": bytes(16)}))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptError, match=r"x\.pt"):
        read(path)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_a_sound_view_is_let_through(tmp_path: Path) -> None:
    """The forged tensors above differ from this one by what their name says."""
    (tmp_path / "x.pt").write_bytes(torch_zip(rebuilt() + b".", {"0": bytes(16)}))
    assert read(tmp_path / "x.pt").root.extent.shape == (2,)


def test_a_bad_view_is_named_by_its_place(tmp_path: Path) -> None:
    inner = rebuilt(offset=3)[2:]
    (tmp_path / "x.pt").write_bytes(
        torch_zip(b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + inner + b"ss.", {"0": bytes(16)})
    )
    with pytest.raises(CorruptError, match=r"x\.pt: model\.w: .*past the end"):
        read(tmp_path / "x.pt")


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_untyped(data: bytes) -> None:
    try:
        tree = unpickle(data, where="x")
    except ContentError:
        return
    list(walk(tree))


def sample() -> bytes:
    out = io.BytesIO()
    value = {"a": [1, 2.5, ("x", b"y")], "s": {1, 2}, "o": Calls(dict, {"k": frozenset({3})}), "l": 1 << 80}
    pickle.Pickler(out, 2).dump(value)
    return out.getvalue()


@given(st.data())
def test_no_mutation_raises_anything_untyped(data: st.DataObject) -> None:
    changed = bytearray(sample())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        tree = unpickle(bytes(changed), where="x")
    except ContentError:
        return
    list(walk(tree))


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]


@given(st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=3)), max_size=60))
def test_no_opcodes_raise_anything_untyped(parts: list[bytes]) -> None:
    prelude = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00cnumpy.core.multiarray\n_reconstruct\nq\x01]q\x02(}N"
    try:
        tree = unpickle(prelude + b"".join(parts) + b".", where="x")
    except ContentError:
        return
    list(walk(tree))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 100), 1 << 100)
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text() | st.integers(-9, 9), inner) | st.tuples(inner, inner)
        ),
        max_leaves=20,
    ),
    st.integers(0, 5),
)
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert unpickle(pickle.dumps(value, protocol), where="x") == value


def test_every_single_bit_of_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.ones(3), "n": 5})
    assert read(path)
    pickle_bytes = rebuilt() + b"."
    for position in range(len(pickle_bytes)):
        for bit in range(8):
            changed = bytearray(pickle_bytes)
            changed[position] ^= 1 << bit
            path.write_bytes(torch_zip(bytes(changed), {"0": bytes(16)}))
            with contextlib.suppress(ContentError):
                read(path)
