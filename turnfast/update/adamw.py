"""AdamW over float32 weights, with moments in float32 or bfloat16.

The update is computed in float32 in both cases; only the stored moments are rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.schema import OptimConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtype of the moments per value of `optim.state`."""

WORKSPACE = 1 << 22
"""Weights that `Bfloat16AdamW` updates at a time."""
WORKSPACE_BYTES = 28 * WORKSPACE
"""Temporary memory of such an update: seven float32 or int32 tensors."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adamw(parameters: Sequence[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over float32 parameters, with all moments allocated."""
    settings: dict[str, Any] = dict(
        lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    if config.state == "bfloat16":
        adamw: torch.optim.Optimizer = Bfloat16AdamW(parameters, **settings)
    else:
        adamw = torch.optim.AdamW(parameters, **settings, fused=True)
    make_moments(adamw, config)
    return adamw


def make_moments(adamw: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Allocate zero moments for every parameter that has none."""
    for p in adamw.param_groups[0]["params"]:
        if adamw.state[p]:
            continue
        moments = {name: torch.zeros_like(p, dtype=DTYPES[config.state]) for name in _MOMENTS}
        # the fused kernel needs its step count on the parameter's device
        device = "cpu" if config.state == "bfloat16" else p.device
        adamw.state[p] = {"step": torch.zeros((), device=device), **moments}


def reserve_workspace(adamw: torch.optim.Optimizer) -> None:
    """Allocate and free the memory of a bfloat16 step, so that it cannot run out halfway.

    The float32 update needs none.
    """
    if isinstance(adamw, Bfloat16AdamW):
        for device in {p.device for p in adamw.param_groups[0]["params"]}:
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class Bfloat16AdamW(torch.optim.Optimizer):
    """AdamW with bfloat16 moments and stochastic rounding.

    Nearest rounding would freeze the second moment: it changes by 0.1 % per step, and neighbouring
    bfloat16 values are 0.8 % apart. Stochastic rounding is right on average. The random numbers
    depend on the step and on the index of the parameter only, so a resumed run repeats them.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                count = int(state["step"])
                random = torch.Generator(p.device).manual_seed((count << 20) + index)
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                for w, grad, mean, square in zip(*map(_slices, tensors), strict=True):
                    _update(w, grad, mean, square, count, group, random)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch casts moments to the parameter's float32
            for name in _MOMENTS:
                state[name] = state[name].bfloat16()


def _slices(x: Tensor) -> Sequence[Tensor]:
    """Views of at most WORKSPACE elements, or of one row."""
    rows = x if x.dim() else x[None]
    per_row = max(1, rows[:1].numel())
    return rows.split(max(1, WORKSPACE // per_row))


def _update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: int,
    group: Mapping[str, Any],
    random: torch.Generator,
) -> None:
    """AdamW on a slice of a parameter. Allocates everything before the first change."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    rounded = _round(mean, random), _round(square, random)
    scale = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
    exp_avg.copy_(rounded[0])
    exp_avg_sq.copy_(rounded[1])
    p.mul_(1 - lr * decay).addcdiv_(mean, scale, value=-lr / (1 - beta1**count))


def _round(x: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 to a neighbouring bfloat16 value, with a probability that keeps the mean."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=random, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
