"""Put the figures of bench/results/ into README.md, between its markers.

    python bench/readme.py [--check]

Each block `<!-- name:begin --> … <!-- name:end -->` is made from bench/results/<name>.json by the
function of that name here; --check only says whether the README is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def starts(record: dict[str, Any]) -> str:
    rules = next(iter(record["starts"].values()))["rules"]
    rows = []
    for name, study in record["starts"].items():
        drawn = {what.removeprefix("sampled/"): share for what, share in study["start"].items()}
        portrait = (
            f"{drawn['calls']:.0%} | {drawn['calls_that_fail']:.0%} "
            f"| {drawn['exact_match_after_a_call']:.0%} | {drawn['exact_match_without_a_call']:.0%}"
        )
        reached = [
            f"{row['eval/tool_success']['mean']:.2f} / {row['eval/exact_match']['mean']:.2f} "
            f"/ {_steps(row['steps_to_80'])}"
            for row in study["rules"].values()
        ]
        rows.append(f"| {name} | {portrait} | {' | '.join(reached)} |")
    seeds = len(record["seeds"])
    return "\n".join(
        [
            "| start | calls | of them in vain | right after a call | right from memory | "
            + " | ".join(f"`{rule}`" for rule in rules)
            + " |",
            "|---" * (5 + len(rules)) + "|",
            *rows,
            "",
            "Left, what the start does in sampled rollouts; right, what each rule makes of it: "
            "tool success / exact match after "
            f"{next(iter(rules.values()))['steps']} steps, greedy and held out / the step at which "
            f"an evaluation first finds 0.8; {seeds} run{'s' * (seeds > 1)} each. "
            f"{_source(record)}",
            "",
            "![held-out exact match and tool success over the steps](bench/results/starts.svg)",
        ]
    )


def hops(record: dict[str, Any]) -> str:
    rows = [
        f"| `{rule}` | {_steps(row['steps_to_80'])} | {_spread(row['exact_match_over_run'])} "
        f"| {_spread(row['held_out/exact_match'])} | {_spread(row['eval/tool_success'])} "
        f"| {_spread(row['eval/turns'])} |"
        for rule, row in record["rules"].items()
    ]
    start = record["start"]
    run_s = fmean(row["seconds_per_step"] * row["steps"] for row in record["rules"].values())
    return "\n".join(
        [
            "| rule | steps until exact match is 0.8 | exact match over the run | at the end "
            "| tool success | turns used |",
            "|---|---|---|---|---|---|",
            f"| the common start | | | {start['eval/exact_match']:.2f} "
            f"| {start['eval/tool_success']:.2f} | {start['eval/turns']:.2f} |",
            *rows,
            "",
            f"{_seeds(record)}; the steps per seed, over the run the mean of all evaluations, at "
            f"the end {record['held_out_questions']} held-out questions. "
            f"The steps of a run take {run_s:.0f} s, two runs at a time. {_source(record)}",
            "",
            "![held-out exact match and tool success over the steps](bench/results/hops.svg)",
        ]
    )


def step(record: dict[str, Any]) -> str:
    names = {"rows": "rows, each whole", "trees": "prefix trees", "lean": "and no idle tokens"}
    rows = [
        f"| {names[way]} | {row['tokens_computed']:,} | {row['model_speedup']:.2f} × "
        f"| {row['step_speedup']:.2f} × | {row['peak_memory_mib']:.0f} MiB "
        f"| {row['gradient_difference']:.0e} |"
        for way, row in record["ways"].items()
    ]
    return "\n".join(
        [
            "| packing | tokens computed | model | whole step | peak memory | gradient error |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"{record['rollouts']} recorded rollouts in groups of 8, {record['tokens_of_rows']:,} "
            f"tokens of which {record['tokens_distinct']:,} are distinct; {record['threads']} "
            f"thread, {record['clock']} time. From `{record['command']}`, commit "
            f"`{record['commit']}`.",
        ]
    )


def trl_step(record: dict[str, Any]) -> str:
    best, seconds, errors = record["trl_setting"], record["seconds"], record["errors"]
    least = min(mib for side, mib in record["peak_memory_mib"].items() if side != "turnfast")
    sides = {
        f"TRL {record['versions']['trl']}": ("trl", best, best),
        "turnfast": ("turnfast", f"turnfast beside {best}", "turnfast"),
    }
    rows = [
        f"| {label} | {record['tokens_computed'][side]:,} | {seconds[timed]['step_s']:.2f} s "
        f"| {record['peak_memory_mib'][error]:.0f} MiB | {errors[error]['logprob']:.0e} "
        f"| {errors[error]['gradient']:.0e} |"
        for label, (side, timed, error) in sides.items()
    ]
    return "\n".join(
        [
            "| step | tokens computed | seconds | peak memory | log-prob error | gradient error |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"**{record['step_speedup']:.1f} ×**, interleaved on {record['threads']} thread, "
            f"{record['clock']} time. {record['rollouts']} recorded rollouts, "
            f"{record['tokens_of_rows']:,} tokens, {record['shared_tokens']:.0%} shared; "
            f"{record['parameters'] / 1e6:.1f} M parameters, float32; TRL in micro-batches of "
            f"{best.removeprefix('trl ')} rows, the fastest of those tried (row by row, slower, "
            f"it takes {least:.0f} MiB). Errors are against float64. "
            f"From `{record['command']}`, commit `{record['commit']}`.",
        ]
    )


def overhead(record: dict[str, Any]) -> str:
    names = {"local": "plain torch, the trainer's own module", "vllm": "vLLM, a copy in process"}
    lines = [
        "| sampler | a step | neither model, loss nor generation | tools, environment, chat, "
        "bookkeeping of the rollouts | weight sync | credit, packing, logs |",
        "|---|---|---|---|---|---|",
    ]
    for backend, each in record["backends"].items():
        shares = each["shares"]
        played = shares["rollout besides generation"] + shares["tools"]
        small = sum(shares[name] for name in ("score", "pack", "other", "log"))
        lines.append(
            f"| {names.get(backend, backend)} | {each['step_s']:.2f} s "
            f"| **{each['overhead']:.1%}** | {played:.1%} | {shares['sync']:.1%} | {small:.1%} |"
        )
    counts = next(iter(record["backends"].values()))
    lines += [
        "",
        f"{counts['rollouts']:.0f} rollouts a step, about {counts['tool_calls']:.0f} tool calls, "
        f"{counts['parameters'] / 1e6:.1f} M parameters. One thread, {record['clock']} time. "
        f"From `{record['command']}`, commit `{record['commit']}`.",
    ]
    return "\n".join(lines)


def rollout_stalls(record: dict[str, Any]) -> str:
    names = {
        "independent": "trajectories on their own",
        "cut": "and 25 % more prompts, the slowest dropped for the next step",
        "lock step": "lock step",
    }
    rows = [
        f"| {names[driver]} | {row['plain_s']:.1f} s | {row['stalled_s']:.1f} s "
        f"| {row['ratio']:.2f} × |"
        for driver, row in record["drivers"].items()
    ]
    return "\n".join(
        [
            "| rollouts | no stalls | with stalls | |",
            "|---|---|---|---|",
            *rows,
            "",
            f"{record['share']:.0%} of the tool calls take {record['stall_s']:.1f} s longer, a "
            f"quarter of the time of {record['rollouts']} rollouts of {record['hops']} searches "
            f"without stalls; an engine with steps of {record['step_ms']:g} ms, medians of "
            f"{record['rounds']} interleaved rounds. From `{record['command']}`, commit "
            f"`{record['environment']['commit']}`.",
        ]
    )


def credit_bias(record: dict[str, Any]) -> str:
    worlds = record["worlds"]
    rules = next(iter(worlds.values()))["rules"]
    titles = {
        "nothing to gain": "all lengths earn the same",
        "every turn costs": "every turn costs 0.1",
        "a late reward": "the second turn pays 1, later ones cost 0.1",
    }
    rows = [
        f"| `{rule}` | "
        + " | ".join(
            f"{row['turns']:.2f} ({row['least']:.2f}–{row['most']:.2f})"
            for row in (world["rules"][rule] for world in worlds.values())
        )
        + " |"
        for rule in rules
    ]
    right = [f"{world['best'] or record['start']:.2f}" for world in worlds.values()]
    return "\n".join(
        [
            f"| turns after training | {' | '.join(titles[world] for world in worlds)} |",
            "|---|" + "---|" * len(worlds),
            f"| right would be | {' | '.join(right)} |",
            *rows,
            "",
            f"A table of {record['longest'] - 1} logits, from {record['start']:.2f} turns at the "
            f"start; mean (least–most) over {record['seeds']} seeds after {record['steps']} steps. "
            f"From `{record['command']}`, commit `{record['commit']}`.",
            "",
            "![turns per rollout over the steps](bench/results/credit_bias.svg)",
        ]
    )


def loss_head_cpu(record: dict[str, Any]) -> str:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        threads = row.get("threads", record["environment"]["threads"])
        case = cases.setdefault((row["N"], row["D"], row["V"], row["dtype"], threads), {})
        case[row["what"]] = row
    lines, torch_ways = [], set[str]()
    for (N, D, V, dtype, threads), whats in cases.items():
        ours, floor = whats["turnfast cpp"], whats["floor: three products"]
        best = min((row for what, row in whats.items() if "torch" in what), key=lambda r: r["ms"])
        torch_ways |= {what.removeprefix("torch ") for what in whats if "torch" in what}
        liger = whats.get("liger chunked grpo")
        times = [ours["ms"], floor["ms"], best["ms"], liger and liger["ms"]]
        cells = [f"{ms:,.1f}" if ms else "–" for ms in times]
        cells[2] += f" ({best['what'].removeprefix('torch ')})"
        lines.append(
            f"| {N:,} × {D} × {V:,} | {dtype} | {threads} | {' | '.join(cells)} "
            f"| {ours['peak MB']:,.0f} / {best['peak MB']:,.0f} "
            f"| {ours['log-prob error']:.0e} / {best['log-prob error']:.0e} "
            f"| {ours['gradient error']:.0e} / {best['gradient error']:.0e} |"
        )
    env = record["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    return "\n".join(
        [
            "| N × D × V | dtype | threads | turnfast, ms | its three products alone "
            "| best of PyTorch | Liger chunked GRPO | peak MB | log-prob error | gradient error |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            "Forward and both gradients of a clipped policy loss; pairs are turnfast / the best of "
            f"PyTorch ({', '.join(sorted(torch_ways))}); errors are against float64. "
            f"{env['device']}, {record.get('clock', 'wall')} time, load average "
            f"{env['load_average']}, {packages}. "
            f"From `{record['command']}`, commit `{env['commit']}`.",
        ]
    )


def linear_logprobs_cpu(record: dict[str, Any]) -> str:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        case = cases.setdefault((row["N"], row["D"], row["V"], row["dtype"]), {})
        case[row["what"]] = row
    lines, speeds = [], []
    for (N, D, V, dtype), whats in cases.items():
        ours, floor = whats["turnfast cpp"], whats["floor: one product"]
        best = min((row for what, row in whats.items() if "torch" in what), key=lambda r: r["ms"])
        speeds.append(best["ms"] / ours["ms"])
        lines.append(
            f"| {N:,} × {D} × {V:,} | {dtype} | {ours['ms']:,.1f} | {floor['ms']:,.1f} "
            f"| {best['ms']:,.1f} ({best['what'].removeprefix('torch ')}) "
            f"| {ours['peak MB']:,.0f} / {best['peak MB']:,.0f} "
            f"| {ours['log-prob error']:.0e} / {best['log-prob error']:.0e} |"
        )
    return "\n".join(
        [
            "| N × D × V | dtype | log-probs alone, ms | the product alone | best of PyTorch "
            "| peak MB | error |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            "`linear_logprobs`, for the old policy and the reference model, is "
            f"{min(speeds):.2f} to {max(speeds):.2f} × as fast as the best of PyTorch (eager, "
            f"chunked, compiled). Pairs are turnfast / that best; errors are against float64. "
            f"{_where(record)}",
        ]
    )


def segments_cpu(record: dict[str, Any]) -> str:
    largest = max(row["N"] for row in record["rows"])
    rows = {row["what"]: row for row in record["rows"] if row["N"] == largest}
    sums, plain = rows["sum, turnfast reference"], rows["sum, torch index_add"]
    spread, indexed = rows["broadcast, turnfast reference"], rows["broadcast, torch indexing"]
    floor = rows["floor: a copy of 12 N bytes"]
    return (
        f"The sums of {sums['K']:,} turns over {largest:,} tokens take {sums['us'] / 1e3:,.1f} ms "
        f"with their checks (`index_add_` alone {plain['us'] / 1e3:,.1f}), the broadcast back "
        f"{spread['us'] / 1e3:,.1f} ms (indexing alone {indexed['us'] / 1e3:,.1f}); a copy of as "
        f"many bytes takes {floor['us'] / 1e3:,.1f} ms. {_where(record)}"
    )


def _where(record: dict[str, Any]) -> str:
    env = record["environment"]
    threads = f"{env['threads']} thread{'s' * (env['threads'] > 1)}"
    return (
        f"{env['device']}, {threads}, {record['clock']} time. From `{record['command']}`, commit "
        f"`{env['commit']}`."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "starts": starts,
    "hops": hops,
    "step": step,
    "credit_bias": credit_bias,
    "trl_step": trl_step,
    "loss_head_cpu": loss_head_cpu,
    "linear_logprobs_cpu": linear_logprobs_cpu,
    "segments_cpu": segments_cpu,
    "rollout_stalls": rollout_stalls,
    "overhead": overhead,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = before = readme.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        block = table(json.loads(path.read_text(encoding="utf-8")))
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, b=block, x=begin, y=end: f"{x}\n{b}\n{y}", text)
    if options.check:
        return int(text != before)
    readme.write_text(text, encoding="utf-8")
    return 0


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {figure['spread']:.2f}"


def _shares(shares: list[float]) -> str:
    return ", ".join(f"{share:.2f}" for share in shares)


def _seeds(record: dict[str, Any]) -> str:
    steps = next(iter(record["rules"].values()))["steps"]
    return (
        f"Mean ± standard deviation over {len(record['seeds'])} seeds after {steps} steps, "
        f"{record['machine']}"
    )


def _source(record: dict[str, Any]) -> str:
    return f"From `{record['command']}`, commit `{record['commit']}`."


def _steps(steps: list[int | None]) -> str:
    return ", ".join("—" if step is None else str(step) for step in steps)


if __name__ == "__main__":
    sys.exit(main())
