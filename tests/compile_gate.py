"""Compile Triton kernels for a GPU target, without that GPU, and read what the code uses.

Triton's cuobjdump reads registers, stack and shared memory from the machine code.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM80, SM90 = 80, 90
SHARED_BYTES = {SM80: 163 * 1024, SM90: 227 * 1024}
# Hopper's own instructions need the target with the "a".
TARGETS = {SM80: "sm_80", SM90: "sm_90a"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with the arguments of one launch.

    types: types of arguments. Others are int32, or `pointer` for names that end in _ptr.
    divisible: integer arguments that are multiples of 16; Triton specialises on that. Pointers
        always are.
    spills: allowed bytes of stack per thread.
    """

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    pointer: str = "*fp32"
    divisible: frozenset[str] = frozenset()
    warps: int = 4
    stages: int = 3
    spills: int = 0
    archs: tuple[int, ...] = (SM80, SM90)
    label: str = ""

    def __str__(self) -> str:
        return f"{self.kernel.fn.__name__}{self.label}"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Registers and bytes of stack (spilled registers) per thread; shared bytes per block."""

    registers: int
    stack: int
    shared: int


def compile_case(case: Case, arch: int) -> tuple[Any, Usage]:
    """Compile a kernel and return it with the resources its machine code uses."""
    names = case.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        is_pointer = name.endswith("_ptr")
        if name in case.constants:
            signature[name] = "constexpr"
        else:
            signature[name] = case.types.get(name, case.pointer if is_pointer else "i32")
            if is_pointer or name in case.divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    return compiled, Usage(registers=registers, stack=stack, shared=compiled.metadata.shared)


def assert_fits(case: Case, arch: int) -> Any:
    """Compile a kernel; assert that it spills no more than allowed and fits the shared memory."""
    compiled, used = compile_case(case, arch)
    about = f"{case} for {TARGETS[arch]}"
    print(about, used)
    assert used.stack <= case.spills, (
        f"{about} spills {used.stack} bytes of registers per thread, {case.spills} are allowed; "
        f"it uses {used.registers} registers"
    )
    assert used.shared <= SHARED_BYTES[arch], (
        f"{about} uses {used.shared} bytes of shared memory per block, the GPU has "
        f"{SHARED_BYTES[arch]}"
    )
    target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert target and target[1] == TARGETS[arch], f"{about} was compiled for {target}"
    return compiled


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


def kernels_in(folder: Path) -> set[tuple[Path, str]]:
    """Return file and name of every jitted function in a folder that no other kernel calls.

    Parses the sources, so it also finds files that nothing imports.
    """
    jitted: set[tuple[Path, str]] = set()
    called: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                jitted.add((path.resolve(), node.name))
                inner = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                called |= inner - {node.name}
    return {(path, name) for path, name in jitted if name not in called}


def _is_jit(decorator: ast.expr) -> bool:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(call).rpartition(".")[2] == "jit"


def ungated(folder: Path, cases: Iterable[Case]) -> list[str]:
    """Return the kernels in a folder that no case compiles, as file and name."""
    gated = {(Path(inspect.getfile(c.kernel.fn)).resolve(), c.kernel.fn.__name__) for c in cases}
    found = kernels_in(folder) - gated
    return sorted(f"{path.relative_to(folder.resolve())}: {name}" for path, name in found)
