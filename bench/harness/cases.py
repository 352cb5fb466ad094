"""The training steps that are timed: rollouts, model and packing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.clocks import clock_of
from harness.recorded import Recording, device_of, record
from harness.shapes import SHAPES, load
from harness.synthetic import synthesize

from turnfast.config.schema import LossConfig, ModelConfig, OptimConfig
from turnfast.model import hidden_states
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import Packed, pack
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import update

WAYS: dict[str, PackOptions] = {
    "rows": PackOptions(share_prefixes=False),
    "trees": PackOptions(),
    "lean": PackOptions(drop_idle=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to record and the tokens of a micro-batch; `groups` 0 means synthetic rollouts."""

    groups: int
    hops: int = 1
    thoughts: int = 0
    budget: int = 16_384


CASES = {
    "one-search": Case(groups=3),
    "two-searches": Case(groups=3, hops=2),
    "many-groups": Case(groups=12, budget=6144),
    "long-replies": Case(groups=1, thoughts=300),
    "synthetic": Case(groups=0),
}


class Bench:
    """One case: rollouts, model and clock."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        self.name, self.options, self.case = name, options, CASES[name]
        self.device = device_of(options.device)
        self.tiny = options.shape == "tiny"
        self.recording = self._rollouts(folder)
        self.budget = options.budget or (
            self.case.budget if self.case.groups else options.pack_tokens
        )
        dtype = options.dtype or ("float32" if self.tiny else "bfloat16")
        config = ModelConfig(
            dtype=dtype, checkpointing=options.checkpointing, compile=options.compile
        )
        self.policy = load(options.shape, config, folder, self.device, options.layers)
        self.clock = clock_of(options.clock, self.device)

    def _rollouts(self, folder: Path) -> Recording:
        case, options = self.case, self.options
        # a synthetic case takes only the tokenizer from the recording
        recording = record(
            options, folder, groups=case.groups or 1, hops=case.hops, thoughts=case.thoughts
        )
        if case.groups:
            return recording
        return synthesize(
            pack_tokens=options.pack_tokens,
            share=options.share,
            groups=options.groups,
            group_size=options.group_size,
            vocab_size=SHAPES.get(options.shape, {"vocab_size": 520})["vocab_size"],
            seed=options.seed,
        )

    def pack(self, way: str, budget: int | None = None) -> Packed:
        groups, credits = self.recording.groups, self.recording.credits
        budget = budget or self.budget
        return pack(groups, credits, budget=budget, device=self.device, options=WAYS[way])

    def model(self, packed: Packed) -> None:
        """Forward and backward up to the hidden states, without the loss head."""
        for batch in packed.batches:
            hidden_states(self.policy, batch)[batch.rows_N].sum().backward()
        self.policy.model.zero_grad()

    def step(self, way: str, optimizer: Optimizer) -> None:
        update(
            Learner(policy=self.policy, optimizer=optimizer), self.pack(way).batches, LossConfig()
        )

    def optimizer(self) -> Optimizer:
        config = OptimConfig(lr=1e-6, state=self.options.optim_state)
        return Optimizer(self.policy.model.parameters(), config)

    def seconds(self, call: Callable[[], object]) -> float:
        begin = self.clock()
        call()
        return self.clock() - begin
