"""Writers killed at every change they make to a real object store.

    python -m tests.commit.served NAME URL STORY...

A process of its own, which uses no client of the store itself: only its forks do.
"""

from __future__ import annotations

import sys
from contextlib import closing

from tests.commit.crashing import CHANGES, exhaust
from tests.commit.keeping import stories as keeping
from tests.commit.places import ServerPlace
from tests.commit.stories import stories


def main(name: str, url: str, *wanted: str) -> None:
    """Disturb the stories `wanted` and print what was done."""
    known = {story.name: story for story in [*stories(), *keeping()]}
    for story in wanted:
        with closing(ServerPlace(name, url)) as place:
            print(exhaust(known[story], place, ("before", "lost"), only=CHANGES), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
