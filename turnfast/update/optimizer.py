"""AdamW with warm-up, float32 master weights and float32 gradients for any model dtype.

A bfloat16 weight cannot change at a learning rate of 1e-6: the update is smaller than its last
digit. So low-precision parameters get a float32 master copy, whose rounded values the model uses.
Gradients are accumulated in float32 for the same reason: a bfloat16 sum loses a micro-batch whose
gradient is less than 1/256 of it, and the step would depend on the split into micro-batches.

Masters and moments are allocated by the constructor, so that a lack of memory shows before the
first step. Bytes per trained parameter, with float32 moments (8; in bfloat16 4):

    float32 model     weight 4 + gradient 4            + moments 8
    bfloat16 model    weight 2 + gradient 4 + master 4 + moments 8
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import OptimConfig
from ..errors import ConfigError, OutOfMemory, TornStep
from ..parallel.ranks import ALONE, Ranks
from .adamw import make_adamw, make_moments, reserve_workspace
from .memory import explain_out_of_memory

LESS_MEMORY = (
    "set optim.state = 'bfloat16', train an adapter with model.lora.r, or lower sampler.gpu_memory"
)
NOTHING_CHANGED = f"out of memory in the optimizer's step, which changed nothing: {LESS_MEMORY}"
TORN = (
    "out of memory halfway through the optimizer's step: continue from the last checkpoint with "
    f"--resume; {LESS_MEMORY}"
)
MIN_DECAY = 0.1


class Optimizer:
    """AdamW over a model's trainable parameters.

    Args:
        parameters: those without `requires_grad` are ignored.
        total_steps: the learning rate decays linearly to 10 % over this many steps; None keeps it
            constant after the warm-up.
        ranks: gradients are summed over these before every step. All ranks must hold the same
            weights and take the same steps.

    Attributes:
        parameters: the trained parameters.
        num_steps: number of steps taken.

    Raises:
        ConfigError: masters and moments do not fit in memory.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimConfig,
        *,
        total_steps: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.ranks = ranks
        self.num_steps = 0
        self._config = config
        self._total_steps = total_steps
        count = sum(p.numel() for p in self.parameters)
        with explain_out_of_memory(
            ConfigError,
            f"optim.state: no memory for AdamW's {config.state} moments and float32 weights of "
            f"{count:,} parameters; {LESS_MEMORY}",
        ):
            self._masters = [_master(p) for p in self.parameters]
            self._adamw = make_adamw(self._masters, config)

    def step(self) -> float:
        """Sum gradients over ranks, clip, update, clear; return the norm before clipping.

        If the norm is not finite, the update is skipped and nothing changes.

        Raises:
            OutOfMemory: nothing changed.
            TornStep: memory ran out during the update itself.
        """
        with self.ranks.share_errors(), explain_out_of_memory(OutOfMemory, NOTHING_CHANGED):
            self._prepare()
        if self.ranks.size > 1:
            self.ranks.all_reduce(m.grad for m in self._masters if m.grad is not None)
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._config.grad_clip))
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            with self.ranks.share_errors(), explain_out_of_memory(TornStep, TORN):
                self._adamw.step()
                self._write_back()
            self.num_steps += 1
        self.zero_grad()
        return norm

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Accumulate the gradients of every backward pass in float32.

        The gradient of a low-precision parameter is added to its float32 sum as soon as autograd
        has computed it, and its `.grad` is freed. Float32 parameters accumulate in `.grad`.
        """
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_move_grad, master=master))
            for parameter, master in zip(self.parameters, self._masters, strict=True)
            if master is not parameter
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def grad_sum(self, parameter: Tensor) -> Tensor | None:
        """The float32 buffer in which the next step expects the parameter's gradient.

        It is created with zeros if needed, and `zero_grad` frees it. A kernel may add to it in
        place; autograd adds its gradients to the same buffer. For a float32 parameter it is
        `.grad`. Returns None if the parameter is not trained here. With several ranks, call it on
        all of them or on none.
        """
        for own, master in zip(self.parameters, self._masters, strict=True):
            if own is parameter:
                if master.grad is None:
                    master.grad = torch.zeros_like(master, memory_format=torch.contiguous_format)
                return master.grad
        return None

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        rate = self._config.lr * min(1.0, (self.num_steps + 1) / max(1, self._config.warmup_steps))
        if self._total_steps is None:
            return rate
        return rate * max(MIN_DECAY, 1.0 - self.num_steps / self._total_steps)

    def zero_grad(self) -> None:
        for parameter in (*self.parameters, *self._masters):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's AdamW, plus `master` per low-precision parameter and `num_steps`."""
        state = self._adamw.state_dict()
        state["state"] = {index: dict(entries) for index, entries in state["state"].items()}
        for i, (parameter, master) in enumerate(zip(self.parameters, self._masters, strict=True)):
            if master is not parameter:
                state["state"].setdefault(i, {})["master"] = master.detach()
        for group in state["param_groups"]:
            group["num_steps"] = self.num_steps
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; call it after the model's weights are loaded.

        Without master copies (the state of a float32 model) the masters are the model's weights.
        Betas and weight decay stay those of the config.
        """
        groups = [dict(group) for group in state["param_groups"]]
        self.num_steps = int(groups[0]["num_steps"])
        for group in groups:
            del group["num_steps"]
        moments: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self._masters, strict=True):
                master.copy_(parameter)
            for i, entries in state["state"].items():
                kept = dict(entries)
                saved: Tensor | None = kept.pop("master", None)
                if saved is not None:
                    self._masters[int(i)].copy_(saved)
                if kept:
                    moments[int(i)] = kept
        own_settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._adamw.param_groups
        ]
        self._adamw.state.clear()  # free the old moments before the new ones are copied
        self._adamw.load_state_dict({"state": moments, "param_groups": groups})
        for group, own in zip(self._adamw.param_groups, own_settings, strict=True):
            group |= own
        make_moments(self._adamw, self._config)
        self._write_back()

    def _prepare(self) -> None:
        """Allocate everything that a step needs, before anything changes."""
        for parameter, master in zip(self.parameters, self._masters, strict=True):
            _move_grad(parameter, master)
            if master.grad is None and self.ranks.size > 1:
                master.grad = torch.zeros_like(master)  # this rank has no gradient for it
        reserve_workspace(self._adamw)

    def _write_back(self) -> None:
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)


def _move_grad(parameter: Tensor, master: Tensor) -> None:
    """Add the gradient of a low-precision parameter to the float32 sum, and free it."""
    if master is parameter or parameter.grad is None:
        return
    grad, parameter.grad = parameter.grad, None
    if master.grad is None:
        master.grad = grad.to(master.dtype).to_dense()
    else:
        # torch adds dense tensors of another dtype without a copy, but not sparse ones
        master.grad += grad.to(master.dtype) if grad.is_sparse else grad


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))
