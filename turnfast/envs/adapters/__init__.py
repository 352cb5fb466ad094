"""Environments and tools of other libraries; each needs its package, from the extra `adapters`."""
