"""``ucp spec check``, ``fmt``, ``explain`` and ``list``, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.programs import FITTING, GPT, write
from tests.cli.test_start_up import modules_loaded
from ucp.lang import parse, shipped

TYPO = GPT.replace("down.weight [hidden, ffn]", "down.weight [hidden, ffm]")
SIZES = ["--size", "l=4", "--size", "ffn=8", "--size", "hidden=6", "--size", "vocab=6"]


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    return write(tmp_path, GPT, "gpt.ucp")


def test_a_sound_program_is_said_to_be_sound(gpt, invoke) -> None:
    done = invoke("spec", "check", gpt)
    assert done.exit_code == 0
    assert done.stdout == f"{gpt}  sound: 5 rules (5 replica-checked)\n"


def test_an_unsound_program_is_shown_as_compilers_do(tmp_path, invoke) -> None:
    path = write(tmp_path, TYPO)
    done = invoke("spec", "check", path)
    assert done.exit_code == 4
    line = "  fc2.weight   [hidden, ffn/tp]           <->  down.weight [hidden, ffm]"
    first, quoted, marks, hint = done.stderr.splitlines()
    assert first == f"{path}:12:{line.index('ffm') + 1}: error[size]: `ffm` is not declared"
    assert quoted == f"   12 | {line}"
    assert marks == "      | " + " " * line.index("ffm") + "^^^"
    assert hint == "hint: did you mean `ffn`? known: dp ffn hidden l pp tp vocab"


def test_the_error_of_a_program_as_json(tmp_path, document) -> None:
    error = document("spec", "check", write(tmp_path, TYPO), exit_code=4)["error"]
    assert (error["code"], error["exit_code"]) == ("program", 4)
    assert "error[size]: `ffm` is not declared" in error["message"]
    assert error["hint"].startswith("did you mean `ffn`?")


@pytest.mark.parametrize("name", ["hf_llama", "megatron_core_moe", "gpt_neox"])
def test_shipped_programs_are_sound(name, document) -> None:
    (found,) = document("spec", "check", name)["programs"]
    assert found["file"] == f"{name}.ucp"
    assert found["rules"]
    assert {rule["inverse"] for rule in found["rules"]} <= {"exact", "replica-checked", "lossy", "one-way"}


def test_a_mesh_compiles_what_sizes_allow(gpt, document, invoke) -> None:
    (found,) = document("spec", "check", gpt, "--mesh", "tp=2,pp=2", *SIZES)["programs"]
    compiled = {rule["source"]: rule["coordinates"] for rule in found["rules"]}
    assert compiled == {
        "embed.weight": 2,
        "head.weight": 2,
        "layers.{l}.norm.weight": 2,
        "layers.{l}.fc1.weight": 4,
        "layers.{l}.fc2.weight": 4,
    }
    lacking = document("spec", "check", gpt, "--mesh", "tp=2", "--size", "hidden=6")["programs"][0]["rules"]
    assert {name for rule in lacking for name in rule["lacking"]} == {"vocab", "ffn"}
    done = invoke("spec", "check", gpt, "--mesh", "tp=2", "--size", "hidden=6")
    assert "--size ffn=N --size vocab=N" in done.stderr


def test_a_cut_that_does_not_come_out_is_refused(gpt, invoke) -> None:
    done = invoke("spec", "check", gpt, "--mesh", "tp=3", "--size", "ffn=8", "--size", "hidden=6")
    assert done.exit_code == 5
    assert "gpt.ucp:11: layers.{l}.fc1.weight: `ffn` has size 8, which `/tp` of 3 ranks" in done.stderr
    done = invoke("spec", "check", gpt, "--mesh", "pp=3", "--size", "hidden=6", "--size", "l=4")
    assert done.exit_code == 5
    assert "`l` has size 4, which `/pp` of 3 ranks cannot cut evenly" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "tp"], "is not NAME=NUMBER"),
        (["--mesh", "tp=0"], "is not NAME=NUMBER"),
        (["--mesh", "xp=2"], "no axis 'xp'"),
        (["--size", "hiden=2"], "no size 'hiden'"),
        (["--size", "hidden=2", "--size", "hidden=3"], "is not NAME=NUMBER"),
        (["--flag", "tied=perhaps"], "is not NAME=yes or NAME=no"),
        (["--flag", "tide=yes"], "no flag 'tide'"),
    ],
)
def test_options_that_make_no_sense_are_refused(gpt, invoke, words, message) -> None:
    done = invoke("spec", "check", gpt, *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_several_programs_and_no_checkpoint(gpt, tmp_path, document, invoke) -> None:
    other = write(tmp_path, FITTING)
    assert [found["file"] for found in document("spec", "check", gpt, other, "hf_llama")["programs"]] == [
        str(gpt),
        str(other),
        "hf_llama.ucp",
    ]
    assert invoke("spec", "check", gpt, other, tmp_path).exit_code == 2
    assert invoke("spec", "check", tmp_path / "none.ucp").exit_code == 3


def test_a_program_against_a_checkpoint(checkpoint, tmp_path, document, invoke) -> None:
    path = write(tmp_path, FITTING)
    found = document("spec", "check", path, checkpoint)
    assert found["checkpoint"]["sizes"]["vocab"] == {"value": 13, "why": "dim 0 of embed.weight is 13"}
    assert found["checkpoint"]["logical"] == 5
    tensors = {rule["source"]: (rule["tensors"], rule["inverse"]) for rule in found["programs"][0]["rules"]}
    assert tensors == {  # each has the states value and exp_avg
        "embed.weight": (2, "exact"),
        "layers.{l}.attn.weight": (2, "exact"),
        "layers.{l}.bias": (4, "exact"),
        "norm.running": (2, "exact"),
    }
    done = invoke("spec", "check", path, checkpoint)
    assert done.exit_code == 0
    assert "dim 0 of embed.weight is 13" in done.stdout
    assert "embed.weight → embed.weight" in done.stdout


def test_a_program_that_does_not_fit(checkpoint, tmp_path, invoke) -> None:
    path = write(tmp_path, FITTING.replace("layers.{l}.bias  ", "layers.{l}.gain  "))
    done = invoke("spec", "check", path, checkpoint)
    assert done.exit_code == 5
    assert "no rule of" in done.stderr
    done = invoke("spec", "check", write(tmp_path, FITTING), checkpoint, "--mesh", "tp=2")
    assert done.exit_code == 2
    assert "a checkpoint knows its own" in done.stderr


def test_formatting_rewrites_once(tmp_path, invoke) -> None:
    path = write(tmp_path, GPT.replace("  <->  ", " <-> "))
    path.chmod(0o640)
    text = path.read_text()
    assert invoke("spec", "fmt", path, "--check").exit_code == 6
    shown = invoke("spec", "fmt", path, "--diff")
    assert shown.exit_code == 0
    assert "\n+head.weight" in shown.stdout
    assert path.read_text() == text
    assert invoke("spec", "fmt", path).exit_code == 0
    assert path.read_text() != text
    assert parse(path.read_text()) == parse(text)
    assert path.stat().st_mode & 0o777 == 0o640
    assert invoke("spec", "fmt", path, "--check").exit_code == 0
    assert [item.name for item in tmp_path.iterdir()] == ["test.ucp"]


def test_formatting_standard_input(invoke) -> None:
    done = invoke("spec", "fmt", "-", input="format 1\nsize  a\nx [a] <-> y [a]\n")
    assert done.exit_code == 0
    assert parse(done.stdout) == parse("format 1\nsize a\nx [a] <-> y [a]")
    assert invoke("spec", "fmt", "-", input=done.stdout).stdout == done.stdout


def test_nothing_is_formatted_unless_all_are_programs(tmp_path, invoke) -> None:
    good = write(tmp_path, "format 1\nsize  a\nx [a] <-> y [a]\n", "good.ucp")
    before = good.read_text()
    assert invoke("spec", "fmt", good, write(tmp_path, "format 1\nx [", "bad.ucp")).exit_code == 4
    assert good.read_text() == before
    assert invoke("spec", "fmt", tmp_path / "none.ucp").exit_code == 3


def test_a_source_name_is_explained(gpt, document) -> None:
    (rule,) = document("spec", "explain", gpt, "layers.1.fc1.weight", "--mesh", "pp=2,tp=2", *SIZES)["rules"]
    assert (rule["side"], rule["line"]) == ("source", 11)
    assert rule["layout"] == "[ffn/tp + ffn/tp, hidden]"
    assert rule["filled"] == "[4 + 4, 6]"
    last = rule["shards"][-1]
    assert (last["name"], last["coordinate"], last["shape"]) == ("layers.1.fc1.weight", {"pp": 1, "tp": 1}, [8, 6])
    regions = [(r["here"], r["name"], r["there"], r["shape"]) for r in last["regions"]]
    assert regions == [
        ("[0..4, :]", "layers.3.gate.weight", "[4..8, :]", [8, 6]),
        ("[4..8, :]", "layers.3.up.weight", "[4..8, :]", [8, 6]),
    ]


def test_a_logical_name_is_explained(gpt, document, invoke) -> None:
    words = ["spec", "explain", gpt, "layers.3.norm.weight", "--mesh", "pp=2,tp=2,dp=4", *SIZES]
    (rule,) = document(*words)["rules"]
    assert (rule["side"], rule["replicas"]) == ("logical", ["tp", "dp"])
    assert [(s["name"], s["coordinate"]) for s in rule["shards"]] == [("layers.1.norm.weight", {"pp": 1})]
    shown = invoke(*words).stdout
    assert "along tp dp, compared with each other" in shown
    assert "norm.weight  [hidden]" in shown


def test_padding_is_no_part_of_a_tensor(gpt, document) -> None:
    (rule,) = document("spec", "explain", gpt, "embed.weight", "--mesh", "tp=4", *SIZES[:-1], "vocab=5")["rules"]
    regions = [[(r["here"], r["there"]) for r in shard["regions"]] for shard in rule["shards"]]
    assert regions == [[("[:, :]", "[0..2, :]")], [("[:, :]", "[2..4, :]")], [("[0, :]", "[4, :]")], []]


def test_what_is_not_known_is_asked_for(gpt, invoke) -> None:
    done = invoke("spec", "explain", gpt, "layers.1.fc1.weight", "--mesh", "pp=2")
    assert done.exit_code == 0
    assert "--size ffn=N --size hidden=N --size l=N" in done.stderr
    done = invoke("spec", "explain", gpt, "layers.1.fc3.weight")
    assert done.exit_code == 2
    assert "nearest: layers.{l}.fc" in done.stderr


def test_a_tensor_of_a_checkpoint_is_explained(checkpoint, tmp_path, document, invoke) -> None:
    path = write(tmp_path, FITTING)
    (rule,) = document("spec", "explain", path, "norm.scale", checkpoint)["rules"]
    (shard,) = rule["shards"]
    assert shard["name"] == "norm.running"
    assert (checkpoint / shard["object"]).exists()
    assert shard["regions"][0]["replica"] == 0
    assert "embed.weight" in invoke("spec", "explain", path, "embed.weight", checkpoint, "--state", "exp_avg").stdout


def test_shipped_programs_are_listed(invoke, document) -> None:
    listed = document("spec", "list")["programs"]
    assert {row["name"] for row in listed} == set(shipped())
    assert all(row["about"] for row in listed)
    assert invoke("spec", "list", "-q").stdout.split() == list(shipped())


@pytest.mark.parametrize(
    "words",
    [["check", "hf_llama"], ["fmt", "--check", "gpt"], ["explain", "hf_llama", "norm.weight"], ["list"]],
    ids=lambda words: words[0],
)
def test_nothing_heavy_is_loaded(gpt, invoke, words) -> None:
    invoke("spec", "fmt", gpt)
    loaded = modules_loaded("spec", *[str(gpt) if word == "gpt" else word for word in words])
    assert not loaded & {"torch", "zarr", "rich"}


def test_json_is_one_document(gpt, invoke) -> None:
    assert json.loads(invoke("spec", "fmt", gpt, "--diff", "--json").stdout)["written"] is False


RENAMING = """\
format 1
size vocab hidden

embed.weight            [vocab, hidden]  <->  wte.weight   [hidden, vocab]
layers.{l}.attn.weight                   <->  blocks.{l}.attn.weight  optional
layers.{l}.bias                          <->  blocks.{l}.bias         optional
norm.running            [1]              <->  norm.scale
state * : like param
"""


def test_checkpoints_are_seen_through_a_program(checkpoint, tmp_path, document, invoke) -> None:
    path = write(tmp_path, RENAMING)
    shown = document("show", checkpoint, "wte.weight", "--spec", path)
    assert (shown["shape"], shown["dims"]) == ([7, 13], ["hidden", "vocab"])
    names = {row["name"] for row in document("ls", checkpoint, "--spec", path)["tensors"]}
    assert {"wte.weight", "blocks.0.attn.weight", "norm.scale"} <= names
    assert invoke("ls", checkpoint, "--size", "hidden=7").exit_code == 2
    assert invoke("show", checkpoint, "wte.weight", "--spec", path, "--size", "hidden=8").exit_code == 5


def test_conversions_go_through_a_program(checkpoint, tmp_path, document, invoke) -> None:
    path, made = write(tmp_path, RENAMING), tmp_path / "made"
    words = [checkpoint, made, "--to", "shards", "--spec", path]
    assert invoke("plan", *words).exit_code == 0
    assert invoke("convert", *words).exit_code == 0
    assert document("show", made, "wte.weight")["shape"] == [7, 13]
    before = document("show", checkpoint, "wte.weight", "--spec", path, "--stats")["stats"]
    assert document("show", made, "wte.weight", "--stats")["stats"] == before
