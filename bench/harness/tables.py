"""The tables of both READMEs. Each function has the name of its result file and block."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any


def starts(record: dict[str, Any]) -> str:
    rules = next(iter(record["starts"].values()))["rules"]
    rows = []
    for name, study in record["starts"].items():
        drawn = {what.removeprefix("sampled/"): share for what, share in study["start"].items()}
        start = (
            f"{drawn['calls']:.0%} | {drawn['calls_that_fail']:.0%} "
            f"| {drawn['exact_match_after_a_call']:.0%} | {drawn['exact_match_without_a_call']:.0%}"
        )
        reached = [
            f"{row['eval/tool_success']['mean']:.2f} / {row['eval/exact_match']['mean']:.2f} "
            f"/ {_steps(row['steps_to_80'])}"
            for row in study["rules"].values()
        ]
        rows.append(f"| {name} | {start} | {' | '.join(reached)} |")
    seeds = len(record["seeds"])
    return "\n".join(
        [
            "| start | calls | failed calls | right after a call | right from memory | "
            + " | ".join(f"`{rule}`" for rule in rules)
            + " |",
            "|---" * (5 + len(rules)) + "|",
            *rows,
            "",
            "Left, sampled rollouts of the start; right, for each rule tool success / exact match "
            f"after {next(iter(rules.values()))['steps']} steps (greedy, held-out questions) / the "
            "step of the first evaluation with an exact match of 0.8; "
            f"{seeds} run{'s' * (seeds > 1)} each. "
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
            f"{_seeds(record)}. Steps are given per seed; `over the run` is the mean of all "
            f"evaluations; `at the end` uses {record['held_out_questions']} held-out questions. "
            f"The steps of a run take {run_s:.0f} s, two runs at a time. {_source(record)}",
            "",
            "![held-out exact match and tool success over the steps](bench/results/hops.svg)",
        ]
    )


def step(record: dict[str, Any]) -> str:
    names = {"rows": "full rows", "trees": "prefix trees", "lean": "trees, no idle tokens"}
    rows = [
        f"| {name.replace('-', ' ')} | {names[way]} | {row['tokens_computed']:,} "
        f"| {row['model_speedup']:.2f} × | {row['step_speedup']:.2f} × "
        f"| {row['peak_memory_mib']:.0f} MiB | {row['gradient_error']:.0e} |"
        for name, case in record["cases"].items()
        for way, row in case["ways"].items()
    ]
    ratios = [
        f"{name.replace('-', ' ')} {case['ratio']:.2f} × (model {met} of that)"
        for name, case in record["cases"].items()
        for met in [f"{case['ways']['trees']['model_speedup'] / case['ratio']:.2f}"]
    ]
    most = max(case["ways"]["trees"]["computed_over_distinct"] for case in record["cases"].values())
    return "\n".join(
        [
            "| rollouts | packing | tokens computed | model | whole step | peak memory "
            "| gradient error |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Ratio of all tokens to distinct tokens: {', '.join(ratios)}; the target is 0.85 of "
            f"it. At most {most:.3f} × the distinct tokens are computed. "
            f"Errors are against float64. {record['parameters'] / 1e6:.1f} M parameters, "
            f"{record['dtype']}. {_where(record)}",
        ]
    )


def trl_step(record: dict[str, Any]) -> str:
    best, seconds, errors = record["trl_setting"], record["seconds"], record["errors"]
    sides = {
        f"TRL {_environment(record)['packages']['trl']}": ("trl", best, best),
        "turnfast": ("turnfast", f"turnfast beside {best}", "turnfast"),
    }
    rows = [
        f"| {label} | {record['tokens_computed'][side]:,} | {seconds[timed]['step_s']:.2f} s "
        f"| {record['peak_memory_mib'][error]:.0f} MiB | {errors[error]['logprob']:.0e} "
        f"| {errors[error]['gradient']:.0e} |"
        for label, (side, timed, error) in sides.items()
    ]
    others = [
        f"{side.removeprefix('trl ')} {seconds[side]['step_s']:.2f} s and {mib:.0f} MiB"
        for side, mib in record["peak_memory_mib"].items()
        if side not in (best, "turnfast")
    ]
    return "\n".join(
        [
            "| step | tokens computed | seconds | peak memory | log-prob error | gradient error |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"**{record['step_speedup']:.1f} ×**, interleaved; the target is 3. "
            f"{record['rollouts']} recorded rollouts, {record['tokens_of_rows']:,} tokens, "
            f"{record['shared_tokens']:.0%} shared; {record['parameters'] / 1e6:.1f} M parameters, "
            f"{record['dtype']}. TRL in micro-batches of {best.removeprefix('trl ')} rows, the "
            f"fastest of those tried (of {', of '.join(others)}). Errors are against float64. "
            f"{_where(record)}",
        ]
    )


def overhead(record: dict[str, Any]) -> str:
    names = {"local": "plain torch, sharing the trainer's module", "vllm": "vLLM in process"}
    lines = [
        "| sampler | seconds per step | neither model, loss nor generation | tools and rewards "
        "| chat and rollout scheduling | weight sync | credit, packing, logs |",
        "|---|---|---|---|---|---|---|",
    ]
    for backend, each in record["backends"].items():
        shares = each["shares"]
        env_share = shares["environment"] + shares["tools"]
        small = sum(shares[name] for name in ("score", "pack", "other", "log"))
        lines.append(
            f"| {names.get(backend, backend)} | {each['step_s']:.2f} s "
            f"| **{each['overhead']:.1%}** | {env_share:.1%} | {shares['rollout besides']:.1%} "
            f"| {shares['sync']:.1%} | {small:.1%} |"
        )
    counts = next(iter(record["backends"].values()))
    lines += [
        "",
        f"{counts['rollouts']:.0f} rollouts a step, about {counts['tool_calls']:.0f} tool calls, "
        f"{counts['parameters'] / 1e6:.1f} M parameters. One thread, {record['clock']} time. "
        f"{_source(record)}",
    ]
    return "\n".join(lines)


def rollout_stalls(record: dict[str, Any]) -> str:
    names = {
        "independent": "independent trajectories",
        "cut": "independent, 25 % more prompts, the slowest dropped",
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
            f"{record['rollouts']} rollouts of {record['hops']} searches. {record['share']:.0%} of "
            f"the tool calls take {record['stall_s']:.1f} s longer, a quarter of the time without "
            f"stalls. Engine steps of {record['step_ms']:g} ms; medians of {record['rounds']} "
            f"interleaved rounds. {_source(record)}",
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
            f"| optimum | {' | '.join(right)} |",
            *rows,
            "",
            f"A policy of {record['longest'] - 1} logits that starts at {record['start']:.2f} "
            f"turns; mean (minimum–maximum) over {record['seeds']} seeds after {record['steps']} "
            f"steps. {_source(record)}",
            "",
            "![turns per rollout over the steps](bench/results/credit_bias.svg)",
        ]
    )


def credit_direction(record: dict[str, Any]) -> str:
    cases = {name: case for name, case in record["cases"].items() if "rare" not in name}
    rules = next(iter(cases.values()))["rules"]
    sizes = next(iter(rules.values()))
    rows = []
    for rule in rules:
        cells = [
            f"{found['search_gradient']:+.3f} ({found['cosine']:.2f})"
            for case in cases.values()
            for size in sizes
            for found in [case["rules"][rule][size]["constant"]]
        ]
        rows.append(f"| `{rule}` | {' | '.join(cells)} |")
    titles = [
        f"{name} ({case['true_search_gradient']:+.3f}), {size} rollouts"
        for name, case in cases.items()
        for size in sizes
    ]
    return "\n".join(
        [
            f"| rule | {' | '.join(titles)} |",
            "|---|" + "---|" * len(titles),
            *rows,
            "",
            "Expected gradient of the search logit, and in parentheses the cosine between the "
            "expected gradient and the gradient of the expected return; in the title the true "
            "gradient of the search logit. Normalised by a constant. "
            f"Groups of 8 are sampled {record['samples']:,} times. {_source(record)}",
        ]
    )


def loss_head_cpu(record: dict[str, Any]) -> str:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        threads = row.get("threads", _environment(record)["threads"])
        case = cases.setdefault((row["N"], row["D"], row["V"], row["dtype"], threads), {})
        case[row["what"]] = row
    ways = {row["what"] for row in record["rows"]}
    torch_ways = {way.removeprefix("torch ") for way in ways if way.startswith("torch ")}
    peer = "best of PyTorch" if len(torch_ways) > 1 else f"PyTorch, {min(torch_ways)}"
    lines = []
    for (N, D, V, dtype, threads), whats in cases.items():
        ours, floor = whats["turnfast cpp"], whats["floor: three products"]
        best = min((row for what, row in whats.items() if "torch" in what), key=lambda r: r["ms"])
        liger = whats.get("liger chunked grpo")
        times = [ours["ms"], floor["ms"], best["ms"], liger and liger["ms"]]
        cells = [f"{ms:,.1f}" if ms else "–" for ms in times]
        if len(torch_ways) > 1:
            cells[2] += f" ({best['what'].removeprefix('torch ')})"
        lines.append(
            f"| {N:,} × {D} × {V:,} | {dtype} | {threads} | {' | '.join(cells)} "
            f"| {ours['peak MB']:,.0f} / {best['peak MB']:,.0f} "
            f"| {ours['log-prob error']:.0e} / {best['log-prob error']:.0e} "
            f"| {ours['gradient error']:.0e} / {best['gradient error']:.0e} |"
        )
    env = _environment(record)
    packages = ", ".join(
        f"{name} {env['packages'][name]}"
        for name in ("torch", "triton", "liger-kernel")
        if name in env["packages"]
    )
    return "\n".join(
        [
            "| N × D × V | dtype | threads | turnfast, ms | three matrix products alone "
            f"| {peer} | Liger chunked GRPO | peak MB | log-prob error | gradient error |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"Forward and both gradients of a clipped policy loss; pairs are turnfast / {peer}; "
            f"errors are against float64. {env['device']}, {record.get('clock', 'wall')} time, "
            f"load average {env['load_average']}, {packages}. {_source(record)}",
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
            "| N × D × V | dtype | log-probs, ms | one matrix product alone | best of PyTorch "
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


def commit_of(record: dict[str, Any]) -> str:
    """The commit of a measurement; it ends in + if there were uncommitted changes."""
    return _environment(record)["commit"]


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "starts": starts,
    "hops": hops,
    "step": step,
    "credit_bias": credit_bias,
    "credit_direction": credit_direction,
    "trl_step": trl_step,
    "loss_head_cpu": loss_head_cpu,
    "linear_logprobs_cpu": linear_logprobs_cpu,
    "rollout_stalls": rollout_stalls,
    "overhead": overhead,
    "overhead_wider": overhead,
}


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {figure['spread']:.2f}"


def _seeds(record: dict[str, Any]) -> str:
    steps = next(iter(record["rules"].values()))["steps"]
    return (
        f"Mean ± standard deviation over {len(record['seeds'])} seeds after {steps} steps, "
        f"{_machine(record)}"
    )


def _machine(record: dict[str, Any]) -> str:
    env = _environment(record)
    return env.get("machine") or f"{env['cores']} cores, {env['device']}"


def _environment(record: dict[str, Any]) -> dict[str, Any]:
    """The record of `provenance`, which some scripts write at the top level."""
    return record.get("environment", record)


def _where(record: dict[str, Any]) -> str:
    env = _environment(record)
    threads = f"{env['threads']} thread{'s' * (env['threads'] > 1)}"
    return f"{env['device']}, {threads}, {record['clock']} time. {_source(record)}"


def _source(record: dict[str, Any]) -> str:
    name = commit_of(record)
    changed = " (+: with uncommitted changes)" if name[-1:] == "+" else ""
    return f"From `{record['command']}`, commit `{name}`{changed}."


def _steps(steps: list[int | None]) -> str:
    return ", ".join("—" if step is None else str(step) for step in steps)
