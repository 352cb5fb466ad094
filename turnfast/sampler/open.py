"""Start the engine that the recipe asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..config.schema import SamplerConfig
from ..errors import ConfigError
from ..model import Policy, check_context_length
from ..model.lora import merged_copy
from .backend import choose_backend
from .base import Sampler
from .cache import slots_that_fit
from .local import LocalSampler
from .vllm import VllmSampler
from .vllm_start import EngineOptions

log = logging.getLogger(__name__)


def open_sampler(
    config: SamplerConfig,
    policy: Policy,
    stop_ids: Sequence[int],
    *,
    max_context: int,
    seed: int = 0,
    overlap: bool = False,
) -> Sampler:
    """Start a sampler for a policy.

    vLLM loads `policy.folder` and gets newer weights from `load_weights`. The local sampler uses
    the trainer's module itself, or with `overlap` a copy.

    Args:
        stop_ids: a request ends when it draws one of these ids, and the id is kept.
        max_context: prompt and sampled tokens of one request together.
        seed: of the engine; the samples of a request depend on the request's own seed only.
        overlap: the sampler runs in another thread while the model is trained: it has weights of
            its own and never sleeps.
    Raises:
        ConfigError: the engine cannot run here, lacks memory, or does not support the model.
    """
    check_context_length(policy.model.config, max_context)
    if choose_backend(config) == "vllm":
        return VllmSampler(
            EngineOptions(
                model_folder=policy.folder,
                device=policy.device,
                dtype=policy.model.dtype,
                stop_ids=tuple(stop_ids),
                max_sequences=config.max_sequences,
                max_context=max_context,
                gpu_memory=config.gpu_memory,
                sleep=config.sleep and not overlap,
                seed=seed,
            )
        )
    if policy.device.type == "cuda" and config.backend == "auto":
        _warn_slow(config)
    num_slots = slots_that_fit(policy.model, max_context, config.gpu_memory)
    if num_slots < 1:
        raise ConfigError(
            f"rollout.max_context: the keys and values of {max_context} tokens do not fit into the "
            "sampler's share of memory; lower it or raise sampler.gpu_memory"
        )
    return LocalSampler(
        merged_copy(policy.model) if overlap else policy.model,
        stop_ids=stop_ids,
        num_slots=min(config.max_sequences, num_slots),
        max_context=max_context,
    )


def _warn_slow(config: SamplerConfig) -> None:
    if not config.sleep:
        raise ConfigError(
            "sampler.sleep: false needs vLLM; the local sampler always frees its cache while the "
            "GPU trains. Set it to true, or install turnfast[vllm]"
        )
    log.warning(
        "sampler.backend: vLLM cannot be used, so plain torch samples, which is slow on a GPU; "
        "install turnfast[vllm] (pip install --no-build-isolation '.[vllm]'), or set "
        "sampler.backend = 'local' to silence this warning"
    )
