"""Imports point one way, and the light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import turnfast.kernels

import turnfast

PACKAGE = Path(turnfast.__file__).parent
KERNELS = Path(turnfast.kernels.__file__).parent

# Every room on a lower line may import those above it, never those below.
LEVELS = [
    [
        "types",
        "config",
        "pairs",
        "recipe",
        "recipes",
        "signals",
        "jsonl",
        "randomness",
        "sandbox_init",
    ],
    ["kernels"],
    [
        "tools",
        "event_loop",
        "codec",
        "sinks",
        "tiny",
        "liger",
        "moments",
        "sandbox",
        "ranks",
        "rows",
        "stopwatch",
        "lora",
    ],
    ["judge"],
    [
        "credit",
        "dealing",
        "packing",
        "replay",
        "model",
        "optim",
        "envs",
        "chat",
        "checkpoint",
        "diagnosis",
        "token_figures",
        "metrics",
        "overlong",
        "report",
        "console",
    ],
    ["reference", "critic", "rendered", "demonstrations"],
    ["loss", "gradient", "sampler"],
    ["sft", "in_play", "play", "rollout", "sync"],
    ["prompts", "record"],
    ["run"],
    ["evaluate", "warm_start", "collect", "estimate", "preflight"],
    ["train"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {"kernels": sorted(KERNELS.rglob("*.py"))}
    for path in sorted(PACKAGE.rglob("*.py")):
        inner = path.relative_to(PACKAGE)
        room = inner.parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, []).append(path)
    return found


def imported(path: Path, room: str) -> set[str]:
    """Rooms of turnfast that a file imports anywhere, also inside functions."""
    base = KERNELS if room == "kernels" else PACKAGE
    where = ("turnfast", *(("kernels",) if room == "kernels" else ()))
    package = (*where, *path.relative_to(base).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            full = ".".join((*start, *([node.module] if node.module else [])))
            names |= {f"{full}.{alias.name}" for alias in node.names} | {full}
    parts = [name.split(".") for name in names if name.startswith("turnfast.")]
    return {part[1] for part in parts if part[1] in LEVEL or part[1] in rooms()} - {room}


def test_every_room_has_a_level():
    assert set(rooms()) - set(LEVEL) == set()


def test_arrows_point_one_way():
    wrong = [
        f"{room} ({path.name}) imports {other}"
        for room, paths in rooms().items()
        for path in paths
        for other in imported(path, room)
        if LEVEL[other] > LEVEL[room]
    ]
    assert not wrong


def test_no_cycles_within_a_level():
    graph = {
        room: {other for path in paths for other in imported(path, room)}
        for room, paths in rooms().items()
    }
    done: set[str] = set()
    while graph.keys() - done:
        free = {room for room in graph.keys() - done if graph[room] <= done}
        assert free, f"a cycle among {sorted(graph.keys() - done)}"
        done |= free


def test_light_imports_load_no_torch():
    code = (
        "import sys; import turnfast.cli, turnfast.config, turnfast.types, turnfast.credit;"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
