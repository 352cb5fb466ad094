"""Recorded rollouts of one training step in the built-in search world.

A scripted agent plays groups of 8 through the real rollout code, with a system prompt that
describes the tool. It searches, rephrases its query, answers without a search, or gives a wrong
answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.clocks import CLOCKS
from harness.provenance import RESULTS
from transformers import AutoTokenizer

from turnfast.chat.template import Chat
from turnfast.config.schema import RolloutConfig
from turnfast.credit import assign_credits
from turnfast.envs import load_env
from turnfast.model.tiny import write_tiny_model
from turnfast.rollout.groups import rollout_tasks
from turnfast.rollout.setup import RolloutSetup
from turnfast.sampler import Request
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.types import Credit, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The rollouts of one step and their credit."""

    groups: list[Group]
    credits: list[Credit]

    @property
    def digest(self) -> str:
        turns = [
            (turn.prompt_ids, turn.sampled_ids)
            for group in self.groups
            for trajectory in group.trajectories
            for turn in trajectory.turns
        ]
        return hashlib.sha256(repr(turns).encode()).hexdigest()[:16]

    @property
    def num_rollouts(self) -> int:
        return sum(len(group.trajectories) for group in self.groups)


def arguments(text: str, name: str, *, repeats: int) -> argparse.ArgumentParser:
    """Options of the step benchmarks: model, device, repeats, clock and result file `name`."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of the tiny model")
    parser.add_argument("--layers", type=int, help="default 4 for the tiny model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    clocks = [name for name in CLOCKS if name != "thread"]
    parser.add_argument("--clock", choices=clocks, default="wall", help="cpu: shared machine")
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    return parser


def device_of(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise SystemExit("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def record(
    options: argparse.Namespace, folder: Path, *, groups: int, hops: int = 1, thoughts: int = 0
) -> Recording:
    """Play the groups of one step in the real environment, through the real rollout code.

    Args:
        folder: where the tiny model of `options` is written; its tokenizer encodes the recording.
        hops: searches that a question needs.
        thoughts: tokens of reasoning in every turn, before the call or answer.
    """
    env = load_env("lookup", {"hops": hops, "prompt": "full"}, max_turns=hops + 2)
    write_tiny_model(
        folder,
        env.corpus(),  # type: ignore[attr-defined]
        seed=options.seed,
        layers=options.layers or 4,
        width=options.width,
        max_context=8192,
    )
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    setup = RolloutSetup(
        env=env,
        chat=chat,
        sampler=ScriptedSampler(_Agent(chat, options.seed, thoughts)),
        config=RolloutConfig(group_size=options.group_size, max_new_tokens=1024, max_context=8192),
        max_turns=hops + 2,
        seed=options.seed,
    )
    played = rollout_tasks(setup, env.tasks("train")[:groups])
    return Recording(groups=played, credits=assign_credits(played, "mt_grpo"))


class _Agent:
    """Replies to requests; the same prompt gets another reply each time."""

    def __init__(self, chat: Chat, seed: int, thoughts: int) -> None:
        self._chat, self._seed, self._thoughts = chat, seed, thoughts
        self._asked: dict[tuple[int, ...], int] = {}

    def __call__(self, request: Request) -> tuple[int, ...]:
        prompt_ids = request.prompt_ids
        self._asked[prompt_ids] = self._asked.get(prompt_ids, 0) + 1
        draw = random.Random(f"{self._seed}:{self._asked[prompt_ids]}:{prompt_ids}")
        text = self._chat.decode_turn(prompt_ids)
        question = text.split("user\n")[1].split("?")[0].strip()
        _, _, result = text.rpartition("<result>")
        words = (result.partition("</result>")[0] or question).split()
        if len(words) < 3 or (not result and draw.random() < 0.85) or draw.random() < 0.3:
            wanted = draw.choice([question, " ".join(question.split()[2:]), " ".join(words[-2:])])
            if draw.random() < 0.5:
                wanted += " " + "".join(draw.choice("aeioulmnrst") for _ in range(12))
            call = {"name": "search", "args": {"query": wanted}}
            written = f"<tool>{json.dumps(call)}</tool>"
            written = written[: -8 if draw.random() < 0.05 else None]
        else:
            start = draw.randrange(len(words) - 1) if draw.random() < 0.3 else len(words) - 2
            written = f"<answer>{' '.join(words[start:]).strip('.')}</answer>"
        return self._chat.encode_turn(self._reasoning(text.split(), draw) + written)

    def _reasoning(self, known: list[str], draw: random.Random) -> str:
        """About `thoughts` tokens of words from the context."""
        said: list[str] = []
        while len(self._chat.encode_turn(" ".join(said))) < self._thoughts:
            said += [draw.choice(known).strip("<>/") for _ in range(8)]
        return f"<reasoning>{' '.join(said)}</reasoning>" if said else ""
