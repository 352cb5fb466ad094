"""Trains language-model agents that act in turns, and gives every turn its own credit.

The rooms are listed in the README; `turnfast.kernels` stands on its own.
"""

__version__ = "0.1.0"
