"""The command line: one file per command, and `output` for everything that is printed."""

from ucp.cli.app import main

__all__ = ["main"]
