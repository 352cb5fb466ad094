"""A head sharded over the vocabulary on two gloo ranks equals the whole head.

The test starts this file twice as a program; each process is one rank.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loss_cases import (
    Case,
    assert_same_stats,
    is_available,
    logprobs_of,
    make_case,
    relative,
    run,
    trained,
    with_large_logit,
)
from turnfast.kernels import PolicyRule, linear_logprobs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
V, CUT = 97, 60


def cases() -> list[Case]:
    """Token, turn and sequence level; entropy and soft cap; one row that overflows its anchor."""
    return [
        make_case(0, V=V, N=80, rule=PolicyRule(kl_coef=0.1)),
        make_case(4, V=V, rule=PolicyRule(dual_clip=1.5, is_cap=1.0), normaliser="masked"),
        make_case(5, V=V, rule=PolicyRule(ratio="sequence", entropy_coef=-0.02)),
        make_case(1, V=V, rule=PolicyRule(ratio="turn", entropy_coef=0.01), softcap=5.0),
        make_case(2, V=V, rule=PolicyRule(ratio="sequence", kind="cispo"), temperature=0.8),
        with_large_logit(make_case(3, V=V, on_policy=True), 90.0),
    ]


def rank_main(rank: int, init: str, impl: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    shard = slice(0, CUT) if rank == 0 else slice(CUT, V)
    for case in cases():
        whole, expected = run(case, impl, chunk_tokens=32)
        part = dataclasses.replace(case, head=case.head[shard])
        place = {"group": group, "vocab_start": shard.start}
        out, actual = run(part, impl, chunk_tokens=32, **place)
        computed = trained(whole)
        assert torch.equal(trained(out), computed)
        # An entropy is a small difference of larger numbers, so rounding has a larger effect.
        for name, bound in (("logprobs", 2e-6), ("entropies", 1e-5)):
            torch.testing.assert_close(
                getattr(out, name)[computed], getattr(whole, name)[computed], rtol=bound, atol=bound
            )
        torch.testing.assert_close(out.loss, whole.loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out.turn_logprobs, whole.turn_logprobs, rtol=2e-6, atol=1e-5)
        assert_same_stats(out, whole, rtol=1e-5, atol=1e-6)
        error = relative(actual.d_hidden, expected.d_hidden)
        assert error < 2e-6, f"{case.rule}: {error:.1e}"
        assert relative(actual.d_head, expected.d_head[shard]) < 2e-6
        alone = logprobs_of(part, impl, **place)
        torch.testing.assert_close(
            alone.logprobs[computed], whole.logprobs[computed], rtol=2e-6, atol=2e-6
        )
    with pytest.raises(ValueError, match="vocab_start: expected shards that tile"):
        index = torch.tensor([0])
        start = rank * (CUT + 1)
        linear_logprobs(
            case.hidden, case.head[shard], index, index, group=group, vocab_start=start, impl=impl
        )
    dist.destroy_process_group()
    print(f"rank {rank} done")


@pytest.mark.parametrize("impl", ["reference", "triton_safe", "triton_anchored"])
def test_two_ranks_equal_the_whole_head(impl: str, tmp_path: Path) -> None:
    if impl.startswith("triton") != INTERPRETED or not is_available(impl):
        pytest.skip("Triton needs TRITON_INTERPRET=1")
    command = [sys.executable, __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "init"), impl],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, output[-3000:]
        assert f"rank {number} done" in output


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    sys.stdout.flush()
    # A gloo thread may outlive its group, and a normal exit then aborts sometimes.
    os._exit(0)
