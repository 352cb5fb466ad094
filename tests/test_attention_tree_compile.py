"""The kernels of tree attention compile without register spills for the tiles that they use."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compile gate needs compiled Triton", allow_module_level=True)
pytest.importorskip("triton")

from compile_gate import SM80, SM90, Case, assert_fits
from turnfast.kernels.attention.triton import backward, forward

TYPES = {
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "ends_ptr": "*i32",
    "depth_ptr": "*i64",
    **{f"{name}{at}_ptr": "*i32" for name in ("whole", "mixed") for at in ("", "_at")},
    "scale": "fp32",
}


def cases() -> list[Case]:
    found = [
        case_of(forward.forward_kernel, forward.forward_tile, 128, window=True),
        case_of(backward.query_gradient_kernel, backward.query_gradient_tile, 128),
    ]
    for width in (64, 128):
        keys = (backward.key_gradient_kernel, backward.key_gradient_tile, width)
        # the tile is tuned for Hopper; Ampere needs more registers and may spill
        found += [case_of(*keys, archs=(SM90,)), case_of(*keys, archs=(SM80,), spills=32)]
    return found


def case_of(kernel, tile, width, *, window=False, archs=(SM80, SM90), spills=0) -> Case:
    sizes = tile(width)
    return Case(
        kernel=kernel,
        constants={
            "HAS_WINDOW": window,
            "EVEN_D": True,
            "PRECISION": "tf32",
            "BLOCK_M": sizes.queries,
            "BLOCK_N": sizes.keys,
            "BLOCK_D": width,
        },
        types=TYPES,
        pointer="*bf16",
        divisible=frozenset(n for n in kernel.arg_names if n.startswith("stride") or n == "D"),
        warps=sizes.warps,
        stages=sizes.stages,
        spills=spills,
        archs=archs,
        label=f"-{width}-window" if window else f"-{width}",
    )


BUILDS = [(case, arch) for case in cases() for arch in case.archs]


@pytest.mark.parametrize(
    ("case", "arch"), BUILDS, ids=[f"{case}-sm{arch}" for case, arch in BUILDS]
)
def test_compiles_without_spills(case, arch):
    assert_fits(case, arch)
