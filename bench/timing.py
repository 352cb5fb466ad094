"""What the kernel benchmarks share: interleaved medians, peak memory, the environment, the table.

Figures go to bench/results/ as JSON with device, versions and commit; a README's table is made from
that file (`--table FILE`), never by hand.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "verl", "cut-cross-entropy", "quack-kernels")
# Several times the L2 cache of any GPU of today.
FLUSH_BYTES = 256 << 20


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
    gc.collect()
    if device.type == "cuda":
        _settle(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _settle(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Freed heap goes back first, or it hides what the call takes. Linux: 5 resets the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit of a result."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("diff", "--stat") else ""),
        "load_average": Path("/proc/loadavg").read_text().split()[0],
    }


def arguments(text: str, rounds: int) -> argparse.ArgumentParser:
    """What every kernel benchmark is asked: where, how often, by which clock."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: shared machine")
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
    record = {
        "command": f"python bench/{name}.py {shlex.join(sys.argv[1:])}".strip(),
        "clock": options.clock,
        "environment": environment(torch.device(options.device)),
        "rows": rows,
    }
    print(table(record))
    print(save(f"{name}_{options.device}", record))


def save(name: str, record: dict[str, Any]) -> Path:
    """bench/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


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


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip()
