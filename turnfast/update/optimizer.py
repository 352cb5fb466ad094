"""AdamW with a warm-up, float32 master weights and float32 gradients, whatever the model's dtype.

At a learning rate of 1e-6 a bf16 weight never moves: the update is smaller than its last digit. So
low-precision parameters get a float32 master copy here, and the model holds its rounding. For the
same reason their gradients are summed in float32: to a bf16 sum a micro-batch adds nothing if its
gradient is less than 1/256 of it, and the step would depend on how it was cut.

Masters and moments are there from the start, so that what is too large fails then, and not in the
first step. Bytes per trained parameter, with moments in float32 (8; 4 in bfloat16, 2 in 8 bits):

    float32 model    weight 4 + gradient 4            + moments 8
    bf16 model       weight 2 + gradient 4 + master 4 + moments 8
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
from .adamw import (
    ask_for_workspace,
    fill_entries,
    make_adamw,
    make_moments,
    plain_entries,
)
from .memory import explain_out_of_memory

LESS_MEMORY = (
    "set optim.state to 'bfloat16' or '8bit', train an adapter with model.lora.r, or leave the "
    "engine less with sampler.gpu_memory"
)
NOTHING_CHANGED = f"out of memory in the optimizer's step, which changed nothing: {LESS_MEMORY}"
TORN = (
    "out of memory halfway through the optimizer's step: continue from the last checkpoint with "
    f"--resume; {LESS_MEMORY}"
)


class Optimizer:
    """AdamW over a model's trainable parameters.

    Args:
        parameters: those with `requires_grad`; gradients are read from them, see `accumulating`.
        ranks: their gradients are added up before every step; they must hold the same weights and
            take the same steps.
        total_steps: None for a constant rate after the warm-up, else a linear decay to 10 %.

    Raises:
        ConfigError: masters and moments do not fit the memory, or need a package that is missing.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimConfig,
        *,
        total_steps: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._config = config
        self._total_steps = total_steps
        self.ranks = ranks
        self.num_steps = 0
        count = sum(p.numel() for p in self._parameters)
        with explain_out_of_memory(
            ConfigError,
            f"optim.state: no memory for AdamW's {config.state} moments and float32 weights of "
            f"{count:,} parameters; {LESS_MEMORY}",
        ):
            self._masters = [_master(p) for p in self._parameters]
            self._adamw = make_adamw(self._masters, config)
            make_moments(self._adamw, self._masters)

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping.

        A gradient that is not finite changes nothing: its norm is returned, the step is skipped.

        Raises:
            OutOfMemory: nothing has changed.
            TornStep: memory ran out half-way, which AdamW in 8 bits cannot rule out.
        """
        with self.ranks.together(), explain_out_of_memory(OutOfMemory, NOTHING_CHANGED):
            self._prepare()
        if self.ranks.size > 1:
            self.ranks.add_up(m.grad for m in self._masters if m.grad is not None)
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._config.grad_clip))
        if math.isfinite(norm):
            self._set_rate(self.lr)
            with self.ranks.together(), explain_out_of_memory(TornStep, TORN):
                self._adamw.step()
                self._write_back()
            self.num_steps += 1
        self.zero_grad()
        return norm

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within, every backward adds the gradients of low-precision parameters to float32 sums,
        each as soon as it is there, and leaves no `.grad` of them; those of float32 parameters are
        added up in `.grad`, by autograd itself."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_into_sum, master=master))
            for parameter, master in zip(self._parameters, self._masters, strict=True)
            if master is not parameter
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def grad_sum(self, parameter: Tensor) -> Tensor | None:
        """The float32 sum, zeros at first, that the next step takes for the parameter's gradient;
        of a float32 parameter it is `.grad`.

        What adds to it in place needs no gradient of its own in every micro-batch; what autograd
        finds besides is added to it, too, and may be sparse. None if the parameter is not trained
        here; on ranks all have to ask, or none. `zero_grad` drops it.
        """
        for own, master in zip(self._parameters, self._masters, strict=True):
            if own is parameter:
                if master.grad is None:
                    master.grad = torch.zeros_like(master, memory_format=torch.contiguous_format)
                return master.grad
        return None

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        rate = self._config.lr * min(1.0, (self.num_steps + 1) / max(1, self._config.warmup_steps))
        if self._total_steps is None:
            return rate
        left = 1.0 - self.num_steps / self._total_steps
        return rate * max(0.1, left)

    def zero_grad(self) -> None:
        for parameter in (*self._parameters, *self._masters):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the master copies and the step count beside the moments."""
        state = self._adamw.state_dict()
        state["state"] = {i: plain_entries(values) for i, values in state["state"].items()}
        for i, (parameter, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
            if master is not parameter:
                state["state"].setdefault(i, {})["master"] = master.detach()
        for group in state["param_groups"]:
            group |= {"num_steps": self.num_steps, "lr": float(group["lr"])}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load after the model: a state without master copies (of a run in float32) leaves them
        at the model's weights. Betas and weight decay stay those of the config."""
        groups = [dict(group) for group in state["param_groups"]]
        self.num_steps = int(groups[0].pop("num_steps"))
        for group in groups[1:]:
            group.pop("num_steps")
        moments: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for parameter, own in zip(self._parameters, self._masters, strict=True):
                own.copy_(parameter)
            for i, values in state["state"].items():
                kept = dict(values)
                master: Tensor | None = kept.pop("master", None)
                if master is not None:
                    self._masters[int(i)].copy_(master)
                if kept:
                    moments[int(i)] = kept
        eight_bit = self._config.state == "8bit"
        if not eight_bit and any("exp_avg.codes" in kept for kept in moments.values()):
            raise ValueError('its moments have 8 bits: optim.state = "8bit"')
        own_settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._adamw.param_groups
        ]
        self._adamw.state.clear()  # no second set of moments beside the one that is loaded
        self._adamw.load_state_dict({"state": {} if eight_bit else moments, "param_groups": groups})
        for group, settings in zip(self._adamw.param_groups, own_settings, strict=True):
            group |= settings
        if eight_bit:
            for i, plain in moments.items():
                fill_entries(self._adamw, self._masters[i], plain)
        make_moments(self._adamw, self._masters)
        self._write_back()

    def _prepare(self) -> None:
        """Allocate everything that a step needs, before anything changes."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            _into_sum(parameter, master)
            if master.grad is None and self.ranks.size > 1:
                master.grad = torch.zeros_like(master)  # this rank has no gradient for it
        ask_for_workspace(self._adamw, self._masters)

    def _set_rate(self, rate: float) -> None:
        for group in self._adamw.param_groups:
            # torchao compiles its step and wants a tensor
            group["lr"] = torch.tensor(rate) if self._config.state == "8bit" else rate

    def _write_back(self) -> None:
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)


def _into_sum(parameter: Tensor, master: Tensor) -> None:
    """Move what autograd has left at a low-precision parameter to the float32 sum."""
    if master is parameter or parameter.grad is None:
        return
    found, parameter.grad = parameter.grad, None
    if master.grad is None:
        master.grad = found.to(master.dtype).to_dense()
    else:
        # only the dense ones of other dtypes are added without a copy
        master.grad += found.to(master.dtype) if found.is_sparse else found


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))
