"""Synthetic rollouts of several turns with a given share of shared tokens, for timings."""

from __future__ import annotations

import random
from itertools import pairwise

from harness.recorded import Recording

from turnfast.types import Credit, Group, Status, Task, Trajectory, Turn


def synthesize(
    *,
    pack_tokens: int,
    share: float,
    groups: int,
    group_size: int = 8,
    vocab_size: int = 1 << 15,
    seed: int = 0,
) -> Recording:
    """Create groups with exactly `pack_tokens` distinct tokens in total.

    The rollouts of a group share only their prompt of P tokens. With D distinct tokens in a group
    of G rollouts, the share s of tokens that need not be computed is (G - 1)·P / (D + (G - 1)·P),
    hence P = D·s / ((1 - s)·(G - 1)). Two to four turns follow the prompt; half of their tokens are
    sampled, half are tool results. The longest rollouts have about four times as many tokens of
    their own as the shortest.

    Raises:
        SystemExit: the share is not possible with this group size.
    """
    most = (group_size - 1) / group_size
    draw = random.Random(seed)
    made, credits = [], []
    for number, distinct in enumerate(_cut(pack_tokens, [1.0] * groups)):
        prompt = round(distinct * share / ((1 - share) * (group_size - 1))) if share < most else 0
        # a rollout has at most four turns, each with at least one sampled and one given token
        if not 0 < prompt <= distinct - 8 * group_size:
            raise SystemExit(
                f"--share {share}: must be above 0 and below {most:.3f} for {group_size} rollouts "
                f"with {distinct} distinct tokens per group"
            )
        sizes = [draw.uniform(0.4, 1.6) for _ in range(group_size)]
        own = _cut(distinct - prompt - 8 * group_size, sizes)
        question = _ids(prompt, vocab_size, draw)
        # different first tokens, so that the rollouts share nothing but the prompt
        firsts = draw.sample(range(3, vocab_size), group_size)
        rollouts, advantages = [], []
        for index, (size, first) in enumerate(zip(own, firsts, strict=True)):
            turns = _turns(question, size + 8, first, vocab_size, draw)
            rollouts.append(
                Trajectory(task_id=str(number), index=index, turns=turns, status=Status.FINISHED)
            )
            advantages.append(tuple(draw.gauss(0.0, 1.0) for _ in turns))
        task = Task(id=str(number), question="")
        made.append(Group(task=task, trajectories=tuple(rollouts)))
        credits.append(Credit(rule="synthetic", advantages=tuple(advantages)))
    return Recording(groups=made, credits=credits)


def rows_of(recording: Recording) -> list[list[int]]:
    """The computed tokens of each rollout: all but the last, which predicts nothing."""
    return [
        [token for turn in rollout.turns for token in (*turn.prompt_ids, *turn.sampled_ids)][:-1]
        for group in recording.groups
        for rollout in group.trajectories
    ]


def _turns(
    prompt: tuple[int, ...], size: int, first: int, vocab_size: int, draw: random.Random
) -> tuple[Turn, ...]:
    """Turns with `size` computed tokens after the prompt, plus the last token."""
    count = draw.randint(2, 4)
    sizes = [1 + n for n in _cut(size - 2 * count + 1, [draw.uniform(0.5, 1.5)] * (2 * count - 1))]
    sampled, given = sizes[::2], [0, *sizes[1::2]]
    sampled[-1] += 1
    turns = []
    for k, (long, before) in enumerate(zip(sampled, given, strict=True)):
        ids = _ids(long, vocab_size, draw)
        turns.append(
            Turn(
                prompt_ids=_ids(before, vocab_size, draw) if k else prompt,
                sampled_ids=ids if k else (first, *ids[1:]),
                logprobs=(-1.0,) * long,
                text="",
                finish="stop",
            )
        )
    return tuple(turns)


def _cut(total: int, shares: list[float]) -> list[int]:
    """Integers in the proportions of `shares` that add up to `total`."""
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    places = [round(total * edge / edges[-1]) for edge in edges]
    return [end - begin for begin, end in pairwise(places)]


def _ids(count: int, vocab_size: int, draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randrange(3, vocab_size) for _ in range(count))
