"""One optimizer step on the same recorded rollouts in TRL's GRPOTrainer and in turnfast.

    pip install "turnfast[bench]"
    python bench/trl_step.py [--device cpu|cuda] [--dtype float32|bfloat16] [--groups 3]
                             [--width 128] [--layers 4] [--trl-batches 1,2,4,8,24]

The rollouts are those of bench/step.py: groups of 8 in the built-in search world, system prompt
with the tool description, several turns. Both sides use copies of the same model, the same
advantage for every token, the same loss (token-level PPO clip, on policy, mean over the sampled
tokens of the step, no KL) and AdamW with the same settings, on one CPU or one GPU. In bfloat16 both
keep float32 weights: TRL in the model, with casts by its Trainer, and turnfast in the optimizer.

TRL's trainer runs unchanged from `train()` down: rollouts enter through its `rollout_func`, tool
results are masked by its `env_mask`, and padding, batching, chunked log-probs, loss, accumulation,
clipping and optimizer are its own. Its settings are the fastest for this case: no gradient
checkpointing, no logging, no recomputation of old log-probs, and the fastest micro-batch size of
--trl-batches. One method is overridden to replace its advantages by turn-level ones (a tensor with
one advantage per token, which its loss accepts).

The timings are interleaved step by step in one process:

    trl       from `on_step_begin` to `on_step_end`. `prepare` is `_prepare_inputs`: recorded
              rollouts to padded tensors, with decoding and rewards; the "generation" is a look-up.
              `train` is the rest: forward, backward, clip, AdamW.
    turnfast  `prepare` is `pack`, `train` is `update`.

TRL's data loader and the rollouts are not timed. On a GPU every clock reading synchronises. The
gradients and log-probs of both are compared with a float64 model on one trajectory at a time; no
result is written if they differ. At most 1.05 x the distinct tokens may be computed. Memory is the
peak of the third step above the usage before it, in a separate process. Results go to
bench/results/trl_step.json, those of a GPU to trl_step_cuda.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from harness.clocks import clock_of
from harness.memory import watch_memory
from harness.provenance import RESULTS, provenance, write
from harness.recorded import Recording, arguments, device_of, record
from harness.truth import (
    Sample,
    gradient_error,
    gradient_of,
    logprob_error,
    samples_of,
    step_of,
    truth_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from turnfast.config.schema import LossConfig, ModelConfig, OptimConfig
from turnfast.model import Policy, load_policy
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import Packed, pack
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import update

# error bounds against float64: log-probs in nats, gradients relative to the largest entry
BUDGETS = {"float32": (1e-4, 1e-4), "bfloat16": (5e-2, 5e-2)}
TOKENS = 1.05  # most computed tokens per distinct token
SPEED = 3.0  # least ratio of TRL's step to turnfast's
OPTIM = OptimConfig(lr=1e-6, warmup_steps=0, grad_clip=1e9)


class Recorded(GRPOTrainer):
    """TRL's trainer with turn-level advantages; `samples` holds the rollouts of each prompt."""

    samples: dict[str, list[Sample]]
    prepare_s = 0.0
    clock = staticmethod(time.perf_counter)

    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        chosen = self.choose([row["prompt"] for row in inputs])
        advantages = torch.zeros(made["completion_ids"].shape)
        for row, sample in zip(advantages, chosen, strict=True):
            row[: len(sample.advantages)] = torch.tensor(sample.advantages)
        return {**made, "advantages": advantages.to(made["completion_ids"].device)}

    def _prepare_inputs(self, generation_batch):
        begin = self.clock()
        inputs = super()._prepare_inputs(generation_batch)
        self.prepare_s += self.clock() - begin
        return inputs

    def choose(self, prompts: list[str]) -> list[Sample]:
        """The next rollout of each prompt; every batch starts with the first."""
        used: Counter[str] = Counter()
        chosen = []
        for prompt in prompts:
            chosen.append(self.samples[prompt][used[prompt]])
            used[prompt] += 1
        return chosen


def recorded_rollouts(prompts: list[str], trainer: Recorded) -> dict[str, list]:
    chosen = trainer.choose(prompts)
    return {
        "prompt_ids": [sample.prompt for sample in chosen],
        "completion_ids": [sample.completion for sample in chosen],
        "logprobs": [sample.logprobs for sample in chosen],
        "env_mask": [sample.sampled for sample in chosen],
    }


class Rounds(TrainerCallback):
    """Times each step of TRL, and runs a turnfast step after it."""

    def __init__(self, trainer: Recorded, ours: Ours) -> None:
        self._trainer, self._ours = trainer, ours
        self.gradient: list[Tensor] | None = None
        self.trl: list[tuple[float, float]] = []
        self.turnfast: list[tuple[float, float]] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self._trainer.prepare_s = 0.0
        self._begin = self._trainer.clock()

    def on_pre_optimizer_step(self, *args, **kwargs) -> None:
        if self.gradient is None:
            self.gradient = gradient_of(self._trainer.model)

    def on_step_end(self, *args, **kwargs) -> None:
        seconds, prepare = self._trainer.clock() - self._begin, self._trainer.prepare_s
        self.trl.append((prepare, seconds - prepare))
        self.turnfast.append(self._ours())


def main() -> None:
    parser = arguments(__doc__, "trl_step.json", repeats=5)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--hops", type=int, default=1)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a micro-batch")
    parser.add_argument("--trl-batches", default="1,2,4,8,24", help="rows per micro-batch to try")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or "float32"
    device = device_of(options.device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise SystemExit("TRL would use all GPUs; set CUDA_VISIBLE_DEVICES=0")
    if device.type == "cuda" and options.out == parser.get_default("out"):
        options.out = RESULTS / "trl_step_cuda.json"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        played = record(options, Path(folder), groups=options.groups, hops=options.hops)
        recording = with_signal(played)
        policy = load_policy(ModelConfig(dtype=options.dtype), Path(folder), device)
        sides = Sides(recording, policy, options)
        if options.memory_of:
            print(sides.peak_memory(options.memory_of))
            return
        result = measure(sides)
    print(write({**provenance(device), "clock": options.clock, **result}, options.out))
    show(result)
    if missed := result["missed"]:
        raise SystemExit(missed)


def with_signal(recording: Recording) -> Recording:
    """Keep groups with advantages: TRL counts the others in its mean, turnfast does not."""
    kept = [
        (group, credit)
        for group, credit in zip(recording.groups, recording.credits, strict=True)
        if credit.has_signal and not any(t.left_out for t in group.trajectories)
    ]
    groups, credits = zip(*kept, strict=True)
    return Recording(groups=list(groups), credits=list(credits))


class Sides:
    """The rollouts and the model, for TRL's step and for turnfast's."""

    def __init__(self, recording: Recording, policy: Policy, options: argparse.Namespace) -> None:
        self.recording, self.policy, self.options = recording, policy, options
        self.clock = clock_of(options.clock, policy.device)
        self.samples = samples_of(recording)

    def pack(self, *, budget: int | None = None, drop_idle: bool = False) -> Packed:
        return pack(
            self.recording.groups,
            self.recording.credits,
            budget=budget or self.options.budget,
            options=PackOptions(drop_idle=drop_idle),
            device=self.policy.device,
        )

    def ours(self) -> Ours:
        return Ours(self, Optimizer(self.policy.model.parameters(), OPTIM))

    def trainer(self, batch: int, steps: int) -> Recorded:
        """TRL's trainer with micro-batches of `batch` rows."""
        options, prompts = self.options, [f"prompt {n}" for n in range(len(self.samples))]
        rows = sum(len(group) for group in self.samples)
        if rows % batch:
            raise SystemExit(f"--trl-batches: {batch} does not divide {rows} rollouts")
        settings = GRPOConfig(
            output_dir=str(self.policy.folder / "trl"),
            use_cpu=self.policy.device.type == "cpu",
            bf16=options.dtype == "bfloat16",
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=rows // batch,
            steps_per_generation=rows // batch,
            num_generations=options.group_size,
            max_completion_length=2048,
            loss_type="dapo",
            beta=0.0,
            learning_rate=OPTIM.lr,
            adam_beta1=OPTIM.betas[0],
            adam_beta2=OPTIM.betas[1],
            weight_decay=OPTIM.weight_decay,
            max_grad_norm=OPTIM.grad_clip,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_steps=steps,
            shuffle_dataset=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
        )
        trainer = Recorded(
            model=AutoModelForCausalLM.from_pretrained(self.policy.folder, dtype="float32"),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=self.policy.tokenizer,
            rollout_func=recorded_rollouts,
        )
        trainer.samples = dict(zip(prompts, self.samples, strict=True))
        trainer.clock = self.clock
        return trainer

    def memory_of(self, side: str) -> float:
        command = [sys.executable, *sys.argv, "--memory-of", side]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(found.stdout.splitlines()[-1])

    def peak_memory(self, side: str) -> float:
        """Peak MiB of the third step above the usage before it."""
        if side == "turnfast":
            ours = self.ours()
            for _ in range(2):
                ours()
            peak = watch_memory(self.policy.device)
            ours()
            return peak() / 2**20
        trainer = self.trainer(int(side), 3)
        watch = Watch(self.policy.device)
        trainer.add_callback(watch)
        trainer.train()
        return watch.bytes / 2**20


class Watch(TrainerCallback):
    """Measures the memory of TRL's third step."""

    bytes = float("nan")

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            self._peak = watch_memory(self._device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            self.bytes = self._peak()


class Ours:
    """turnfast's step, as in its training loop."""

    def __init__(self, sides: Sides, optimizer: Optimizer) -> None:
        self._sides, self._optimizer = sides, optimizer

    def __call__(self) -> tuple[float, float]:
        """Run one step; returns the seconds of packing and of the update."""
        clock = self._sides.clock
        begin = clock()
        packed = self._sides.pack(drop_idle=True)
        middle = clock()
        update(
            Learner(policy=self._sides.policy, optimizer=self._optimizer),
            packed.batches,
            LossConfig(),
        )
        return middle - begin, clock() - middle


def measure(sides: Sides) -> dict[str, Any]:
    policy, options = sides.policy, sides.options
    true_gradient, true_logprobs = truth_of(policy, sides.recording)
    start = deepcopy(policy.model.state_dict())

    def errors_of(gradient: list[Tensor], logprobs: Tensor) -> dict[str, float]:
        return {
            "logprob": logprob_error(logprobs, true_logprobs),
            "gradient": gradient_error(gradient, true_gradient),
        }

    step_of(policy, sides.pack(drop_idle=True).batches)
    own_gradient = gradient_of(policy.model)
    # idle tokens have no log-prob if they are skipped
    own_logprobs = step_of(policy, sides.pack().batches)
    policy.model.zero_grad()
    errors = {"turnfast": errors_of(own_gradient, own_logprobs)}
    seconds: dict[str, dict[str, float]] = {}
    batches = [int(batch) for batch in options.trl_batches.split(",")]
    for batch in batches:
        policy.model.load_state_dict(start)
        trainer = sides.trainer(batch, options.repeats + 1)
        logprobs = trl_logprobs(trainer)
        rounds = Rounds(trainer, sides.ours())
        trainer.add_callback(rounds)
        trainer.train()
        assert rounds.gradient is not None
        errors[f"trl {batch}"] = {
            **errors_of(rounds.gradient, logprobs),
            "gradient_against_turnfast": gradient_error(rounds.gradient, own_gradient),
        }
        # the first round warms the caches
        seconds[f"trl {batch}"] = seconds_of(rounds.trl[1:])
        seconds[f"turnfast beside trl {batch}"] = seconds_of(rounds.turnfast[1:])
    most_logprob, most_gradient = BUDGETS[options.dtype]
    for name, found in errors.items():
        if not (found["logprob"] < most_logprob and found["gradient"] < most_gradient):
            raise SystemExit(f"{name}: errors against float64 are too large: {found}")
    best = min((f"trl {batch}" for batch in batches), key=lambda name: seconds[name]["step_s"])
    ours = seconds[f"turnfast beside {best}"]
    packed, whole = sides.pack(drop_idle=True), sides.pack(budget=1 << 40)
    distinct = sides.pack(drop_idle=True, budget=1 << 40).num_tokens
    samples = [sample for group in sides.samples for sample in group]
    width = max(len(s.prompt) for s in samples) + max(len(s.completion) for s in samples)
    computed, speedup = packed.num_tokens / distinct, seconds[best]["step_s"] / ours["step_s"]
    missed = f"{computed:.3f} x the distinct tokens are computed, more than {TOKENS}"
    return {
        "dtype": options.dtype,
        "rollouts_sha256": sides.recording.digest,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "rollouts": len(samples),
        "tokens_of_rows": whole.num_tokens_total,
        "shared_tokens": whole.shared_prefix.value,
        "tokens_computed": {"trl": width * len(samples), "turnfast": packed.num_tokens},
        "computed_over_distinct": computed,
        "trl_setting": best,
        "step_speedup": speedup,
        "train_speedup": seconds[best]["train_s"] / ours["train_s"],
        "targets": {
            "step of TRL over that of turnfast": {
                "found": speedup,
                "wanted": SPEED,
                "met": speedup >= SPEED,
            }
        },
        "missed": "" if computed <= TOKENS else missed,
        "peak_memory_mib": {
            **{f"trl {batch}": sides.memory_of(str(batch)) for batch in batches},
            "turnfast": sides.memory_of("turnfast"),
        },
        "seconds": seconds,
        "errors": errors,
    }


def seconds_of(rounds: list[tuple[float, float]]) -> dict[str, float]:
    prepare, train = zip(*rounds, strict=True)
    return {
        "prepare_s": median(prepare),
        "train_s": median(train),
        "step_s": median(a + b for a, b in rounds),
    }


def trl_logprobs(trainer: Recorded) -> Tensor:
    inputs = [{"prompt": prompt} for prompt, rows in trainer.samples.items() for _ in rows]
    made = trainer._generate_and_score_completions(inputs)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    with torch.no_grad(), trainer.accelerator.autocast():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, made["completion_ids"].shape[1]
        )
    return logprobs[(made["completion_mask"] * made["tool_mask"]).bool()].float().cpu()


def show(result: dict[str, Any]) -> None:
    for side, seconds in result["seconds"].items():
        print(f"{side:<24} " + "  ".join(f"{n} {s * 1e3:8.1f} ms" for n, s in seconds.items()))
    for side, errors in result["errors"].items():
        print(f"{side:<24} " + "  ".join(f"{n} {error:.1e}" for n, error in errors.items()))
    for target, row in result["targets"].items():
        met = "met" if row["met"] else "not met"
        print(f"{target}: {row['found']:.2f}, target {row['wanted']}: {met}")


if __name__ == "__main__":
    main()
