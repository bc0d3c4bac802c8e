"""Internals of the converters of families ``hf`` and ``safetensors``."""
