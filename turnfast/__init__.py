"""Train language-model agents that act in turns, with credit for each turn.

`turnfast.kernels` can be used without the rest of the package.
"""

__version__ = "0.1.0"
