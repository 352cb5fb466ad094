"""The metrics of a step, and how they are reduced over ranks."""
