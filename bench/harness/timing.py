"""What the kernel benchmarks share: arguments, interleaved medians, peak memory, the table.

Figures go to bench/results/ as JSON with device, versions and commit; a README's table is made from
that file (`--table FILE`), never by hand.
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

# Several times the L2 cache of any GPU of today.
FLUSH_BYTES = 256 << 20


def medians_s(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call, rounds interleaved so that drift hits every contender alike.

    On CUDA the L2 cache is overwritten before each call and the clock is the device's. On the CPU
    each timed call follows an untimed one of its own: a virtual machine may give freed pages back
    to its host within seconds, and getting them again would be charged to whoever allocates.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, device=device).byte()
    for call in calls.values():
        call()
        _settle(device)
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
    """The most memory that the call held above what was there before."""
    peak = watch_memory(device)
    call()
    _settle(device)
    return int(peak())


def arguments(text: str, rounds: int) -> argparse.ArgumentParser:
    """What every kernel benchmark is asked: where, how often, by which clock."""
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
    """The options, the device and the clock; --table prints its file, and that is all."""
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        raise SystemExit
    torch.set_num_threads(options.threads)
    return options, torch.device(options.device), CLOCKS[options.clock]


def sizes(text: str) -> list[tuple[int, ...]]:
    """Numbers with an x between them, from a list with commas."""
    return [tuple(int(n) for n in one.split("x")) for one in text.split(",")]


def finish(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the rows as a table and save them under the name and the device."""
    record = {**provenance(options.device), "clock": options.clock, "rows": rows}
    print(table(record))
    print(write(record, RESULTS / f"{name}_{options.device}.json"))


def table(record: dict[str, Any]) -> str:
    """The rows of a record as a Markdown table, with its environment above."""
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


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
