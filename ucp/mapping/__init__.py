"""Between what ranks hold and logical tensors, as a conversion program says. Catalogs in and out, no data read."""

from ucp.mapping.around import Part
from ucp.mapping.consolidate import consolidate
from ucp.mapping.scatter import scatter
from ucp.mapping.source import AUTO, ProgramLike, as_program, is_logical, known_flags, read_source

__all__ = [
    "AUTO",
    "Part",
    "ProgramLike",
    "as_program",
    "consolidate",
    "is_logical",
    "known_flags",
    "read_source",
    "scatter",
]
