"""Attention over packed rows, which do not see each other, and over trees of rows that share."""

from .packed import PackedRows, packed_attention, pick_backend
from .tree import TreeRows, pick_tree_backend, tree_attention

__all__ = [
    "PackedRows",
    "TreeRows",
    "packed_attention",
    "pick_backend",
    "pick_tree_backend",
    "tree_attention",
]
