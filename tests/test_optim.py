"""AdamW with float32 master weights, low-precision moments, states and memory limits."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from step_data import adamw_gradients
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from turnfast.config.schema import OptimConfig
from turnfast.errors import TornStep
from turnfast.rundir.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from turnfast.update.optimizer import Optimizer


def weights(*shape: int, dtype: torch.dtype, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def set_gradients(parameters, seed: int) -> None:
    for i, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


def constant(lr: float, **changed) -> OptimConfig:
    return OptimConfig(lr=lr, **{"warmup_steps": 0, "grad_clip": 1e9, **changed})


def test_small_steps_accumulate_in_bfloat16():
    """At lr 1e-6 one step is below the last digit of a bfloat16 weight near 1; 4000 are not."""
    ours, naive = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = Optimizer([ours], constant(1e-6))
    plain = torch.optim.AdamW([naive], lr=1e-6, weight_decay=0.0)
    for step in range(4000):
        ours.grad = torch.ones_like(ours)
        optimizer.step()
        if step == 0:
            assert torch.equal(ours, torch.ones_like(ours))
        if step < 50:
            naive.grad = torch.ones_like(naive)
            plain.step()
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.allclose(ours.float(), torch.tensor(1.0 - 4e-3), atol=4e-3)
    assert bool((ours < 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_match_torch_adamw(dtype):
    ours = [weights(3, 5, dtype=dtype), weights(7, dtype=dtype, seed=1)]
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    optimizer = Optimizer(ours, constant(1e-2, weight_decay=0.1, betas=(0.8, 0.9), grad_clip=0.5))
    plain = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    for seed in range(5):
        set_gradients(ours, seed)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.float().clone()
        expected = nn.utils.clip_grad_norm_(theirs, 0.5)
        assert optimizer.step() == pytest.approx(float(expected), rel=1e-6)
        plain.step()
        assert all(p.grad is None for p in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other.to(dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_sums_and_autograd_make_one_gradient(dtype):
    ours = [weights(3, 5, dtype=dtype), weights(7, dtype=dtype, seed=1)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    config = constant(1e-2, grad_clip=0.5)
    optimizer, plain = Optimizer(ours, config), Optimizer(theirs, config)
    for seed in range(3):
        total = optimizer.grad_sum(ours[0])
        assert total.dtype == torch.float32 and not total.any()
        assert total is optimizer.grad_sum(ours[0])
        assert (total is ours[0].grad) == (dtype == torch.float32)
        set_gradients(theirs, seed)
        ours[1].grad = theirs[1].grad.clone()
        half = theirs[0].grad / 2  # exact in both dtypes
        total += half.float()
        with optimizer.accumulating():
            ours[0].backward(half.to_sparse() if seed else half)
        assert total.equal(theirs[0].grad.float()) and total is optimizer.grad_sum(ours[0])
        assert optimizer.step() == pytest.approx(plain.step(), rel=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(p.grad is None for p in ours)
    total = optimizer.grad_sum(ours[0])
    total += 1.0
    optimizer.zero_grad()
    assert not optimizer.grad_sum(ours[0]).any()


def test_low_precision_gradients_are_summed_in_float32():
    """Each of 1,000 micro-batches is far below the last digit of a bfloat16 sum of them all."""
    draw = torch.Generator().manual_seed(0)
    gradients = [(torch.randn(64, generator=draw) + 1).bfloat16() for _ in range(1000)]
    truth = sum(gradient.double() for gradient in gradients)
    ours, naive = weights(64, dtype=torch.bfloat16), weights(64, dtype=torch.bfloat16)
    optimizer = Optimizer([ours], constant(1e-3))
    for gradient in gradients:
        with optimizer.accumulating():
            ours.backward(gradient)
        assert ours.grad is None
        naive.backward(gradient)
    ours.backward(torch.zeros_like(ours))
    assert ours.grad is not None  # outside `accumulating` autograd keeps its gradients
    with adamw_gradients() as steps:
        optimizer.step()
    ((found,),) = steps
    assert found.dtype == torch.float32
    assert (found - truth).norm() / truth.norm() < 1e-6
    assert (naive.grad - truth).norm() / truth.norm() > 1e-2


def test_a_state_dict_does_not_change_the_optimizer():
    parameter = weights(4, dtype=torch.bfloat16)
    optimizer = Optimizer([parameter], constant(1e-3))
    set_gradients([parameter], 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        optimizer.state_dict()["state"][0]["exp_avg"] = None
    after = optimizer.state_dict()
    assert set(after["state"][0]) == set(before["state"][0])
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_a_bfloat16_run_can_continue_a_float32_run():
    """The state has no masters; they become the loaded weights of the model."""
    trained = weights(8, dtype=torch.float32)
    optimizer = Optimizer([trained], constant(0.5))
    set_gradients([trained], 0)
    optimizer.step()
    rounded = weights(8, dtype=torch.bfloat16)
    resumed = Optimizer([rounded], constant(0.5))
    with torch.no_grad():
        rounded.copy_(trained)  # as load_checkpoint does before
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(rounded, trained.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, dtype):
    parameters = [weights(3, dtype=dtype), weights(3, dtype=dtype, seed=1)]
    optimizer = Optimizer(parameters, constant(1e-2))
    set_gradients(parameters, 0)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    set_gradients(parameters, 1)
    parameters[1].grad[2] = bad
    norm = optimizer.step()
    assert not torch.isfinite(torch.tensor(norm)) and optimizer.num_steps == 1
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(p.grad is None for p in parameters)
    for i, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][i][name]) for name, value in entries.items())


def test_the_learning_rate_warms_up_and_decays_in_the_steps_taken():
    """Without momentum AdamW's step is the learning rate times the sign of the gradient."""
    parameter = nn.Parameter(torch.zeros(1))
    config = OptimConfig(lr=1.0, warmup_steps=4, grad_clip=1e9, betas=(0.0, 0.0))
    optimizer = Optimizer([parameter], config, total_steps=10)
    rates = [0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]
    for rate in rates:
        before = parameter.item()
        assert optimizer.lr == pytest.approx(rate)
        parameter.grad = torch.ones(1)
        optimizer.step()
        assert before - parameter.item() == pytest.approx(rate, rel=1e-5)


def test_frozen_parameters_do_not_change():
    trained, frozen = weights(3, dtype=torch.float32), weights(3, dtype=torch.float32)
    frozen.requires_grad_(False)
    start = frozen.detach().clone()
    optimizer = Optimizer([trained, frozen], constant(1e-1, weight_decay=0.5))
    assert optimizer.grad_sum(frozen) is None and frozen.grad is None
    assert optimizer.grad_sum(weights(3, dtype=torch.float32)) is None
    assert trained.grad is None
    set_gradients([trained], 0)
    optimizer.step()
    assert torch.equal(frozen, start) and len(optimizer.state_dict()["state"]) == 1


def test_bfloat16_moments_train_like_float32_moments():
    torch.manual_seed(0)
    x, truth = torch.randn(256, 64), torch.randn(64, 128)
    ends, losses = [], []
    for kind in ("float32", "bfloat16"):
        parameter = nn.Parameter(torch.zeros(64, 128))
        optimizer = Optimizer([parameter], constant(3e-2, betas=(0.9, 0.999), state=kind))
        for _ in range(150):
            loss = (x @ (parameter - truth)).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(parameter.detach())
        losses.append(float(loss.detach()))
    assert losses[1] < 1.5 * losses[0] + 0.05
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 0.05


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_restores_the_state_bit_for_bit(state, dtype, tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weights(64, 64, dtype=dtype)
            self.bias = weights(64, dtype=dtype, seed=1)

        def save_pretrained(self, folder) -> None:
            save_file(self.state_dict(), folder / "model.safetensors")

    def run(model, optimizer, steps):
        for seed in steps:
            set_gradients(model.parameters(), seed)
            optimizer.step()

    config = constant(1e-3, warmup_steps=4, state=state)
    straight = Model()
    optimizer = Optimizer(straight.parameters(), config)
    run(straight, optimizer, range(3))
    training = TrainingState(model=straight, optimizer=optimizer)
    save_checkpoint(tmp_path, 3, training, progress={}, keep=1)
    run(straight, optimizer, range(3, 6))
    resumed = Model()
    again = Optimizer(resumed.parameters(), config)
    load_checkpoint(tmp_path / "step_000003", TrainingState(model=resumed, optimizer=again))
    assert again.num_steps == 3 and again.lr == pytest.approx(1e-3)
    run(resumed, again, range(3, 6))
    for mine, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, other)
    ours, theirs = again.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, entries in theirs["state"].items():
        assert ("master" in entries) == (dtype == torch.bfloat16)
        for name, value in entries.items():
            assert torch.equal(ours["state"][index][name], value)
    moments = [entries["exp_avg"] for entries in ours["state"].values()]
    moments += [entries["exp_avg_sq"] for entries in ours["state"].values()]
    assert {moment.dtype for moment in moments} == {getattr(torch, state)}


def test_bfloat16_moments_converge():
    """A second moment that changes by less than half a digit per step reaches its limit."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = Optimizer([parameter], constant(1e-6, betas=(0.9, 0.999), state="bfloat16"))
    for _ in range(2000):
        parameter.grad = torch.ones(4096)
        optimizer.step()
    moment = optimizer.state_dict()["state"][0]["exp_avg_sq"].float()
    assert float(moment.mean()) == pytest.approx(1 - 0.999**2000, rel=0.01)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2000):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert float(nearest) < 0.5


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_moments_are_allocated_before_the_first_step(state):
    parameter = weights(64, 64, dtype=torch.bfloat16)
    entries = Optimizer([parameter], constant(1e-2, state=state)).state_dict()["state"][0]
    assert entries.keys() == {"step", "exp_avg", "exp_avg_sq", "master"} and entries["step"] == 0
    for name in ("exp_avg", "exp_avg_sq"):
        assert entries[name].dtype == getattr(torch, state) and not entries[name].any()
        assert entries[name].shape == parameter.shape


def test_a_resumed_run_uses_the_settings_of_its_own_recipe():
    old = Optimizer([weights(4, dtype=torch.float32)], constant(1e-3, betas=(0.9, 0.99)))
    set_gradients(old.parameters, 0)
    old.step()
    changed = constant(1e-2, betas=(0.5, 0.8), weight_decay=0.25)
    parameter = weights(4, dtype=torch.float32)
    new = Optimizer([parameter], changed)
    new.load_state_dict(old.state_dict())
    (group,) = new.state_dict()["param_groups"]
    assert group["betas"] == (0.5, 0.8) and group["weight_decay"] == 0.25
    set_gradients([parameter], 1)
    gradient, before = parameter.grad.clone(), old.state_dict()["state"][0]["exp_avg"].clone()
    new.step()
    moment = new.state_dict()["state"][0]["exp_avg"]
    torch.testing.assert_close(moment, 0.5 * before + 0.5 * gradient)
    assert new.num_steps == 2


CHILD = """
    import json, re, resource, sys
    from pathlib import Path
    import torch
    from torch import nn
    from turnfast.config.schema import OptimConfig
    from turnfast.errors import ConfigError, OutOfMemory
    from turnfast.update.optimizer import Optimizer

    torch.set_num_threads(1)
    MiB = 1 << 20

    def limit_memory(most):
        held = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (held * 1024 + most, -1))

    config = OptimConfig(lr=0.1, warmup_steps=0, state=sys.argv[1])
    Optimizer([nn.Parameter(torch.ones(8))], config)  # load libraries
    found = {}
    parameter = nn.Parameter(torch.ones(8, MiB, dtype=torch.bfloat16))
    limit_memory(50 * MiB)  # masters need 32, moments 32 to 64
    try:
        Optimizer([parameter], config)
    except ConfigError as error:
        found["start"] = str(error)
    limit_memory(1 << 40)
    optimizer = Optimizer([parameter], config)
    parameter.grad = torch.ones_like(parameter)
    limit_memory(20 * MiB)  # the float32 gradient needs 32
    try:
        optimizer.step()
    except OutOfMemory as error:
        found["gradient"] = str(error)
    limit_memory(1 << 40)
    parameter.grad = torch.ones_like(parameter)
    with optimizer.accumulating():
        parameter.backward(torch.ones_like(parameter))
    limit_memory(60 * MiB)  # the workspace of bfloat16 moments needs 112
    try:
        optimizer.step()
    except OutOfMemory as error:
        found["step"] = str(error)
    kept = {**optimizer.state_dict()["state"][0], "weights": parameter}
    found["kept"] = {name: [float(x.min()), float(x.max())] for name, x in kept.items()}
    limit_memory(1 << 40)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found["later"] = float(parameter.min())
    print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and an address-space limit")
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_out_of_memory_changes_nothing(state):
    """Real limits of the allocator, at the start and in each part of a step."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), state]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("optim.state", "model.lora.r", "sampler.gpu_memory"):
        assert name in found["start"] and name in found["gradient"]
    assert ("step" in found) == (state == "bfloat16")
    if state == "bfloat16":
        assert "changed nothing" in found["step"]
        kept = found["kept"]
        assert kept.pop("weights") == kept.pop("master") == [1.0, 1.0]
        assert len(kept) == 3 and all(moment == [0.0, 0.0] for moment in kept.values())
    assert found["later"] < 1.0


def test_out_of_memory_within_adamw_is_a_torn_step():
    parameter = weights(4, dtype=torch.float32)
    optimizer = Optimizer([parameter], constant(1e-3))

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    set_gradients([parameter], 0)
    handle = register_optimizer_step_pre_hook(run_out)
    with pytest.raises(TornStep, match=r"--resume.*optim\.state.*CUDA out of memory"):
        optimizer.step()
    handle.remove()
