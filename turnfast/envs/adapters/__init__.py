"""Environments and tools of other packages, which are optional dependencies."""
