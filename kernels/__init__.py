"""Fused kernels of turnfast."""
