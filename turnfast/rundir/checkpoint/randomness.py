"""The global random states of Python, numpy and torch as JSON values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Any]:
    """Return all random states, including that of the current CUDA device if CUDA is in use."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "keys": [int(key) for key in keys],
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the states that `random_states` returned; CUDA's only on a machine with CUDA."""
    python = states["python"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    legacy = states["numpy"]
    keys = np.array(legacy["keys"], dtype=np.uint32)
    np.random.set_state(
        ("MT19937", keys, legacy["position"], legacy["has_gauss"], legacy["cached"])
    )
    torch.set_rng_state(_from_hex(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(states["cuda"]))


def _to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
