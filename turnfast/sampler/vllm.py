"""vLLM inside this process, stepped by hand.

The engine shares the device with the trainer: between two rollouts it sleeps, wakes, and takes the
new weights in place. This file is the only one that imports vLLM or sets its variables.
"""

from __future__ import annotations

import importlib
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from ..errors import ConfigError
from ..types import Finish
from .base import Completion, Request
from .ragged import cache_bytes_per_token

CPU_CACHE_BYTES = 1 << 30
"""Largest key-value cache on a CPU; VLLM_CPU_KVCACHE_SPACE (in GiB) overrides it."""

CPU_BLOCK_SIZE = 32
"""Tokens of one prefix-cache block on a CPU: vLLM's own 128 would hardly ever be a hit."""

MAX_STEP_TOKENS = 8192

QUIET = "CRITICAL"
"""Log level unless VLLM_LOGGING_LEVEL is set: failures reach the caller as exceptions anyway, and
with them vLLM prints every request in flight at level ERROR."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the engine is started with.

    Attributes:
        model_folder: Hugging Face folder (or hub name) with the first weights.
        stop_ids: a request ends when it draws one of these; the id stays in `sampled_ids`.
        max_sequences, max_context: requests in flight, tokens of one request.
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


class VllmSampler:
    """An in-process vLLM engine behind the `Sampler` protocol.

    Raises:
        ConfigError: the engine lacks memory to start.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._on_cpu = options.device.type == "cpu"
        self._sleeps = options.sleep and not self._on_cpu
        self._stop_ids = list(options.stop_ids)
        self._max_context = options.max_context
        self.capacity = options.max_sequences
        arguments = _engine_arguments(options)
        _set_environment()
        try:
            with _trainer_untouched(), _quiet_stderr():
                self._vllm, self._engine = _start(arguments, on_cpu=self._on_cpu)
        except (ValueError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            raise ConfigError(_lacks_memory(options, error)) from error

    def _stance(self) -> AbstractContextManager[Any]:
        # eager on a CPU means everything: one small compiled function of vLLM's sampler would ask
        # for a C++ compiler and cost seconds in the first step
        return torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext()

    @property
    def num_pending(self) -> int:
        return self._engine.get_num_unfinished_requests()

    @property
    def asleep(self) -> bool:
        return self._sleeps and self._engine.is_sleeping()

    def submit(self, request: Request) -> None:
        if not 0 < len(request.prompt_ids) < self._max_context:
            raise ValueError(
                f"request {request.id}: a prompt of {len(request.prompt_ids)} tokens; it must have "
                f"1 to {self._max_context - 1}"
            )
        greedy = request.temperature == 0.0
        params = self._vllm.SamplingParams(
            temperature=request.temperature,
            seed=None if greedy else request.seed,
            max_tokens=request.max_new_tokens,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        prompt = self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        self._engine.add_request(str(request.id), prompt, params)

    def abort(self, ids: Sequence[int]) -> None:
        self._engine.abort_request([str(i) for i in ids])

    def step(self) -> list[Completion]:
        if not self.num_pending:
            return []
        with self._stance():
            outputs = self._engine.step()
        return [_completion(output) for output in outputs if output.finished]

    def shares(self, model: torch.nn.Module) -> bool:
        return False

    def load_weights(self, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place, and prove that every one was replaced.

        The old ones are overwritten with NaN first, so that a tensor that was not handed over, or
        was silently ignored by the engine, is found here and cannot be sampled from.
        """
        if self.num_pending:
            raise RuntimeError(f"{self.num_pending} requests are in flight while weights change")
        if self.asleep:
            self._engine.wake_up(["weights"])
        stale = self._engine.apply_model(lambda model: _replace(model, named_weights))[0]
        if stale:
            raise RuntimeError(
                f"the engine was handed no (or NaN) values for {len(stale)} of its parameters: "
                f"{', '.join(stale[:4])}{', …' if len(stale) > 4 else ''}"
            )
        if self.asleep:
            self._engine.wake_up(["kv_cache"])
        # vLLM itself keeps cached blocks across a change of weights
        if self._engine.reset_prefix_cache() is False:
            raise RuntimeError("vLLM did not reset its prefix cache: blocks are still in use")

    def sleep(self) -> None:
        if self._sleeps:
            self._engine.sleep(level=2)

    def wake(self) -> None:
        """Nothing: `load_weights` wakes the weights, loads them, and only then takes the memory of
        the cache, so that the peak stays low."""

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def cpu_cache_bytes(
    architecture: Any, dtype: torch.dtype, max_sequences: int, max_context: int
) -> int:
    """What the engine takes for keys and values on a CPU."""
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return int(float(space) * (1 << 30))
    tokens = max_sequences * (max_context + CPU_BLOCK_SIZE)
    return min(tokens * cache_bytes_per_token(architecture, dtype), CPU_CACHE_BYTES)


def _engine_arguments(options: EngineOptions) -> dict[str, Any]:
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
    if options.device.type != "cpu":
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


def _lacks_memory(options: EngineOptions, error: Exception) -> str:
    setting = f"sampler.gpu_memory = {options.gpu_memory:g}"
    if options.device.type == "cpu":
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
    # one process: its group of one needs no network interface but the loopback
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _start(options: dict[str, Any], *, on_cpu: bool) -> tuple[Any, Any]:
    import vllm

    if on_cpu:
        # oneDNN packs the linear weights where load_weights cannot reach them any more
        custom_ops: Any = importlib.import_module("vllm._custom_ops")
        custom_ops._supports_onednn = False
    return vllm, vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**options))


@contextmanager
def _trainer_untouched() -> Iterator[None]:
    # the engine seeds every generator of the process, and its CPU worker disables set_num_threads
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
    """Hold back what the engine's start writes to stderr, also from C++; shown if it fails."""
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


@torch.no_grad()
def _replace(
    model: torch.nn.Module, named_weights: Iterable[tuple[str, torch.Tensor]]
) -> list[str]:
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.fill_(math.nan)
    model.load_weights(named_weights)  # type: ignore[operator]  # every vLLM model has it
    # one NaN makes a norm of it; all are looked at in one go, as each look waits for the device
    norms = torch._foreach_norm([*parameters.values()])  # pyright: ignore[reportPrivateImportUsage]
    stale = torch.stack([norm.float() for norm in norms]).isnan().tolist()
    return [name for name, is_stale in zip(parameters, stale, strict=True) if is_stale]


def _completion(output: Any) -> Completion:
    sample = output.outputs[0]
    finish: Finish = "stop" if sample.finish_reason == "stop" else "length"
    logprobs = sample.logprobs
    return Completion(
        id=int(output.request_id),
        sampled_ids=tuple(sample.token_ids),
        logprobs=tuple(logprobs.logprobs[start] for start in logprobs.start_indices),
        finish=finish,
        cached_tokens=output.num_cached_tokens or 0,
    )
