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
    """The model being trained, with its tokenizer and settings.

    Attributes:
        folder: source of the weights; the sampler reads config and tokenizer from it.
        attention, tree_attention: backends for packed rows and for prefix trees.
        softcap: soft-cap of the final logits (Gemma), or None.
        logit_scale: factor of the logits (Cohere, Granite), 1 in most models.
        body: the compiled model up to its last hidden states, None if it is not compiled.
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
        """The weight of the output projection; the embedding itself if the two are tied."""
        head = self.model.get_output_embeddings()
        assert head is not None  # see check_modules
        return head.weight

    def synchronize(self) -> None:
        """Wait until all queued work of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def hidden_states(policy: Policy, batch: Batch) -> Tensor:
    """Compute the last hidden states [T, D] of a batch; a token sees its row up to itself.

    They are multiplied by the logit scale, so their products with `head_VD` are the logits.
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
    """Context in which an embedding tied to the head has sparse gradients, if `wanted`.

    A dense gradient is another [V, D] tensor in every micro-batch. The optimizer's sum for the head
    must exist already, as a sparse gradient can only be added to a dense one. Compiled models are
    not changed: their gradient stays dense.
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
