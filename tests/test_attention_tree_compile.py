"""The tree-attention kernels compile for Hopper without spills, in the tiles they run with."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compile gate needs compiled Triton", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from turnfast.kernels.attention import triton_tree as forward  # noqa: E402
from turnfast.kernels.attention import triton_tree_backward as backward  # noqa: E402

TYPES = {
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "ends_ptr": "*i32",
    "depth_ptr": "*i64",
    **{f"{name}{at}_ptr": "*i32" for name in ("whole", "mixed") for at in ("", "_at")},
    "scale": "fp32",
}
SHARED_BYTES = 227 * 1024
CASES = [
    pytest.param(kernel, tile, width, window, id=f"{kernel.fn.__name__}-{width}-{window}")
    for kernel, tile, width, window in (
        (forward.forward_kernel, forward.forward_tile, 128, True),
        (backward.query_gradient_kernel, backward.query_gradient_tile, 128, False),
        (backward.key_gradient_kernel, backward.key_gradient_tile, 128, False),
        (backward.key_gradient_kernel, backward.key_gradient_tile, 64, False),
    )
]


@pytest.mark.parametrize(("kernel", "tile", "width", "window"), CASES)
def test_compiles_without_spills(kernel, tile, width, window):
    sizes = tile(width)
    constants = {
        "HAS_WINDOW": window,
        "EVEN_D": True,
        "PRECISION": "tf32",
        "BLOCK_M": sizes.queries,
        "BLOCK_N": sizes.keys,
        "BLOCK_D": width,
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        default = "*bf16" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else TYPES.get(name, default)
        if name.endswith("_ptr") or name.startswith("stride") or name == "D":
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attributes,
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": sizes.warps, "num_stages": sizes.stages},
    )
    registers, stack = usage(compiled.asm["cubin"])
    print(kernel.fn.__name__, width, registers, stack, compiled.metadata.shared)
    assert stack == 0, f"{stack} bytes of stack with {registers} registers"
    assert compiled.metadata.shared <= SHARED_BYTES


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])
