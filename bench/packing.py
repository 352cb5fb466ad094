"""Packing of rollouts into micro-batches on the host, compared with reading their data once.

    python bench/packing.py [--sizes 1000x1000,...] [--budget 16384] [--rounds 9]
                            [--threads 1] [--clock cpu] [--table FILE]

A size is trajectories x tokens. Groups of 8 trajectories share a third of their tokens, half of
which is a system prompt. First the number of tokens in one micro-batch is checked against a trie.
The floor is one conversion of the ids and log-probs of all turns to two arrays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from harness.timing import arguments, begin, finish, medians_s, sizes
from turnfast.kernels.packing.tree import prefix_tree

from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.types import Credit, Group, Status, Task, Trajectory, Turn

SIZES = "192x70,1000x1000"
GROUP_SIZE = 8
NUM_TURNS = 4
VOCAB = 150_000
FLOOR = "floor: ids and log-probs to arrays"


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--sizes", default=SIZES, help="trajectories x tokens, comma separated")
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch")
    options, device, clock = begin(parser)
    if device.type != "cpu":
        raise SystemExit("packing runs on the host; use --device cpu")
    rows: list[dict[str, Any]] = []
    for number, length in sizes(options.sizes):
        rows += bench_size(number, length, options.budget, options.rounds, clock)
    finish("packing", rows, options)


def bench_size(
    number: int, length: int, budget: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """The rows of one size."""
    groups, credits = made_step(number, length)
    turns = [turn for group in groups for t in group.trajectories for turn in t.turns]
    packed = partial(pack, groups, credits)
    whole = packed(budget=number * length)
    distinct = trie_size(groups)
    if not whole.num_tokens == whole.num_distinct == distinct:
        raise SystemExit(f"{whole.num_tokens} tokens packed, but {distinct} are distinct")
    no_sharing = PackOptions(share_prefixes=False)
    plain = packed(budget=number * length, options=no_sharing).batches[0]
    lengths = plain.cu_seqlens.diff().tolist()
    calls: dict[str, Callable[[], object]] = {
        "one micro-batch": partial(packed, budget=number * length),
        f"micro-batches of {budget:,}": partial(packed, budget=budget),
        "the same without sharing": partial(packed, budget=budget, options=no_sharing),
        "prefix tree alone": lambda: prefix_tree(plain.tokens_T, lengths),
        FLOOR: lambda: (
            np.fromiter(
                chain.from_iterable(chain(*((t.prompt_ids, t.sampled_ids) for t in turns))),
                np.int64,
            ),
            np.fromiter(chain.from_iterable(t.logprobs for t in turns), np.float32),
        ),
    }
    times = medians_s(calls, rounds, torch.device("cpu"), clock)
    return [
        {
            "trajectories": number,
            "tokens": sum(len(t.prompt_ids) + len(t.sampled_ids) for t in turns),
            "distinct": distinct,
            "what": name,
            "ms": seconds * 1e3,
            "x floor": seconds / times[FLOOR],
        }
        for name, seconds in times.items()
    ]


def made_step(number: int, length: int) -> tuple[list[Group], list[Credit]]:
    """Groups of random ids and their credit; about half of the unshared tokens are sampled."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(count))

    system, each = ids(length // 6), 2 * length // (3 * (2 * NUM_TURNS - 1))
    groups, credits = [], []
    for g in range(number // GROUP_SIZE):
        prompt = system + ids(length // 6)
        trajectories = []
        for i in range(GROUP_SIZE):
            turns = [
                Turn(
                    prompt_ids=prompt if k == 0 else ids(each),
                    sampled_ids=ids(each),
                    logprobs=tuple(-draw.random() for _ in range(each)),
                    text="",
                    finish="stop",
                )
                for k in range(NUM_TURNS)
            ]
            trajectories.append(
                Trajectory(task_id=str(g), index=i, turns=tuple(turns), status=Status.FINISHED)
            )
        groups.append(Group(task=Task(id=str(g), question=""), trajectories=tuple(trajectories)))
        advantages = tuple(tuple(draw.gauss(0, 1) for _ in t.turns) for t in trajectories)
        credits.append(Credit(rule="random", advantages=advantages))
    return groups, credits


def trie_size(groups: Sequence[Group]) -> int:
    """Number of distinct tokens of all contexts, counted with a trie."""
    children: dict[tuple[int, int], int] = {}
    for trajectory in (t for group in groups for t in group.trajectories):
        context = [i for turn in trajectory.turns for i in (*turn.prompt_ids, *turn.sampled_ids)]
        node = 0
        for token in context[:-1]:  # the last token predicts nothing
            node = children.setdefault((node, token), len(children) + 1)
    return len(children)


if __name__ == "__main__":
    main()
