"""A pickle machine that builds inert data.

It runs the opcodes of pickle protocols 0 to 5 (CPython's Lib/pickletools.py describes each) and hands every global,
call and persistent id to functions of ours. Time and memory are bounded by the length of the pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from ucp.container.cursor import Cursor
from ucp.container.safety import refuse_malicious
from ucp.container.values import Reference
from ucp.errors import UcpError
from ucp.tree import Opaque, Tree

MOST_OPS = 20_000_000
_STOP = 0x2E
_KEY_NODES = 1000
_MOST_NAME = 1000
_FREE_ARGUMENTS = 64

Call = Callable[["Machine", tuple[Tree, ...]], Tree]
Persistent = Callable[["Machine", Tree], Tree]
Build = Callable[["Machine", Opaque, Tree], Tree]

_MOVED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
_MOVED_NAMES = {"xrange": "range", "unicode": "str", "long": "int", "basestring": "str"}

_RAW_ERRORS = (
    ArithmeticError,
    AttributeError,
    BufferError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class Machine(Cursor):
    """Runs one pickle that starts at byte `start` of `data`.

    `where` names the file in errors. `calls` says, by ``module.name``, what calling a global gives; every other call
    gives an `Opaque`. `builds` says, by path of the Opaque, what setting its state gives. `persistent` resolves
    persistent ids; without it they are an error.
    """

    def __init__(
        self,
        data: bytes,
        *,
        where: str,
        calls: dict[str, Call],
        builds: dict[str, Build],
        persistent: Persistent | None = None,
        start: int = 0,
        most: int = MOST_OPS,
    ) -> None:
        super().__init__(data, where=where, start=start)
        self._most = most
        self.broken: list[tuple[Opaque, str]] = []
        self._calls = calls
        self._builds = builds
        self._persistent = persistent
        self._marks: list[list[Tree]] = []
        self._memo: dict[int, Tree] = {}
        self._waiting: dict[int, list[int]] = {}
        self._globals: dict[tuple[str, str], Reference] = {}

    def run(self) -> Tree:
        """The value the pickle describes; `position` is then one past its end.

        CorruptError for anything ill-formed or out of proportion, UnsafeError for a global that only attacks name.
        """
        try:
            self._run()
            return self._stack.pop()
        except UcpError:
            raise
        except _RAW_ERRORS as error:
            raise self._error(f"ill-formed ({type(error).__name__})") from error

    def _run(self) -> None:
        handlers = [handler.__get__(self) if handler else None for handler in _HANDLERS]
        data, end = self.data, len(self.data)
        for _ in range(self._most):
            if self.position >= end:
                self._truncated()
            op = data[self.position]
            self.position += 1
            if op == _STOP:
                return
            handler = handlers[op]
            if handler is None:
                self.fail(f"unknown opcode 0x{op:02x}")
            handler()
        self.fail("too long to be training state")

    def fault(self, result: Opaque, problem: str) -> Opaque:
        """Note that `result` cannot be what it should be; reported with its place in the tree once that is known."""
        self.broken.append((result, problem))
        return result

    def call(self, target: Tree, args: Tree, kwargs: Tree = None) -> Tree:
        """What ``target(*args, **kwargs)`` gives: our own stand-in's result, or an Opaque that records the call."""
        if not isinstance(target, Reference) or not isinstance(args, tuple):
            self.fail("calls something that is neither class nor function")
        if len(args) > _FREE_ARGUMENTS:
            self.spend(len(args))
        known = self._calls.get(target.path)
        if known is not None and not kwargs:
            return known(self, args)
        return Opaque(target.module, target.name, args, _names(self, kwargs))

    def reference(self, module: str, name: str) -> Reference:
        """The inert stand-in of a global; UnsafeError if only an attack would name it."""
        found = self._globals.get((module, name))
        if found is None:
            if len(module) + len(name) > _MOST_NAME:
                self.fail("a global with a very long name")
            home = _MOVED_MODULES.get(module, module)
            called = _MOVED_NAMES.get(name, name) if module == "__builtin__" else name
            refuse_malicious(home, called, where=self.where)
            found = self._globals[module, name] = Reference(home, called)
        return found

    def keys(self, values: Iterable[Tree]) -> None:
        """Check that each value can be hashed in bounded time, and is the kind of thing that state is keyed by."""
        for value in values:
            if type(value) is not str:
                self._key(value)

    def _key(self, key: Tree) -> None:
        stack, seen = [key], 0
        while stack:
            value = stack.pop()
            seen += 1
            if isinstance(value, tuple | frozenset):
                stack.extend(value)
            elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
                self.fail("a key is a very large number")
            elif not isinstance(value, str | bytes | int | float | Opaque | None):
                self.fail(f"a {type(value).__name__} as key")
            if len(stack) + seen > _KEY_NODES:
                self.fail("a key is very large")
        if seen > 1:
            self.spend(seen)

    def _since_mark(self) -> list[Tree]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    # Opcodes: markers, stack and memo.

    def _proto(self) -> None:
        version = self._byte()
        if version > 5:
            self.fail(f"protocol {version}")

    def _frame(self) -> None:
        self._number(8)

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self) -> None:
        self._since_mark()

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _put_at(self, index: int) -> None:
        value = self._memo[index] = self._stack[-1]
        if type(value) is Opaque and value.path in self._builds:
            self._waiting.setdefault(id(value), []).append(index)

    def _put(self) -> None:
        self._put_at(int(self._digits()))

    def _binput(self) -> None:
        self._put_at(self._byte())

    def _long_binput(self) -> None:
        self._put_at(self._number(4))

    def _memoize(self) -> None:
        self._put_at(len(self._memo))

    def _get(self) -> None:
        self._stack.append(self._memo[int(self._digits())])

    def _binget(self) -> None:
        self._stack.append(self._memo[self._byte()])

    def _long_binget(self) -> None:
        self._stack.append(self._memo[self._number(4)])

    # Opcodes: containers.

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple1(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def _tuple2(self) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _empty_list(self) -> None:
        self._stack.append([])

    def _list(self) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _dict(self) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set_pairs(items)

    def _empty_set(self) -> None:
        self._stack.append(set())

    def _frozenset(self) -> None:
        items = self._since_mark()
        self.keys(items)
        self._stack.append(frozenset(items))

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Tree]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif type(target) is Opaque:
            target.items.extend(items)
        else:
            self.fail(f"appends to a {type(target).__name__}")

    def _additems(self) -> None:
        items = self._since_mark()
        target = self._stack[-1]
        if isinstance(target, set):
            self.keys(items)
            target.update(items)
        elif type(target) is Opaque:
            target.items.extend(items)
        else:
            self.fail(f"adds to a {type(target).__name__}")

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_pairs([key, value])

    def _setitems(self) -> None:
        self._set_pairs(self._since_mark())

    def _set_pairs(self, items: list[Tree]) -> None:
        target = self._stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            self.keys(items[::2])
            target.update(pairs)
        elif type(target) is Opaque:
            target.pairs.extend(pairs)
        else:
            self.fail(f"sets an item of a {type(target).__name__}")

    # Opcodes: globals and objects.

    def _global(self) -> None:
        module, name = self._line().decode("utf-8"), self._line().decode("utf-8")
        self._stack.append(self.reference(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            self.fail("a global without a name")
        self._stack.append(self.reference(module, name))

    def _extension(self) -> None:
        self.fail("refers to the extension registry of the process that wrote it")

    def _buffer(self) -> None:
        self.fail("refers to a buffer outside of it")

    def _reduce(self) -> None:
        args, target = self._stack.pop(), self._stack.pop()
        self._stack.append(self.call(target, args))

    def _newobj_ex(self) -> None:
        kwargs, args, target = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(self.call(target, args, kwargs))

    def _inst(self) -> None:
        self._global()
        target = self._stack.pop()
        args = self._since_mark()
        self._stack.append(self.call(target, tuple(args)))

    def _obj(self) -> None:
        target, *args = self._since_mark()
        self._stack.append(self.call(target, tuple(args)))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Reference):
            self.fail(f"sets the state of {target.path}")
        if not isinstance(target, Opaque):
            return  # attributes hung on a tensor or dict, such as the _metadata of a state_dict
        build = self._builds.get(target.path, _set_state)
        result = build(self, target, state)
        if result is not target:
            self._stack[-1] = result
            for index in self._waiting.pop(id(target), ()):
                if self._memo.get(index) is target:
                    self._memo[index] = result

    def _persid(self) -> None:
        self._stack.append(self._resolve(self._line().decode("utf-8")))

    def _binpersid(self) -> None:
        self._stack.append(self._resolve(self._stack.pop()))

    def _resolve(self, key: Tree) -> Tree:
        if self._persistent is None:
            self.fail("refers to data outside of it")
        return self._persistent(self, key)


def _set_state(machine: Machine, target: Opaque, state: Tree) -> Tree:
    """Record state; the (``__dict__``, slots) pair of a class with slots becomes one dict."""
    if target.state is not None:
        machine.fail(f"sets the state of a {target.path} twice")
    if isinstance(state, tuple) and len(state) == 2 and all(part is None or isinstance(part, dict) for part in state):
        machine.spend(sum(len(part or ()) for part in state))
        state = {**(state[0] or {}), **(state[1] or {})}
    target.state = state
    return target


def _names(machine: Machine, kwargs: Tree) -> dict[str, Tree]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        machine.fail("keyword arguments without names")
    machine.spend(len(kwargs))
    if not all(isinstance(name, str) for name in kwargs):
        machine.fail("keyword arguments without names")
    return kwargs


_OPCODES: dict[int, Callable[[Machine], None]] = {
    ord("("): Machine._mark,
    ord("0"): Machine._pop,
    ord("1"): Machine._pop_mark,
    ord("2"): Machine._dup,
    ord("F"): Machine._float,
    ord("I"): Machine._int,
    ord("J"): Machine._binint,
    ord("K"): Machine._binint1,
    ord("L"): Machine._long,
    ord("M"): Machine._binint2,
    ord("N"): Machine._none,
    ord("P"): Machine._persid,
    ord("Q"): Machine._binpersid,
    ord("R"): Machine._reduce,
    ord("S"): Machine._string,
    ord("T"): Machine._binstring,
    ord("U"): Machine._short_binstring,
    ord("V"): Machine._unicode,
    ord("X"): Machine._binunicode,
    ord("a"): Machine._append,
    ord("b"): Machine._build,
    ord("c"): Machine._global,
    ord("d"): Machine._dict,
    ord("}"): Machine._empty_dict,
    ord("e"): Machine._appends,
    ord("g"): Machine._get,
    ord("h"): Machine._binget,
    ord("i"): Machine._inst,
    ord("j"): Machine._long_binget,
    ord("l"): Machine._list,
    ord("]"): Machine._empty_list,
    ord("o"): Machine._obj,
    ord("p"): Machine._put,
    ord("q"): Machine._binput,
    ord("r"): Machine._long_binput,
    ord("s"): Machine._setitem,
    ord("t"): Machine._tuple,
    ord(")"): Machine._empty_tuple,
    ord("u"): Machine._setitems,
    ord("G"): Machine._binfloat,
    ord("B"): Machine._binbytes,
    ord("C"): Machine._short_binbytes,
    0x80: Machine._proto,
    0x81: Machine._reduce,  # NEWOBJ: cls.__new__(cls, *args)
    0x82: Machine._extension,
    0x83: Machine._extension,
    0x84: Machine._extension,
    0x85: Machine._tuple1,
    0x86: Machine._tuple2,
    0x87: Machine._tuple3,
    0x88: Machine._true,
    0x89: Machine._false,
    0x8A: Machine._long1,
    0x8B: Machine._long4,
    0x8C: Machine._short_binunicode,
    0x8D: Machine._binunicode8,
    0x8E: Machine._binbytes8,
    0x8F: Machine._empty_set,
    0x90: Machine._additems,
    0x91: Machine._frozenset,
    0x92: Machine._newobj_ex,
    0x93: Machine._stack_global,
    0x94: Machine._memoize,
    0x95: Machine._frame,
    0x96: Machine._binbytes8,  # BYTEARRAY8
    0x97: Machine._buffer,
    0x98: Machine._buffer,
}

_HANDLERS = tuple(_OPCODES.get(op) for op in range(256))
