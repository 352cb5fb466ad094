"""Options of packing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """Weights of the targets, and how rows are laid out and distributed.

    Attributes:
        normalizer: the weight of a target. `token` is 1/N for the N targets of the step;
            `sequence` is 1/(S·n_s), the mean over S trajectories of their token means; `constant`
            is 1/(S·constant), which does not favour short answers (arXiv 2503.20783).
        constant: the most tokens that a trajectory can sample.
        share_prefixes: compute tokens that several rows begin with once.
        drop_idle: drop the tokens after the last turn with an advantage, and rows without one. The
            gradient is the same if the loss has no entropy or KL term and no sequence ratio; the
            log-probs of the dropped tokens are not computed.
        whole_trajectories: keep all rows of a trajectory in one micro-batch, for a loss over whole
            sequences.
        attention_span: the number of keys whose attention costs a token as much as everything else
            (`attention_span_of`); it moves the cuts between micro-batches, not the gradient.
    """

    normalizer: str = "token"
    constant: float = 1.0
    share_prefixes: bool = True
    drop_idle: bool = False
    whole_trajectories: bool = False
    attention_span: int = 4096


DEFAULT_OPTIONS = PackOptions()
