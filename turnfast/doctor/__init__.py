"""Checks that need no weights, and the memory estimate."""
