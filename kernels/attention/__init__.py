"""Attention over packed rows: rows lie one after the other in one flat axis and do not see each other."""

from .packed import PackedRows, packed_attention, pick_backend

__all__ = ["PackedRows", "packed_attention", "pick_backend"]
