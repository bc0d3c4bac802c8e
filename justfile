# Each recipe is a step of CI and `just ci` is all of them. See CONTRIBUTING.md.

set positional-arguments

venv := env("UCP_VENV", ".venv")
python := venv / "bin/python"

[private]
default:
    @{{ just_executable() }} --list --unsorted

# Make the environment, with every tool and every framework the tests use
install:
    python3 -m venv {{ venv }}
    {{ python }} -m pip install -c constraints.txt -e '.[dev]'

# torchtitan, for the tests of its checkpointer: without what it asks for that they never import, such as triton
torchtitan:
    {{ python }} -m pip install -c constraints.txt tyro typeguard docstring_parser
    {{ python }} -m pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing==0.1.1

# Object stores for the long tests, unpacked into .ci/servers: Ceph, Swift, azurite, nginx
servers:
    tests/servers/install.sh

# Style, docstrings and formatting
lint:
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .

# Repair what ruff can repair
fix:
    {{ python }} -m ruff check --fix .
    {{ python }} -m ruff format .

# Types, strictly
types:
    {{ python }} -m mypy

# The tests without the long ones; arguments go to pytest
test *args:
    {{ python }} -m pytest "$@"

# The long tests, with more examples
test-slow *args:
    {{ python }} -m pytest -n auto -m 'slow and not exhaustive' --hypothesis-profile=ci "$@"

# The very long ones: every operation and every order, on every server
test-exhaustive *args:
    {{ python }} -m pytest -n auto -m exhaustive --timeout=7200 "$@"

# Fuzz each reader for so many seconds, or one: `just fuzz 600 pickle`. What is found is kept in tests/fuzz/corpus
fuzz seconds="60" *targets:
    {{ python }} -m pip install --quiet -c constraints.txt 'atheris>=3.0'
    {{ python }} -m tests.fuzz --seconds {{ seconds }} {{ targets }}

# Links, commands and examples of the documentation, and the changelog fragments
docs:
    {{ python }} -m pytest tests/test_docs.py
    {{ python }} -m towncrier build --draft --version next

# The main job, end to end: train, save, convert, resume on another layout
demo *args:
    {{ venv }}/bin/ucp demo "$@"

# Everything CI runs
ci: torchtitan servers lint types test test-slow docs demo

# Rewrite constraints.txt from the environment
freeze:
    {{ python }} -m pip freeze --all --exclude-editable --exclude pip --exclude wheel > {{ venv }}/frozen.txt
    { grep '^#' constraints.txt; sed -E 's/\+[a-z0-9.]+$//' {{ venv }}/frozen.txt; } > {{ venv }}/constraints.txt
    mv {{ venv }}/constraints.txt constraints.txt
