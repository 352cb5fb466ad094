"""Trajectories of two turns through any sampler, for the tests of each."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from turnfast.sampler import Completion, Request, Sampler
from turnfast.sampler.sync import teacher_forced_logprobs

VOCAB = 600


def tiny_qwen3(head_dim: int, **fields) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True,
        **fields,
    )
    return Qwen3ForCausalLM(config)


def request(id: int, prompt_ids: Sequence[int], **changes) -> Request:
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1000 + id, **changes}
    return Request(id=id, prompt_ids=tuple(prompt_ids), **options)


def finish_all(sampler: Sampler) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while sampler.num_pending:
        done |= {completion.id: completion for completion in sampler.step()}
    return done


def two_turns(
    sampler: Sampler, order: Sequence[int]
) -> dict[tuple[int, int], tuple[Request, Completion]]:
    """24 trajectories, 4 to a prompt; a second turn starts as soon as its first one has ended."""
    rng = random.Random(7)
    system = [rng.randrange(2, VOCAB) for _ in range(40)]
    prompts = [
        system + [rng.randrange(2, VOCAB) for _ in range(rng.randrange(60))] for _ in "abcdef"
    ]
    replies = [[rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 30))] for _ in range(24)]
    lengths = [rng.randrange(3, 25) for _ in range(24)]
    requests = {(i, 0): request(2 * i, prompts[i // 4], max_new_tokens=lengths[i]) for i in order}
    for first in requests.values():
        sampler.submit(first)
    played = {}
    while sampler.num_pending:
        for completion in sampler.step():
            i, turn = divmod(completion.id, 2)
            before = requests[i, turn]
            played[i, turn] = (before, completion)
            if turn == 0:
                context = (*before.prompt_ids, *completion.sampled_ids, *replies[i])
                requests[i, 1] = request(2 * i + 1, context, max_new_tokens=lengths[-1 - i])
                sampler.submit(requests[i, 1])
    assert len(played) == 48
    return played


def worst_gap(model: torch.nn.Module, played) -> float:
    """Largest |log-prob of the sampler - that of the model's plain forward| over all samples."""
    gap = 0.0
    for before, completion in played.values():
        ids = before.prompt_ids + completion.sampled_ids
        ours = teacher_forced_logprobs(
            model, ids, len(before.prompt_ids), before.temperature or 1.0
        )
        gap = max(gap, (ours.cpu() - torch.tensor(completion.logprobs)).abs().max().item())
    return gap
