"""Compile every Triton kernel of the loss head and of segments for sm_80 and sm_90a.

This needs no GPU: Triton compiles for a named target.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compile gate needs compiled Triton", allow_module_level=True)
pytest.importorskip("triton")

from compile_gate import SM80, SM90, Case, assert_fits
from turnfast.kernels.loss_head.triton import gemm as triton_gemm
from turnfast.kernels.loss_head.triton import head as triton_head
from turnfast.kernels.loss_head.triton import policy as triton_policy
from turnfast.kernels.loss_head.triton import rows
from turnfast.kernels.segments import triton_segments as segments

TYPES = {
    "x_ptr": "*bf16",
    "w_ptr": "*bf16",
    "E_ptr": "*bf16",
    "out_ptr": "*bf16",
    "target_ptr": "*i64",
    "column_ptr": "*i64",
    "offset_ptr": "*i64",
    "segments_ptr": "*i64",
    "start_ptr": "*i64",
    "stop_ptr": "*i64",
    "flag_ptr": "*i32",
    "any_flag_ptr": "*i32",
}
FLOATS = ("scale", "softcap", "LIMIT", "clip_low", "clip_high", "dual_clip", "kl_coef")
FLOATS += ("entropy_coef", "is_cap")
TYPES |= dict.fromkeys(FLOATS, "fp32")
DIVISIBLE = frozenset(
    {"stride_zc", "stride_ec", "stride_xc", "stride_wv", "D", "V", "C", "stride_st"}
)


def case_of(kernel: Any, constants: dict[str, Any], **launch: Any) -> Case:
    types = TYPES | launch.pop("types", {})
    return Case(kernel=kernel, constants=constants, types=types, divisible=DIVISIBLE, **launch)


def anchored(tiles: triton_head.Tiles, archs: tuple[int, ...], **switches: bool) -> Case:
    constants: dict[str, Any] = {
        "HAS_SOFTCAP": False,
        "KEEP": True,
        "ONLY_FLAGGED": False,
        "USE_TMA": tiles.tma,
        "CEILING": triton_head.CEILING,
        "PRECISION": "ieee",
        "UPCAST": False,
        "BLOCK_C": tiles.block_c,
        "BLOCK_V": tiles.block_v,
        "BLOCK_D": tiles.block_d,
        "GROUP_C": tiles.group_c,
        "PROGRAMS": 132,
        "STAGES": tiles.stages,
    }
    constants.update(switches)
    on = [name.lower() for name, value in switches.items() if value]
    # The pass over flagged rows is rare and the soft cap needs registers, so a few bytes may spill
    # there, outside the loop over D. All other passes must not spill.
    rare = switches.get("ONLY_FLAGGED") or switches.get("HAS_SOFTCAP")
    return case_of(
        triton_gemm.anchored_kernel,
        constants,
        warps=tiles.warps,
        stages=tiles.stages,
        spills=64 if rare and tiles.block_v == 256 else 0,
        archs=archs,
        label="-".join(["", f"{tiles.block_c}x{tiles.block_v}", *on]),
    )


def row_cases(dtype: str) -> list[Case]:
    """Cases of the row-wise kernels with tensors of the model's dtype."""
    types = dict.fromkeys(("x_ptr", "w_ptr", "E_ptr", "out_ptr"), f"*{dtype}")
    row, d = {"BLOCK_V": triton_head.ROW_BLOCK}, {"BLOCK_D": triton_head.D_BLOCK}
    built = []

    def add(kernel: Any, constants: dict[str, Any], warps: int = 4) -> None:
        switches = [f"{value:d}" for value in constants.values() if isinstance(value, bool)]
        label = "-".join(["", dtype, *filter(None, ["".join(switches)])])
        built.append(case_of(kernel, constants, types=types, warps=warps, label=label))

    for cap in (False, True):
        for keep, flagged in ((True, False), (True, True), (False, False)):
            switches = {"HAS_SOFTCAP": cap, "KEEP": keep, "ONLY_FLAGGED": flagged}
            add(rows.exp_rows_kernel, {**switches, **row, "CEILING": triton_head.CEILING}, 8)
        add(rows.row_dots_kernel, {"HAS_SOFTCAP": cap, **d})
    for cap, entropy in ((True, True), (True, False), (False, True)):
        add(rows.dlogits_rows_kernel, {"HAS_SOFTCAP": cap, "HAS_ENTROPY": entropy, **row})
    add(rows.scale_rows_kernel, d)
    add(rows.finish_dx_kernel, d)
    return built


def policy_cases() -> list[Case]:
    """Cases of the policy kernel with all options and with none."""
    policies = []
    options = ("HAS_OLD", "HAS_REF", "HAS_CAP", "HAS_DUAL", "HAS_ENTROPY")
    for segments_too in (False, True):
        for cispo in (False, True):
            for on in (True, False):
                constants: dict[str, Any] = dict.fromkeys(options, on)
                constants |= {"SEGMENTS": segments_too, "CISPO": cispo}
                constants |= {"HAS_DUAL": on and not cispo, "BLOCK": triton_policy.BLOCK}
                label = f"-{segments_too:d}{cispo:d}{on:d}"
                policies.append(case_of(triton_policy.policy_kernel, constants, label=label))
    return policies


def cases() -> list[Case]:
    all_cases = [*row_cases("bf16"), *row_cases("fp16"), *row_cases("fp32"), *policy_cases()]
    for cap in (False, True):
        for keep, flagged in ((True, False), (True, True), (False, False)):
            switches = {"HAS_SOFTCAP": cap, "KEEP": keep, "ONLY_FLAGGED": flagged}
            all_cases.append(anchored(triton_head.HOPPER_TILES, (SM90,), **switches))
            all_cases.append(anchored(triton_head.AMPERE_TILES, (SM80, SM90), **switches))
    block = {"BLOCK": segments.BLOCK}
    return [
        *all_cases,
        case_of(rows.max_rows_kernel, {"BLOCK_C": 32, "BLOCK_T": 64}),
        case_of(rows.sum_rows_kernel, {"BLOCK_C": 32, "BLOCK_T": 64}),
        case_of(rows.choose_shifts_kernel, {"BLOCK_C": 256}),
        case_of(rows.finish_rows_kernel, {"BLOCK_C": 256}),
        case_of(segments.bounds_kernel, block),
        case_of(segments.segment_sum_kernel, block),
    ]


BUILDS = [(case, arch) for case in cases() for arch in case.archs]


@pytest.mark.parametrize(
    ("case", "arch"), BUILDS, ids=[f"{case}-sm{arch}" for case, arch in BUILDS]
)
def test_kernel_compiles_without_spills(case: Case, arch: int) -> None:
    assert_fits(case, arch)


def test_the_hopper_product_uses_tensor_cores_and_tma() -> None:
    ptx = assert_fits(anchored(triton_head.HOPPER_TILES, (SM90,)), SM90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, turnfast.kernels as k, torch; "
        "h = torch.ones(2, 4); i = torch.tensor([0, 1]); "
        "k.linear_logprobs(h, h, i, i, impl='reference'); "
        "assert not [m for m in sys.modules if m.startswith('turnfast') and 'triton' in m]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
