"""Data parallelism: the ranks' shares add up to the step of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from step_data import make_groups, optimizer_of

from turnfast.config import LossConfig, ModelConfig
from turnfast.credit import assign_credits
from turnfast.loss import update
from turnfast.model import load_policy
from turnfast.packing import pack

TESTS = Path(__file__).parent


def gradients_of(folder: Path, **options) -> tuple[list[torch.Tensor], int]:
    policy = load_policy(ModelConfig(), folder, torch.device("cpu"))
    groups = make_groups(7)
    packed = pack(groups, assign_credits(groups, "mt_grpo"), budget=48, **options)
    optimizer = optimizer_of(policy)
    update(policy, optimizer, packed.batches, LossConfig())
    return optimizer.gradients[0], packed.num_targets


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_gradients_of_simulated_ranks_add_up(tiny_folder, num_ranks):
    whole, targets = gradients_of(tiny_folder)
    parts = [gradients_of(tiny_folder, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    assert sum(count for _, count in parts) == targets
    for expected, *each in zip(whole, *(part for part, _ in parts), strict=True):
        assert (sum(each) - expected).abs().max() <= 1e-6


def test_fewer_rows_than_ranks_are_refused():
    groups = make_groups(7)
    with pytest.raises(ValueError, match=r"6 rows for 9 ranks.*rollout\.prompts_per_step"):
        pack(groups, assign_credits(groups, "mt_grpo"), budget=48, num_ranks=9)


CHILD = """
    import json, sys
    from pathlib import Path
    import torch, torch.distributed as dist
    from safetensors.torch import save_file
    from step_data import make_groups
    from turnfast.config import LossConfig, ModelConfig, OptimConfig
    from turnfast.credit import assign_credits
    from turnfast.loss import update
    from turnfast.model import load_policy
    from turnfast.optim import Optimizer
    from turnfast.packing import pack

    torch.set_num_threads(1)
    ranks, rank = int(sys.argv[2]), int(sys.argv[3])
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=sys.argv[4], rank=rank, world_size=ranks)
        group = dist.group.WORLD
    policy = load_policy(ModelConfig(), Path(sys.argv[1]), torch.device("cpu"))
    config = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip=0.05)
    optimizer = Optimizer(policy.model.parameters(), config, group=group)
    norms = []
    for seed in (7, 8):
        groups = make_groups(seed)
        credits = assign_credits(groups, "mt_grpo")
        packed = pack(groups, credits, budget=48, rank=rank, num_ranks=ranks)
        norms.append(update(policy, optimizer, packed.batches, LossConfig()).grad_norm)
    moments = [entries["exp_avg"] for entries in optimizer.state_dict()["state"].values()]
    save_file({str(i): x for i, x in enumerate(moments)}, sys.argv[5])
    print(json.dumps(norms))
    if ranks > 1:
        dist.destroy_process_group()
"""


def test_two_processes_take_the_step_of_one(tiny_folder, tmp_path):
    """Through gloo; the moments after two steps are sums of the gradients stepped with."""

    def run(ranks: int) -> tuple[list[list[float]], list[dict[str, torch.Tensor]]]:
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
        files = [tmp_path / f"{ranks}-{rank}.safetensors" for rank in range(ranks)]
        children = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", textwrap.dedent(CHILD)),
                    *(str(tiny_folder), str(ranks), str(rank)),
                    *(f"file://{tmp_path}/meeting-{ranks}", str(files[rank])),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(ranks)
        ]
        norms = []
        for child in children:
            out, err = child.communicate(timeout=300)
            assert child.returncode == 0, err[-2000:]
            norms.append(json.loads(out.splitlines()[-1]))
        return norms, [load_file(file) for file in files]

    (one,), (alone,) = run(1)
    both, moments = run(2)
    assert both[0] == both[1] and both[0] == pytest.approx(one, rel=1e-5)
    for name, expected in alone.items():
        assert torch.equal(moments[0][name], moments[1][name])
        assert (moments[0][name] - expected).abs().max() <= 1e-6
