"""A whole training step: what sharing prefixes and skipping idle tokens save.

    python bench/step.py [--rollouts one-search,two-searches,many-groups,long-replies]
                         [--threads 1] [--clock cpu]
    python bench/step.py --device cuda --shape qwen2.5-1.5b|qwen2.5-7b [--pack-tokens 32768]
                         [--share 0.6] [--checkpointing] [--compile] [--optim-state bfloat16]

Rollouts of the built-in search world (groups of 8, system prompt with the tool description) are
recorded once with a scripted agent (see harness/recorded.py):

    one-search     3 groups, one micro-batch
    two-searches   questions of two hops; in one group no rollout answers, so its last turns have no
                   advantage
    many-groups    12 groups in micro-batches of 6,144 tokens: a cut repeats shared prefixes
    long-replies   the agent reasons for 300 tokens in every turn, different in every rollout
    synthetic      packs of --pack-tokens distinct tokens with a share --share of shared tokens;
                   used for every --shape except tiny

The same step is packed in several ways, and the timings are interleaved:

    rows     packed rows without padding
    trees    prefix trees: shared prefixes are computed once
    lean     prefix trees without idle tokens (ends of rows that have no advantage)

First the gradients are checked. The tiny model in float32 must be within 1e-5 of float64 (relative
to the largest entry); a public shape in bf16 is compared with its own `rows`. At most 1.05 x the
distinct tokens may be computed. Otherwise the script fails with the numbers. `model` is forward and
backward up to the hidden states; `step` is packing, model, loss head and optimizer. Utilisation is
relative to the peak of matrix products in the same run and counts distinct tokens, see
harness/flops.py. Memory is the peak of a step above the usage before it, on a CPU in a separate
process. Results go to bench/results/step.json, those of a public shape or a GPU to
step_<shape>_<device>.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness.cases import CASES, WAYS, Bench
from harness.flops import body_flops, gemm_peak, head_flops
from harness.memory import watch_memory
from harness.provenance import RESULTS, provenance, write
from harness.recorded import arguments, device_of
from harness.shapes import SHAPES
from harness.truth import gradient_error, gradient_of, step_of, truth_of
from torch import Tensor

from turnfast.packing.pack import Packed
from turnfast.update.optimizer import Optimizer

BUDGETS = (2048, 4096, 8192, 16_384)
TOKENS = 1.05  # most computed tokens per distinct token
SPEED = 0.85  # least model speed-up relative to all tokens / distinct tokens
UTILISATION = 0.45  # least share of the peak, for a public shape on a GPU
GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def parser() -> argparse.ArgumentParser:
    made = arguments(__doc__, "step.json", repeats=5)
    made.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    made.add_argument("--rollouts", help=f"comma-separated: {', '.join(CASES)}")
    made.add_argument("--budget", type=int, help="tokens of a micro-batch; default: the case's")
    made.add_argument("--pack-tokens", type=int, default=32_768, help="synthetic: distinct tokens")
    made.add_argument("--share", type=float, default=0.6, help="synthetic: share of shared tokens")
    made.add_argument("--groups", type=int, default=4, help="synthetic: groups in a pack")
    made.add_argument("--checkpointing", action="store_true")
    made.add_argument("--compile", action="store_true", help="use torch.compile")
    made.add_argument("--optim-state", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--memory-of", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    return made


def main() -> None:
    asked = parser()
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        name, way = options.memory_of
        with tempfile.TemporaryDirectory() as folder:
            print(peak_memory(Bench(name, options, Path(folder)), way))
        return
    tiny = options.shape == "tiny"
    wanted = options.rollouts or ("synthetic" if not tiny else ",".join(list(CASES)[:-1]))
    names = wanted.split(",")
    if unknown := [name for name in names if name not in CASES]:
        asked.error(f"--rollouts: {unknown[0]!r} is not one of {', '.join(CASES)}")
    device = device_of(options.device)
    elsewhere = not tiny or device.type == "cuda"
    if elsewhere and options.out == asked.get_default("out"):
        options.out = RESULTS / f"step_{options.shape}_{device.type}.json"
    cases: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, options, Path(folder))
            cases[name] = measure(bench)
        show(name, cases[name])
        policy = bench.policy
        result = {
            **provenance(device),
            "clock": options.clock,
            "shape": options.shape,
            "parameters": sum(p.numel() for p in policy.model.parameters()),
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "attention": {"rows": policy.attention, "trees": policy.tree_attention},
            "cases": cases,
        }
        write(result, options.out)  # keep finished cases if a later one fails
        del bench, policy
    if missed := [f"{name}: {gate}" for name in cases for gate in cases[name]["missed"]]:
        raise SystemExit("\n".join(missed))


def measure(bench: Bench) -> dict[str, Any]:
    policy, device = bench.policy, bench.device
    packs = {way: bench.pack(way) for way in WAYS}
    if not packs["lean"].num_idle_tokens:
        del packs["lean"]
    distinct = {way: bench.pack(way, budget=1 << 40) for way in packs if way != "rows"}
    distinct["rows"] = distinct["trees"]
    errors = gradient_errors(bench, packs)
    most = GRADIENTS[policy.model.dtype]
    if wrong := {way: error for way, error in errors.items() if not error < most}:
        raise SystemExit(f"{bench.name}: gradient errors above {most}: {wrong}")
    peak = gemm_peak(device, policy.model.dtype, bench.clock)
    optimizer = bench.optimizer()
    times = timed(bench, packs, optimizer)
    ways = {}
    for way, packed in packs.items():
        seconds = {f"{name}_s": median(values) for name, values in times[way].items()}
        body = body_flops(policy, distinct[way])
        whole = body + head_flops(policy, distinct[way])
        ways[way] = {
            **seconds,
            "microbatches": len(packed.batches),
            "tokens_computed": packed.num_tokens,
            "computed_over_distinct": packed.num_tokens / distinct[way].num_tokens,
            "targets": packed.num_targets,
            "shared_prefix": packed.shared_prefix.value,
            "idle_tokens": packed.num_idle_tokens,
            "gradient_error": errors[way],
            "trained_tokens_per_s": packed.num_tokens / seconds["step_s"],
            "effective_tokens_per_s": packs["rows"].num_tokens / seconds["step_s"],
            "trained_targets_per_s": packs["rows"].num_targets / seconds["step_s"],
            "model_flop_utilisation": body / seconds["model_s"] / peak,
            "step_flop_utilisation": whole / seconds["step_s"] / peak,
            "model_speedup": median(times["rows"]["model"]) / seconds["model_s"],
            "step_speedup": median(times["rows"]["step"]) / seconds["step_s"],
            "peak_memory_mib": memory_of(bench, way, optimizer),
        }
    ratio = packs["rows"].num_tokens / distinct["trees"].num_tokens
    computed = {way: row["computed_over_distinct"] for way, row in ways.items() if way != "rows"}
    turns = [t for g in bench.recording.groups for one in g.trajectories for t in one.turns]
    return {
        "rollouts": bench.recording.num_rollouts,
        "rollouts_sha256": bench.recording.digest,
        "sampled_per_turn": sum(len(turn.sampled_ids) for turn in turns) / len(turns),
        "budget": bench.budget,
        "gemm_peak_flops": peak,
        "tokens_of_rows": packs["rows"].num_tokens,
        "tokens_distinct": distinct["trees"].num_tokens,
        "ratio": ratio,
        "padding": 0.0,  # packed rows have none
        "padding_of_a_rectangle": rectangle_padding(packs["rows"]),
        "computed_over_distinct_by_budget": {
            budget: bench.pack("trees", budget=budget).num_tokens / distinct["trees"].num_tokens
            for budget in BUDGETS
            if budget >= packs["rows"].batches[0].max_seqlen
        },
        "gradient_against": "float64" if bench.tiny else "its own rows",
        "targets": targets(bench, ways["trees"], ratio),
        "missed": [
            f"{way}: {share:.3f} x the distinct tokens are computed, more than {TOKENS}"
            for way, share in computed.items()
            if not share <= TOKENS
        ],
        "ways": ways,
    }


def timed(
    bench: Bench, packs: dict[str, Packed], optimizer: Optimizer
) -> dict[str, dict[str, list[float]]]:
    """Seconds of model, packing and whole step for every way, interleaved."""
    times: dict[str, dict[str, list[float]]] = {
        way: {"model": [], "pack": [], "step": []} for way in packs
    }
    for repeat in range(bench.options.repeats + 1):
        for way in packs:
            calls: dict[str, Callable[[], object]] = {
                "model": partial(bench.model, packs[way]),
                "pack": partial(bench.pack, way),
                "step": partial(bench.step, way, optimizer),
            }
            for name, call in calls.items():
                seconds = bench.seconds(call)
                if repeat:  # the first round warms the caches
                    times[way][name].append(seconds)
    return times


def gradient_errors(bench: Bench, packs: dict[str, Packed]) -> dict[str, float]:
    """Gradient error of every way, relative to the largest entry of the reference."""
    true: list[Tensor] | None = truth_of(bench.policy, bench.recording)[0] if bench.tiny else None
    errors = {}
    for way, packed in packs.items():
        step_of(bench.policy, packed.batches)
        gradient = gradient_of(bench.policy.model)
        true = gradient if true is None else true
        errors[way] = gradient_error(gradient, true)
    bench.policy.model.zero_grad()
    return errors


def targets(bench: Bench, trees: dict[str, Any], ratio: float) -> dict[str, dict[str, Any]]:
    """The targets and whether they are met."""
    found = {f"model speed-up of trees over {ratio:.2f}": (trees["model_speedup"] / ratio, SPEED)}
    if bench.device.type == "cuda" and not bench.tiny:
        name = "model flop utilisation of trees, on distinct tokens"
        found[name] = (trees["model_flop_utilisation"], UTILISATION)
    return {
        name: {"found": value, "wanted": wanted, "met": value >= wanted}
        for name, (value, wanted) in found.items()
    }


def rectangle_padding(packed: Packed) -> float:
    """The share of padding if all rows were padded to the longest of the step."""
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in packed.batches]).float()
    return float(1 - lengths.mean() / lengths.max())


def memory_of(bench: Bench, way: str, optimizer: Optimizer) -> float:
    """Peak MiB of a step. On a CPU in a new process, since freed memory stays in the process."""
    if bench.device.type == "cuda":
        return peak_memory(bench, way, optimizer)
    command = [sys.executable, *sys.argv, "--memory-of", bench.name, way]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def peak_memory(bench: Bench, way: str, optimizer: Optimizer | None = None) -> float:
    optimizer = optimizer or bench.optimizer()
    bench.step(way, optimizer)  # creates the optimizer state
    peak = watch_memory(bench.device)
    bench.step(way, optimizer)
    return peak() / 2**20


def show(name: str, case: dict[str, Any]) -> None:
    print(
        f"{name}: {case['rollouts']} rollouts, {case['tokens_of_rows']:,} tokens, "
        f"{case['tokens_distinct']:,} distinct (ratio {case['ratio']:.2f}); "
        f"padded rows would have {case['padding_of_a_rectangle']:.0%} padding; "
        f"gradients against {case['gradient_against']}"
    )
    for way, row in case["ways"].items():
        print(
            f"  {way:<6} {row['tokens_computed']:>7} tokens, {row['computed_over_distinct']:.3f} x "
            f"distinct  model {row['model_s'] * 1e3:7.1f} ms ({row['model_speedup']:.2f}x)  "
            f"step {row['step_s'] * 1e3:7.1f} ms ({row['step_speedup']:.2f}x)  "
            f"pack {row['pack_s'] * 1e3:5.1f} ms  {row['effective_tokens_per_s']:8.0f} tokens/s  "
            f"MFU {row['model_flop_utilisation']:.2f}  {row['peak_memory_mib']:6.0f} MiB  "
            f"gradients {row['gradient_error']:.1e}"
        )
    for target, row in case["targets"].items():
        met = "met" if row["met"] else "not met"
        print(f"  {target}: {row['found']:.2f}, target {row['wanted']}: {met}", flush=True)


if __name__ == "__main__":
    main()
