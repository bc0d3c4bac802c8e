"""``python -m ucp …`` is ``ucp …``."""

from ucp.cli import main

if __name__ == "__main__":
    main()
