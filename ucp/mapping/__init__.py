"""From what ranks hold to logical tensors, as a conversion program says: catalogs in, one catalog out, no data read."""

from ucp.mapping.around import Part
from ucp.mapping.consolidate import consolidate
from ucp.mapping.source import ProgramLike, as_program, read_source

__all__ = ["Part", "ProgramLike", "as_program", "consolidate", "read_source"]
