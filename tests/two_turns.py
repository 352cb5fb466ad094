"""Trajectories of two turns through any sampler, checked against plain forwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from turnfast.sampler import Completion, Request, Sampler

VOCAB = 600


SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.06,
    tie_word_embeddings=True,
)


def tiny_qwen3(seed: int = 0, **fields) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **fields}))


def train_one_step(model: Qwen3ForCausalLM, seed: int = 0, lr: float = 3e-4) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    ids = torch.randint(2, VOCAB, (4, 48), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


class WithOtherLoad:
    """A sampler whose `load_weights` is replaced."""

    def __init__(self, sampler: Sampler, load: Callable[[Iterable], None]) -> None:
        self._sampler = sampler
        self.load_weights = load

    def __getattr__(self, name: str):
        return getattr(self._sampler, name)


def without(sampler: Sampler, name: str) -> WithOtherLoad:
    """A sampler to which one tensor is never passed."""
    return WithOtherLoad(
        sampler, lambda named: sampler.load_weights((n, t) for n, t in named if n != name)
    )


def request(id: int, prompt_ids: Sequence[int], **changes) -> Request:
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1000 + id, **changes}
    return Request(id=id, prompt_ids=tuple(prompt_ids), **options)


def finish_all(sampler: Sampler) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while sampler.num_pending:
        done |= {completion.id: completion for completion in sampler.step()}
    return done


def sample(sampler: Sampler, *requests: Request) -> dict[int, Completion]:
    """The completions of these requests by id."""
    for each in requests:
        sampler.submit(each)
    return finish_all(sampler)


def gap_of(model: torch.nn.Module, sampler: Sampler, *requests: Request) -> float:
    """The worst gap over the samples of these requests."""
    done = sample(sampler, *requests)
    return worst_gap(model, {each.id: (each, done[each.id]) for each in requests})


def check_abort(sampler: Sampler) -> None:
    """Aborted requests do not change the samples of another one."""
    requests = [request(i, range(10 * i + 1, 10 * i + 51)) for i in range(3)]
    expected = sample(sampler, requests[1])[1]
    for each in requests:
        sampler.submit(each)
    sampler.step()
    sampler.abort([0, 2, 17])
    assert sampler.num_pending == 1
    done = finish_all(sampler)
    assert done.keys() == {1} and done[1].sampled_ids == expected.sampled_ids
    assert sampler.step() == []


def same_samples(one: dict, other: dict) -> bool:
    """Whether two results of `two_turns` have the same ids."""
    return all(one[key][1].sampled_ids == other[key][1].sampled_ids for key in one)


def two_turns(
    sampler: Sampler, order: Sequence[int]
) -> dict[tuple[int, int], tuple[Request, Completion]]:
    """24 trajectories, 4 per prompt; a second turn starts when its first one has finished."""
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


@torch.no_grad()
def forward_logprobs(
    model: torch.nn.Module, ids: Sequence[int], start: int, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of ids[start:] by one plain forward, float32 on the CPU."""
    ids_T = torch.tensor(ids, device=next(model.parameters()).device)
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    logprobs_TV = torch.log_softmax(logits_TV[start - 1 : -1] / temperature, dim=-1)
    return logprobs_TV.gather(1, ids_T[start:, None]).squeeze(1).cpu()


def worst_gap(model: torch.nn.Module, played) -> float:
    """Largest |log-prob of the sampler - log-prob of the forward| over all samples."""
    gap = 0.0
    for before, completion in played.values():
        ids = before.prompt_ids + completion.sampled_ids
        ours = forward_logprobs(model, ids, len(before.prompt_ids), before.temperature or 1.0)
        gap = max(gap, (ours - torch.tensor(completion.logprobs)).abs().max().item())
    return gap
