"""Data-parallel ranks and their communication."""
