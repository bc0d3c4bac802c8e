"""The folders of all nodes of a job as one store: what a node writes lies there and on its buddies."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ucp.catalog import Checksum
from ucp.elastic.nodes.client import RemoteNode
from ucp.elastic.nodes.folder import NodeFolder
from ucp.elastic.nodes.heal import heal
from ucp.elastic.nodes.member import Member
from ucp.elastic.nodes.placement import buddies, wards
from ucp.elastic.nodes.scrub import damaged
from ucp.elastic.nodes.whole import new_stamp
from ucp.errors import CorruptError, NotFoundError, StorageError, UcpError, UsageError
from ucp.store import Buffer, Entry, Store, Writer

_LOG = logging.getLogger("ucp")

T = TypeVar("T")

_PIECE_BYTES = 512 << 10
"""Bytes that go to each node in turn: while the network carries some, others are written here."""

_THREADS = 8
_REMEMBERED = 100_000
"""Most objects of which it is remembered who has them."""


@dataclass(slots=True)
class _Known:
    """What the stores of one job have in common in a process: who has what, as last seen, and who did not answer."""

    holders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, path: str, nodes: tuple[str, ...]) -> None:
        if len(self.holders) >= _REMEMBERED:
            self.holders.clear()
        self.holders[path] = nodes


class NodesStore(Store):
    """The folders of `members`, by node; `me` is this node, whose folder it has itself.

    `create` streams an object to this node and its buddies at once, so that `copies` nodes have it; `put` writes to all
    of them. Both fail if one node does, and an object appears on a node only whole. Whoever reads takes its own node's
    copy, or that of any other node that has one: a node that is gone, or whose copy is too short, is passed over. Where
    copies differ, the longest counts, and of those the latest, for all nodes alike.
    Conditions of `put` are decided by the first node, by name.
    """

    parallel = 4

    def __init__(self, me: str, members: Mapping[str, Member], *, copies: int, url: str = "nodes://memory") -> None:
        if copies < 1:
            raise UsageError(f"{copies} copies of an object cannot be kept", hint="2 survive the loss of a node")
        own = members[me]
        if not isinstance(own, NodeFolder):
            raise UsageError(f"the folder of {me}, which is this node, is not here")
        self.me, self.members, self.copies, self.url = me, dict(members), copies, url
        self.folder = own
        self.nodes = tuple(sorted(members))
        self.targets = (me, *buddies(me, self.nodes, copies))
        self.active = self.nodes
        self.tended: tuple[str, ...] = (me,)
        self.path = ""
        self._known = _Known()

    def __reduce__(self) -> tuple[Callable[..., NodesStore], tuple[object, ...]]:
        return (_again, (self.me, self.members, self.copies, self.url, self.path))

    @property
    def gone(self) -> tuple[str, ...]:
        """Nodes that did not answer when they were last asked."""
        return tuple(sorted(self._known.gone))

    @property
    def bytes_sent(self) -> int:
        """Bytes of objects that this process has sent to other nodes."""
        return sum(one.link.sent for one in self.members.values() if isinstance(one, RemoteNode))

    @property
    def bytes_received(self) -> int:
        """Bytes of objects that this process has read from other nodes."""
        return sum(one.link.received for one in self.members.values() if isinstance(one, RemoteNode))

    @property
    def bytes_kept(self) -> int:
        """Bytes of objects that this process has written on its own node."""
        return self.folder.kept_bytes

    def listing(self, prefix: str = "") -> dict[str, dict[str, Entry]]:
        """Who has what: entries by path and node. Nodes that do not answer are left out, which the log tells once."""
        at = self._prefix(prefix)
        found: dict[str, dict[str, Entry]] = {}
        for node, entries in self._each(lambda member: list(member.entries(at)), told=True).items():
            for entry in entries:
                path = entry.path[self._skip :]
                found.setdefault(path, {})[node] = replace(entry, path=path)
        for path, held in found.items():
            self._known.note(self._at(path), self._good(held))
        return found

    def holders(self, path: str) -> tuple[str, ...]:
        """The nodes that have an object."""
        held = self._each(_entry_of(self._at(path)), told=True)
        return tuple(node for node in self.nodes if held.get(node) is not None)

    def tend(self, active: Iterable[str]) -> None:
        """Look after nodes that are not `active`, as no rank there does anything: each is `tended` by one that is."""
        self.active = tuple(sorted(set(active)))
        self.tended = (self.me, *wards(self.me, self.nodes, self.active))

    def each_tended(self, work: Callable[[Member], T]) -> dict[str, T]:
        """What `work` makes of the folder of this node and of those that it looks after; nodes that are gone aside."""
        return self._each(work, self.tended, told=True)

    def room(self) -> int:
        """Bytes that can be written on the tightest of this node and its buddies; one that is gone is left out.

        A node takes what all its ranks write, and the copies that others have there: what there is room for is for all
        of them together. Nodes that share a machine's memory each see all of it.
        """
        return min(self._each(lambda member: member.room(), self.targets, told=True).values())

    def entry(self, path: str) -> Entry:
        return replace(self._read(path, lambda member, at: member.entry(at)), path=path)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for _, held in sorted(self.listing(prefix).items()):
            yield held[self._good(held)[0]]

    def children(self, path: str = "") -> list[str]:
        at = self._at(path)
        return sorted(
            {name for names in self._each(lambda one: one.children(at), told=True).values() for name in names}
        )

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self._read(path, lambda member, at: member.read_into(at, offset, buffer))

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        self._read(path, lambda member, at: member.read_runs(at, offsets, length, buffer))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        self._read(path, lambda member, at: member.read_ranges(at, ranges))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._read(path, lambda member, at: member.read(at, offset, length))

    def create(self, path: str, size: int) -> Writer:
        at, stamp = self._at(path), new_stamp()
        writers: list[Writer] = []
        try:
            # This node is the last one to have it: what it has, the others have.
            for member in (self.members[node] for node in reversed(self.targets)):
                writers.append(member.create(at, size, stamp=stamp))  # noqa: PERF401  those made are given up
        except BaseException:
            _give_up(writers)
            raise
        return _Copies(writers, lambda: self._known.note(at, self.targets))

    def replace(self, path: str, size: int) -> Writer:
        return self.create(path, size)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        at, stamp = self._at(path), new_stamp()
        first, *others = self.nodes
        self.members[first].put(at, data, if_absent=if_absent, if_match=if_match, durable=durable, stamp=stamp)
        self._each(lambda member: member.put(at, data, durable=durable, stamp=stamp), others)
        self._known.note(at, (self.me, *(node for node in self.nodes if node != self.me)))

    def flush(self, paths: Sequence[str]) -> None:
        """Make what this node has created durable, here and on its buddies."""
        full = [self._at(path) for path in paths]
        self._each(lambda member: member.flush(full), self.targets)

    def delete(self, path: str) -> None:
        """Delete an object everywhere; a node that is gone keeps it, which the log tells once."""
        at = self._at(path)
        self._each(lambda member: member.delete(at), told=True)
        self._known.holders.pop(at, None)

    def clear(self, path: str) -> None:
        """Remove the folder `path` everywhere, at once on each node; one that is gone keeps it, as the log tells."""
        at = self._at(path)
        self._each(lambda member: member.clear(at), told=True)
        for known in [name for name in list(self._known.holders) if name.startswith(f"{at}/")]:
            self._known.holders.pop(known, None)

    def scrub(self, checksums: Iterable[Checksum]) -> tuple[str, ...]:
        """Read the copies on the nodes that this one tends against `checksums`; return those that differ, deleted."""
        wanted = tuple(checksums)
        found = self.each_tended(lambda member: damaged(member.child(self.path), wanted))
        for node, path in [(node, path) for node, bad in found.items() for path in bad]:
            _LOG.warning("%s: the copy of %s on node %s is damaged, and is removed", self.url, path, node)
            self.members[node].delete(self._at(path))
        return tuple(sorted({path for bad in found.values() for path in bad}))

    def heal(self, path: str = "") -> int:
        """Make the copies that the folder `path` lacks since nodes were lost; the bytes that this node has copied.

        For one rank of each active node; each does its part, in any thread, and waits for nobody.
        """
        child = self.child(path)
        return heal(self, {child._at(name): held for name, held in child.listing().items()})

    def tidy(self) -> None:
        self._each(lambda member: member.tidy())

    def child(self, path: str) -> NodesStore:
        return self._beside(self._at(path), f"{self.url}/{path}" if path else self.url)

    def sibling(self, name: str) -> Store:
        if not self.path:
            return super().sibling(name)
        top = self.path.rpartition("/")[0]
        return self._beside(f"{top}/{name}" if top else name, f"{self.url.rpartition('/')[0]}/{name}")

    def close(self) -> None:
        for member in self.members.values():
            member.close()

    def _beside(self, path: str, url: str) -> NodesStore:
        other = object.__new__(type(self))  # not copy.copy, which makes what would be pickled: another store
        vars(other).update(vars(self), path=path, url=url)
        return other

    @property
    def _skip(self) -> int:
        return len(self.path) + 1 if self.path else 0

    def _at(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"{path!r} is not a path inside {self.url}")
        return f"{self.path}/{path}" if self.path and path else self.path or path

    def _prefix(self, prefix: str) -> str:
        self._at(prefix)
        return f"{self.path}/{prefix}" if self.path else prefix

    def _good(self, held: Mapping[str, Entry]) -> tuple[str, ...]:
        """Nodes in the order in which they are read: those whose copy counts, the longest and latest, this one first.

        Each node has an order of its own of the others, so that not all read from the same.
        """
        best = max(held.values(), key=lambda entry: (entry.size, entry.fingerprint)).fingerprint
        return tuple(sorted(held, key=lambda node: (held[node].fingerprint != best, *self._distance(node))))

    def _distance(self, node: str) -> tuple[bool, int, str]:
        return node != self.me, zlib.crc32(f"{self.me}\0{node}".encode()), node

    def _read(self, path: str, read: Callable[[Member, str], T]) -> T:
        """What `read` makes of the first good copy; what is wrong with the last one, if there is none."""
        at = self._at(path)
        if at not in self._known.holders:
            self._look(at)
        errors: list[UcpError] = []
        for node in self._order(at):
            try:
                found = read(self.members[node], at)
            except (NotFoundError, CorruptError, StorageError) as error:
                if isinstance(error, StorageError):
                    self._tell(node, error)
                errors.append(error)
            else:
                self._known.gone.discard(node)
                return found
        for kind in (CorruptError, StorageError):
            for wrong in errors:
                if isinstance(wrong, kind):
                    raise wrong
        raise NotFoundError(f"{self.url}/{path}: no node has it")

    def _look(self, at: str) -> None:
        """Find out who has an object, and whose copy counts: nodes that were apart may have put different ones."""
        held = {node: entry for node, entry in self._each(_entry_of(at), told=True).items() if entry is not None}
        if held:
            self._known.note(at, self._good(held))

    def _order(self, at: str) -> list[str]:
        """All nodes, first those of which it is known that they have the object, then this one and its buddies.

        Those that did not answer come last.
        """
        likely = dict.fromkeys((*self._known.holders.get(at, ()), *self.targets, *self.nodes))
        return sorted(likely, key=lambda node: node in self._known.gone)

    def _each(
        self, work: Callable[[Member], T], nodes: Sequence[str] | None = None, *, told: bool = False
    ) -> dict[str, T]:
        """What `work` makes of each of `nodes`; one that is gone is left out if `told`, and is an error otherwise."""
        asked = self.nodes if nodes is None else nodes

        def run(node: str) -> T | StorageError:
            try:
                made = work(self.members[node])
            except StorageError as error:
                if not told or node == self.me:
                    raise
                self._tell(node, error)
                return error
            self._known.gone.discard(node)
            return made

        if len(asked) <= 1:
            found = [run(node) for node in asked]
        else:
            with ThreadPoolExecutor(min(_THREADS, len(asked)), thread_name_prefix="ucp-nodes") as pool:
                found = list(pool.map(run, asked))
        pairs = zip(asked, found, strict=True)
        return {node: one for node, one in pairs if not isinstance(one, StorageError)}

    def _tell(self, node: str, error: UcpError) -> None:
        with self._known.lock:
            known = node in self._known.gone
            self._known.gone.add(node)
        if not known:
            _LOG.warning("%s: node %s does not answer, others are asked: %s", self.url, node, error)


class _Copies(Writer):
    """Writes an object to several nodes at once, a piece to each in turn."""

    def __init__(self, writers: Sequence[Writer], done: Callable[[], None]) -> None:
        self._writers, self._done = writers, done

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            for writer in self._writers:
                writer.write_at(offset + start, piece)

    def close(self) -> None:
        try:
            for writer in self._writers:
                writer.close()
        except BaseException:
            self.abort()
            raise
        self._done()

    def abort(self) -> None:
        _give_up(self._writers)


def _entry_of(at: str) -> Callable[[Member], Entry | None]:
    def look(member: Member) -> Entry | None:
        try:
            return member.entry(at)
        except NotFoundError:
            return None

    return look


def _give_up(writers: Iterable[Writer]) -> None:
    for writer in writers:
        writer.abort()


def _again(me: str, members: Mapping[str, Member], copies: int, url: str, path: str) -> NodesStore:
    store = NodesStore(me, members, copies=copies, url=url)
    store.path = path
    return store
