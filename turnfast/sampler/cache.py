"""The key-value cache of the local sampler and the memory it takes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig


def cache_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Size of one token's keys and values in all layers."""
    text: Any = config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * num_heads * head_dim * dtype.itemsize


def slots_that_fit(model: Any, max_context: int, gpu_memory: float) -> int:
    """How many requests of `max_context` tokens fit: in the share `gpu_memory` of a GPU's memory,
    or in half of a CPU's, where only used pages count."""
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(parameter.device).total_memory
        memory_bytes = int(total_bytes * gpu_memory)
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return memory_bytes // (max_context * cache_bytes_per_token(model.config, parameter.dtype))


@dataclass(slots=True)
class KVCache:
    """Keys and values of every layer, [slots, heads, capacity, head size], allocated on first use.

    Zeroed, not empty: masked positions still enter the arithmetic, and 0 · NaN is NaN.
    """

    num_slots: int
    capacity: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def layer(
        self, index: int, key_THD: torch.Tensor, value_THD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.layers:
            self.layers[index] = (self._zeros_like(key_THD), self._zeros_like(value_THD))
        return self.layers[index]

    def _zeros_like(self, sample_THD: torch.Tensor) -> torch.Tensor:
        _, num_heads, head_dim = sample_THD.shape
        shape = (self.num_slots, num_heads, self.capacity, head_dim)
        if sample_THD.device.type != "cpu":
            return sample_THD.new_zeros(shape)
        # NumPy's zero pages take no memory until they are written, torch writes them at once
        size_bytes = math.prod(shape) * sample_THD.element_size()
        raw = torch.from_numpy(np.zeros(size_bytes, dtype=np.uint8))
        return raw.view(sample_THD.dtype).view(shape)
