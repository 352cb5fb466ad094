"""The compile gate rejects faulty kernels and covers every kernel of the package."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compile gate needs compiled Triton", allow_module_level=True)
pytest.importorskip("triton")

import test_attention_tree_compile
import test_loss_head_compile
from compile_gate import SM80, SM90, Case, assert_fits, ungated
from triton.errors import TritonError

import turnfast
from turnfast import kernels

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def twice(x):
    return x + x


@triton.jit
def good_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, twice(tl.load(x_ptr + n)))


@triton.jit
def unknown_name_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n) * scale)


@triton.jit
def wrong_shape_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr + tl.arange(0, N)))


@triton.autotune(configs=[], key=[])
@triton.jit(noinline=False)
def centre_columns(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x - tl.sum(x, 0)[None, :])


@triton.jit
def product_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x.T))
"""


@pytest.fixture
def faulty(tmp_path: Path):
    """Write and import a file of kernels outside the package."""
    path = tmp_path / "new_folder" / "faulty.py"
    path.parent.mkdir()
    path.write_text(KERNELS, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", [SM80, SM90])
def test_a_correct_kernel_passes(faulty, arch):
    assert_fits(Case(kernel=faulty.good_kernel, constants={"N": 256}), arch)


@pytest.mark.parametrize(
    ("name", "why"),
    [("unknown_name_kernel", "scale is not defined"), ("wrong_shape_kernel", "block")],
)
def test_a_compile_error_shows_the_line(faulty, name, why):
    with pytest.raises(TritonError) as caught:
        assert_fits(Case(kernel=getattr(faulty, name), constants={"N": 256}), SM90)
    assert f"def {name}" in str(caught.value) and why in str(caught.value)


@pytest.mark.parametrize("arch", [SM80, SM90])
def test_a_tile_that_spills_is_rejected_by_name(faulty, arch):
    kernel = faulty.centre_columns.fn
    assert_fits(Case(kernel=kernel, constants={"N": 16}, warps=1), arch)
    large = Case(kernel=kernel, constants={"N": 128}, warps=1, label="-128")
    with pytest.raises(AssertionError, match=r"centre_columns-128 for sm_\w+ spills \d+ bytes"):
        assert_fits(large, arch)


def test_a_tile_larger_than_the_shared_memory_is_rejected_by_name(faulty):
    case = Case(kernel=faulty.product_kernel, constants={"N": 256}, warps=16, spills=1 << 20)
    with pytest.raises(AssertionError, match=r"product_kernel for sm_80 uses \d+ bytes of shared"):
        assert_fits(case, SM80)


def test_a_kernel_that_no_case_compiles_is_named(faulty, tmp_path):
    good = Case(kernel=faulty.good_kernel, constants={"N": 256})
    path = os.path.join("new_folder", "faulty.py")
    names = ("centre_columns", "product_kernel", "unknown_name_kernel", "wrong_shape_kernel")
    assert ungated(tmp_path, [good]) == [f"{path}: {name}" for name in names]
    # A called function compiles with its callers. Files that nothing imports count.
    assert not any("twice" in line for line in ungated(tmp_path, []))
    assert "faulty" not in sys.modules


@pytest.mark.parametrize("package", [kernels, turnfast])
def test_every_kernel_of_the_package_is_compiled_by_the_gate(package):
    cases = [*test_loss_head_compile.cases(), *test_attention_tree_compile.cases()]
    missing = ungated(Path(package.__file__).parent, cases)
    assert not missing, f"no case compiles {', '.join(missing)}: add one to the test of its package"
