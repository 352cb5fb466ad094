"""The loss head on the CPU: the reference, and the C++ implementation where it is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import loss_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    Case,
    as_problem,
    assert_within_budget,
    every_impl,
    is_available,
    leaves,
    logprobs_of,
    loss_of,
    make_case,
    relative,
    run,
    select,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from turnfast.kernels import PolicyRule, linear_logprobs, turn_policy_loss
from turnfast.kernels.loss_head import backends, reference

CPU = torch.device("cpu")

cases = loss_cases.cases(N=[1, 2, 31, 63], V=[2, 37, 97, 128], D=[3, 16, 24], K=[1, 9, 30])


@every_impl
@given(case=cases, chunk=st.sampled_from([None, 1, 7, 64]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_option_is_within_the_error_budget(impl: str, case: Case, chunk: int | None) -> None:
    assert_within_budget(case, impl, chunk_tokens=chunk)


@every_impl
@pytest.mark.parametrize(
    ("N", "V", "D"),
    [(1, 1, 4), (1, 1500, 8), (63, 1, 8), (507, 1500, 32), (63, 50257, 8), (24, 151_936, 16)],
)
def test_shapes_that_break_kernels(impl: str, N: int, V: int, D: int) -> None:
    # One chunk: torch's own product over 151,936 terms is off by 1e-4 for fewer than four rows.
    case = make_case(1, N=N, V=V, D=D, rule=PolicyRule(ratio="turn"))
    assert_within_budget(case, impl, chunk_tokens=N)


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rule",
    [PolicyRule(), PolicyRule(ratio="sequence", entropy_coef=0.01), PolicyRule(kind="cispo")],
    ids=["token", "sequence-entropy", "cispo"],
)
def test_low_precision_is_within_the_error_budget(
    impl: str, dtype: torch.dtype, rule: PolicyRule
) -> None:
    case = make_case(2, N=257, V=1500, D=64, rule=rule, dtype=dtype)
    assert_within_budget(case, impl, chunk_tokens=100)


@every_impl
def test_log_probs_of_confident_tokens_keep_their_relative_precision(impl: str) -> None:
    gaps = torch.tensor([5.0, 10.0, 20.0, 40.0])
    hidden, rows = gaps[:, None], torch.arange(4)
    head = torch.tensor([[1.0], [0.0], [0.0]])
    targets = torch.zeros(4, dtype=torch.long)
    out = linear_logprobs(hidden, head, rows, targets, impl=impl)
    z = hidden.double() @ head.double().T
    true = -torch.log1p((z[:, 1:] - z[:, :1]).exp().sum(1))
    torch.testing.assert_close(out.logprobs.double(), true, rtol=3e-6, atol=0.0)


@every_impl
def test_sequences_may_have_any_ids(impl: str) -> None:
    case = make_case(23, N=60, rule=PolicyRule(ratio="sequence"))
    _, expected = run(case, impl)
    spread = dataclasses.replace(case, sequences=case.sequences * 10**15 + 2**62)
    assert len(case.sequences.unique()) > 1
    _, actual = run(spread, impl)
    assert relative(actual.d_hidden, expected.d_hidden) < 1e-6
    assert relative(actual.d_head, expected.d_head) < 1e-6


@every_impl
@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_any_split_into_micro_batches_gives_the_same_gradient(impl: str, ratio: str) -> None:
    rule = PolicyRule(ratio=ratio, kl_coef=0.04, entropy_coef=0.01)  # type: ignore[arg-type]
    case = make_case(7, N=120, K=20, rule=rule)
    _, whole = run(case, impl)
    segments = case.sequences[case.turns] if ratio == "sequence" else case.turns
    for cut in (15, 60, 110):
        first = segments < segments[cut]
        (_, a), (_, b) = (run(select(case, keep), impl) for keep in (first, ~first))
        assert relative(a.d_hidden + b.d_hidden, whole.d_hidden) < 1e-6
        assert relative(a.d_head + b.d_head, whole.d_head) < 1e-6
        torch.testing.assert_close(a.loss + b.loss, whole.loss, rtol=1e-5, atol=1e-7)


@every_impl
def test_values_of_unused_rows_and_masked_tokens_are_never_read(impl: str) -> None:
    case = make_case(9, normaliser="masked", rule=PolicyRule(kl_coef=0.1))
    clean, clean_answer = run(case, impl)
    masked = case.weights == 0
    assert case.old is not None and case.ref is not None
    unused = torch.ones(case.hidden.shape[0], dtype=torch.bool)
    unused[case.rows] = False
    with_nan = dataclasses.replace(
        case,
        hidden=case.hidden.masked_fill(unused[:, None], torch.nan),
        old=case.old.masked_fill(masked, -torch.inf),
        ref=case.ref.masked_fill(masked, torch.nan),
    )
    out, answer = run(with_nan, impl)
    assert bool(unused.any()) and bool(masked.any())
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(answer.d_hidden, clean_answer.d_hidden)
    assert not answer.d_hidden[unused].any()
    assert torch.equal(out.logprobs.isnan(), masked)


@every_impl
def test_several_targets_per_row_equal_copied_rows(impl: str) -> None:
    case = make_case(10, N=40)
    _, actual = run(case, impl)
    copied = dataclasses.replace(case, hidden=case.hidden[case.rows], rows=torch.arange(40))
    _, expected = run(copied, impl)
    d_hidden = torch.zeros_like(actual.d_hidden).index_add_(0, case.rows, expected.d_hidden)
    assert len(case.rows.unique()) < 40
    assert relative(actual.d_hidden, d_hidden) < 1e-6
    assert relative(actual.d_head, expected.d_head) < 1e-6


@every_impl
def test_statistics_of_a_known_example(impl: str) -> None:
    # Two equal logits: every log-prob is -log 2, so the old log-probs determine the ratios.
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 4.0, 1.0, 1.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 2.0])
    N = len(ratios)
    out = turn_policy_loss(
        torch.zeros(N, 3, requires_grad=True),
        torch.zeros(2, 3),
        torch.arange(N),
        torch.zeros(N, dtype=torch.long),
        torch.arange(N),
        advantages,
        -math.log(2) - ratios.log(),
        weights=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        rule=PolicyRule(dual_clip=3.0),
        impl=impl,
    )
    s = out.stats
    assert (int(s.tokens), int(s.skipped), int(s.masked)) == (5, 1, 1)
    # Clipped: 1.5 with A > 0, 0.5 with A < 0, and 4 > 3 with A < 0.
    assert float(s.clip_high) == pytest.approx(0.2)
    assert float(s.clip_low) == pytest.approx(0.2)
    assert float(s.clip_dual) == pytest.approx(0.2)
    assert float(s.ratio_min) == pytest.approx(0.5) and float(s.ratio_max) == pytest.approx(4.0)
    assert float(s.entropy) == pytest.approx(math.log(2))
    k3 = (1 / ratios - 1 + ratios.log())[:5].mean()
    assert float(s.kl) == pytest.approx(float(k3), rel=1e-5)
    assert float(out.loss.detach()) == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8 + 3.0)
    expected = torch.full((N,), -math.log(2))
    expected[5:] = 0.0
    torch.testing.assert_close(out.turn_logprobs, expected)


@every_impl
def test_the_worked_example_of_the_docstring(impl: str) -> None:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head = torch.randn(11, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows, targets = torch.tensor([0, 1, 4]), torch.tensor([5, 9, 7])
    turns, advantages = torch.tensor([0, 0, 1]), torch.tensor([1.0, -1.0])
    out = turn_policy_loss(hidden, head, rows, targets, turns, advantages, impl=impl)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(-1 / 3)
    assert hidden.grad is not None and head.grad is not None
    with torch.no_grad():
        updated = (hidden - 0.1 * hidden.grad, head - 0.1 * head.grad)
    after = linear_logprobs(*updated, rows, targets, impl=impl).logprobs - out.logprobs
    assert after[0] > 0 and after[1] > 0 and after[2] < 0


@every_impl
def test_only_inputs_that_require_a_gradient_get_one(impl: str) -> None:
    case = make_case(13)
    _, both = run(case, impl)
    for needs_hidden, needs_head in ((True, False), (False, True)):
        hidden = case.hidden.clone().requires_grad_(needs_hidden)
        head = case.head.clone().requires_grad_(needs_head)
        out = loss_of(case, impl, hidden, head)
        (2.5 * out.loss).backward(retain_graph=True)
        out.loss.backward()
        for leaf, expected, needed in (
            (hidden, both.d_hidden, needs_hidden),
            (head, both.d_head, needs_head),
        ):
            assert (leaf.grad is not None) == needed
            if leaf.grad is not None:
                assert relative(leaf.grad.double(), 3.5 * expected) < 1e-5
    with torch.no_grad():
        out = loss_of(case, impl, hidden, head)
    assert not out.loss.requires_grad


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_ever_exists() -> None:
    case = make_case(14, N=512, V=400, rule=PolicyRule(ratio="turn", entropy_coef=0.01))
    with Largest() as seen:
        reference.policy_loss(as_problem(case, chunk_tokens=32))
    assert 32 * 400 <= seen.elements <= 64 * 400 < 512 * 400


@pytest.mark.parametrize(
    ("needs", "products"),
    [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)],
)
@pytest.mark.parametrize("ratio", ["token", "turn"])
def test_only_tokens_with_a_signal_enter_the_products(
    ratio: str, needs: tuple[bool, bool], products: int
) -> None:
    rule = PolicyRule(ratio=ratio)  # type: ignore[arg-type]
    case = make_case(22, N=90, V=50, D=8, rule=rule, normaliser="masked")
    signal = (case.advantages != 0)[case.turns] & (case.weights != 0)
    wanted = as_problem(case, chunk_tokens=32, need_hidden=needs[0], need_head=needs[1])

    def in_place(_: object, a: list[int], b: list[int], **others: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    mapping = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = reference.policy_loss(wanted)
    assert out.d_head_VD.numel() == (50 * 8 if needs[1] else 0)
    assert 0 < int(signal.sum()) < 90
    assert counter.get_total_flops() == products * 2 * int(signal.sum()) * 50 * 8


@pytest.mark.parametrize("rule", [PolicyRule(), PolicyRule(ratio="turn", entropy_coef=0.1)])
def test_gradients_pass_gradcheck_in_float64(rule: PolicyRule) -> None:
    case = make_case(15, N=12, V=7, D=3, K=3, rule=rule, dtype=torch.float64, softcap=4.0)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return loss_of(case, "reference", hidden, head).loss

    assert torch.autograd.gradcheck(loss, leaves(case), eps=1e-6, atol=1e-6)


@every_impl
def test_a_compiled_caller_sees_one_graph(impl: str) -> None:
    case = make_case(17, N=30, rule=PolicyRule(ratio="turn", clip_high=0.28))

    def step(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = loss_of(case, impl, hidden * 1.5, head)
        alone = linear_logprobs(hidden, head, case.rows, case.targets, impl=impl).logprobs
        return out.loss * 2 + alone.sum(), out.turn_logprobs, out.stats.ratio_max

    results = []
    compiled = [
        torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for dynamic in (False, True)
    ]
    for call in (step, *compiled):
        hidden, head = leaves(case)
        loss, turn_logprobs, ratio_max = call(hidden, head)
        loss.backward()
        results.append((loss.detach(), turn_logprobs, ratio_max, hidden.grad, head.grad))
    for eager, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, eager)


@every_impl
def test_hidden_and_head_may_have_any_strides(impl: str) -> None:
    case = make_case(19, N=30)
    _, expected = run(case, impl)
    hidden = case.hidden.T.contiguous().T.requires_grad_()
    head = torch.cat([case.head, case.head], dim=1)[:, : case.head.shape[1]]
    for weight in (head.detach(), case.head.T.contiguous().T):
        hidden.grad = None
        weight = weight.requires_grad_()
        loss_of(case, impl, hidden, weight).loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        assert relative(hidden.grad.double(), expected.d_hidden) < 1e-6
        assert relative(weight.grad.double(), expected.d_head) < 1e-6


@every_impl
def test_autocast_changes_nothing(impl: str) -> None:
    case = make_case(20, N=40, rule=PolicyRule(ratio="turn", entropy_coef=0.01))
    _, expected = run(case, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, actual = run(case, impl)
        inside = logprobs_of(case, impl).logprobs
    outside = logprobs_of(case, impl).logprobs
    assert torch.equal(actual.d_head, expected.d_head)
    assert torch.equal(actual.d_hidden, expected.d_hidden)
    assert torch.equal(inside, outside)


def test_auto_selects_the_fastest_available_implementation() -> None:
    fastest = "cpp" if is_available("cpp") else "reference"
    selected = backends.implementation("auto", CPU, torch.float32)
    assert selected is backends.implementation(fastest, CPU, torch.float32)
    # Only the reference supports float64.
    assert backends.implementation("auto", CPU, torch.float64) is reference


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(4)}, r"hidden: expected \[T, D\]"),
    ({"hidden": torch.zeros(4, 3, dtype=torch.long)}, r"hidden: .* floating"),
    ({"head_weight": torch.zeros(5, 4)}, r"head_weight: expected shape \[5, 3\]"),
    ({"head_weight": torch.zeros(0, 3)}, r"head_weight: expected \[V, D\]"),
    ({"head_weight": torch.zeros(5, 3).half()}, r"head_weight: expected the dtype"),
    ({"head_weight": torch.zeros(5, 3, device="meta")}, r"head_weight: expected device"),
    ({"rows": torch.tensor([0, 1, 4])}, r"rows: expected 0 <= row < 4, got 4 at index 2"),
    ({"rows": torch.tensor([-1, 1, 2])}, r"rows: .* got -1 at index 0"),
    ({"rows": torch.zeros(3)}, r"rows: expected a dtype of int32, int64"),
    ({"rows": torch.zeros(3, dtype=torch.long, device="meta")}, r"rows: expected device"),
    ({"rows": torch.zeros(3, 1, dtype=torch.long)}, r"rows: expected shape \[N\]"),
    ({"targets": torch.tensor([0, 5, 1])}, r"targets: .* got 5 at index 1"),
    ({"targets": torch.tensor([0, 1])}, r"targets: expected shape \[3\]"),
    ({"targets": torch.tensor([0, 1, -1])}, r"targets: .* got -1 at index 2"),
    ({"targets": torch.zeros(3)}, r"targets: expected a dtype of int32, int64"),
    ({"turns": torch.tensor([0, 0])}, r"turns: expected shape \[3\]"),
    ({"turns": torch.zeros(3)}, r"turns: expected a dtype of int32, int64"),
    ({"turns": torch.tensor([-1, 0, 1])}, r"turns: .* got -1 at index 0"),
    ({"turns": torch.tensor([0, 1, 0])}, r"turns: .*contiguous.* got 0 at index 2"),
    ({"turns": torch.tensor([0, 1, 2])}, r"turns: expected 0 <= turn < 2, got 2"),
    ({"advantages": torch.tensor([[1.0]])}, r"advantages: expected shape \[K\]"),
    ({"advantages": torch.tensor([1.0, torch.nan])}, r"advantages: .* nan at index 1"),
    ({"old_logprobs": torch.tensor([0.0, -torch.inf, 0.0])}, r"old_logprobs: .* -inf at in"),
    ({"old_logprobs": torch.zeros(2)}, r"old_logprobs: expected shape \[3\]"),
    ({"old_logprobs": torch.zeros(3).long()}, r"old_logprobs: expected a dtype"),
    (
        {"sampler_logprobs": torch.tensor([0.0, torch.nan, 0.0]), "rule": PolicyRule(is_cap=2.0)},
        r"sampler_logprobs: .* nan at index 1",
    ),
    ({"advantages": torch.ones(2).long()}, r"advantages: expected a dtype"),
    ({"weights": torch.tensor([1.0, 1.0, torch.inf])}, r"weights: .* inf at index 2"),
    ({"weights": torch.ones(2)}, r"weights: expected shape \[3\]"),
    (
        {"sequences": torch.tensor([0, -1]), "rule": PolicyRule(ratio="sequence")},
        r"sequences: expected ids >= 0, got -1 at index 1",
    ),
    ({"ref_logprobs": torch.tensor([0.0, 0.0, torch.nan])}, r"ref_logprobs: .* index 2"),
    ({"weights": torch.tensor([1.0, -1.0, 1.0])}, r"weights: .* -1.0 at index 1"),
    ({"weights": torch.ones(3, dtype=torch.long)}, r"weights: expected a dtype"),
    ({"hidden": torch.full((4, 3), torch.nan)}, r"hidden: expected finite .* index 0"),
    ({"head_weight": torch.full((5, 3), torch.nan)}, r"head_weight: expected finite"),
    ({"temperature": 0.0}, r"temperature: expected a finite number > 0"),
    ({"temperature": math.nan}, r"temperature: expected"),
    ({"softcap": -1.0}, r"softcap: expected"),
    ({"chunk_tokens": 0}, r"chunk_tokens: expected"),
    ({"vocab_start": 3}, r"vocab_start: expected 0 without a process group"),
    ({"rule": PolicyRule(ratio="sequence")}, r"sequences: expected the sequence"),
    ({"sequences": torch.zeros(3, dtype=torch.long)}, r"sequences: expected shape"),
    ({"rule": PolicyRule(kl_coef=0.1)}, r"ref_logprobs: expected with kl_coef"),
    ({"rule": PolicyRule(is_cap=2.0)}, r"sampler_logprobs: expected with is_cap"),
    ({"sampler_logprobs": torch.zeros(3)}, r"sampler_logprobs: given, but"),
    ({"hidden": [[1.0]]}, r"hidden: expected a dense tensor, got list"),
    ({"hidden": torch.ones(4, 3).to_sparse()}, r"hidden: .* layout torch.sparse_coo"),
    ({"head_weight": None}, r"head_weight: expected a dense tensor, got NoneType"),
    ({"rows": [0, 1, 2]}, r"rows: expected a dense tensor, got list"),
    ({"targets": [0, 1, 4]}, r"targets: expected a dense tensor, got list"),
    ({"advantages": 1.0}, r"advantages: expected a dense tensor, got float"),
    ({"old_logprobs": [0.0] * 3}, r"old_logprobs: expected a dense tensor, got list"),
    ({"temperature": "1"}, r"temperature: expected a finite number > 0, got '1'"),
    ({"chunk_tokens": 1.5}, r"chunk_tokens: expected an integer >= 1 or None, got 1.5"),
    ({"vocab_start": "0"}, r"vocab_start: expected an integer, got '0'"),
    ({"group": "world"}, r"group: expected a process group or None, got str"),
    ({"rule": {"ratio": "turn"}}, r"rule: expected a PolicyRule, got dict"),
    ({"impl": None}, r"impl: expected a name, got None"),
    ({"impl": "fast"}, r"impl: expected one of auto, reference"),
    ({"impl": "triton"}, r"impl: 'triton' is not available here"),
    ({"impl": "triton_anchored"}, r"impl: 'triton_anchored' is not available here"),
]


@every_impl
@pytest.mark.parametrize(
    ("bad", "message"), BAD, ids=[f"{next(iter(bad))}-{i}" for i, (bad, _) in enumerate(BAD)]
)
def test_bad_input_is_rejected_by_name(impl: str, bad: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.ones(4, 3),
        "head_weight": torch.ones(5, 3),
        "rows": torch.tensor([0, 1, 2]),
        "targets": torch.tensor([0, 1, 4]),
        "turns": torch.tensor([0, 0, 1]),
        "advantages": torch.tensor([1.0, -1.0]),
        "impl": impl,
    }
    turn_policy_loss(**good)
    with pytest.raises(ValueError, match=message):
        turn_policy_loss(**{**good, **bad})


@every_impl
@pytest.mark.parametrize("name", ["hidden", "head_weight", "rows", "targets"])
def test_bad_input_of_log_probs_alone_is_rejected_by_name(impl: str, name: str) -> None:
    good = {"hidden": torch.ones(4, 3), "head_weight": torch.ones(5, 3)}
    good |= {"rows": torch.tensor([0, 1, 2]), "targets": torch.tensor([0, 1, 4])}
    linear_logprobs(**good, impl=impl)
    tried = 0
    for bad, message in BAD:
        if set(bad) == {name}:
            tried += 1
            with pytest.raises(ValueError, match=message):
                linear_logprobs(**good | bad, impl=impl)
    assert tried >= 3


@pytest.mark.parametrize(
    "bad",
    [
        {"clip_low": -0.1},
        {"clip_low": 1.5},
        {"clip_high": math.inf},
        {"ratio": "episode"},
        {"kind": "reinforce"},
        {"dual_clip": 1.0},
        {"dual_clip": 2.0, "kind": "cispo"},
        {"kl_coef": -1.0},
        {"entropy_coef": math.nan},
        {"is_cap": 0.0},
    ],
    ids=str,
)
def test_an_invalid_rule_is_rejected(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PolicyRule(**bad)
