"""Recorded rollouts of one training step, and what the benchmarks on them share.

Groups of 8 in the built-in search world, system prompt with the tool description, played once
through the real rollout by a scripted agent that searches, rephrases, answers at once, or answers
wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from turnfast.chat import Chat
from turnfast.config import ModelConfig, RolloutConfig
from turnfast.credit import assign_credits
from turnfast.envs import load_env
from turnfast.model import Policy, load_policy
from turnfast.rollout import rollout
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.tiny import write_tiny_model
from turnfast.types import Credit, Group

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The rollouts of one step with their credit, and a model to train on them."""

    groups: list[Group]
    credits: list[Credit]
    policy: Policy

    @property
    def digest(self) -> str:
        turns = [
            (turn.prompt_ids, turn.sampled_ids)
            for group in self.groups
            for trajectory in group.trajectories
            for turn in trajectory.turns
        ]
        return hashlib.sha256(repr(turns).encode()).hexdigest()[:16]


def arguments(text: str, name: str, *, groups: int, repeats: int) -> argparse.ArgumentParser:
    """What the recording is of, and how a step on it is timed; results go to `name`."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--groups", type=int, default=groups)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--hops", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: shared machine")
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    return parser


def write(result: dict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def record(options: argparse.Namespace, folder: Path) -> Recording:
    """Play the groups of one step in the real environment, through the real rollout."""
    env = load_env("lookup", {"hops": options.hops, "prompt": "full"}, max_turns=options.hops + 2)
    write_tiny_model(
        folder,
        env.corpus(),  # type: ignore[attr-defined]
        seed=options.seed,
        layers=options.layers,
        width=options.width,
        max_context=2048,
    )
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    policy = load_policy(ModelConfig(), folder, torch.device(device))
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    groups = rollout(
        env.tasks("train")[: options.groups],
        env,
        chat,
        ScriptedSampler(_Agent(chat, options.seed)),
        RolloutConfig(group_size=options.group_size),
        max_turns=options.hops + 2,
        seed=options.seed,
    )
    return Recording(groups=groups, credits=assign_credits(groups, "mt_grpo"), policy=policy)


class _Agent:
    """Ids of a reply for ids of a context; the same context gets another reply each time."""

    def __init__(self, chat: Chat, seed: int) -> None:
        self._chat, self._seed = chat, seed
        self._asked: dict[tuple[int, ...], int] = {}

    def __call__(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        self._asked[prompt_ids] = self._asked.get(prompt_ids, 0) + 1
        draw = random.Random(f"{self._seed}:{self._asked[prompt_ids]}:{prompt_ids}")
        text = self._chat.text(prompt_ids)
        question = text.split("user\n")[1].split("?")[0].strip()
        _, _, result = text.rpartition("<result>")
        words = (result.partition("</result>")[0] or question).split()
        if len(words) < 3 or (not result and draw.random() < 0.85) or draw.random() < 0.3:
            wanted = draw.choice([question, " ".join(question.split()[2:]), " ".join(words[-2:])])
            if draw.random() < 0.5:
                wanted += " " + "".join(draw.choice("aeioulmnrst") for _ in range(12))
            call = {"name": "search", "args": {"query": wanted}}
            written = f"<tool>{json.dumps(call)}</tool>"
            return self._chat.encode_reply(written[: -8 if draw.random() < 0.05 else None])
        start = draw.randrange(len(words) - 1) if draw.random() < 0.3 else len(words) - 2
        return self._chat.encode_reply(f"<answer>{' '.join(words[start:]).strip('.')}</answer>")


def watch_memory(device: torch.device) -> Callable[[], float]:
    """A function that says how many MiB were held at most since, above what is held now; NaN where
    the system cannot tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed is not held
    before = _host_bytes("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return lambda: (_host_bytes("VmHWM") - before) / 2**20


def _host_bytes(name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1]) * 1024
    return float("nan")


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip()
