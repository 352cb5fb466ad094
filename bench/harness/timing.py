"""Shared by the kernel benchmarks: arguments, interleaved medians, peak memory, tables.

Results are written to bench/results/ as JSON with device, versions and commit; `--table FILE`
prints a result file as a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.clocks import CLOCKS
from harness.memory import watch_memory
from harness.provenance import RESULTS, provenance, write

# larger than the L2 cache of any GPU
FLUSH_BYTES = 256 << 20


def medians_s(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call. Rounds are interleaved, so drift affects all calls equally.

    On CUDA the L2 cache is overwritten before each call and CUDA events measure the time. On the
    CPU an untimed call precedes each timed one: a virtual machine may return freed pages to its
    host within seconds, and allocating them again would be timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, device=device).byte()
    for call in calls.values():
        call()
        _synchronize(device)
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) / 1e3)
            else:
                call()
                start = clock()
                call()
                times[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the call above the usage before it."""
    peak = watch_memory(device)
    call()
    _synchronize(device)
    return int(peak())


def arguments(text: str, rounds: int) -> argparse.ArgumentParser:
    """Options of every kernel benchmark: device, rounds, threads, clock."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: shared machine"
    )
    parser.add_argument("--table", type=Path, help="print a result file as a table and stop")
    return parser


def begin(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, torch.device, Callable[[], float]]:
    """Parse the options, device and clock; with --table print the file and exit."""
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        raise SystemExit
    torch.set_num_threads(options.threads)
    return options, torch.device(options.device), CLOCKS[options.clock]


def sizes(text: str) -> list[tuple[int, ...]]:
    """Parse a comma-separated list of sizes such as 512x896."""
    return [tuple(int(n) for n in one.split("x")) for one in text.split(",")]


def finish(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the rows as a table and write them to the result file."""
    record = {**provenance(options.device), "clock": options.clock, "rows": rows}
    print(table(record))
    print(write(record, RESULTS / f"{name}_{options.device}.json"))


def table(record: dict[str, Any]) -> str:
    """Format the rows of a record as a Markdown table with its environment above."""
    lines = [", ".join(f"{k} {v}" for k, v in record["environment"].items() if k != "packages")]
    rows = record["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.4g}"
    return str(value)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
