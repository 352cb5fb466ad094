"""The Triton implementation of the loss head, in two designs behind one Head.

    safe:      the library computes z = x @ W^T in float32 slices; one pass writes E and row sums
    anchored:  one kernel computes the product and the exponentials (gemm.py); z is never stored
The backward pass is the same. Column y of E is 0, the target's term y = g S / Z is added in
float32, and the products are library calls:
    dx_n = -(g_n / Z_n) (E @ W)_n + y_n W_y          dW = E^T @ (-(g / Z) x), row y plus y x
E has the model's dtype; sums, coefficients, dx and dW are float32. With an entropy bonus or a soft
cap, dz is not a multiple of E: one more pass over E replaces it by dloss/dlogits.
Workspace: E [C, V] of at most WORKSPACE_BYTES together with the float32 slice or the sums per tile.
"""

# Type checkers do not know the type of a launch, kernel[grid](...).
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from ...segments.reference import add_rows
from ..problem import LogprobsProblem
from .gemm import anchored_kernel
from .rows import (
    choose_shifts_kernel,
    dlogits_rows_kernel,
    exp_rows_kernel,
    finish_dx_kernel,
    finish_rows_kernel,
    max_rows_kernel,
    row_dots_kernel,
    scale_rows_kernel,
    sum_rows_kernel,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WORKSPACE_BYTES = 2_300_000_000
SAFE_SLICE = 1024
# Rows with a logit more than LIMIT above the target's are repeated with their maximum as shift.
# exp(LIMIT) * V and its inverse times a coefficient stay far from overflow in bf16 and float32.
# CEILING keeps the sums of a row finite until it is repeated.
LIMIT, CEILING = 40.0, 80.0
# float16 cannot hold exp(40), so every row is shifted by its maximum.
HALF_LIMIT = -torch.inf
ROW_BLOCK, D_BLOCK = (64, 64) if INTERPRETED else (4096, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Launch configuration of the anchored product."""

    block_c: int
    block_v: int
    block_d: int
    group_c: int
    warps: int
    stages: int
    tma: bool


# Hopper: the widest tile whose halved epilogue compiles without spills.
HOPPER_TILES = Tiles(block_c=128, block_v=256, block_d=64, group_c=16, warps=8, stages=3, tma=True)
AMPERE_TILES = Tiles(block_c=128, block_v=128, block_d=32, group_c=16, warps=8, stages=4, tma=False)
INTERPRETER_TILES = Tiles(
    block_c=32, block_v=64, block_d=32, group_c=2, warps=4, stages=1, tma=False
)
Design = Literal["safe", "anchored"]


class TritonHead:
    """The driver's Head in Triton; `tokens` limits the workspace of small calls."""

    def __init__(self, p: LogprobsProblem, design: Design, tokens: int) -> None:
        head_VD = p.head_VD
        # The kernels require rows of stride 1.
        self.head_VD = head_VD if head_VD.stride(1) == 1 else head_VD.contiguous()
        self.vocab = p.vocab
        self.scale, self.softcap = 1.0 / p.temperature, p.softcap
        self.need_hidden, self.d_head_VD = p.need_hidden, p.head_gradient()
        self.design, self.tokens = design, max(tokens, 1)
        self.half = head_VD.dtype == torch.float16
        self.one = torch.ones((), dtype=torch.float32, device=head_VD.device)
        self.tiles = _tiles(self.head_VD)
        self.E_flat = head_VD.new_empty(0)
        self.kept: tuple[Tensor, ...] = ()

    def chunk_tokens(self) -> int:
        V, D = self.head_VD.shape
        row_bytes = self.head_VD.element_size() * V + 8 * D
        budget = WORKSPACE_BYTES
        if self.design == "safe":
            budget -= 4 * SAFE_SLICE * V
        else:
            row_bytes += 12 * triton.cdiv(V, self.tiles.block_v)
        return max(128, budget // row_bytes // 128 * 128)

    def forward(self, x_CD: Tensor, targets_C: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        x_CD = x_CD.contiguous()
        C, device = x_CD.shape[0], x_CD.device
        column_C, owned_C = self.vocab.local(targets_C)
        # -1 marks a target of another shard; the kernels then exclude no column.
        target_C = column_C.where(owned_C, -1)
        E_CV = self._workspace(C) if keep else x_CD
        z_y_C = torch.empty(C, dtype=torch.float32, device=device)
        row_dots_kernel[(C,)](
            x_CD, x_CD.stride(0), self.head_VD, self.head_VD.stride(0), column_C, target_C, z_y_C,
            x_CD.shape[1], self.scale, self.softcap or 1.0,
            HAS_SOFTCAP=self.softcap is not None, BLOCK_D=D_BLOCK,
        )  # fmt: skip
        z_y_C = self.vocab.sum(z_y_C)
        run = self._safe_sums if self.design == "safe" else self._anchored_sums
        S_C, U_C, shift_C = run(x_CD, target_C, z_y_C, E_CV, keep)
        out = [torch.empty_like(z_y_C) for _ in range(4)]
        logprobs_C, entropies_C, Z_C, log_Z_C = out
        finish_rows_kernel[(triton.cdiv(C, 256),)](
            S_C, U_C, z_y_C, shift_C, *out, C, BLOCK_C=256,
        )  # fmt: skip
        if keep:
            self.kept = (x_CD, E_CV, z_y_C, shift_C, target_C, S_C, Z_C, log_Z_C, entropies_C)
            self.kept += (column_C,)
        return logprobs_C, entropies_C

    def backward(self, d_logprob_C: Tensor, d_entropy_C: Tensor | None) -> Tensor | None:
        x_CD, E_CV, z_y_C, shift_C, target_C, S_C, Z_C, log_Z_C, entropies_C, column_C = self.kept
        C, D = x_CD.shape
        grad_scale = self._grad_scale(d_logprob_C, d_entropy_C)
        grid_CD = (C, triton.cdiv(D, D_BLOCK))
        if d_entropy_C is None and self.softcap is None:
            factor_C = -d_logprob_C * self.scale / Z_C
            y_C = -factor_C * S_C * (target_C >= 0)
            scaled_CD = x_CD
            if self.d_head_VD is not None:
                scaled_CD = torch.empty_like(x_CD)
                scale_rows_kernel[grid_CD](
                    x_CD, x_CD.stride(0), factor_C, grad_scale, scaled_CD, D, BLOCK_D=D_BLOCK
                )
        else:
            factor_C, scaled_CD = grad_scale.expand(C).contiguous(), x_CD
            y_C = torch.empty_like(Z_C)
            dlogits_rows_kernel[(C,)](
                E_CV, E_CV.stride(0), z_y_C, shift_C, target_C, S_C, Z_C, log_Z_C, entropies_C,
                d_logprob_C, d_logprob_C if d_entropy_C is None else d_entropy_C, y_C, grad_scale,
                E_CV.shape[1], self.scale, self.softcap or 1.0,
                HAS_SOFTCAP=self.softcap is not None, HAS_ENTROPY=d_entropy_C is not None,
                BLOCK_V=ROW_BLOCK,
            )  # fmt: skip
        if self.d_head_VD is not None:
            self._add_to_head(self.d_head_VD, E_CV, scaled_CD, grad_scale)
            add_rows(self.d_head_VD, column_C, x_CD * y_C.unsqueeze(1))
        if not self.need_hidden:
            return None
        d_x_CD = product(E_CV, self.head_VD)
        finish_dx_kernel[grid_CD](
            d_x_CD, factor_C, y_C, self.head_VD, self.head_VD.stride(0), column_C, D,
            BLOCK_D=D_BLOCK,
        )  # fmt: skip
        return self.vocab.sum(d_x_CD)

    def _safe_sums(
        self, x_CD: Tensor, target_C: Tensor, z_y_C: Tensor, E_CV: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        C, V = x_CD.shape[0], self.head_VD.shape[0]
        S_C, U_C, M_C = (torch.empty_like(z_y_C) for _ in range(3))
        shift_C = torch.empty_like(z_y_C)
        for start in range(0, C, SAFE_SLICE):
            rows = slice(start, min(start + SAFE_SLICE, C))
            z_RV = product(x_CD[rows], self.head_VD.T)

            def pass_over(
                shift_R: Tensor, flag_R: Tensor, flagged: bool, write: bool,
                z_RV: Tensor = z_RV, rows: slice = rows,
            ) -> None:  # fmt: skip
                exp_rows_kernel[(z_RV.shape[0],)](
                    z_RV, z_RV.stride(0), E_CV[rows], E_CV.stride(0), shift_R, target_C[rows],
                    flag_R, S_C[rows], U_C[rows], M_C[rows], V, self.scale, self.softcap or 1.0,
                    HAS_SOFTCAP=self.softcap is not None, KEEP=write, ONLY_FLAGGED=flagged,
                    CEILING=CEILING, BLOCK_V=ROW_BLOCK, num_warps=8,
                )  # fmt: skip

            # float16 repeats every row, so its first pass only finds the maxima.
            pass_over(z_y_C[rows], target_C, False, keep and not self.half)
            shift_R, flag_R = self._choose_shifts(self.vocab.max(M_C[rows]), z_y_C[rows])
            shift_C[rows] = shift_R
            pass_over(shift_R, flag_R, True, keep)
        return self.vocab.sum(S_C), self.vocab.sum(U_C), shift_C

    def _anchored_sums(
        self, x_CD: Tensor, target_C: Tensor, z_y_C: Tensor, E_CV: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        (C, D), V, t = x_CD.shape, self.head_VD.shape[0], self.tiles
        tiles_v = triton.cdiv(V, t.block_v)
        S_TC, U_TC, M_TC = torch.empty(3, tiles_v, C, dtype=torch.float32, device=x_CD.device)
        if t.tma:
            triton.set_allocator(_scratch)

        def launch(shift_C: Tensor, flag_C: Tensor, any_flag: Tensor, flagged: bool) -> None:
            programs = _programs(x_CD.device)
            anchored_kernel[(programs,)](
                x_CD, x_CD.stride(0), self.head_VD, self.head_VD.stride(0), E_CV, E_CV.stride(0),
                shift_C, target_C, flag_C, any_flag, S_TC, U_TC, M_TC, C, C, V, D,
                self.scale, self.softcap or 1.0, HAS_SOFTCAP=self.softcap is not None,
                KEEP=keep, ONLY_FLAGGED=flagged, USE_TMA=t.tma, CEILING=CEILING,
                PRECISION="ieee", UPCAST=INTERPRETED,
                BLOCK_C=t.block_c, BLOCK_V=t.block_v, BLOCK_D=t.block_d, GROUP_C=t.group_c,
                PROGRAMS=programs, STAGES=t.stages, num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip

        block_c, block_t = (16, 16) if INTERPRETED else (32, 64)
        grid = (triton.cdiv(C, block_c),)
        launch(z_y_C, target_C, target_C, False)
        M_C, S_C, U_C = (torch.empty_like(z_y_C) for _ in range(3))
        max_rows_kernel[grid](M_TC, C, M_C, C, tiles_v, BLOCK_C=block_c, BLOCK_T=block_t)
        shift_C, flag_C = self._choose_shifts(self.vocab.max(M_C), z_y_C)
        launch(shift_C, flag_C, flag_C.amax(), True)
        sum_rows_kernel[grid](S_TC, U_TC, C, S_C, U_C, C, tiles_v, BLOCK_C=block_c, BLOCK_T=block_t)
        return self.vocab.sum(S_C), self.vocab.sum(U_C), shift_C

    def _choose_shifts(self, M_C: Tensor, z_y_C: Tensor) -> tuple[Tensor, Tensor]:
        C = M_C.shape[0]
        shift_C = torch.empty_like(z_y_C)
        flag_C = torch.empty(C, dtype=torch.int32, device=M_C.device)
        limit = HALF_LIMIT if self.half else LIMIT
        choose_shifts_kernel[(triton.cdiv(C, 256),)](
            M_C, z_y_C, shift_C, flag_C, C, limit, BLOCK_C=256
        )
        return shift_C, flag_C

    def _workspace(self, C: int) -> Tensor:
        V = self.head_VD.shape[0]
        # Each row starts at a multiple of 128 bytes for any V.
        pitch = triton.cdiv(V, 64) * 64
        if self.E_flat.numel() < C * pitch:
            rows = max(C, min(self.tokens, self.chunk_tokens()))
            self.E_flat = self.head_VD.new_empty(0)
            self.E_flat = self.head_VD.new_empty(rows * pitch)
        return self.E_flat[: C * pitch].view(C, pitch)[:, :V]

    def _grad_scale(self, d_logprob_C: Tensor, d_entropy_C: Tensor | None) -> Tensor:
        """Return a power of two near the largest coefficient; 1 except for float16.

        Coefficients such as 1 / N are below the range of float16.
        """
        if not self.half:
            return self.one
        largest = d_logprob_C.abs().max()
        if d_entropy_C is not None:
            largest = torch.maximum(largest, d_entropy_C.abs().max())
        return torch.exp2(torch.log2(largest.clamp(min=1e-30)).round())

    def _add_to_head(
        self, d_head_VD: Tensor, E_CV: Tensor, scaled_CD: Tensor, grad_scale: Tensor
    ) -> None:
        if self.half:
            d_head_VD += product(E_CV.T, scaled_CD) * grad_scale
        elif E_CV.is_cuda and E_CV.dtype != torch.float32:
            torch.addmm(d_head_VD, E_CV.T, scaled_CD, out_dtype=torch.float32, out=d_head_VD)
        else:
            d_head_VD.addmm_(E_CV.T.float(), scaled_CD.float())


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b with float32 sums and output."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _tiles(head_VD: Tensor) -> Tiles:
    if INTERPRETED:
        return INTERPRETER_TILES
    hopper = torch.cuda.get_device_capability(head_VD.device)[0] == 9
    # TMA requires rows of the head and of the gathered hidden states to start at 16 bytes.
    size = head_VD.element_size()
    aligned = all(
        n % 16 == 0 for n in (head_VD.data_ptr(), head_VD.stride(0) * size, head_VD.shape[1] * size)
    )
    return HOPPER_TILES if hopper and aligned else AMPERE_TILES


def _programs(device: torch.device) -> int:
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)
