"""The benchmarks' counts, checks and plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from turnfast.config.schema import ModelConfig
from turnfast.errors import ConfigError
from turnfast.model import hidden_states, load_policy
from turnfast.model.tiny import write_tiny_model
from turnfast.packing.pack import pack

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def by_path(monkeypatch):
    """Imports as `python bench/step.py` has them."""
    monkeypatch.syspath_prepend(BENCH)


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_commit_is_marked_if_files_outside_results_differ(tmp_path):
    from harness.provenance import commit

    assert commit(tmp_path) == "unknown"
    git(tmp_path, "init")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "bench" / "step.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (results / "step.json").write_text("{}")
    clean = commit(tmp_path / "bench")
    assert len(clean) >= 7 and not clean.endswith("+")
    (tmp_path / "new.py").write_text("")
    assert commit(tmp_path / "bench") == clean + "+"


def test_readmes_match_the_result_files():
    import readme

    for path in readme.READMES:
        text = path.read_text(encoding="utf-8")
        assert readme.filled(text, readme.RESULTS, readme.EXCEPTIONS) == text


def test_results_with_uncommitted_changes_are_rejected(tmp_path):
    import readme

    record = json.loads((readme.RESULTS / "linear_logprobs_cpu.json").read_text(encoding="utf-8"))
    record["environment"]["commit"] += "+"
    (tmp_path / "linear_logprobs_cpu.json").write_text(json.dumps(record))
    text = "<!-- linear_logprobs_cpu:begin -->\n<!-- linear_logprobs_cpu:end -->"
    with pytest.raises(
        SystemExit, match=r"linear_logprobs_cpu\.json: .*--unclean linear_logprobs_cpu"
    ):
        readme.filled(text, tmp_path, ())
    assert "+` (+: with uncommitted changes)" in readme.filled(
        text, tmp_path, {"linear_logprobs_cpu"}
    )


@pytest.mark.parametrize(
    ("pack_tokens", "share", "groups"), [(32_768, 0.6, 4), (4096, 0.3, 1), (5001, 0.8, 3)]
)
def test_synthetic_rollouts_have_the_requested_share(pack_tokens, share, groups):
    from harness.synthetic import rows_of, synthesize

    made = synthesize(pack_tokens=pack_tokens, share=share, groups=groups)
    packed = pack(made.groups, made.credits, budget=pack_tokens)
    assert packed.num_tokens == pack_tokens and len(packed.batches) == 1
    assert packed.shared_prefix.value == pytest.approx(share, abs=2e-3)
    rows = rows_of(made)
    assert sum(map(len, rows)) == packed.num_tokens_total and len(rows) == 8 * groups
    assert max(map(len, rows)) > min(map(len, rows))


def test_impossible_share_is_rejected():
    from harness.synthetic import synthesize

    with pytest.raises(SystemExit, match=r"--share 0\.875: must be above 0 and below 0\.875"):
        synthesize(pack_tokens=4096, share=0.875, groups=1)


@pytest.mark.parametrize(
    ("shape", "parameters"), [("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)]
)
def test_public_shapes_have_the_published_sizes(shape, parameters):
    from harness.shapes import architecture

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(shape))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_body_flops_match_the_flop_counter(tmp_path):
    from harness.flops import body_flops
    from harness.synthetic import synthesize

    write_tiny_model(tmp_path, ["a b c"], seed=0, layers=2, width=32)
    policy = load_policy(ModelConfig(), tmp_path, torch.device("cpu"))
    made = synthesize(pack_tokens=600, share=0.5, groups=1, vocab_size=250)
    packed = pack(made.groups, made.credits, budget=600)
    (batch,) = packed.batches
    with FlopCounterMode(display=False) as counter:
        hidden_states(policy, batch).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    # 2 layers, 4 heads, width 8; two products of 2 operations; forward once, backward twice
    pairs = sum(depth + 1 for depth in batch.positions_T.tolist())
    attention = 2 * 4 * 8 * pairs * 2 * 2 * 3
    assert body_flops(policy, packed) == products + attention


def test_pairs_counts_visible_query_key_pairs():
    from attention import _pairs

    depths = torch.tensor(
        [0, 1, 2, 3, 2, 3]
    )  # a path of four tokens, and a branch after the second
    for window in (0, 2):
        seen = sum(min(d + 1, window or 9) for d in depths.tolist())
        assert _pairs(depths, window) == seen


def test_cpu_clock_is_rejected_for_a_gpu():
    from harness.clocks import clock_of

    with pytest.raises(SystemExit, match="--clock cpu"):
        clock_of("cpu", torch.device("cuda"))


def test_step_fails_if_too_many_tokens_are_recomputed(tmp_path):
    words = "--rollouts one-search --budget 2048 --width 32 --layers 1 --repeats 1 --threads 1"
    command = [sys.executable, BENCH / "step.py", *words.split(), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "step.json"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("1.143 x the distinct tokens are computed, more than 1.05")
    case = json.loads((tmp_path / "step.json").read_text())["cases"]["one-search"]
    assert case["ways"]["trees"]["microbatches"] == 2
    assert case["ways"]["rows"]["gradient_error"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_public_shape_trains_with_random_weights(tmp_path, monkeypatch, dtype):
    import step
    from harness import cases, shapes

    small = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64}
    monkeypatch.setitem(shapes.SHAPES, "qwen2.5-7b", shapes.SHAPES["qwen2.5-7b"] | small)
    monkeypatch.setitem(shapes.SHAPES["qwen2.5-7b"], "num_attention_heads", 12)
    words = f"--shape qwen2.5-7b --layers 2 --pack-tokens 1024 --groups 2 --dtype {dtype}"
    options = step.parser().parse_args([*words.split(), "--checkpointing", "--device", "cpu"])
    bench = cases.Bench("synthetic", options, tmp_path)
    assert bench.policy.model.dtype == getattr(torch, dtype)
    packs = {way: bench.pack(way) for way in ("rows", "trees")}
    assert packs["trees"].num_tokens == 1024 and len(packs["rows"].batches) > 1
    errors = step.gradient_errors(bench, packs)
    assert errors["rows"] == 0 and 0 < errors["trees"] < step.GRADIENTS[bench.policy.model.dtype]
    before = bench.policy.head_VD.detach().clone()
    bench.model(packs["trees"])
    assert all(p.grad is None for p in bench.policy.model.parameters())
    bench.step("trees", bench.optimizer())
    assert dtype == "bfloat16" or not torch.equal(bench.policy.head_VD, before)


def write_evals(path: Path, values: dict[int, float]) -> Path:
    path.mkdir(parents=True)
    lines = [
        {"step": s, "eval/exact_match": v, "eval/tool_success": v / 2} for s, v in values.items()
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path / "metrics.jsonl"


def test_spread_uses_the_steps_that_all_seeds_have(tmp_path):
    from harness.plots import spread_over_seeds

    paths = [
        write_evals(tmp_path / "0", {0: 0.0, 20: 0.5, 40: 0.9}),
        write_evals(tmp_path / "1", {0: 0.2, 20: 0.1}),
    ]
    spread = spread_over_seeds("r", paths, "eval/exact_match")
    assert spread.steps == (0, 20)
    assert spread.mean == pytest.approx((0.1, 0.3))
    assert (spread.low, spread.high) == ((0.0, 0.1), (0.2, 0.5))


def test_runs_that_cannot_be_compared_are_rejected(tmp_path):
    from harness.plots import learning_plot

    whole = write_evals(tmp_path / "0", {0: 0.0})
    other = write_evals(tmp_path / "1", {5: 0.0})
    empty = write_evals(tmp_path / "2", {})
    with pytest.raises(ConfigError, match="mt_grpo: its runs have no common step"):
        learning_plot({"mt_grpo": [whole, other]}, tmp_path / "x.svg")
    with pytest.raises(ConfigError, match=r"2.metrics\.jsonl: has no eval/exact_match"):
        learning_plot({"mt_grpo": [whole, empty]}, tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()


def test_plot_is_reproducible(tmp_path):
    from harness.plots import learning_plot

    runs = {
        rule: [
            write_evals(
                tmp_path / rule / str(seed), {s: (s + seed) / 150 for s in range(0, 101, 20)}
            )
            for seed in range(3)
        ]
        for rule in ("grpo_or", "grpo_mr", "mt_grpo")
    }
    first = learning_plot(runs, tmp_path / "a.svg").read_bytes()
    assert learning_plot(runs, tmp_path / "plots" / "b.svg").read_bytes() == first
    assert b"<svg" in first
    png = learning_plot(runs, tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG")
