"""One optimizer step on the same recorded rollouts through TRL's GRPOTrainer and through turnfast.

    pip install "turnfast[bench]"
    python bench/trl_step.py [--groups 3] [--width 128] [--layers 4] [--trl-batches 1,2,4,8,24]

The rollouts are those of bench/step.py: groups of 8 in the built-in search world, system prompt
with the tool description, several turns. Both sides have the same model (two copies of one start),
the same advantage for every token, the same loss (token-level PPO clip, on policy, mean over the
sampled tokens of the step, no KL), AdamW with the same settings, float32, one CPU.

TRL's trainer is used as shipped, from `train()` down: rollouts enter through its `rollout_func`,
tool results are masked through its `env_mask`, and padding, batching, chunked log-probs, loss,
accumulation, clipping and optimizer are its own. Its settings are those that suit it here: no bf16,
no gradient checkpointing, nothing logged, old log-probs not recomputed, and of the micro-batch
sizes of --trl-batches the fastest. One method is overridden, to put turn-level advantages, a tensor
with one per token that its loss accepts, in the place of those it computes.

What is timed, interleaved step by step in one process:

    trl       from `on_step_begin` to `on_step_end`. `prepare` is `_prepare_inputs`: recorded
              rollouts to padded tensors; the recorded "generation" is a look-up, and decoding and
              rewards are in it. `train` is the rest: forward, backward, clip, AdamW.
    turnfast  `prepare` is `pack`, `train` is `update`: the same work.

Neither the data loader of TRL nor the rollout of either is in it. Gradients and log-probs of both
are compared with a float64 model run on one trajectory at a time; no figure is written if they
differ. Memory is what a process of its own has at most, above what it holds before its third step
(the optimizer's state is made by then). Results go to bench/results/trl_step.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
import trl
from datasets import Dataset
from recorded import CLOCKS, Recording, arguments, commit, record, watch_memory, write
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turnfast.kernels import turn_policy_loss

from turnfast.config import LossConfig, OptimConfig
from turnfast.loss import update
from turnfast.model import Policy, hidden_states
from turnfast.optim import Optimizer
from turnfast.packing import pack
from turnfast.types import Trajectory

# float32 against float64: log-probs of a few nats, gradients as a share of the largest entry
LOGPROB_BUDGET = 1e-4
GRADIENT_BUDGET = 1e-4
OPTIM = OptimConfig(lr=1e-6, warmup_steps=0, grad_clip=1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A trajectory as one row: prompt, and all that follows; `sampled` marks the agent's ids."""

    prompt: list[int]
    completion: list[int]
    sampled: list[int]
    logprobs: list[float]
    advantages: list[float]


def sample_of(trajectory: Trajectory, advantages: tuple[float, ...]) -> Sample:
    completion: list[int] = []
    sampled: list[int] = []
    logprobs: list[float] = []
    each: list[float] = []
    for k, turn in enumerate(trajectory.turns):
        if turn.restart:
            raise SystemExit("a rewritten history is two rows in turnfast and none in TRL")
        given = turn.prompt_ids if k else ()
        completion += [*given, *turn.sampled_ids]
        sampled += [0] * len(given) + [1] * len(turn.sampled_ids)
        logprobs += [0.0] * len(given) + list(turn.logprobs)
        each += [0.0] * len(given) + [advantages[k]] * len(turn.sampled_ids)
    return Sample(
        prompt=list(trajectory.turns[0].prompt_ids),
        completion=completion,
        sampled=sampled,
        logprobs=logprobs,
        advantages=each,
    )


class Recorded(GRPOTrainer):
    """TRL's trainer with turn-level advantages; `samples[prompt]` are the rollouts of a prompt."""

    samples: dict[str, list[Sample]]
    prepare_s = 0.0
    clock = staticmethod(time.perf_counter)

    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        chosen = self.choose([row["prompt"] for row in inputs])
        advantages = torch.zeros(made["completion_ids"].shape)
        for row, sample in zip(advantages, chosen, strict=True):
            row[: len(sample.advantages)] = torch.tensor(sample.advantages)
        return {**made, "advantages": advantages}

    def _prepare_inputs(self, generation_batch):
        begin = self.clock()
        inputs = super()._prepare_inputs(generation_batch)
        self.prepare_s += self.clock() - begin
        return inputs

    def choose(self, prompts: list[str]) -> list[Sample]:
        """The next rollout of each prompt, from the first one on in every batch."""
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
    """Times TRL's step from inside, and takes ours after each of its own."""

    def __init__(self, trainer: Recorded, ours) -> None:
        self._trainer, self._ours = trainer, ours
        self.gradient: Tensor | None = None
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
        if self._ours is not None:
            self.turnfast.append(self._ours(self._trainer.clock))


def main() -> None:
    parser = arguments(__doc__, "trl_step.json", groups=3, repeats=5)
    parser.add_argument("--trl-batches", default="1,2,4,8,24", help="rows per micro-batch to try")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = "cpu"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        recording = with_signal(record(options, Path(folder)))
        if options.memory_of:
            print(peak_memory(recording, options, Path(folder)))
            return
        result = measure(recording, options, Path(folder))
    write(result, options.out)
    print(json.dumps(result, indent=1))


def with_signal(recording: Recording) -> Recording:
    """Only groups that are trained on: TRL counts the others in its mean, turnfast does not."""
    kept = [
        (group, credit)
        for group, credit in zip(recording.groups, recording.credits, strict=True)
        if credit.has_signal and not any(t.failed for t in group.trajectories)
    ]
    groups, credits = zip(*kept, strict=True)
    return Recording(groups=list(groups), credits=list(credits), policy=recording.policy)


def samples_of(recording: Recording) -> list[list[Sample]]:
    return [
        [sample_of(*pair) for pair in zip(group.trajectories, credit.advantages, strict=True)]
        for group, credit in zip(recording.groups, recording.credits, strict=True)
    ]


def trainer_of(
    recording: Recording, options: argparse.Namespace, folder: Path, batch: int, steps: int
) -> Recorded:
    groups = samples_of(recording)
    rows = sum(len(group) for group in groups)
    if rows % batch:
        raise SystemExit(f"--trl-batches: {batch} does not divide {rows} rollouts")
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
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
    prompts = [f"prompt {number}" for number in range(len(groups))]
    trainer = Recorded(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=recording.policy.tokenizer,
        rollout_func=recorded_rollouts,
    )
    trainer.samples = dict(zip(prompts, groups, strict=True))
    trainer.clock = CLOCKS[options.clock]
    return trainer


class Ours:
    """turnfast's step, as its trainer takes it."""

    def __init__(self, recording: Recording, options: argparse.Namespace) -> None:
        self._recording, self._options = recording, options
        self._optimizer = Optimizer(recording.policy.model.parameters(), OPTIM)

    def pack(self):
        recording = self._recording
        return pack(
            recording.groups, recording.credits, budget=self._options.budget, drop_idle=True
        )

    def __call__(self, clock) -> tuple[float, float]:
        begin = clock()
        packed = self.pack()
        middle = clock()
        update(self._recording.policy, self._optimizer, packed.batches, LossConfig())
        return middle - begin, clock() - middle


def measure(recording: Recording, options: argparse.Namespace, folder: Path) -> dict:
    policy = recording.policy
    truth = truth_of(recording)
    start = deepcopy(policy.model.state_dict())
    own_gradient, _ = own_side(policy, Ours(recording, options).pack().batches)
    # idle ends of rows have no log-prob where they are left out
    whole = pack(recording.groups, recording.credits, budget=options.budget)
    _, own_logprobs = own_side(policy, whole.batches)
    errors = {"turnfast": compared(own_gradient, own_logprobs, truth)}
    sides: dict[str, dict] = {}
    for batch in map(int, options.trl_batches.split(",")):
        policy.model.load_state_dict(start)
        trainer = trainer_of(recording, options, folder, batch, options.repeats + 1)
        logprobs = trl_logprobs(trainer)
        rounds = Rounds(trainer, Ours(recording, options))
        trainer.add_callback(rounds)
        trainer.train()
        errors[f"trl {batch}"] = compared(rounds.gradient, logprobs, truth)
        # the first round is for caches
        sides[f"trl {batch}"] = seconds_of(rounds.trl[1:])
        sides[f"turnfast beside trl {batch}"] = seconds_of(rounds.turnfast[1:])
        gap = float((rounds.gradient - own_gradient).abs().max())
        errors[f"trl {batch}"]["gradient_against_turnfast"] = gap / float(own_gradient.abs().max())
    for name, found in errors.items():
        if not (found["logprob"] < LOGPROB_BUDGET and found["gradient"] < GRADIENT_BUDGET):
            raise SystemExit(f"{name}: not the same step, {found}")
    best = min((name for name in sides if name.startswith("trl")), key=lambda n: sides[n]["step_s"])
    ours = sides[f"turnfast beside {best}"]
    packed = Ours(recording, options).pack()
    rows = pack(recording.groups, recording.credits, budget=1 << 30, share_prefixes=False)
    samples = [sample for group in samples_of(recording) for sample in group]
    width = max(len(s.prompt) for s in samples) + max(len(s.completion) for s in samples)
    return {
        "command": " ".join(["python bench/trl_step.py", *sys.argv[1:]]),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "commit": commit(),
        "rollouts_sha256": recording.digest,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "rollouts": len(samples),
        "tokens_of_rows": rows.num_tokens,
        "shared_tokens": pack(recording.groups, recording.credits, budget=1 << 30).shared_prefix,
        "tokens_computed": {"trl": width * len(samples), "turnfast": packed.num_tokens},
        "trl_setting": best,
        "step_speedup": sides[best]["step_s"] / ours["step_s"],
        "train_speedup": sides[best]["train_s"] / ours["train_s"],
        "peak_memory_mib": {
            side: memory_of(side.removeprefix("trl "))
            for side in (*(name for name in sides if name.startswith("trl ")), "turnfast")
        },
        "seconds": sides,
        "errors": errors,
    }


def seconds_of(rounds: list[tuple[float, float]]) -> dict[str, float]:
    prepare, train = zip(*rounds, strict=True)
    return {
        "prepare_s": median(prepare),
        "train_s": median(train),
        "step_s": median(a + b for a, b in rounds),
    }


def truth_of(recording: Recording) -> tuple[Tensor, Tensor]:
    """Gradient and log-probs by a float64 model, one trajectory after the other, by definition."""
    config = deepcopy(recording.policy.model.config)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.load_state_dict(recording.policy.model.state_dict())
    samples = [sample for group in samples_of(recording) for sample in group]
    count = sum(sum(sample.sampled) for sample in samples)
    found = []
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.completion])
        logits = model(ids, use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, ids[0, len(sample.prompt) :, None]).squeeze(1)
        live = torch.tensor(sample.sampled, dtype=torch.bool)
        # on policy the ratio is 1 and its gradient that of the log-prob
        advantages = torch.tensor(sample.advantages, dtype=torch.float64)
        (-(logprobs * advantages)[live].sum() / count).backward()
        found.append(logprobs.detach()[live])
    return gradient_of(model), torch.cat(found)


def gradient_of(model) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def own_side(policy: Policy, batches) -> tuple[Tensor, Tensor]:
    policy.model.zero_grad()
    found = []
    for batch in batches:
        out = turn_policy_loss(
            hidden_states(policy, batch),
            policy.head_VD,
            batch.rows_N,
            batch.targets_N,
            batch.turns_N,
            batch.advantages_K,
            weights=batch.weights_N,
        )
        out.loss.backward()
        turns = batch.sequences_K[batch.turns_N.long()]
        found += [(int(n), lp) for n, lp in zip(turns, out.logprobs.detach(), strict=True)]
    found.sort(key=lambda pair: pair[0])
    gradient = gradient_of(policy.model)
    policy.model.zero_grad()
    return gradient, torch.stack([logprob for _, logprob in found])


def trl_logprobs(trainer: Recorded) -> Tensor:
    inputs = [{"prompt": prompt} for prompt, rows in trainer.samples.items() for _ in rows]
    made = trainer._generate_and_score_completions(inputs)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, made["completion_ids"].shape[1]
        )
    return logprobs[(made["completion_mask"] * made["tool_mask"]).bool()]


def compared(gradient: Tensor, logprobs: Tensor, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    gradients, expected = truth
    error = (logprobs.double() - expected).abs()
    # turnfast computes no log-prob for a token without advantage
    return {
        "logprob": float(error[~error.isnan()].max()),
        "gradient": float((gradient - gradients).abs().max() / gradients.abs().max()),
    }


def memory_of(side: str) -> float:
    command = [sys.executable, *sys.argv, "--memory-of", side]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout.splitlines()[-1])


def peak_memory(recording: Recording, options: argparse.Namespace, folder: Path) -> float:
    """MiB of a step above what is held before it; the steps before have made all lasting state."""
    if options.memory_of == "turnfast":
        ours = Ours(recording, options)
        for _ in range(2):
            ours(time.perf_counter)
        peak = watch_memory(recording.policy.device)
        ours(time.perf_counter)
        return peak()
    trainer = trainer_of(recording, options, folder, int(options.memory_of), 3)
    found: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                self.peak = watch_memory(recording.policy.device)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                found.append(self.peak())

    trainer.add_callback(Watch())
    trainer.train()
    return found[0]


if __name__ == "__main__":
    main()
