"""info, ls, tree, show and state: the right facts, and JSON documents with the documented keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cli import shards
from tests.cli.conftest import arrays
from ucp.cli.app import program


def documented(name: str) -> set[str]:
    return set(program.get_command(None, name).json_keys)


@pytest.mark.parametrize(
    ("name", "more"),
    [("info", []), ("ls", []), ("tree", []), ("show", ["embed.weight"]), ("state", []), ("verify", [])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_has_the_documented_keys(document, checkpoint, name, more) -> None:
    assert set(document(name, checkpoint, *more)) == documented(name)


def test_plan_and_convert_have_the_documented_keys(document, checkpoint, tmp_path) -> None:
    there = tmp_path / "new"
    assert set(document("plan", checkpoint, there, "--to", "shards", "-v")) == documented("plan")
    assert set(document("convert", checkpoint, there, "--to", "shards")) == documented("convert")


def test_info_counts(document, checkpoint) -> None:
    facts = document("info", checkpoint)
    sizes = {name: array.size for name, array in arrays().items()}
    assert facts["tensors"] == 5
    assert facts["kinds"] == {"parameter": 4, "buffer": 1}
    assert facts["parameters"] == sum(size for name, size in sizes.items() if not name.endswith("running"))
    assert facts["bytes"] == 8 * sum(sizes.values())
    assert facts["states"]["exp_avg"] == {"tensors": 5, "bytes": 4 * sum(sizes.values())}
    assert facts["mesh"] == {"dp": 2}
    assert facts["complete"] is True
    assert facts["integrity"]["low_precision_copies"] == 2
    assert facts["integrity"]["replicas"] == 8
    on_disk = sum(path.stat().st_size for path in Path(checkpoint).glob("*.bin"))
    assert facts["objects_bytes"] == facts["integrity"]["digests"]["crc32"] == on_disk


def test_info_fits_one_screen_and_shows_notes(invoke, checkpoint) -> None:
    result = invoke("info", checkpoint)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) <= 24
    assert "note  the data-parallel size was inferred" in result.stdout
    assert "head.weight = embed.weight" in result.stdout


def test_info_of_a_checkpoint_with_a_hole_says_so(invoke, document, checkpoint) -> None:
    edit_fragments(checkpoint, lambda fragments: fragments[1:])
    facts = document("info", checkpoint)
    assert facts["complete"] is False
    assert "embed.weight[value]" in facts["problem"]
    assert "complete    no: " in invoke("info", checkpoint).stdout


def edit_fragments(checkpoint: Path, change) -> None:
    import json

    index = json.loads((checkpoint / "index.json").read_text())
    index["fragments"] = change(index["fragments"])
    (checkpoint / "index.json").write_text(json.dumps(index))


def test_options_reach_the_reader(invoke, checkpoint, monkeypatch) -> None:
    given = {}
    read = shards.Shards.read
    monkeypatch.setattr(
        shards.Shards, "read", lambda self, store, **options: (given.update(options), read(self, store))[1]
    )
    assert invoke("info", checkpoint, "--tag", "t", "-o", "one=1=1", "-o", "two=a", "-o", "two=b").exit_code == 0
    assert given == {"tag": "t", "one": "1=1", "two": ("a", "b")}
    for word in ("nothing", "=x", "family=x"):
        assert invoke("info", checkpoint, "-o", word).exit_code == 2


def test_ls_selects_and_sorts(invoke, document, checkpoint) -> None:
    assert invoke("ls", checkpoint, "-q").stdout.split() == [
        "embed.weight", "layers.0.attn.weight", "layers.9.bias", "layers.10.bias", "norm.running"
    ]  # fmt: skip
    assert invoke("ls", checkpoint, "layers.*.bias", "-q").stdout.split() == ["layers.9.bias", "layers.10.bias"]
    sizes = [row["bytes"] for row in document("ls", checkpoint, "--sort", "size")["tensors"]]
    assert sizes == sorted(sizes, reverse=True)
    (row,) = document("ls", checkpoint, "embed*", "--state", "exp_avg")["tensors"]
    assert row["bytes"] == 13 * 7 * 4
    assert list(row["states"]) == ["exp_avg"]


def test_ls_long_has_a_line_per_state(invoke, checkpoint) -> None:
    lines = invoke("ls", checkpoint, "embed.weight", "--long").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["value", "exp_avg"]


def test_ls_of_nothing_is_not_found(invoke, checkpoint) -> None:
    result = invoke("ls", checkpoint, "nothing.*")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no tensor matches 'nothing.*'" in result.stderr
    assert invoke("ls", checkpoint, "--state", "momentum").exit_code == 3


def test_tree_adds_up(document, invoke, checkpoint) -> None:
    root = document("tree", checkpoint)["tree"]
    assert root["tensors"] == 5
    assert root["bytes"] == sum(child["bytes"] for child in root["children"])
    layers = next(child for child in root["children"] if child["name"] == "layers")
    assert (layers["tensors"], layers["parameters"]) == (3, 44)
    lines = invoke("tree", checkpoint, "--depth", "1").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["embed", "layers", "norm"]
    assert "10" in invoke("tree", checkpoint).stdout.split("9")[-1], "layer 10 comes after layer 9"


def test_a_name_of_many_parts_is_no_danger(document, invoke, tmp_path) -> None:
    deep = shards.write(tmp_path / "deep", {"a." * 5000 + "b": np.ones(2, np.float32)})
    assert document("tree", deep)["tree"]["tensors"] == 1
    assert invoke("tree", deep).exit_code == 0


def test_show_lists_fragments_and_resolves_aliases(document, checkpoint) -> None:
    facts = document("show", checkpoint, "head.weight")
    assert (facts["name"], facts["aliases"], facts["stats"]) == ("embed.weight", ["head.weight"], None)
    assert facts["scalars"] == {"step": {"value": 7, "dtype": "float32"}}
    assert facts["options"][0]["lr"] == 0.01
    first = facts["fragments"][0]
    assert first["region"] == {"start": 0, "stop": 46}
    data = np.fromfile(checkpoint / first["object"], np.float32, count=46, offset=first["offset"])
    assert np.array_equal(data, arrays()["embed.weight"].ravel()[:46])
    assert [f["replica"] for f in facts["fragments"] if f["state"] == "value"] == [0, 0, 1, 1]
    assert facts["low_precision_copy"] == {"dtype": "bfloat16", "shape": [13, 7]}


def test_show_stats_are_those_of_the_data(document, invoke, checkpoint) -> None:
    array = arrays()["embed.weight"].astype(np.float64)
    found = document("show", checkpoint, "embed.weight", "--stats")["stats"]["value"]
    assert (found["count"], found["nan"], found["inf"]) == (array.size, 0, 0)
    assert (found["min"], found["max"]) == (array.min(), array.max())
    assert found["mean"] == pytest.approx(array.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(array.std(), rel=1e-12)
    assert "MEAN" in invoke("show", checkpoint, "embed.weight", "--stats").stdout


def test_show_of_an_unknown_tensor_suggests(invoke, checkpoint) -> None:
    result = invoke("show", checkpoint, "embed.wieght")
    assert result.exit_code == 3
    assert "hint: did you mean 'embed.weight'" in result.stderr


def test_state_shows_a_tree_and_its_parts(document, invoke, checkpoint) -> None:
    state = document("state", checkpoint)["state"]
    assert state["lr_scheduler"] == {"last_epoch": 7, "base_lrs": [0.01, 0.02]}
    client = state["client"]
    assert client["args"]["class"] == "argparse.Namespace"
    assert client["rng"] == {"$type": "tensor", "dtype": "uint8", "shape": [4], "object": "rank0.bin", "offset": 0}
    assert client["nested"]["$type"] == "dict"
    assert client["nested"]["pairs"][0] == ["tuple", {"$type": "tuple", "items": [1, "two"]}]
    assert document("state", checkpoint, "lr_scheduler.last_epoch")["state"] == 7
    assert invoke("state", checkpoint, "client.nested.3").stdout.split("  ") == ["client.nested.3", "3 bytes\n"]
    assert invoke("state", checkpoint, "--depth", "1").stdout.splitlines()[1:] == [
        "  lr_scheduler  dict of 2",
        "  client  dict of 3",
    ]
    missing = invoke("state", checkpoint, "client.nothing")
    assert missing.exit_code == 3
    assert "there is: args rng nested" in missing.stderr
