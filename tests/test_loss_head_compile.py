"""The compile gate: every Triton kernel of the loss head and of segments, for sm_80 and sm_90a.

No GPU takes part: Triton compiles for a named target, and the machine code is read back.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compile gate needs compiled Triton", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from turnfast.kernels.loss_head import triton_gemm, triton_head, triton_policy  # noqa: E402
from turnfast.kernels.loss_head import triton_rows as rows  # noqa: E402
from turnfast.kernels.segments import triton_segments as segments  # noqa: E402

SM80, SM90 = 80, 90
POINTERS = {
    "x_ptr": "bf16",
    "w_ptr": "bf16",
    "E_ptr": "bf16",
    "out_ptr": "bf16",
    "target_ptr": "i64",
    "column_ptr": "i64",
    "offset_ptr": "i64",
    "segments_ptr": "i64",
    "start_ptr": "i64",
    "stop_ptr": "i64",
    "flag_ptr": "i32",
    "any_flag_ptr": "i32",
}
FLOATS = {"scale", "softcap", "LIMIT", "clip_low", "clip_high", "dual_clip"}
FLOATS |= {"kl_coef", "entropy_coef", "is_cap"}
# What the launcher passes as multiples of 16 on the shapes that count; Triton specialises on it.
DIVISIBLE = {"stride_zc", "stride_ec", "stride_xc", "stride_wv", "D", "V", "C", "stride_st"}


@dataclass(frozen=True)
class Case:
    """A kernel with its compile-time arguments; spills: bytes of spill stores allowed."""

    kernel: Any
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    spills: int = 0
    archs: tuple[int, ...] = (SM80, SM90)
    types: dict[str, str] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return f"{self.kernel.fn.__name__}{self.label}"


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
    label = "-".join(["", f"{tiles.block_c}x{tiles.block_v}", *on])
    # The pass over flagged rows is rare and the soft cap costs registers: a few bytes may spill
    # there, outside the loop over D. The passes that every step runs spill nothing.
    rare = switches.get("ONLY_FLAGGED") or switches.get("HAS_SOFTCAP")
    return Case(
        triton_gemm.anchored_kernel,
        constants,
        tiles.warps,
        tiles.stages,
        64 if rare and tiles.block_v == 256 else 0,
        archs,
        label=label,
    )


def cases() -> list[Case]:
    found = []
    for cap in (False, True):
        for keep, flagged in ((True, False), (True, True), (False, False)):
            switches = {"HAS_SOFTCAP": cap, "KEEP": keep, "ONLY_FLAGGED": flagged}
            constants = {**switches, "CEILING": 80.0, "BLOCK_V": 4096}
            label = f"-{cap:d}{keep:d}{flagged:d}"
            found.append(Case(rows.exp_rows_kernel, constants, 8, label=label))
            found.append(anchored(triton_head.HOPPER_TILES, (SM90,), **switches))
            found.append(anchored(triton_head.AMPERE_TILES, (SM80, SM90), **switches))
    found += [
        Case(rows.max_rows_kernel, {"BLOCK_C": 32, "BLOCK_T": 64}),
        Case(rows.sum_rows_kernel, {"BLOCK_C": 32, "BLOCK_T": 64}),
        Case(rows.settle_rows_kernel, {"BLOCK_C": 256}),
        Case(rows.finish_rows_kernel, {"BLOCK_C": 256}),
        Case(rows.row_dots_kernel, {"HAS_SOFTCAP": True, "BLOCK_D": 1024}),
        Case(rows.scale_rows_kernel, {"BLOCK_D": 1024}),
        Case(rows.finish_dx_kernel, {"BLOCK_D": 1024}),
    ]
    for cap, entropy in ((True, True), (True, False), (False, True)):
        constants = {"HAS_SOFTCAP": cap, "HAS_ENTROPY": entropy, "BLOCK_V": 4096}
        found.append(Case(rows.dlogits_rows_kernel, constants, label=f"-{cap:d}{entropy:d}"))
    on = ("HAS_OLD", "HAS_REF", "HAS_CAP", "HAS_DUAL", "HAS_ENTROPY")
    for is_segment in (False, True):
        for cispo in (False, True):
            constants = {name: True for name in on}
            constants |= {"SEGMENTS": is_segment, "CISPO": cispo, "HAS_DUAL": not cispo}
            constants["BLOCK"] = triton_policy.BLOCK
            label = f"-{is_segment:d}{cispo:d}"
            found.append(Case(triton_policy.policy_kernel, constants, label=label))
    found += [
        Case(segments.bounds_kernel, {"BLOCK": segments.BLOCK}),
        Case(segments.segment_sum_kernel, {"BLOCK": segments.BLOCK}),
        Case(
            segments.segment_broadcast_kernel,
            {"BLOCK": segments.BLOCK},
            types={"out_ptr": "*fp32"},
        ),
    ]
    return found


@dataclass(frozen=True)
class Usage:
    """Registers per thread; bytes per thread of stack, which is where spilled registers go."""

    registers: int
    stack: int


def compile_case(case: Case, arch: int) -> tuple[Any, Usage]:
    """The compiled kernel and what its machine code uses."""
    names = case.kernel.arg_names
    signature, attrs = {}, {}
    for index, name in enumerate(names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in case.types:
            signature[name] = case.types[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name, "fp32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name not in case.constants and (name.endswith("_ptr") or name in DIVISIBLE):
            attrs[(index,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, attrs)
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=target, options=options)
    return compiled, usage(compiled.asm["cubin"])


def usage(cubin: bytes) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return Usage(registers=int(found[1]), stack=int(found[2]))


TARGETS = [(case, arch) for case in cases() for arch in case.archs]


@pytest.mark.parametrize(
    ("case", "arch"), TARGETS, ids=[f"{case}-sm{arch}" for case, arch in TARGETS]
)
def test_kernel_compiles_without_spills(case: Case, arch: int) -> None:
    compiled, used = compile_case(case, arch)
    print(case, used, compiled.metadata.shared)
    assert used.stack <= case.spills, f"{used.stack} bytes of stack, {used.registers} registers"
    limit = {SM80: 163 * 1024, SM90: 227 * 1024}[arch]
    assert compiled.metadata.shared <= limit
    assert re.search(r"\.target sm_90a" if arch == SM90 else r"\.target sm_80", compiled.asm["ptx"])


def test_hopper_product_uses_the_tensor_cores_and_the_copy_engine() -> None:
    case = anchored(triton_head.HOPPER_TILES, (SM90,))
    compiled, _ = compile_case(case, SM90)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]


def test_every_kernel_of_both_rooms_is_in_the_gate() -> None:
    gated = {case.kernel.fn.__name__ for case in cases()}
    files = [Path(module.__file__) for module in (rows, segments)]
    for path in [path for file in files for path in file.parent.glob("*.py")]:
        kernels = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text("utf-8"))
        missing = set(kernels) - gated
        assert not missing, f"{path.name}: {missing} not compiled by the gate"


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, turnfast.kernels as k, torch; "
        "h = torch.ones(2, 4); i = torch.tensor([0, 1]); "
        "k.linear_logprobs(h, h, i, i, impl='reference'); "
        "assert not [m for m in sys.modules if m.startswith('turnfast') and 'triton' in m]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
