"""AdamW by what its two moments are kept in: float32, bfloat16, or 8 bits with a scale per block.

The update itself is computed in float32 every time; only what lasts from step to step is rounded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.schema import OptimConfig
from ..errors import ConfigError

BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0 + 4.0 / 256}
"""Per moment and weight."""

WORKSPACE = 1 << 22
"""Weights that `Bfloat16AdamW` updates at a time."""
WORKSPACE_BYTES = 28 * WORKSPACE
"""What that takes: seven float32 or int32 tensors."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_state(config: OptimConfig) -> None:
    """Raises ConfigError if `optim.state` needs a package that is not installed."""
    if config.state == "8bit" and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "optim.state: '8bit' needs torchao; install turnfast[8bit], or set it to 'bfloat16'"
        )


def make_adamw(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over float32 parameters, without moments yet.

    Raises:
        ConfigError: `optim.state = "8bit"` without torchao.
    """
    check_state(config)
    settings: dict[str, Any] = dict(
        lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    if config.state == "float32":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    if config.state == "bfloat16":
        return Bfloat16AdamW(parameters, **settings)
    return importlib.import_module("torchao.optim").AdamW8bit(parameters, **settings)


def make_moments(adamw: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Give every parameter that has none yet its moments, zeros, as the first step would."""
    for p in parameters:
        if adamw.state[p]:
            continue
        if isinstance(adamw, Bfloat16AdamW):
            moments = [torch.zeros_like(p, dtype=torch.bfloat16) for _ in _MOMENTS]
            count = torch.zeros(())
        elif isinstance(adamw, torch.optim.AdamW):
            moments = [torch.zeros_like(p, memory_format=torch.preserve_format) for _ in _MOMENTS]
            count = torch.zeros((), device=p.device)  # a fused step counts where it computes
        else:
            eight_bit: Any = adamw  # of torchao, which need not be installed
            moments = [eight_bit._new_buffer(p, signed) for signed in (True, False)]
            count = torch.zeros(())
        adamw.state[p] = {"step": count, **dict(zip(_MOMENTS, moments, strict=True))}


def ask_for_workspace(adamw: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take and give back the memory of a step, so that it runs out before anything is changed.

    The float32 one works in place; what torchao's compiled one takes is not known here.
    """
    if isinstance(adamw, Bfloat16AdamW):
        for device in {p.device for p in parameters}:
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class Bfloat16AdamW(torch.optim.Optimizer):
    """AdamW whose moments are bfloat16, rounded up or down at random so that means are kept.

    A second moment that moves by 0.1 % per step would stand still if it were rounded to the nearest
    of values 0.8 % apart. The draw is a function of the step and the parameter's place: a resumed
    run repeats it.
    """

    def __init__(self, parameters, *, lr: float, betas, weight_decay: float, eps: float = 1e-8):
        super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                draw = torch.Generator(p.device).manual_seed((int(state["step"]) << 20) + place)
                mean, square = (_parts(state[name]) for name in _MOMENTS)
                for part in zip(_parts(p), _parts(p.grad), mean, square, strict=True):
                    _update(*part, int(state["step"]), group, draw)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch's has made them float32, like the parameter
            for name in _MOMENTS:
                state[name] = state[name].bfloat16()


def _parts(x: Tensor) -> Sequence[Tensor]:
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
    draw: torch.Generator,
) -> None:
    """AdamW's formula on a part of a parameter. What takes memory comes before the first change."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    rounded = _rounded(mean, draw), _rounded(square, draw)
    scale = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
    exp_avg.copy_(rounded[0])
    exp_avg_sq.copy_(rounded[1])
    p.mul_(1 - lr * decay).addcdiv_(mean, scale, value=-lr / (1 - beta1**count))


def _rounded(x: Tensor, draw: torch.Generator) -> Tensor:
    """bfloat16 neighbours of float32 values, the nearer the likelier."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=draw, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def plain_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as ordinary tensors: 8-bit moments become codes and scales."""
    plain: dict[str, Any] = {}
    for name, value in entries.items():
        if hasattr(value, "codes"):
            plain |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            plain[name] = value
    return plain


def fill_entries(adamw: Any, parameter: Tensor, plain: Mapping[str, Any]) -> None:
    """Put `plain_entries` back into an 8-bit optimizer.

    Raises:
        ValueError: they are not those of such an optimizer.
    """
    made: dict[str, Any] = {"step": plain["step"].detach().cpu().clone()}
    for name, signed in zip(_MOMENTS, (True, False), strict=True):
        made[name] = adamw._new_buffer(parameter, signed)
        parts = (
            {"codes": made[name].codes, "scale": made[name].scale}
            if hasattr(made[name], "codes")
            else {"": made[name]}
        )
        for part, target in parts.items():
            key = f"{name}.{part}".rstrip(".")
            if key not in plain or plain[key].shape != target.shape:
                raise ValueError(f"no 8-bit {key} of shape {list(target.shape)}")
            target.copy_(plain[key])
    adamw.state[parameter] = made
