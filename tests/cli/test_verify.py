"""verify: finds each kind of damage, lists it all, and compares checkpoints bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.cli import shards
from tests.cli.conftest import arrays


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def kinds(report) -> list[str]:
    return [finding["kind"] for finding in report["findings"]]


def test_a_whole_checkpoint_is_ok(invoke, document, checkpoint) -> None:
    quick = document("verify", checkpoint)
    assert (quick["ok"], quick["bytes_read"], quick["checksums"]) == (True, 0, 0)
    deep = document("verify", checkpoint, "--deep")
    assert (deep["ok"], deep["checksums"], deep["low_precision_copies"], deep["replicas"]) == (True, 3, 2, 8)
    assert (deep["nan"], deep["inf"]) == ({}, {})
    result = invoke("verify", checkpoint, "--deep")
    assert result.stdout.startswith("ok  ")
    assert invoke("verify", checkpoint, "-q").output == ""


def test_every_flipped_bit_is_found(document, checkpoint) -> None:
    for name in ("rank0.bin", "rank1.bin", "copies.bin"):
        path = checkpoint / name
        whole = path.read_bytes()
        for offset in range(0, len(whole), 97):
            flip(path, offset)
            report = document("verify", checkpoint, "--deep", exit_code=6)
            assert {"kind": "checksum", "where": name} in [
                {"kind": f["kind"], "where": f["where"]} for f in report["findings"]
            ]
            path.write_bytes(whole)
    assert document("verify", checkpoint, "--deep")["ok"]


def without_checksums(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "index.json").read_text())
    (checkpoint / "index.json").write_text(json.dumps({**index, "checksums": []}))


def test_without_checksums_copies_and_replicas_still_tell(document, checkpoint) -> None:
    without_checksums(checkpoint)
    flip(checkpoint / "rank0.bin", 3)  # sign and exponent of the first element of embed.weight
    report = document("verify", checkpoint, "--deep", exit_code=6)
    assert sorted(set(kinds(report))) == ["low-precision-copy", "replica"]
    assert {finding["where"] for finding in report["findings"]} == {"embed.weight[value]"}


def test_truncated_and_missing_objects_are_found_without_reading(invoke, document, checkpoint) -> None:
    data = (checkpoint / "rank1.bin").read_bytes()
    (checkpoint / "rank1.bin").write_bytes(data[:-1])
    report = document("verify", checkpoint, exit_code=6)
    assert kinds(report) == ["object-size"]
    (checkpoint / "rank1.bin").unlink()
    report = document("verify", checkpoint, exit_code=6)
    assert report["findings"] == [{"kind": "missing-object", "where": "rank1.bin", "message": "is not there"}]
    result = invoke("verify", checkpoint)
    assert result.exit_code == 6
    assert result.stdout.startswith("missing-object  rank1.bin")
    assert "error[content]: " in result.stderr


def test_missing_objects_do_not_stop_the_deep_part(document, checkpoint) -> None:
    (checkpoint / "rank1.bin").unlink()
    flip(checkpoint / "copies.bin", 1)
    found = kinds(document("verify", checkpoint, "--deep", exit_code=6))
    assert {"missing-object", "not-found", "checksum"} <= set(found)


def test_a_hole_is_found(document, checkpoint) -> None:
    index = json.loads((checkpoint / "index.json").read_text())
    del index["fragments"][1]
    (checkpoint / "index.json").write_text(json.dumps(index))
    for options in ((), ("--deep",)):
        report = document("verify", checkpoint, *options, exit_code=6)
        assert [f["where"] for f in report["findings"] if f["kind"] == "incomplete"] == ["embed.weight[value]"]


def test_nan_and_inf_are_counted_and_no_fault(document, invoke, tmp_path) -> None:
    array = arrays()["embed.weight"]
    array[0, :3] = np.nan
    array[1, 0] = -np.inf
    there = shards.write(tmp_path / "nan", {"embed.weight": array})
    report = document("verify", there, "--deep")
    assert report["nan"] == {"embed.weight[value]": 3, "embed.weight[exp_avg]": 3}
    assert report["inf"] == {"embed.weight[value]": 1, "embed.weight[exp_avg]": 1}
    assert "NaN  embed.weight[value]  3 elements" in invoke("verify", there, "--deep").stdout


def test_the_same_state_from_other_ranks_is_equal(document, checkpoint, other) -> None:
    report = document("verify", checkpoint, "--against", other)
    assert (report["ok"], report["against"]) == (True, str(other))
    assert report["bytes_read"] == 2 * 8 * sum(array.size for array in arrays().values())


def test_one_different_bit_is_named(document, invoke, checkpoint, tmp_path) -> None:
    changed = arrays()
    changed["layers.0.attn.weight"][2, 3] = np.nextafter(changed["layers.0.attn.weight"][2, 3], np.float32(9))
    there = shards.write(tmp_path / "changed", changed)
    report = document("verify", checkpoint, "--against", there, exit_code=6)
    assert [(f["kind"], f["where"]) for f in report["findings"]] == [
        ("data", "layers.0.attn.weight[value]"),
        ("data", "layers.0.attn.weight[exp_avg]"),
    ]
    assert "1 of 30 elements differ, first at [2, 3]" in report["findings"][0]["message"]
    result = invoke("verify", checkpoint, "--against", there)
    assert result.exit_code == 6
    assert "2 differences" in result.stderr


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda a: a.pop("layers.9.bias"), "tensor"),
        (lambda a: a.update({"layers.9.bias": np.zeros(12, np.float32)}), "form"),
        (lambda a: a.update({"more": np.zeros(1, np.float32)}), "tensor"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_differing_descriptions_are_listed(document, checkpoint, tmp_path, change, kind) -> None:
    changed = arrays()
    change(changed)
    there = shards.write(tmp_path / "changed", changed)
    assert set(kinds(document("verify", checkpoint, "--against", there, exit_code=6))) == {kind}


def test_another_step_is_a_difference(document, checkpoint, tmp_path) -> None:
    there = shards.write(tmp_path / "later", arrays(), step=8)
    found = kinds(document("verify", checkpoint, "--against", there, exit_code=6))
    assert found == ["step", "scalar"]


def test_other_hyper_parameters_are_named_once_for_all_tensors(document, checkpoint, other, monkeypatch) -> None:
    read = shards.Shards.read

    def later(self, store, **options):
        catalog = read(self, store, **options)
        if not store.url.endswith("other"):
            return catalog
        group = replace(catalog.param_groups[0], options={"lr": 0.02, "betas": [0.9, 0.95]})
        return replace(catalog, param_groups=(group,))

    monkeypatch.setattr(shards.Shards, "read", later)
    report = document("verify", checkpoint, "--against", other, exit_code=6)
    assert report["findings"] == [
        {"kind": "option", "where": "embed.weight and 4 more", "message": "lr 0.01 against 0.02"},
        {"kind": "option", "where": "embed.weight and 4 more", "message": "weight_decay only in the first"},
    ]


def test_the_training_state_is_compared_when_asked(document, invoke, checkpoint, tmp_path) -> None:
    there = tmp_path / "universal"
    assert invoke("convert", checkpoint, there).exit_code == 0
    report = document("verify", checkpoint, "--against", there, "--training-state")
    assert (report["ok"], report["training_state"]) == (True, True)
    changed = arrays()
    changed["embed.weight"][0, 0] += 1  # the test family's random state is the first bytes of this
    other = shards.write(tmp_path / "changed", changed)
    found = document("verify", other, "--against", there, "--training-state", exit_code=6)["findings"]
    assert {"kind": "training-state", "where": "client.rng", "message": "tensor uint8[4]: values differ"} in found
    assert invoke("verify", checkpoint, "--training-state").exit_code == 2


def test_the_universal_form_of_a_checkpoint_is_whole_and_equal(document, invoke, checkpoint, tmp_path) -> None:
    there = tmp_path / "universal"
    assert invoke("convert", checkpoint, there).exit_code == 0
    deep = document("verify", there, "--deep", "--against", checkpoint)
    assert deep["ok"]
    assert deep["checksums"] > 0
    for path in sorted(p for p in there.rglob("*") if p.is_file() and "ucp" not in p.name):
        whole = path.read_bytes()
        for offset in {0, len(whole) // 2, len(whole) - 1}:
            flip(path, offset)
            assert invoke("verify", there, "--deep").exit_code in (3, 5, 6), f"{path} byte {offset}"
        path.write_bytes(whole)
