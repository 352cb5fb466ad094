"""The critic: one float32 linear layer on the policy's last hidden states.

The value of the state before a sampled token is computed from the hidden state that predicts the
token. So policy and critic share packed rows, prefix trees, and one forward and backward pass. The
layer starts at zero and has its own optimizer, since it needs a larger learning rate than a
pretrained policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from operator import itemgetter

import torch
from torch import Tensor, nn

from ..config.schema import CriticConfig, OptimConfig
from ..errors import OutOfMemory, TornStep
from ..model import Policy, hidden_states
from ..packing.options import PackOptions
from ..packing.pack import pack
from ..parallel.ranks import ALONE, Ranks
from ..types import Batch, Credit, Group
from .optimizer import LESS_MEMORY, Optimizer


class Critic:
    """State values and their loss.

    Args:
        policy: only its hidden size and device are used here.
        optim: settings of the policy's optimizer; the learning rate is multiplied by
            `critic.lr_factor`, weight decay is 0.
        ranks: gradients are summed over these.
    """

    def __init__(
        self, policy: Policy, config: CriticConfig, optim: OptimConfig, *, ranks: Ranks = ALONE
    ) -> None:
        width = policy.head_VD.shape[1]
        self.head = nn.Linear(width, 1, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._config = config
        rate = optim.lr * config.lr_factor
        settings = optim.model_copy(update={"lr": rate, "weight_decay": 0.0})
        self._optimizer = Optimizer(self.head.parameters(), settings, ranks=ranks)

    def values_N(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """The value before each target token of a batch, with gradient."""
        return self.head(hidden_TD.float()).squeeze(1)[batch.rows_N]

    @torch.no_grad()
    def values(
        self,
        policy: Policy,
        groups: Sequence[Group],
        *,
        tokens_per_microbatch: int,
        share_prefixes: bool,
    ) -> list[list[tuple[float, ...]]]:
        """Compute values[g][i][t], the value before sampled token t of rollout i of group g.

        Failed and masked rollouts get an empty tuple.
        """
        credits = [
            Credit(rule="", advantages=tuple((1.0,) * len(t.turns) for t in group.trajectories))
            for group in groups
        ]
        packed = pack(
            groups,
            credits,
            budget=tokens_per_microbatch,
            device=policy.device,
            options=PackOptions(share_prefixes=share_prefixes),
        )
        values: list[tuple[int, int, float]] = []
        for batch in packed.batches:
            values_N = self.values_N(hidden_states(policy, batch), batch)
            turns_N = batch.turns_N.long()
            columns = (batch.sequences_K[turns_N], batch.places_K[turns_N], values_N)
            values += zip(*(column.tolist() for column in columns), strict=True)
        # `pack` numbers the trajectories in order; sorting keeps the order of a turn's tokens
        values.sort(key=itemgetter(0, 1))
        remaining = (value for _, _, value in values)
        return [
            [tuple(islice(remaining, 0 if t.left_out else t.num_sampled)) for t in g.trajectories]
            for g in groups
        ]

    def loss(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """coef / 2 times the weighted mean of (V - target)^2.

        With `critic.clip` it is the maximum of that and of the error of V clipped to within `clip`
        of its old value (public code of arXiv 1707.06347).
        """
        assert batch.values_N is not None and batch.value_targets_N is not None
        assert batch.value_weights_N is not None
        values_N = self.values_N(hidden_TD, batch)
        errors_N = (values_N - batch.value_targets_N).square()
        if self._config.clip is not None:
            c = self._config.clip
            clipped_N = batch.values_N + (values_N - batch.values_N).clamp(-c, c)
            errors_N = torch.maximum(errors_N, (clipped_N - batch.value_targets_N).square())
        return 0.5 * self._config.coef * (batch.value_weights_N * errors_N).sum()

    def step(self) -> float:
        """Update the layer, after the policy, and return its gradient norm.

        If the norm is not finite, the layer does not change.

        Raises:
            TornStep: memory ran out, but the policy is already updated.
        """
        try:
            return self._optimizer.step()
        except OutOfMemory as error:
            raise TornStep(
                "out of memory in the critic's step, after the policy's: continue from the last "
                f"checkpoint with --resume; {LESS_MEMORY}"
            ) from error

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """The layer, the moments and the number of steps, all as tensors."""
        state = {f"head.{name}": x.detach() for name, x in self.head.state_dict().items()}
        saved = self._optimizer.state_dict()
        for index, entries in saved["state"].items():
            state |= {f"optimizer.{index}.{name}": x for name, x in entries.items()}
        state["optimizer.num_steps"] = torch.tensor(self._optimizer.num_steps)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state; raises KeyError or RuntimeError if it does not fit the hidden size."""
        head = {n.removeprefix("head."): x for n, x in state.items() if n.startswith("head.")}
        self.head.load_state_dict(head)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, x in state.items():
            kind, _, rest = name.partition(".")
            index, _, entry = rest.partition(".")
            if kind == "optimizer" and entry:
                moments.setdefault(int(index), {})[entry] = x
        num_steps = int(state["optimizer.num_steps"])
        groups = self._optimizer.state_dict()["param_groups"]
        groups = [{**group, "num_steps": num_steps} for group in groups]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
