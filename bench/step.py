"""A whole training step on recorded rollouts: what sharing prefixes and skipping idle tokens save.

    python bench/step.py [--groups 4] [--hops 1] [--width 128] [--layers 4] [--budget 16384]

Rollouts of the built-in search world (groups of 8, system prompt with the tool description) are
recorded once, with a scripted agent that searches, rephrases, answers at once, or answers wrongly.
Then the same step is packed and trained in several ways, interleaved, and timed:

    rows     packed rows without padding, every row computed whole
    trees    prefix trees: what rows begin with is computed once
    lean     prefix trees, without the ends of rows that have no advantage

First of all the gradients of all ways must be those of `rows`. `model` is forward and backward up
to the hidden states; `step` is packing, model, loss head and optimizer. Memory is what a process of
its own has at most, above what it has before its first step. Results go to bench/results/step.json.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from recorded import CLOCKS, Recording, arguments, commit, record, watch_memory, write
from torch import Tensor
from turnfast.kernels import turn_policy_loss

from turnfast.config import LossConfig, OptimConfig
from turnfast.loss import update
from turnfast.model import Policy, hidden_states
from turnfast.optim import Optimizer
from turnfast.packing import Packed, pack
from turnfast.types import Batch

WAYS = {
    "rows": {"share_prefixes": False},
    "trees": {"share_prefixes": True},
    "lean": {"share_prefixes": True, "drop_idle": True},
}
GRADIENT_BUDGET = 1e-5


def main() -> None:
    parser = arguments(__doc__, "step.json", groups=4, repeats=7)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        recording = record(options, Path(folder))
    if options.memory_of:
        print(_peak_memory(recording, options))
        return
    result = measure(recording, options)
    write(result, options.out)
    _show(result)


def pack_as(recording: Recording, way: str, options: argparse.Namespace) -> Packed:
    device = recording.policy.device
    return pack(
        recording.groups, recording.credits, budget=options.budget, device=device, **WAYS[way]
    )


def measure(recording: Recording, options: argparse.Namespace) -> dict:
    policy = recording.policy
    packs = {way: pack_as(recording, way, options) for way in WAYS}
    distinct = pack(recording.groups, recording.credits, budget=1 << 30).num_tokens
    differences = _gradient_differences(policy, packs)
    for way, difference in differences.items():
        if not difference < GRADIENT_BUDGET:
            raise SystemExit(f"{way}: gradients differ from those of rows by {difference:.2e}")
    optimizer = Optimizer(policy.model.parameters(), OptimConfig(lr=1e-6))
    seconds = partial(_seconds, policy, CLOCKS[options.clock])
    times: dict[str, dict[str, list[float]]] = {
        way: {"model": [], "step": [], "pack": []} for way in WAYS
    }
    for repeat in range(options.repeats + 1):
        for way in WAYS:
            model_s = seconds(lambda way=way: _model_only(policy, packs[way]))
            pack_s = seconds(lambda way=way: pack_as(recording, way, options))
            step_s = seconds(lambda way=way: _step(recording, way, optimizer, options))
            if repeat:  # the first round is for caches
                for name, value in (("model", model_s), ("pack", pack_s), ("step", step_s)):
                    times[way][name].append(value)
    peak = _gemm_flops(policy.device, CLOCKS[options.clock])
    ways = {}
    for way, packed in packs.items():
        medians = {f"{name}_s": median(values) for name, values in times[way].items()}
        flops = _flops(policy, packed)
        ways[way] = {
            **medians,
            "microbatches": len(packed.batches),
            "tokens_computed": packed.num_tokens,
            "targets": packed.num_targets,
            "padding": 0.0,
            "shared_prefix": packed.shared_prefix,
            "idle_tokens": packed.num_idle_tokens,
            "gradient_difference": differences[way],
            "effective_tokens_per_s": packs["rows"].num_tokens / medians["step_s"],
            "trained_targets_per_s": packs["rows"].num_targets / medians["step_s"],
            "model_flop_utilisation": flops / medians["model_s"] / peak,
            "model_speedup": median(times["rows"]["model"]) / medians["model_s"],
            "step_speedup": median(times["rows"]["step"]) / medians["step_s"],
            "peak_memory_mib": _memory_of(way),
        }
    ratio = packs["rows"].num_tokens / distinct
    return {
        "command": " ".join(["python bench/step.py", *sys.argv[1:]]),
        "device": platform.processor() or platform.machine()
        if policy.device.type == "cpu"
        else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "rollouts_sha256": recording.digest,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "gemm_peak_flops": peak,
        "rollouts": sum(len(group.trajectories) for group in recording.groups),
        "tokens_of_rows": packs["rows"].num_tokens,
        "tokens_distinct": distinct,
        "ratio": ratio,
        "padding_of_a_rectangle": _rectangle_padding(packs["rows"]),
        "computed_over_distinct": packs["trees"].num_tokens / distinct,
        "model_speedup_over_ratio": ways["trees"]["model_speedup"] / ratio,
        "ways": ways,
    }


def _model_only(policy: Policy, packed: Packed) -> None:
    policy.model.zero_grad()
    for batch in packed.batches:
        hidden = hidden_states(policy, batch)
        hidden[batch.rows_N].sum().backward()


def _step(recording: Recording, way: str, optimizer: Optimizer, options) -> None:
    packed = pack_as(recording, way, options)
    update(recording.policy, optimizer, packed.batches, LossConfig())


def _gradient_differences(policy: Policy, packs: dict[str, Packed]) -> dict[str, float]:
    gradients = {way: _gradient(policy, packed.batches) for way, packed in packs.items()}
    whole = gradients["rows"]
    return {way: float((gradient - whole).abs().max()) for way, gradient in gradients.items()}


def _gradient(policy: Policy, batches: tuple[Batch, ...]) -> Tensor:
    policy.model.zero_grad()
    for batch in batches:
        turn_policy_loss(
            hidden_states(policy, batch),
            policy.head_VD,
            batch.rows_N,
            batch.targets_N,
            batch.turns_N,
            batch.advantages_K,
            weights=batch.weights_N,
        ).loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def _seconds(policy: Policy, clock: Callable[[], float], function: Callable[[], object]) -> float:
    policy.synchronize()
    begin = clock()
    function()
    policy.synchronize()
    return clock() - begin


def _flops(policy: Policy, packed: Packed) -> float:
    """Of forward and backward, matrix products and attention, on the tokens that are computed."""
    config = policy.model.config
    matrices = sum(
        p.numel()
        for name, p in policy.model.named_parameters()
        if p.ndim == 2 and "embed" not in name
    )
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    keys = sum(float((batch.positions_T + 1).sum()) for batch in packed.batches)
    return 6.0 * matrices * packed.num_tokens + 12.0 * heads * keys


def _gemm_flops(device: torch.device, clock: Callable[[], float], size: int = 2048) -> float:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        begin = clock()
        (a @ b).sum().item()
        seconds.append(clock() - begin)
    return 2.0 * size**3 / min(seconds)


def _rectangle_padding(packed: Packed) -> float:
    """The share of padding, had the rows been padded to the longest of the step."""
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in packed.batches]).float()
    return float(1 - lengths.mean() / lengths.max())


def _memory_of(way: str) -> float:
    command = [sys.executable, *sys.argv, "--memory-of", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_memory(recording: Recording, options: argparse.Namespace) -> float:
    optimizer = Optimizer(recording.policy.model.parameters(), OptimConfig())
    _step(recording, options.memory_of, optimizer, options)  # the optimizer's own state is made
    peak = watch_memory(recording.policy.device)
    _step(recording, options.memory_of, optimizer, options)
    return peak()


def _show(result: dict) -> None:
    print(
        f"{result['rollouts']} rollouts, {result['tokens_of_rows']} tokens, "
        f"{result['tokens_distinct']} distinct (ratio {result['ratio']:.2f}); "
        f"computed / distinct {result['computed_over_distinct']:.3f}; "
        f"model speed-up / ratio {result['model_speedup_over_ratio']:.2f}; "
        f"a rectangle would have {result['padding_of_a_rectangle']:.0%} padding"
    )
    for way, row in result["ways"].items():
        print(
            f"{way:<6} {row['tokens_computed']:>7} tokens  model {row['model_s'] * 1e3:7.1f} ms "
            f"({row['model_speedup']:.2f}x)  step {row['step_s'] * 1e3:7.1f} ms "
            f"({row['step_speedup']:.2f}x)  pack {row['pack_s'] * 1e3:5.1f} ms  "
            f"{row['effective_tokens_per_s']:8.0f} tokens/s  "
            f"MFU {row['model_flop_utilisation']:.2f}  {row['peak_memory_mib']:6.0f} MiB  "
            f"gradients {row['gradient_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
