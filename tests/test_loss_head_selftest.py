"""The self-test finds every wrong kernel, in the interpreter: TRITON_INTERPRET=1.

A kernel is made wrong for real: it runs, and then one value that it wrote is changed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")

from turnfast.kernels.loss_head import backends, reference  # noqa: E402
from turnfast.kernels.loss_head.triton import choice, memory, selftest  # noqa: E402
from turnfast.kernels.loss_head.triton import entry as triton_loss  # noqa: E402
from turnfast.kernels.loss_head.triton import head as triton_head  # noqa: E402
from turnfast.kernels.loss_head.triton import policy as triton_policy  # noqa: E402
from turnfast.kernels.segments import triton_segments  # noqa: E402

CPU, BF16 = torch.device("cpu"), torch.bfloat16
BUILDS = [("safe", BF16), ("anchored", BF16), ("safe", torch.float16), ("safe", torch.float32)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and a process that has not asked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = selftest.failure
    asked.cache_clear()
    yield tmp_path
    asked.cache_clear()


@pytest.mark.parametrize(("design", "dtype"), BUILDS)
def test_right_kernels_pass(design: str, dtype: torch.dtype) -> None:
    assert selftest.run(CPU, design, dtype) == ""


def test_the_problem_has_a_row_to_be_redone_and_several_chunks() -> None:
    problem = selftest._problem(CPU, selftest.RULES[0], BF16)
    logprobs, _ = reference.logprobs(problem.without_loss())
    assert float(logprobs[0]) < -triton_head.CEILING - 20
    assert bool((logprobs[1:] > -triton_head.LIMIT).all())
    assert problem.chunk_tokens and problem.chunk_tokens < len(problem.rows_N)


class Spoiled:
    """A kernel that writes one number wrongly: `spoil` gets the argument of that place."""

    def __init__(self, kernel: Any, place: int, spoil: Callable[[Tensor], object]) -> None:
        self.kernel, self.place, self.spoil = kernel, place, spoil

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            self.kernel[grid](*given, **constants)
            self.spoil(given[self.place])

        return launch


def first(x: Tensor) -> None:
    x.view(-1)[0] += 0.2 * (1 + x.view(-1)[0].abs())


def a_row(x: Tensor) -> None:
    x[min(2, len(x) - 1)] *= 1.5


def never_redo(x: Tensor) -> None:
    x.fill_(-torch.inf)


WRONG = [
    # (where it is launched from, its name, place of what is spoiled, how, designs that launch it)
    (triton_head, "row_dots_kernel", 6, first, ("safe", "anchored")),
    (triton_head, "exp_rows_kernel", 2, a_row, ("safe",)),
    (triton_head, "exp_rows_kernel", 7, first, ("safe",)),
    (triton_head, "exp_rows_kernel", 8, first, ("safe",)),
    (triton_head, "exp_rows_kernel", 9, never_redo, ("safe",)),
    (triton_head, "anchored_kernel", 4, a_row, ("anchored",)),
    (triton_head, "anchored_kernel", 10, first, ("anchored",)),
    (triton_head, "anchored_kernel", 11, first, ("anchored",)),
    (triton_head, "max_rows_kernel", 2, never_redo, ("anchored",)),
    (triton_head, "sum_rows_kernel", 3, first, ("anchored",)),
    (triton_head, "sum_rows_kernel", 4, first, ("anchored",)),
    (triton_head, "settle_rows_kernel", 2, first, ("safe", "anchored")),
    (triton_head, "settle_rows_kernel", 3, torch.Tensor.zero_, ("safe", "anchored")),
    (triton_head, "finish_rows_kernel", 4, first, ("safe", "anchored")),
    (triton_head, "finish_rows_kernel", 5, first, ("safe", "anchored")),
    (triton_head, "finish_rows_kernel", 6, first, ("safe", "anchored")),
    (triton_head, "finish_rows_kernel", 7, first, ("safe", "anchored")),
    (triton_head, "dlogits_rows_kernel", 0, a_row, ("safe",)),
    (triton_head, "dlogits_rows_kernel", 11, first, ("safe",)),
    (triton_head, "scale_rows_kernel", 4, a_row, ("safe",)),
    (triton_head, "finish_dx_kernel", 0, a_row, ("safe",)),
    (triton_policy, "policy_kernel", 8, first, ("safe",)),
    (triton_policy, "policy_kernel", 9, first, ("safe",)),
    (triton_policy, "policy_kernel", 10, first, ("safe",)),
    (triton_segments, "bounds_kernel", 2, torch.Tensor.zero_, ("safe",)),
    (triton_segments, "segment_sum_kernel", 3, first, ("safe",)),
]


def spoil(monkeypatch: pytest.MonkeyPatch, wrong: tuple[Any, ...]) -> None:
    module, name, place, how, _ = wrong
    monkeypatch.setattr(module, name, Spoiled(getattr(module, name), place, how))


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{w[1]}-{w[2]}" for w in WRONG])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, wrong: tuple[Any, ...]) -> None:
    spoil(monkeypatch, wrong)
    for design in wrong[4]:
        assert "off by" in selftest.run(CPU, design, BF16)
    for design in {"safe", "anchored"} - set(wrong[4]):
        if wrong[1] in ("exp_rows_kernel", "anchored_kernel", "max_rows_kernel"):
            assert selftest.run(CPU, design, BF16) == "", "a design that does not launch it"


def test_every_kernel_of_the_loss_has_been_wrong_once() -> None:
    launched = {
        (module, name)
        for module in (triton_head, triton_policy, triton_segments)
        for name in vars(module)
        if name.endswith("_kernel") and name != "segment_broadcast_kernel"
    }
    assert launched == {(wrong[0], wrong[1]) for wrong in WRONG}


def test_a_kernel_that_fails_is_off_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(x: Tensor) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    spoil(monkeypatch, (triton_head, "finish_dx_kernel", 0, fault, ()))
    assert "RuntimeError: an illegal memory access" in selftest.run(CPU, "safe", BF16)


def test_a_pass_is_remembered_and_asked_again_after_a_change(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selftest.failure(CPU, "safe", BF16) == ""
    (passed,) = [path for path in cache.rglob("*") if path.is_file()]
    assert passed.read_text() == selftest.PASSED and "safe-bfloat16" in str(passed)

    spoil(monkeypatch, WRONG[0])
    selftest.failure.cache_clear()
    assert selftest.failure(CPU, "safe", BF16) == "", "the next process takes it from the file"

    # Another version, and a file that says something else: both mean that nobody knows.
    selftest.failure.cache_clear()
    with monkeypatch.context() as other:
        other.setattr(triton, "__version__", "99.1")
        with pytest.warns(RuntimeWarning, match="safe Triton loss head is OFF"):
            assert "off by" in selftest.failure(CPU, "safe", BF16)
    for text in (b"", b"\xff\xfe", b"pass"):
        passed.write_bytes(text)
        selftest.failure.cache_clear()
        with pytest.warns(RuntimeWarning, match="OFF"):
            assert selftest.failure(CPU, "safe", BF16)


def test_a_failure_is_told_once_and_forgotten_with_the_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        spoil(broken, WRONG[0])
        with pytest.warns(RuntimeWarning) as told:
            first_answer = selftest.failure(CPU, "safe", BF16)
            assert selftest.failure(CPU, "safe", BF16) == first_answer
        (message,) = [str(each.message) for each in told]
        assert "the safe Triton loss head is OFF on cpu: its self-test failed with" in message
        assert "The slower reference takes its place; please report this." in message
        assert "off by" in message and "from the reference (bound" in message
    assert not [path for path in cache.rglob("*") if path.is_file()]
    selftest.failure.cache_clear()
    assert selftest.failure(CPU, "safe", BF16) == ""


def test_where_the_cache_cannot_be_written_the_test_runs_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    selftest.failure.cache_clear()
    assert selftest.failure(CPU, "safe", BF16) == ""
    spoil(monkeypatch, WRONG[0])
    selftest.failure.cache_clear()
    with pytest.warns(RuntimeWarning, match="OFF"):
        assert selftest.failure(CPU, "safe", BF16)
    selftest.failure.cache_clear()


def test_a_wrong_design_is_not_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.zeros(8, 16, dtype=BF16)
    spoil(monkeypatch, next(w for w in WRONG if w[1] == "anchored_kernel"))
    with pytest.warns(RuntimeWarning, match=r"anchored .* OFF .* The slower safe design takes"):
        assert choice._fastest(head, 128) == "safe"


def test_what_failed_is_not_available_on_its_gpu(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    on_this_cpu = selftest.failure
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda device, *which: on_this_cpu(CPU, *which))
    assert backends.implementation("auto", gpu, BF16) is triton_loss.measured

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    on_this_cpu.cache_clear()
    with monkeypatch.context() as broken:
        spoil(broken, next(w for w in WRONG if w[1] == "anchored_kernel"))
        assert backends.implementation("auto", gpu, BF16) is triton_loss.measured
        with (
            pytest.warns(RuntimeWarning, match="anchored Triton loss head is OFF"),
            pytest.raises(ValueError, match=r"impl: 'triton_anchored' is not .* self-test failed"),
        ):
            backends.implementation("triton_anchored", gpu, BF16)

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "third"))
    on_this_cpu.cache_clear()
    spoil(monkeypatch, WRONG[0])
    with pytest.warns(RuntimeWarning, match="safe Triton loss head is OFF"):
        assert backends.implementation("auto", gpu, BF16) is reference
    with pytest.raises(ValueError, match=r"impl: 'triton' is not available here: its self-test"):
        backends.implementation("triton", gpu, BF16)


@pytest.mark.parametrize("setting", ["autocast", "default dtype"])
def test_a_callers_settings_do_not_turn_it_off(setting: str) -> None:
    if setting == "autocast":
        with torch.autocast("cpu", dtype=BF16):
            assert selftest.run(CPU, "safe", torch.float32) == ""
        return
    torch.set_default_dtype(torch.float64)
    try:
        assert selftest.run(CPU, "safe", torch.float32) == ""
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_draws_no_number_of_the_callers() -> None:
    before = torch.get_rng_state()
    selftest.run(CPU, "safe", BF16)
    assert torch.equal(torch.get_rng_state(), before)
    assert "cpu/torch" in memory.device_key(CPU)
