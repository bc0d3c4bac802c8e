"""Launcher for a source checkout: ``python cli.py …`` is ``ucp …``."""

from ucp.cli import main

if __name__ == "__main__":
    main()
