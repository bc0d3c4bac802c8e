"""A node that is cut off, or that hears and is not heard, or the other way round, and no packet says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.elastic.nodes.processes import end, serve
from tests.elastic.nodes.test_processes import DATA, store_of, write, write_on
from ucp.elastic.nodes.join import _Hello, _reachable
from ucp.errors import StorageError


class Cable:
    """A network namespace with a link to this one."""

    def __init__(self) -> None:
        number = os.getpid()
        self.name, self.near, self.far = f"ucp-{number}", f"ucpn{number}", f"ucpf{number}"
        self.here, self.there = (f"10.213.{number % 250}.{last}" for last in (1, 2))

    def lay(self) -> None:
        """Make it; CalledProcessError where this is not allowed."""
        inside = ("ip", "-n", self.name)
        for command in (
            ("ip", "netns", "add", self.name),
            ("ip", "link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.name),
            ("ip", "addr", "add", f"{self.here}/24", "dev", self.near),
            (*inside, "addr", "add", f"{self.there}/24", "dev", self.far),
            (*inside, "link", "set", self.far, "up"),
            ("ip", "link", "set", self.near, "up"),
        ):
            subprocess.run(command, check=True, capture_output=True)

    def cut(self, which: str) -> None:
        """Lose packets without a word: ``both`` ways, those from here ``there``, or those from there ``here``."""
        if which == "both":
            self._far("link", "set", self.far, "down")
        elif which == "here":
            self._far("route", "add", "blackhole", f"{self.here}/32")
        else:
            # To an address that nobody has, so that this end does not know either.
            self._near("neigh", "replace", self.there, "lladdr", "02:00:00:00:00:01", "dev", self.near)

    def heal(self, which: str) -> None:
        """Take that back."""
        if which == "both":
            self._far("link", "set", self.far, "up")
        elif which == "here":
            self._far("route", "del", "blackhole", f"{self.here}/32")
        else:
            self._near("neigh", "del", self.there, "dev", self.near)

    def _near(self, *words: str) -> None:
        subprocess.run(("ip", *words), check=True, capture_output=True)

    def _far(self, *words: str) -> None:
        self._near("-n", self.name, *words)

    def remove(self) -> None:
        """Take it away, and whatever is left of it."""
        subprocess.run(("ip", "link", "del", self.near), check=False, capture_output=True)
        subprocess.run(("ip", "netns", "del", self.name), check=False, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """A cable, where this machine lets us lay one."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    cable = Cable()
    try:
        try:
            cable.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"may make no network namespaces here: {error.stderr.decode().strip()}")
        yield cable
    finally:
        cable.remove()


@pytest.mark.parametrize("which", ["both", "there", "here"])
def test_a_node_that_is_cut_off_in_the_middle_of_an_object(tmp_path: Path, cable: Cable, which: str) -> None:
    process, address = serve(tmp_path / "b", cable.there, inside=("ip", "netns", "exec", cable.name))
    patient, store = store_of(tmp_path / "a", address), store_of(tmp_path / "a", address, timeout=3)
    try:
        write(patient, "x")
        patient.close()
        writer = store.create("y", 256 << 20)
        writer.write_at(0, bytes(1 << 20))
        cable.cut(which)
        begun = time.monotonic()
        with pytest.raises(StorageError, match="node b is gone"):
            write_on(writer)
        writer.abort()
        assert store.read("x") == DATA, "this node has it"
        with pytest.raises(StorageError, match="node b is gone"):
            store.put("root", b"1")
        assert [entry.path for entry in store.entries()] == ["root", "x"]
        assert time.monotonic() - begun < 60
        cable.heal(which)
        shutil.rmtree(tmp_path / "a")
        while True:
            try:
                assert store.read("x") == DATA
                break
            except StorageError:
                assert time.monotonic() - begun < 120, "it is found again when the link is back"
    finally:
        store.close()
        end(process)


def test_a_node_that_knows_itself_by_a_loopback_address_tells_another(cable: Cable) -> None:
    """As the leader of a job on a host whose own name leads to 127.0.1.1."""
    other = _Hello("b", "", cable.there)
    for host, told in (("127.0.1.1", cable.here), ("10.1.2.3", "10.1.2.3")):
        mine = _Hello("a", "", host)
        assert _reachable(mine, [mine, other]) == told
    alone = _Hello("a", "", "127.0.0.1")
    assert _reachable(alone, [alone, _Hello("b", "", "127.0.0.1")]) == "127.0.0.1"
