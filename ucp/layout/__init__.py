"""Integer algebra of tensor dims and mesh axes: no torch, no I/O."""

from ucp.layout.block import Block, View, clip, linear
from ucp.layout.branches import Branch, branches, default_targets, without_dims
from ucp.layout.compile import Compiled, Placed, compile_layout, globalize, local_shape
from ucp.layout.dtypes import itemsize
from ucp.layout.invalid import LayoutError
from ucp.layout.mesh import Mesh
from ucp.layout.pack import Packed, compile_pack
from ucp.layout.pads import saved_pads
from ucp.layout.region import Box, FlatRange, Region, Shape, as_flat, boxes, numel, ravel, row_major_strides, unravel
from ucp.layout.setting import Setting
from ucp.layout.spell import spell

__all__ = [
    "Block",
    "Box",
    "Branch",
    "Compiled",
    "FlatRange",
    "LayoutError",
    "Mesh",
    "Packed",
    "Placed",
    "Region",
    "Setting",
    "Shape",
    "View",
    "as_flat",
    "boxes",
    "branches",
    "clip",
    "compile_layout",
    "compile_pack",
    "default_targets",
    "globalize",
    "itemsize",
    "linear",
    "local_shape",
    "numel",
    "ravel",
    "row_major_strides",
    "saved_pads",
    "spell",
    "unravel",
    "without_dims",
]
