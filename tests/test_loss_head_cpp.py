"""The C++ loss head: equal to the reference within its own error budget, on every instruction set.

Budget: err(cpp, float64) <= 2 err(reference in the same dtype, float64) + 1e-5; absolute for
log-probs, entropies and loss, relative to the norm for gradients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turnfast.kernels import PolicyRule, linear_logprobs, turn_policy_loss
from turnfast.kernels.extension import load_error
from turnfast.kernels.loss_head import cpp, reference
from turnfast.kernels.loss_head.problem import HeadInputs, Problem, Vocab, compute_dtype
from turnfast.kernels.loss_head.reference import ReferenceHead

needs_extension = pytest.mark.skipif(load_error() is not None, reason=f"no _C: {load_error()}")
KERNELS = torch.ops.turnfast.head_kernels() if load_error() is None else []
PAIRED = ("amx", "avx512_bf16")  # products of bf16, E among them
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
F32, BF16 = torch.float32, torch.bfloat16


def make_case(N, D, V, dtype, *, lengths=None, T=None, seed=0, shift=0.0, boost=None):
    """Inputs of turn_policy_loss. shift is added to all logits, boost to one that is no target."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    T = T or N + 2
    hidden, head = normal(T, D), normal(V, D) / D**0.5
    targets = torch.randint(0, V, (N,), generator=generator)
    if shift or boost:
        hidden[:, 0], head[:, 0] = 1.0, shift
    if boost:
        targets = targets.clamp(max=V - 2)
        head[V - 1, 0] += boost
    lengths = lengths or [4] * (N // 4) + [N % 4]
    turns = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return {
        "hidden": hidden.to(dtype),
        "head_weight": head.to(dtype),
        "rows": torch.randint(0, T, (N,), generator=generator),
        "targets": targets,
        "turns": turns,
        "advantages": normal(len(lengths)),
    }


def run(case, impl, dtype=None, **options):
    """Loss, log-probs, entropies, d_hidden, d_head in float64."""
    case = dict(case)
    for name in ("hidden", "head_weight"):
        case[name] = case[name].to(dtype or case[name].dtype).clone().requires_grad_()
    out = turn_policy_loss(**case, impl=impl, **options)
    out.loss.backward()
    parts = (out.loss.detach(), out.logprobs, out.entropies)
    parts += (case["hidden"].grad, case["head_weight"].grad)
    return tuple(part.double().nan_to_num(nan=7.0) for part in parts), out


def within_budget(case, *, slack=0.0, **options):
    truth, _ = run(case, "reference", torch.float64, **options)
    low, reference = run(case, "reference", **options)
    ours, out = run(case, "cpp", **options)
    for index, name in enumerate(("loss", "logprobs", "entropies", "d_hidden", "d_head")):
        if index < 3:
            err = [(x[index] - truth[index]).abs().max().item() for x in (ours, low)]
        else:
            size = truth[index].norm().item() or 1.0
            err = [(x[index] - truth[index]).norm().item() / size for x in (ours, low)]
        allowed = 2 * err[1] + 1e-5 + (slack if index >= 3 else 0.0)
        assert err[0] <= allowed, f"{name}: {err[0]:.2e}, reference {err[1]:.2e}"
    for field in ("tokens", "masked", "skipped"):
        assert getattr(out.stats, field) == getattr(reference.stats, field)
    for field in ("clip_low", "clip_high", "clip_dual", "kl", "ref_kl", "ratio_max", "entropy"):
        torch.testing.assert_close(
            getattr(out.stats, field), getattr(reference.stats, field), rtol=1e-3, atol=1e-4
        )


rules = st.builds(
    PolicyRule,
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.3]),
    ratio=st.sampled_from(["token", "turn", "sequence"]),
    kind=st.just("ppo"),
    dual_clip=st.sampled_from([None, 1.5]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.05, -0.1]),
    is_cap=st.sampled_from([None, 1.2]),
) | st.builds(
    PolicyRule,
    ratio=st.sampled_from(["token", "turn", "sequence"]),
    kind=st.just("cispo"),
    entropy_coef=st.sampled_from([0.0, 0.05]),
)


@needs_extension
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    rule=rules,
    dtype=st.sampled_from(DTYPES),
    D=st.integers(1, 70),
    V=st.integers(2, 400),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 40]), min_size=1, max_size=6).filter(any),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 4.0]),
    chunk=st.sampled_from([None, 7]),
    masked=st.booleans(),
    quiet=st.booleans(),
    shared_rows=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_option_within_the_budget(
    rule, dtype, D, V, lengths, temperature, softcap, chunk, masked, quiet, shared_rows, seed
):
    N = sum(lengths)
    case = make_case(N, D, V, dtype, lengths=lengths, T=3 if shared_rows else None, seed=seed)
    torch.manual_seed(seed)
    where = {k: case[k] for k in ("hidden", "head_weight", "rows", "targets")}
    known = linear_logprobs(
        **where, temperature=temperature, softcap=softcap, impl="reference"
    ).logprobs
    if quiet:
        case["advantages"][::2] = 0.0
    weights = torch.rand(N) / N
    if masked:
        weights[::3] = 0.0
    within_budget(
        case | {"old_logprobs": known + 0.2 * torch.randn(N)},
        rule=rule,
        weights=weights,
        ref_logprobs=known + 0.2 * torch.randn(N),
        sampler_logprobs=known + 0.1 * torch.randn(N) if rule.is_cap else None,
        sequences=torch.arange(len(lengths)) // 2,
        temperature=temperature,
        softcap=softcap,
        chunk_tokens=chunk,
    )


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("N", "V"), [(1, 1500), (63, 1500), (507, 1500), (63, 50257)])
def test_odd_shapes(N, V, dtype):
    within_budget(make_case(N, 33, V, dtype))


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", [PolicyRule(), PolicyRule(entropy_coef=0.1)])
def test_all_logits_far_below_zero(dtype, rule):
    within_budget(make_case(40, 32, 600, dtype, shift=-120.0), rule=rule)


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", [PolicyRule(), PolicyRule(entropy_coef=0.1)])
def test_one_logit_100_above_the_target(dtype, rule):
    # One element carries the whole row of dz, so nothing averages out its rounding to bf16.
    slack = 2**-9 if dtype == BF16 else 0.0
    within_budget(make_case(40, 32, 600, dtype, boost=100.0), rule=rule, slack=slack)


@needs_extension
def test_confident_tokens_keep_the_digits_of_one_minus_p():
    # d loss / d z_y is 1 - p_y = 1e-12: a softmax in float32 would round it to 0.
    head = torch.zeros(600, 32)
    head[5, 0] = 1.0
    hidden = torch.zeros(1, 32)
    hidden[0, 0] = torch.tensor(599e12).log()
    x = hidden.clone().requires_grad_()
    one = torch.zeros(1, dtype=torch.long)
    out = turn_policy_loss(x, head, one, one + 5, one, torch.ones(1), impl="cpp")
    out.loss.backward()
    assert x.grad[0, 0].item() == pytest.approx(-1e-12, rel=1e-4)


@needs_extension
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "D", "V", "softcap"), [(50, 37, 203, None), (97, 65, 1000, 3.0)])
def test_every_instruction_set(kernel, dtype, C, D, V, softcap):
    case = make_case(C, D, V, dtype)
    x, head, targets = case["hidden"][:C], case["head_weight"], case["targets"]
    g, h = case["advantages"].repeat(4)[:C], torch.full((C,), 0.1)
    results = []
    for weight, options in ((head, {"kernel": kernel}), (head, None), (head.double(), None)):
        kind = ReferenceHead if options is None else cpp.CppHead
        vocab = Vocab.of(weight, 0, "")
        wide = compute_dtype(weight.dtype)
        d_head = torch.zeros(weight.shape, dtype=wide)
        inputs = HeadInputs(
            head_VD=weight,
            vocab=vocab,
            temperature=0.9,
            softcap=softcap,
            need_hidden=True,
            d_head_VD=d_head,
        )
        one = kind(inputs, **(options or {}))
        forward = one.forward(x.to(weight.dtype), targets, keep=True)
        d_x = one.backward(g.to(wide), h.to(wide))
        plain = one.backward(g.to(wide), None) if kind is cpp.CppHead else None
        assert plain is None or plain.isfinite().all()
        results.append([part.double() for part in (*forward, d_x)])
    for ours, low, truth in zip(*results, strict=True):
        budget = 2 * (low - truth).norm() / truth.norm() + 1e-5
        # The reference keeps the gradient in float32 here; E in bf16 has 8 bits.
        budget += 2e-3 if kernel in PAIRED and dtype == BF16 else 0.0
        assert (ours - truth).norm() / truth.norm() <= budget


def as_problem(case, rule, chunk=None, softcap=None):
    hidden, head, N = case["hidden"], case["head_weight"], len(case["rows"])
    return Problem(
        hidden_TD=hidden,
        head_VD=head,
        vocab=Vocab.of(head, 0, ""),
        rows_N=case["rows"],
        targets_N=case["targets"],
        turns_N=case["turns"],
        sequences_K=None,
        advantages_K=case["advantages"].to(compute_dtype(hidden.dtype)),
        weights_N=torch.full((N,), 1.0 / N, dtype=compute_dtype(hidden.dtype)),
        old_N=None,
        ref_N=None,
        sampler_N=None,
        rule=rule,
        temperature=0.9,
        softcap=softcap,
        chunk_tokens=chunk,
        need_hidden=True,
        need_head=True,
    )


@needs_extension
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rule", [PolicyRule(), PolicyRule(ratio="turn", entropy_coef=0.1)])
def test_the_whole_call_on_every_instruction_set(kernel, dtype, softcap, rule):
    case = make_case(150, 37, 203, dtype, lengths=[1, 60, 9, 30, 50])
    problem = as_problem(case, rule, chunk=64, softcap=softcap)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    truth = reference.policy_loss(as_problem(wide, rule, chunk=64, softcap=softcap))
    low = reference.policy_loss(problem)
    found = torch.ops.turnfast.policy_loss(*cpp.flat_arguments(problem), kernel)
    for name, ours in zip(cpp.OUTCOME_FIELDS, found, strict=True):
        true, near = getattr(truth, name).double(), getattr(low, name).to(ours.dtype).double()
        budget = 2 * (near - true).norm() + 1e-5 * true.norm()
        # The reference keeps dz in float32 here; E in bf16 has 8 bits.
        if kernel in PAIRED and dtype == BF16 and name.startswith("d_"):
            budget += 2e-3 * true.norm()
        assert (ours.double() - true).norm() <= budget, name


@needs_extension
def test_a_bf16_gradient_over_many_chunks_is_rounded_once():
    case = make_case(600, 48, 300, BF16)
    rule = PolicyRule()
    truth = reference.policy_loss(as_problem(case, rule)).d_head_VD
    once = (truth.bfloat16().float() - truth).norm() / truth.norm()
    for chunk in (600, 50, 6):
        # The portable kernel: products in float32, so that only the sum is rounded.
        given = (*cpp.flat_arguments(as_problem(case, rule, chunk=chunk)), "portable")
        gradient = torch.ops.turnfast.policy_loss(*given)[-1]
        assert gradient.dtype == BF16
        # 100 sums rounded to bf16 each would be off by some 7 times as much; to 20 bits, a tenth.
        assert (gradient.float() - truth).norm() / truth.norm() <= 1.15 * once


@needs_extension
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logprobs_alone_on_every_instruction_set(kernel, softcap):
    case = make_case(150, 37, 203, BF16)
    given = (case["hidden"], case["head_weight"], case["rows"], case["targets"])
    wide = (given[0].double(), given[1].double(), *given[2:])
    true = linear_logprobs(*wide, impl="reference", temperature=0.7, softcap=softcap)
    for chunk in (0, 64):
        options = (0.7, softcap or 0.0, chunk, kernel)
        logprobs, entropies = torch.ops.turnfast.logprobs(*given, *options)
        torch.testing.assert_close(logprobs.double(), true.logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropies.double(), true.entropies, atol=1e-5, rtol=1e-5)
    assert torch.ops.turnfast.logprobs(*given[:3], given[3] + 203, *options) == []


@needs_extension
def test_what_is_not_plainly_right_is_left_to_python():
    case = make_case(8, 16, 100, F32, T=8)
    good = as_problem(case, PolicyRule())
    assert len(torch.ops.turnfast.policy_loss(*cpp.flat_arguments(good))) == len(cpp.OUTCOME_FIELDS)
    nan = torch.full((8,), torch.nan)
    for wrong in (
        {"turns_N": good.turns_N + 5},
        {"turns_N": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])},
        {"targets_N": good.targets_N - 200},
        {"rows_N": good.rows_N + 8},
        {"weights_N": -good.weights_N},
        {"old_N": nan},
        {"hidden_TD": good.hidden_TD * torch.inf},
    ):
        assert torch.ops.turnfast.policy_loss(*cpp.flat_arguments(replace(good, **wrong))) == []
    masked = replace(good, old_N=nan, weights_N=torch.zeros(8))
    assert torch.ops.turnfast.policy_loss(*cpp.flat_arguments(masked))[4][1] == 8


@needs_extension
@pytest.mark.parametrize("kernel", KERNELS)
def test_exp_is_within_its_stated_error(kernel):
    x = torch.linspace(-87, 88, 1_000_003)
    y = torch.ops.turnfast.exp_anchored(x, kernel).double()
    truth = x.double().exp()
    assert ((y - truth).abs() / truth).max() < 2e-7
    far, bad, one = torch.ops.turnfast.exp_anchored(torch.tensor([-1e4, torch.nan, 0.0]), kernel)
    assert 0 <= far < 2e-38 and bad.isnan() and one == 1.0


@needs_extension
@pytest.mark.parametrize("rule", [PolicyRule(), PolicyRule(ratio="turn", entropy_coef=0.1)])
def test_any_cut_into_chunks_gives_the_same_gradient(rule):
    case = make_case(150, 48, 700, F32, lengths=[1, 60, 9, 30, 50])
    whole, _ = run(case, "cpp", rule=rule)
    for chunk in (1, 7, 64):
        parts, _ = run(case, "cpp", rule=rule, chunk_tokens=chunk)
        for a, b in zip(parts, whole, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_call_twice_is_bitwise_equal(threads, dtype):
    case = make_case(200, 40, 900, dtype, T=20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, _ = run(case, "cpp")
        junk = torch.full((1 << 20,), torch.nan)  # what the allocator hands out next
        del junk
        second, _ = run(case, "cpp")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_extension
@pytest.mark.parametrize("frozen", ["head_weight", "hidden"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    case = make_case(60, 32, 500, F32)
    (_, _, _, d_hidden, d_head), _ = run(case, "cpp")
    for name in {"hidden", "head_weight"} - {frozen}:
        case[name].requires_grad_()
    turn_policy_loss(**case, impl="cpp").loss.backward()
    assert case[frozen].grad is None
    if frozen == "head_weight":
        assert torch.equal(case["hidden"].grad.double(), d_hidden)
    else:
        assert torch.equal(case["head_weight"].grad.double(), d_head)


@needs_extension
@pytest.mark.parametrize("silence", ["advantages", "weights", "no tokens"])
def test_nothing_to_train_gives_zero_loss_and_gradients(silence):
    case = make_case(0 if silence == "no tokens" else 8, 16, 100, F32, lengths=None)
    if silence == "advantages":
        case["advantages"].zero_()
    options = {"weights": torch.zeros(8)} if silence == "weights" else {}
    (loss, _, _, d_hidden, d_head), out = run(case, "cpp", **options)
    assert loss == 0 and not d_hidden.any() and not d_head.any()
    assert out.stats.tokens == 0 and out.stats.masked + out.stats.skipped == len(case["rows"])


@needs_extension
def test_values_that_are_not_finite_are_refused_with_their_index():
    case = make_case(8, 16, 100, F32, T=8)
    case["rows"] = torch.arange(8)
    bad = case | {"hidden": case["hidden"].clone()}
    bad["hidden"][3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"hidden: .* at index 3"):
        turn_policy_loss(**bad, impl="cpp")
    old = torch.zeros(8)
    old[5] = -torch.inf
    with pytest.raises(ValueError, match=r"old_logprobs: .* at index 5"):
        turn_policy_loss(**case, old_logprobs=old, impl="cpp")


@needs_extension
def test_rows_that_no_token_uses_may_hold_anything():
    case = make_case(8, 16, 100, F32, T=12)
    case["rows"] = torch.arange(8)
    clean, _ = run(case, "cpp")
    case["hidden"][8:] = torch.nan
    poisoned, _ = run(case, "cpp")
    assert all(torch.equal(a, b) for a, b in zip(clean[:3], poisoned[:3], strict=True))
    assert torch.equal(clean[4], poisoned[4])


@needs_extension
def test_linear_logprobs_equals_log_softmax():
    case = make_case(100, 32, 1000, F32)
    where = [case[k] for k in ("hidden", "head_weight", "rows", "targets")]
    out = linear_logprobs(*where, temperature=0.8, impl="cpp")
    hidden, head, rows, targets = where
    log_p = (hidden[rows].double() @ head.double().T / 0.8).log_softmax(-1)
    truth = log_p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.double(), truth, rtol=0, atol=1e-5)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(out.entropies.double(), entropy, rtol=0, atol=1e-5)


@needs_extension
def test_operators_pass_opcheck():
    case = make_case(20, 16, 90, F32)
    x, head, columns = case["hidden"][:20], case["head_weight"], case["targets"].int()
    anchors, ones = torch.zeros(20), torch.ones(20)
    exps = torch.empty(torch.ops.turnfast.head_exps_bytes(head, 20), dtype=torch.uint8)
    d_head = torch.zeros_like(head)
    ops = torch.ops.turnfast
    utils = ("test_schema", "test_faketensor")
    checks = [
        (ops.head_target_logits, (x, head, columns, 1.0, 0.0)),
        (ops.head_forward, (x, head, columns, anchors, 1.0, 0.0, None)),
        (ops.exp_anchored, (anchors,)),
    ]
    for op, args in checks:
        torch.library.opcheck(op.default, args, test_utils=utils)
    ops.head_forward(x, head, columns, anchors, 1.0, 0.0, exps)
    args = (x, head, anchors, 1.0, 0.0, exps, ones, None, None, d_head, True, True)
    torch.library.opcheck(ops.head_backward.default, args, test_utils=utils)
    args = (x, head, columns, ones, torch.zeros_like(x), d_head)
    torch.library.opcheck(ops.head_add_targets.default, args, test_utils=utils)


@needs_extension
def test_operators_refuse_what_they_would_misread():
    case = make_case(20, 16, 90, F32)
    x, head, columns = case["hidden"][:20], case["head_weight"], case["targets"].int()
    ops = torch.ops.turnfast
    with pytest.raises(ValueError, match=r"columns: .* got 90 at index 2"):
        ops.head_target_logits(x, head, columns.index_fill(0, torch.tensor([2]), 90), 1.0, 0.0)
    with pytest.raises(ValueError, match="exps: expected at least"):
        small = torch.empty(10, dtype=torch.uint8)
        ops.head_forward(x, head, columns, torch.zeros(20), 1.0, 0.0, small)
    with pytest.raises(ValueError, match="head_weight: expected a contiguous"):
        ops.head_target_logits(x, head.T, columns, 1.0, 0.0)
    with pytest.raises(ValueError, match="kernel: abacus"):
        ops.head_target_logits(x, head, columns, 1.0, 0.0, "abacus")


def test_without_the_extension_a_request_is_refused_and_auto_goes_on(monkeypatch):
    monkeypatch.setattr(cpp, "load_error", lambda: "not built")
    case = make_case(8, 16, 100, F32)
    with pytest.raises(ValueError, match=r"impl: 'cpp' is not available here: .*not built"):
        turn_policy_loss(**case, impl="cpp")
    auto, reference = run(case, "auto")[0], run(case, "reference")[0]
    assert all(torch.equal(a, b) for a, b in zip(auto, reference, strict=True))


@needs_extension
def test_float64_is_left_to_the_reference():
    case = make_case(8, 16, 100, torch.float64)
    with pytest.raises(ValueError, match=r"impl: 'cpp' is not available here: .*not float64"):
        turn_policy_loss(**case, impl="cpp")
