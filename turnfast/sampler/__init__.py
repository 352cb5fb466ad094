"""Sampling: token ids in, token ids and log-probabilities out (`base.Sampler`).

Importing this package loads neither torch nor vLLM; `open.open_sampler` starts an engine.
"""

from .backend import choose_backend
from .base import Completion, Request, Sampler

__all__ = ["Completion", "Request", "Sampler", "choose_backend"]
