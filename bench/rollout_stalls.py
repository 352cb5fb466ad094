"""The cost of stalled tools: independent trajectories and lock step.

    python bench/rollout_stalls.py [--prompts 16] [--hops 3] [--share 0.05] [--stall 0.25]

A scripted agent plays rollouts of the built-in search world (groups of 8). It reasons, searches
once per hop and answers; the length of its reasoning has a long-tailed distribution. The engine is
simulated: every step takes the same time and gives each running request one token, like a decoding
step of a GPU. A share of the tool calls takes longer, by a share of the time that the same rollouts
take without stalls. Interleaved:

    independent   turnfast's rollout: while one trajectory waits for its tool, the others continue
    cut           the same with 25 % more prompts than needed; those still running are dropped
    lock step     all trajectories take a turn together and wait for the slowest tool

First the samples of both drivers are compared. Writes bench/results/rollout_stalls.json.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from harness.provenance import RESULTS, provenance, write
from transformers import AutoTokenizer

from turnfast.chat.template import Chat
from turnfast.config.schema import RolloutConfig
from turnfast.envs.lookup.env import LookupEnv
from turnfast.model.tiny import write_tiny_model
from turnfast.rollout.episode import derive_seed
from turnfast.rollout.groups import CollectedGroups, collect_groups
from turnfast.rollout.schedule import Prompt, Quota
from turnfast.rollout.setup import RolloutSetup
from turnfast.sampler import Completion, Request
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.tools import tool

GROUP_SIZE = 8
EXTRA = 0.25
THINKING = (2.5, 0.8, 80)
"""Words of reasoning: mean and standard deviation of their logarithm, and maximum."""


class StallingWorld(LookupEnv):
    """The built-in world; some searches take `stall_s` longer."""

    share = 0.0
    stall_s = 0.0
    round = 0

    def start_round(self, number: int, share: float) -> None:
        """Choose the stalling calls by round and query, independent of the order of calls."""
        self.round, self.share = number, share
        self.asked: Counter[str] = Counter()
        self.num_stalls = 0

    @tool
    def search(self, query: str) -> str:
        """Find the passage that matches a query best.

        Args:
            query: words to look for.
        """
        self.asked[query] += 1
        text = f"{self.round}:{self.asked[query]}:{query}"
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        if drawn < self.share:
            self.num_stalls += 1
            time.sleep(self.stall_s)
        return "\n".join(hit.text for hit in self.index.search(query, 1))


class Clock(ScriptedSampler):
    """A simulated engine: a step takes `step_s` and gives each running request one token."""

    def __init__(self, chat: Chat, env: StallingWorld, *, step_s: float, capacity: int) -> None:
        super().__init__(self._answer, pick=self._finished, capacity=capacity)
        self._chat = chat
        self._step_s = step_s
        self._hops = max(env.training.hops)
        self._described = env.describe().count("<result>")
        self._num_left: dict[int, int] = {}

    def _finished(self, waiting: Sequence[Request]) -> list[Request]:
        time.sleep(self._step_s)
        running = waiting[: self.capacity]
        for request in running:
            if request.id not in self._num_left:
                self._num_left[request.id] = len(self._answer(request))
            self._num_left[request.id] -= 1
        return [request for request in running if not self._num_left[request.id]]

    def _answer(self, request: Request) -> tuple[int, ...]:
        draw = random.Random(request.seed)
        mean, deviation, most = THINKING
        thoughts = " ".join(["ida"] * min(most, round(math.exp(draw.gauss(mean, deviation)))))
        text = self._chat.decode_turn(request.prompt_ids)
        question = text.split("user\n")[1].split("?")[0]
        answer = "<answer>Ida</answer>"
        if text.count("<result>") - self._described < self._hops:
            answer = f'<tool>{{"name": "search", "args": {{"query": "{question}"}}}}</tool>'
        return self._chat.encode_turn(f"<reasoning>{thoughts}</reasoning>{answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--hops", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.05, help="of the calls that stall")
    parser.add_argument("--stall", type=float, default=0.25, help="of the time without stalls")
    parser.add_argument("--step-ms", type=float, default=5.0, help="time of an engine step")
    parser.add_argument("--capacity", type=int, default=256, help="requests in a step")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    env = StallingWorld(hops=options.hops, prompt="full", reasoning=True)
    env.set_limits(max_turns=options.hops + 1, tool_timeout_s=60.0)
    env.start_round(0, share=0.0)
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), env.corpus(), seed=0, layers=1, width=32)
        chat = Chat(AutoTokenizer.from_pretrained(folder))
    bench = Bench(options, env, chat)
    independent, _ = bench.independent()
    locked, _ = bench.lock_step()
    if _samples(independent) != locked:
        raise SystemExit("the two drivers do not give the same samples")
    record = bench.measure()
    write(record, RESULTS / "rollout_stalls.json")
    for name, row in record["drivers"].items():
        print(f"{name:<12} {row['plain_s']:.2f} s  {row['stalled_s']:.2f} s  × {row['ratio']:.2f}")


class Bench:
    """The same prompts through every driver."""

    def __init__(self, options: argparse.Namespace, env: StallingWorld, chat: Chat) -> None:
        self._options = options
        self._env = env
        self._chat = chat
        self._config = RolloutConfig(group_size=GROUP_SIZE, max_new_tokens=512, max_context=4096)

    def measure(self) -> dict:
        options, env = self._options, self._env
        drivers = {
            "independent": self.independent,
            "cut": lambda: self.independent(math.ceil(EXTRA * options.prompts)),
            "lock step": self.lock_step,
        }
        env.start_round(0, share=0.0)
        usual_s = median(self.independent()[1] for _ in range(3))
        env.stall_s = options.stall * usual_s
        plain: dict[str, list[float]] = {name: [] for name in drivers}
        stalled: dict[str, list[float]] = {name: [] for name in drivers}
        stalls: list[int] = []
        for number in range(1, options.rounds + 1):
            for name, drive in drivers.items():
                for share, times in ((0.0, plain), (options.share, stalled)):
                    env.start_round(number, share)
                    times[name].append(drive()[1])
                if name == "independent":
                    stalls.append(env.num_stalls)
        return {
            **provenance(),
            "rollouts": options.prompts * GROUP_SIZE,
            "hops": options.hops,
            "step_ms": options.step_ms,
            "rounds": options.rounds,
            "share": options.share,
            "stall": options.stall,
            "stall_s": env.stall_s,
            "stalls": median(stalls),
            "drivers": {
                name: {
                    "plain_s": median(plain[name]),
                    "stalled_s": median(stalled[name]),
                    "ratio": median(stalled[name]) / median(plain[name]),
                    "against_independent": median(stalled[name]) / median(plain["independent"]),
                    "plain_each_s": plain[name],
                    "stalled_each_s": stalled[name],
                }
                for name in drivers
            },
        }

    def independent(self, extra: int = 0) -> tuple[CollectedGroups, float]:
        """Run turnfast's rollout; returns groups and seconds."""
        options = self._options
        prompts = [
            Prompt(place=i, task=task)
            for i, task in enumerate(self._env.tasks("train")[: options.prompts + extra])
        ]
        begin = time.perf_counter()
        setup = RolloutSetup(
            env=self._env,
            chat=self._chat,
            sampler=self._sampler(),
            config=self._config,
            max_turns=options.hops + 1,
            seed=0,
        )
        quota = Quota(wanted=options.prompts, ahead=extra, most=options.prompts + extra)
        gathered = collect_groups(setup, iter(prompts), quota)
        return gathered, time.perf_counter() - begin

    def lock_step(self) -> tuple[list, float]:
        """Run the same rollouts in lock step; returns samples and seconds."""
        begin = time.perf_counter()
        samples = asyncio.run(self._turns_together())
        return samples, time.perf_counter() - begin

    async def _turns_together(self) -> list:
        options, chat, sampler = self._options, self._chat, self._sampler()
        tasks = self._env.tasks("train")[: options.prompts]
        rollouts = [(place, task, i) for place, task in enumerate(tasks) for i in range(GROUP_SIZE)]
        seeds = [derive_seed(0, place, task.id, i) for place, task, i in rollouts]
        episodes = [self._env.episode(task) for _, task, _ in rollouts]
        conversations = [chat.open(messages) for messages in [await e.start() for e in episodes]]
        contexts: list[tuple[int, ...]] = [()] * len(rollouts)
        samples: list[list[tuple[int, ...]]] = [[] for _ in rollouts]
        active = list(range(len(rollouts)))
        for k in range(options.hops + 1):
            for i in active:
                contexts[i] += conversations[i].prompt_ids
                sampler.submit(
                    Request(
                        id=i,
                        prompt_ids=contexts[i],
                        max_new_tokens=self._config.max_new_tokens,
                        temperature=1.0,
                        seed=derive_seed(seeds[i], k),
                    )
                )
            done: dict[int, Completion] = {}
            while sampler.num_pending:
                done |= {completion.id: completion for completion in sampler.step()}
            texts = {i: chat.decode_turn(done[i].sampled_ids) for i in active}
            steps = await asyncio.gather(*(episodes[i].step(texts[i]) for i in active))
            for i, step in zip(list(active), steps, strict=True):
                samples[i].append(done[i].sampled_ids)
                contexts[i] += done[i].sampled_ids
                if step.done:
                    active.remove(i)
                else:
                    conversations[i] = chat.extend(conversations[i], texts[i], True, step.messages)
        await asyncio.gather(*(episode.finish() for episode in episodes))
        return samples

    def _sampler(self) -> Clock:
        options = self._options
        return Clock(self._chat, self._env, step_s=options.step_ms / 1e3, capacity=options.capacity)


def _samples(gathered: CollectedGroups) -> Sequence:
    return [
        [turn.sampled_ids for turn in trajectory.turns]
        for group in gathered.groups
        for trajectory in group.trajectories
    ]


if __name__ == "__main__":
    main()
