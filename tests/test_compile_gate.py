"""The compile gate closes: kernels wrong on purpose do not pass it, and none slips by it."""

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
def wrong(tmp_path: Path):
    """A file of kernels outside the package."""
    path = tmp_path / "new_room" / "wrong.py"
    path.parent.mkdir()
    path.write_text(KERNELS, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", [SM80, SM90])
def test_a_kernel_that_is_right_passes(wrong, arch):
    assert_fits(Case(kernel=wrong.good_kernel, constants={"N": 256}), arch)


@pytest.mark.parametrize(
    ("name", "why"),
    [("unknown_name_kernel", "scale is not defined"), ("wrong_shape_kernel", "block")],
)
def test_a_kernel_that_does_not_compile_is_shown_with_its_line(wrong, name, why):
    with pytest.raises(TritonError) as caught:
        assert_fits(Case(kernel=getattr(wrong, name), constants={"N": 256}), SM90)
    assert f"def {name}" in str(caught.value) and why in str(caught.value)


@pytest.mark.parametrize("arch", [SM80, SM90])
def test_a_tile_that_spills_is_refused_by_name(wrong, arch):
    kernel = wrong.centre_columns.fn
    assert_fits(Case(kernel=kernel, constants={"N": 16}, warps=1), arch)
    large = Case(kernel=kernel, constants={"N": 128}, warps=1, label="-128")
    with pytest.raises(AssertionError, match=r"centre_columns-128 for sm_\w+ spills \d+ bytes"):
        assert_fits(large, arch)


def test_a_tile_larger_than_the_shared_memory_is_refused_by_name(wrong):
    case = Case(kernel=wrong.product_kernel, constants={"N": 256}, warps=16, spills=1 << 20)
    with pytest.raises(AssertionError, match=r"product_kernel for sm_80 takes \d+ bytes of shared"):
        assert_fits(case, SM80)


def test_a_kernel_that_no_case_compiles_is_named(wrong, tmp_path):
    good = Case(kernel=wrong.good_kernel, constants={"N": 256})
    room = os.path.join("new_room", "wrong.py")
    names = ("centre_columns", "product_kernel", "unknown_name_kernel", "wrong_shape_kernel")
    assert ungated(tmp_path, [good]) == [f"{room}: {name}" for name in names]
    # a helper is compiled with its callers; and a file that nothing imports counts
    assert not any("twice" in line for line in ungated(tmp_path, []))
    assert "wrong" not in sys.modules


@pytest.mark.parametrize("package", [kernels, turnfast])
def test_every_kernel_of_the_package_is_compiled_by_the_gate(package):
    cases = [*test_loss_head_compile.cases(), *test_attention_tree_compile.cases()]
    missing = ungated(Path(package.__file__).parent, cases)
    assert not missing, f"no case compiles {', '.join(missing)}: add one to its room's test"
