"""Content-addressed reuse: objects that several checkpoints of a run have in common are stored once, in its pool.

How writers and the collector of garbage keep out of each other's way: spec/commit-protocol.md, "Shared objects and
garbage".
"""
