"""Reward functions: the interface, the built-in ones, and the judge."""
