"""What nodes hold between them: which versions are whole, which are not, and what of those is missing."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch

import ucp
from ucp.elastic.nodes import NodeFolder
from ucp.elastic.versions import (
    EPOCH_FILE,
    Part,
    Root,
    Shown,
    Version,
    epoch_folder,
    folder_of,
    record_of,
    show,
    versions_of,
)


def part(step, objects, *, epoch=1, root=None, damage=""):
    return Part(step, epoch, objects, root, damage)


def whole(shown):
    return versions_of(shown, tier="memory", url="nodes://memory")


A, B = "shards/rank-00000-0.safetensors", "shards/rank-00001-0.safetensors"
ROOT = Root("x", {A: 10, B: 20})


def test_a_version_is_complete_where_its_nodes_have_all_of_it_between_them():
    (found,) = whole([Shown("n0", (part(5, {A: 10}),)), Shown("n1", (part(5, {B: 20}, root=ROOT),))])
    assert found == Version(5, 1, "memory", "nodes://memory/e00001/step-00000005", id="x")
    assert (found.complete, found.why) == (True, "")


def test_an_object_that_is_too_short_on_all_nodes_is_missing():
    (found,) = whole([Shown("n0", (part(5, {A: 10, B: 19}, root=ROOT),)), Shown("n1", (part(5, {B: 0}),))])
    assert (found.complete, found.missing) == (False, (B,))


def test_what_is_missing_is_told_with_the_node_that_had_it():
    placed = {1: ("n0", "n1")}
    shown = Shown("n0", (part(5, {A: 10}, root=ROOT),), placed)
    (gone,) = whole([shown])
    assert gone.why == f"nowhere any more: {B} (of rank 1 on node n1, which is gone)"
    (lost,) = whole([shown, Shown("n1")])
    assert lost.missing == (f"{B} (of rank 1 on node n1, which lost it)",)


def test_much_that_is_missing_is_told_in_short():
    root = Root("x", {f"shards/rank-{rank:05}-0.safetensors": 1 for rank in range(5)})
    (found,) = whole([Shown("n0", (part(5, {}, root=root),))])
    assert found.why.endswith("rank-00002-0.safetensors and 2 more")


def test_a_save_that_was_cut_short_is_told_and_counts_for_nothing():
    (found,) = whole([Shown("n0", (part(5, {A: 10}),)), Shown("n1", (part(5, {B: 20}),))])
    assert (found.committed, found.complete, found.why) == (False, False, "its save was cut short")


def test_a_root_that_is_damaged_on_one_node_is_had_from_another():
    damaged = Shown("n0", (part(5, {A: 10, B: 20}, damage="ucp.json: no JSON"),))
    (found,) = whole([damaged, Shown("n1", (part(5, {}, root=ROOT),))])
    assert found.complete
    (found,) = whole([damaged])
    assert (found.committed, found.missing) == (True, ("ucp.json (damaged on n0: ucp.json: no JSON)",))


def test_two_saves_in_one_folder_are_two_versions_and_never_mixed():
    """As of a node that was away while its epoch's number was given again."""
    other = Root("y", {A: 11, B: 20})
    found = whole([Shown("n0", (part(5, {A: 10, B: 20}, root=ROOT),)), Shown("n1", (part(5, {B: 20}, root=other),))])
    assert [(one.id, one.complete) for one in found] == [("x", True), ("y", False)]


def test_what_nodes_hold_of_another_run_is_apart_and_never_complete():
    """Of a node that was away while the run began anew: its objects count for nothing in a version of this one."""
    mine = Shown("n0", (part(5, {A: 10}, root=ROOT),), run="this")
    found = versions_of(
        [mine, Shown("n1", (part(5, {B: 20}, root=ROOT),), run="other")], tier="memory", url="u", run="this"
    )
    assert [(one.foreign, one.complete, one.missing) for one in found] == [(False, False, (B,)), (True, False, (A,))]
    assert found[1].why == "of another run"
    unknown = Shown("n1", (part(5, {B: 20}),))
    (found,) = versions_of([mine, unknown], tier="memory", url="u", run="this")
    assert found.complete


def test_the_newest_step_is_first_then_the_last_epoch_then_the_nearest_tier():
    found = [
        Version(10, 3, "local", ""),
        Version(10, 0, "storage", ""),
        Version(12, 1, "memory", ""),
        Version(10, 3, "memory", ""),
        Version(10, 2, "memory", ""),
        Version(11, 0, "storage", ""),
    ]
    ordered = sorted(found, key=lambda one: one.order, reverse=True)
    assert [(one.step, one.epoch, one.tier) for one in ordered] == [
        (12, 1, "memory"),
        (11, 0, "storage"),
        (10, 3, "memory"),
        (10, 3, "local"),
        (10, 2, "memory"),
        (10, 0, "storage"),
    ]


@pytest.fixture
def folder(tmp_path):
    """A node's folder with real saves of steps 3 and 6 of epoch 2."""
    made = NodeFolder(str(tmp_path / "node"))
    for step in (3, 6):
        ucp.save({"w": torch.arange(6.0)}, tmp_path / "save", step=step)
        shutil.copytree(tmp_path / "save", tmp_path / "node" / folder_of(2, step))
        shutil.rmtree(tmp_path / "save")
    made.put(f"{epoch_folder(2)}/{EPOCH_FILE}", record_of(["n", "m"]))
    return made


def test_a_node_shows_what_it_has(folder, tmp_path):
    shown = show("n", folder)
    assert (shown.node, dict(shown.placed), shown.epochs) == ("n", {2: ("n", "m")}, {2})
    assert [(one.step, one.epoch, one.damage) for one in shown.parts] == [(3, 2, ""), (6, 2, "")]
    for one in shown.parts:
        files = [path for path in (tmp_path / "node" / one.folder).rglob("*") if path.is_file()]
        assert dict(one.objects) == {
            str(path.relative_to(tmp_path / "node" / one.folder)): path.stat().st_size for path in files
        }
        assert one.root is not None
        assert one.root.sizes.items() <= one.objects.items()
    found = whole([shown])
    assert Counter((one.step, one.epoch, one.complete) for one in found) == Counter({(3, 2, True): 1, (6, 2, True): 1})
    assert [one.id for one in found] == [
        ucp.open(tmp_path / "node" / folder_of(2, step)).catalog.source.detail["id"] for step in (3, 6)
    ]


def test_what_is_in_no_version_is_not_shown(folder):
    for path in (
        "else",
        "e00009/else",
        "e1/step-00000001/ucp.json",
        "e00002/step-1/ucp.json",
        "e00002/step-00000009.json",
    ):
        folder.put(path, b"{}")
    shown = show("n", folder)
    assert ([one.step for one in shown.parts], shown.epochs) == ([3, 6], {2})


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": "ucp"}', b"\xff" * 100])
def test_a_root_that_is_none_is_damage_and_no_error(folder, data):
    folder.put(f"{folder_of(2, 6)}/ucp.json", data)
    first, second = show("n", folder).parts
    assert (first.damage, second.root) == ("", None)
    assert second.damage
    assert [(one.step, one.complete) for one in whole([show("n", folder)])] == [(3, True), (6, False)]


def test_a_root_of_another_step_is_damage(folder):
    folder.put(f"{folder_of(2, 6)}/ucp.json", folder.read(f"{folder_of(2, 3)}/ucp.json"))
    assert "of step 3, not 6" in show("n", folder).parts[1].damage


@pytest.mark.parametrize("data", [b"", b"[]", b'{"nodes": 3}', b"{}", b"[" * 100_000])
def test_places_that_are_not_told_only_make_messages_say_less(folder, data):
    folder.put(f"{epoch_folder(2)}/{EPOCH_FILE}", data)
    assert show("n", folder).placed == {}
    assert [one.complete for one in whole([show("n", folder)])] == [True, True]
