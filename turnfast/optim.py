"""AdamW with a warm-up and float32 master weights, whatever the model's dtype.

At a learning rate of 1e-6 a bf16 weight never moves: the update is smaller than its last digit. So
low-precision parameters get a float32 master copy here, and the model holds its rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import OptimConfig
from .moments import fill_entries, make_adamw, plain_entries
from .ranks import ALONE, Ranks


class Optimizer:
    """AdamW over a model's trainable parameters.

    Args:
        parameters: those with `requires_grad`; gradients are read from them, see `grad_sum`.
        ranks: their gradients are added up before every step; they must hold the same weights and
            take the same steps.
        total_steps: None for a constant rate after the warm-up, else a linear decay to 10 %.
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
        self._masters = [_master(p) for p in self._parameters]
        self._config = config
        self._total_steps = total_steps
        self._ranks = ranks
        self._hooks: list[RemovableHandle] = []
        self._adamw = make_adamw(self._masters, config)
        self.num_steps = 0

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping.

        A gradient that is not finite changes nothing: its norm is returned, the step is skipped.
        """
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            _into_sum(parameter, master)
        if self._ranks.size > 1:
            self._add_up()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master.grad is None and parameter.grad is not None:
                master.grad = parameter.grad.to(master.dtype)
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._config.grad_clip))
        if norm == norm and norm != float("inf"):
            self._set_rate(self.lr)
            self._adamw.step()
            self._write_back()
            self.num_steps += 1
        self.zero_grad()
        return norm

    def grad_sum(self, parameter: Tensor) -> Tensor | None:
        """The float32 sum, zeros at first, that the next step takes for the parameter's gradient
        together with what autograd leaves in `.grad`; of a float32 parameter it is `.grad`.

        What adds to it in place needs no gradient of its own in every micro-batch; what autograd
        finds is added to it at the end of each backward, and may be sparse. None if the parameter
        is not trained here; on ranks all have to ask, or none. `zero_grad` drops it.
        """
        for own, master in zip(self._parameters, self._masters, strict=True):
            if own is parameter:
                if master.grad is None:
                    master.grad = torch.zeros_like(master, memory_format=torch.contiguous_format)
                    move = partial(_into_sum, master=master)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(move))
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
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

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
        at the model's weights."""
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
        self._adamw.load_state_dict({"state": {} if eight_bit else moments, "param_groups": groups})
        if eight_bit:
            for i, plain in moments.items():
                fill_entries(self._adamw, self._masters[i], plain)
        self._write_back()

    def _add_up(self) -> None:
        own = [
            parameter if master.grad is None else master
            for parameter, master in zip(self._parameters, self._masters, strict=True)
        ]
        for parameter in own:
            if parameter.grad is None:  # this rank had nothing to learn from
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.add_up(p.grad for p in own if p.grad is not None)

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
    """What autograd has left beside a `grad_sum` goes there."""
    if master is parameter or master.grad is None or parameter.grad is None:
        return
    found, parameter.grad = parameter.grad, None
    # only the dense ones of other dtypes are added without a copy
    master.grad += found.to(master.dtype) if found.is_sparse else found


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))
