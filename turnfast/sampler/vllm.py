"""vLLM in this process, stepped by hand.

The engine shares the device with the trainer. Between two rollouts it sleeps, then wakes and takes
the new weights in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..errors import SyncError
from ..types import Finish
from .base import Completion, Request
from .vllm_start import EngineOptions, start_engine


class VllmSampler:
    """An in-process vLLM engine behind the `Sampler` protocol.

    Raises:
        ConfigError: the engine lacks memory to start.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._on_cpu = options.on_cpu
        self._sleeps = options.sleep and not options.on_cpu
        self._stop_ids = list(options.stop_ids)
        self._max_context = options.max_context
        self.capacity = options.max_sequences
        self._vllm, self._engine = start_engine(options)

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
        with self._compile_stance():
            outputs = self._engine.step()
        return [_completion(output) for output in outputs if output.finished]

    def shares(self, model: torch.nn.Module) -> bool:
        return False

    def load_weights(self, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place and check that every one was replaced.

        They are overwritten with NaN first, so a tensor that is missing or that the engine silently
        ignores is found here. The weights wake before the cache, which keeps the peak of memory
        low.
        """
        if self.num_pending:
            raise SyncError(f"{self.num_pending} requests are in flight while weights change")
        if self.asleep:
            self._engine.wake_up(["weights"])
        stale = self._engine.apply_model(lambda model: _replace(model, named_weights))[0]
        if stale:
            raise SyncError(
                f"the engine got no (or NaN) values for {len(stale)} of its parameters: "
                f"{', '.join(stale[:4])}{', …' if len(stale) > 4 else ''}"
            )
        if self.asleep:
            self._engine.wake_up(["kv_cache"])
        # vLLM keeps its cached blocks when the weights change
        if self._engine.reset_prefix_cache() is False:
            raise SyncError("vLLM did not reset its prefix cache: blocks are still in use")

    def sleep(self) -> None:
        if self._sleeps:
            self._engine.sleep(level=2)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _compile_stance(self) -> AbstractContextManager[Any]:
        # enforce_eager leaves one small compiled function in vLLM's sampler, which would need a C++
        # compiler on a CPU
        return torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext()


@torch.no_grad()
def _replace(
    model: torch.nn.Module, named_weights: Iterable[tuple[str, torch.Tensor]]
) -> list[str]:
    """Load the weights and return the names of parameters that still hold NaN."""
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.fill_(math.nan)
    model.load_weights(named_weights)  # type: ignore[operator]  # every vLLM model has it
    # one NaN makes the norm NaN; one transfer for all norms, as each waits for the device
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
