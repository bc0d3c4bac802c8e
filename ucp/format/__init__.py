"""The universal form on disk: a Zarr v3 group whose objects are safetensors files at the same time.

The normative text is ``spec/universal-format.md``.
"""
