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
    {{ python }} -m pytest -n auto -m slow --hypothesis-profile=ci "$@"

# Links, commands and examples of the documentation, and the changelog fragments
docs:
    {{ python }} -m pytest tests/test_docs.py
    {{ python }} -m towncrier build --draft --version next

# The main job, end to end: train, save, convert, resume on another layout
demo *args:
    {{ venv }}/bin/ucp demo "$@"

# Everything CI runs
ci: lint types test test-slow docs demo

# Rewrite constraints.txt from the environment
freeze:
    {{ python }} -m pip freeze --all --exclude-editable --exclude pip --exclude wheel > {{ venv }}/frozen.txt
    { grep '^#' constraints.txt; sed -E 's/\+[a-z0-9.]+$//' {{ venv }}/frozen.txt; } > {{ venv }}/constraints.txt
    mv {{ venv }}/constraints.txt constraints.txt
