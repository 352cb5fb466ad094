"""AdamW by what its two moments are kept in: float32, bfloat16, or 8 bits with a scale per block.

The update itself is computed in float32 every time; only what lasts from step to step is rounded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, OptimConfig

BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0 + 4.0 / 256}
"""Per moment and weight."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adamw(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over float32 parameters.

    Raises:
        ConfigError: `optim.state = "8bit"` without torchao.
    """
    settings = dict(lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    if config.state == "float32":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    if config.state == "bfloat16":
        return Bfloat16AdamW(parameters, **settings)
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "optim.state: '8bit' needs torchao; install turnfast[8bit], or set it to 'bfloat16'"
        )
    return importlib.import_module("torchao.optim").AdamW8bit(parameters, **settings)


class Bfloat16AdamW(torch.optim.Optimizer):
    """AdamW whose moments are bfloat16, rounded up or down at random so that means are kept.

    A second moment that moves by 0.1 % per step would stand still if it were rounded to the nearest
    of values 0.8 % apart. The draw is a function of the step and the parameter's place: a resumed
    run repeats it.
    """

    def __init__(self, parameters, *, lr: float, betas, weight_decay: float, eps: float = 1e-8):
        super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in _MOMENTS:
                        state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                count = int(state["step"])
                mean = state["exp_avg"].float().lerp_(p.grad, 1 - beta1)
                square = state["exp_avg_sq"].float().mul_(beta2)
                square.addcmul_(p.grad, p.grad, value=1 - beta2)
                draw = torch.Generator(p.device).manual_seed((count << 20) + place)
                state["exp_avg"].copy_(_rounded(mean, draw))
                state["exp_avg_sq"].copy_(_rounded(square, draw))
                scale = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
                p.mul_(1 - lr * decay).addcdiv_(mean, scale, value=-lr / (1 - beta1**count))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch's has made them float32, like the parameter
            for name in _MOMENTS:
                state[name] = state[name].bfloat16()


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
