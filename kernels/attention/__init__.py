"""Attention over packed rows, and over prefix trees of rows with common beginnings."""

from .packed import Backend, PackedRows, packed_attention, pick_backend
from .tree import TreeBackend, TreeRows, pick_tree_backend, tree_attention

__all__ = [
    "Backend",
    "PackedRows",
    "TreeBackend",
    "TreeRows",
    "packed_attention",
    "pick_backend",
    "pick_tree_backend",
    "tree_attention",
]
