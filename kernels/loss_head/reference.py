"""The specification: torch only, float32 inside (float64 for float64 input), any device.

    z_j  = softcap * tanh(x . w_j / softcap) / temperature    (x . w_j / temperature without)
    m    = max_j z_j, E_j = exp(z_j - m), S = sum of E_j over j != y, Z = S + E_y
    logprob = z_y - m - log Z = -log1p(S exp(m - z_y));   entropy = log Z - sum_j E_j (z_j - m) / Z
    dz_j = -(g + h (log p_j + entropy)) E_j / Z          g = dloss/dlogprob, h = dloss/dentropy
    dz_y = g S / Z - h (log p_y + entropy) E_y / Z
    dx = dz @ W, dW = dz^T @ x, the terms of y added separately

S excludes the target, so 1 - p_y = S / Z keeps its relative precision for confident tokens.
Memory: two [C, V] buffers in float32 of about 64 MiB, with at least 64 and at most 2,048 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments.reference import add_rows
from .driver import run_logprobs, run_policy_loss
from .problem import LogprobsProblem, Outcome, Problem, compute_dtype

CHUNK_ELEMENTS = 1 << 24
MIN_CHUNK, MAX_CHUNK = 64, 2048
COLUMNS = 4096


class ReferenceHead:
    """The driver's Head in plain torch."""

    def __init__(self, p: LogprobsProblem) -> None:
        self.dtype = compute_dtype(p.head_VD.dtype)
        self.head_VD = p.head_VD.to(self.dtype)
        self.vocab = p.vocab
        self.temperature, self.softcap = p.temperature, p.softcap
        self.need_hidden, self.d_head_VD = p.need_hidden, p.head_gradient()
        self.kept: tuple[Tensor, ...] = ()

    def chunk_tokens(self) -> int:
        return max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_ELEMENTS // max(1, self.head_VD.shape[0])))

    def forward(self, x_CD: Tensor, targets_C: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        self.kept = ()
        x_CD = x_CD.to(self.dtype)
        z_CV = x_CD @ self.head_VD.T
        if self.softcap is not None:
            z_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z_CV.div_(self.temperature)
        column_C, owned_C = self.vocab.local(targets_C)
        column_C1, owned_C1 = column_C.unsqueeze(1), owned_C.unsqueeze(1)
        m_C = self.vocab.max(z_CV.amax(dim=1))
        u_CV = z_CV.sub_(m_C.unsqueeze(1))
        u_y_C = self.vocab.sum((u_CV.gather(1, column_C1) * owned_C1).squeeze(1))
        E_CV = u_CV.exp()
        E_CV.scatter_(1, column_C1, E_CV.gather(1, column_C1).masked_fill(owned_C1, 0.0))
        S_C = self.vocab.sum(E_CV.sum(dim=1))
        E_y_C = u_y_C.exp()
        Z_C = S_C + E_y_C
        # Anchored at the target where that cannot overflow: log1p keeps the precision of 1 - p_y.
        anchored_C = -torch.log1p(S_C * (-u_y_C.clamp(min=-60)).exp())
        logprobs_C = torch.where(u_y_C > -60, anchored_C, u_y_C - Z_C.log())
        log_Z_C = u_y_C - logprobs_C
        Eu_C = self.vocab.sum(_dot_rows(E_CV, u_CV)) + E_y_C * u_y_C
        entropies_C = log_Z_C - Eu_C / Z_C
        if keep:
            self.kept = (x_CD, column_C, owned_C, m_C, u_CV, u_y_C, E_CV, S_C, Z_C)
            self.kept += (log_Z_C, entropies_C)
        return logprobs_C, entropies_C

    def backward(self, d_logprob_C: Tensor, d_entropy_C: Tensor | None) -> Tensor | None:
        x_CD, column_C, owned_C, m_C, u_CV, u_y_C, E_CV, S_C, Z_C, log_Z_C, entropies_C = self.kept
        scale_C = -d_logprob_C / (Z_C * self.temperature)
        y_C = -scale_C * S_C
        if d_entropy_C is not None:
            offset_C = entropies_C - log_Z_C
            entropy_scale_C = -d_entropy_C / (Z_C * self.temperature)
            y_C = y_C + entropy_scale_C * (u_y_C + offset_C) * u_y_C.exp()
            factor_CV = u_CV.add(offset_C.unsqueeze(1)).mul_(entropy_scale_C.unsqueeze(1))
            E_CV.mul_(factor_CV.add_(scale_C.unsqueeze(1)))
            scale_C = torch.ones_like(scale_C)
        if self.softcap is not None:
            # The derivative of tanh: 1 - (z / softcap)^2, z before the temperature.
            by_cap = self.temperature / self.softcap
            E_CV.mul_(u_CV.add_(m_C.unsqueeze(1)).mul_(by_cap).square_().neg_().add_(1.0))
            y_C = y_C * (1.0 - ((u_y_C + m_C) * by_cap).square())
        # The target's term, up to V times any other, is added after the long sums of the products.
        y_C1 = (y_C * owned_C).unsqueeze(1)
        if self.d_head_VD is not None:
            self.d_head_VD.addmm_(E_CV.T, x_CD * scale_C.unsqueeze(1))
            add_rows(self.d_head_VD, column_C, x_CD * y_C1)
        if not self.need_hidden:
            return None
        d_x_CD = (E_CV @ self.head_VD).mul_(scale_C.unsqueeze(1))
        return self.vocab.sum(d_x_CD.addcmul_(self.head_VD[column_C], y_C1))


def _dot_rows(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    # Per block of columns: no third [C, V] buffer, and pairwise sums within a block.
    pairs = zip(a_CV.split(COLUMNS, dim=1), b_CV.split(COLUMNS, dim=1), strict=True)
    return torch.stack([(a * b).sum(dim=1) for a, b in pairs]).sum(dim=0)


def unavailable(device: torch.device, dtype: torch.dtype, sharded: bool) -> str:
    """Return an empty string: every device and floating dtype is supported."""
    return ""


def policy_loss(problem: Problem) -> Outcome:
    """Compute loss and gradients of a problem."""
    return run_policy_loss(problem, ReferenceHead(problem))


def logprobs(problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropies, [N] in the compute dtype."""
    return run_logprobs(problem, ReferenceHead(problem))
