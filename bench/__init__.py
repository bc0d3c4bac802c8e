"""Measurements against stock tools and against the machine's own limits; see `bench/README.md`."""
