"""Carrying plans out: executors, journal and resume, integrity, progress."""
