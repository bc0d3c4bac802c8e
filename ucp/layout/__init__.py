"""Integer algebra of tensor dims and mesh axes: no torch, no I/O."""

from ucp.layout.dtypes import itemsize
from ucp.layout.mesh import Mesh
from ucp.layout.region import Box, FlatRange, Region, Shape, as_flat, boxes, numel, ravel, row_major_strides

__all__ = [
    "Box",
    "FlatRange",
    "Mesh",
    "Region",
    "Shape",
    "as_flat",
    "boxes",
    "itemsize",
    "numel",
    "ravel",
    "row_major_strides",
]
