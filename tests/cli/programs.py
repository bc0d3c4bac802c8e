"""Programs for the command line's tests: one for the test family's checkpoint, one of a model on a grid."""

from __future__ import annotations

from pathlib import Path

FITTING = """\
format 1
size vocab hidden

embed.weight          [vocab, hidden]  <->  embed.weight
layers.{l}.attn.weight                 <->  layers.{l}.attn.weight  optional
layers.{l}.bias                        <->  layers.{l}.bias         optional
norm.running          [1]              <->  norm.scale
state * : like param
"""

GPT = """\
# A small model, cut over tensor parallel ranks. Its layers are numbered anew on each stage.
format 1
mesh pp tp dp
size vocab hidden ffn
flag tied

embed.weight  [(vocab + _)/tp, hidden]  <->  embed.weight [vocab, hidden]  on pp 0
head.weight   [vocab/tp, hidden]        <->  lm_head.weight                on pp -1  unless tied
in layers.{l/pp} <-> layers.{l} {
  norm.weight  [hidden]                   <->  norm.weight
  fc1.weight   [ffn/tp + ffn/tp, hidden]  <->  gate.weight [ffn, hidden], up.weight [ffn, hidden]
  fc2.weight   [hidden, ffn/tp]           <->  down.weight [hidden, ffn]
}
"""


def write(folder: Path, text: str, name: str = "test.ucp") -> Path:
    """Put a program into a file."""
    path = folder / name
    path.write_text(text)
    return path
