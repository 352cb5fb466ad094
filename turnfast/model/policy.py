"""The model being trained, and its hidden states over a pack of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..kernels.attention import Backend, PackedRows, TreeBackend, TreeRows
from ..types import Batch
from .attention import packed_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The model being trained, with what the rest needs to know of it.

    Attributes:
        head_VD: the output projection; the same tensor as the embedding where the two are tied.
        attention, tree_attention: what attends over packed rows, and over prefix trees.
        softcap: the final logit soft-cap of models that have one (Gemma), else None.
        logit_scale: what the model multiplies its logits by (Cohere, Granite), 1 in most.
        body: the compiled model up to its last hidden state, None where it runs as it is.
        folder: where the weights came from; the sampler reads architecture and tokenizer there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    device: torch.device
    attention: Backend
    tree_attention: TreeBackend = "sdpa"
    softcap: float | None = None
    logit_scale: float = 1.0
    body: Callable[..., Any] | None = None

    @property
    def head_VD(self) -> Tensor:
        head = self.model.get_output_embeddings()
        assert head is not None  # a model without one is refused when it is loaded
        return head.weight

    def synchronize(self) -> None:
        """Wait for queued device work, so that a clock read after it is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def hidden_states(policy: Policy, batch: Batch) -> Tensor:
    """Last hidden states [T, D] of a pack; a token sees its own row up to itself, nothing else.

    They carry the model's logit scale: their products with `head_VD` are its logits.
    """
    rows = _attention_rows(policy, batch)
    body = policy.model.base_model if policy.body is None else policy.body
    with packed_forward():
        out = body(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            packed_rows=rows,
        )
    hidden_TD = out.last_hidden_state[0]
    return hidden_TD if policy.logit_scale == 1.0 else hidden_TD * policy.logit_scale


@contextmanager
def sparse_embedding(policy: Policy, *, wanted: bool) -> Iterator[None]:
    """An embedding that is the head, too, gives its gradient as the rows of its tokens within.

    A dense one would be a second [V, D] in every micro-batch. It needs a dense gradient to be added
    to, as the optimizer's sum for the head is. A compiled model gives it dense.
    """
    embedding = policy.model.get_input_embeddings()
    wanted = wanted and policy.body is None
    if not (wanted and isinstance(embedding, nn.Embedding) and embedding.weight is policy.head_VD):
        yield
        return
    before, embedding.sparse = embedding.sparse, True
    try:
        yield
    finally:
        embedding.sparse = before


def _attention_rows(policy: Policy, batch: Batch) -> PackedRows | TreeRows:
    if batch.ends_T is not None:
        return TreeRows(
            ends_T=batch.ends_T, positions_T=batch.positions_T, backend=policy.tree_attention
        )
    return PackedRows(
        cu_seqlens=batch.cu_seqlens,
        lengths=tuple((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()),
        backend=policy.attention,
        max_seqlen=batch.max_seqlen,
    )
