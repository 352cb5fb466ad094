"""Environments and tools of other libraries; each needs its own package."""
