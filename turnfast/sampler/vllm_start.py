"""Start vLLM's engine in this process, without side effects on the trainer.

Only this file imports vLLM or sets its environment variables.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from ..errors import ConfigError
from .cache import cache_bytes_per_token

CPU_CACHE_BYTES = 1 << 30
"""Largest key-value cache on a CPU; VLLM_CPU_KVCACHE_SPACE (in GiB) overrides it."""

CPU_BLOCK_SIZE = 32
"""Tokens per prefix-cache block on a CPU; prompts rarely share one of vLLM's default, 128."""

MAX_STEP_TOKENS = 8192

QUIET = "CRITICAL"
"""Log level unless VLLM_LOGGING_LEVEL is set. Failures reach the caller as exceptions, and vLLM
would also print every request in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the engine is started with.

    Attributes:
        model_folder: Hugging Face folder (or hub name) with the first weights.
        stop_ids: a request ends when it draws one of these; the id stays in `sampled_ids`.
        max_sequences: requests in flight.
        max_context: prompt and sampled tokens of one request together.
        gpu_memory: share of the GPU's memory for weights and cache together (CUDA only).
        sleep: allow `sleep` to free that memory (CUDA only).
    """

    model_folder: str | Path
    device: torch.device
    dtype: torch.dtype
    stop_ids: tuple[int, ...]
    max_sequences: int
    max_context: int
    gpu_memory: float
    sleep: bool
    seed: int

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


def start_engine(options: EngineOptions) -> tuple[Any, Any]:
    """The module vLLM and its engine.

    Raises:
        ConfigError: the engine lacks memory. Other errors of vLLM are not caught.
    """
    arguments = _arguments(options)
    _set_environment()
    try:
        with _keep_process_state(), _quiet_stderr():
            import vllm

            if options.on_cpu:
                # oneDNN packs the linear weights, and load_weights can no longer replace them
                custom_ops: Any = importlib.import_module("vllm._custom_ops")
                custom_ops._supports_onednn = False
            return vllm, vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
    except (ValueError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise ConfigError(_memory_advice(options, error)) from error


def cpu_cache_bytes(
    architecture: Any, dtype: torch.dtype, max_sequences: int, max_context: int
) -> int:
    """Size of the engine's key-value cache on a CPU."""
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return int(float(space) * (1 << 30))
    tokens = max_sequences * (max_context + CPU_BLOCK_SIZE)
    return min(tokens * cache_bytes_per_token(architecture, dtype), CPU_CACHE_BYTES)


def _arguments(options: EngineOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": str(options.model_folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": str(options.dtype).removeprefix("torch."),
        "seed": options.seed,
        "max_model_len": options.max_context,
        "max_num_seqs": options.max_sequences,
        "max_num_batched_tokens": max(MAX_STEP_TOKENS, options.max_context),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "async_scheduling": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if not options.on_cpu:
        return arguments | {
            "gpu_memory_utilization": options.gpu_memory,
            "enable_sleep_mode": options.sleep,
        }
    # chunked prefill would have to rewind a CPU generator, which is not possible
    arguments |= {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_SIZE,
        "enable_chunked_prefill": False,
    }
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        architecture = AutoConfig.from_pretrained(options.model_folder)
        arguments["kv_cache_memory_bytes"] = cpu_cache_bytes(
            architecture, options.dtype, options.max_sequences, options.max_context
        )
    return arguments


def _memory_advice(options: EngineOptions, error: Exception) -> str:
    setting = f"sampler.gpu_memory = {options.gpu_memory:g}"
    if options.on_cpu:
        setting = "the environment variable VLLM_CPU_KVCACHE_SPACE (GiB)"
    return (
        f"sampler.backend: vLLM lacks memory to start; change {setting}, lower "
        f"rollout.max_context = {options.max_context}, or set sampler.backend = 'local'. "
        f"{type(error).__name__}: {' '.join(str(error).split())}"
    )


def _set_environment() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", QUIET)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    # a process group of one process needs no other network interface
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


@contextmanager
def _keep_process_state() -> Iterator[None]:
    # the engine seeds all generators of the process, and its CPU worker replaces set_num_threads
    set_num_threads = torch.set_num_threads
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what the engine writes to stderr, also from C++; print it if the start fails."""
    if os.environ["VLLM_LOGGING_LEVEL"] != QUIET:
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                held.seek(0)
                sys.stderr.write(held.read().decode(errors="replace"))
