"""Run configuration: one frozen section per part of a run, each field checked for type and range.

Conflicts between two fields are in conflicts.py; reading and writing recipes is in recipe.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]

VALUE_RULES = ("mt_ppo", "turn_ppo")
"""Credit rules that need a critic."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


def _field(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


class LoraConfig(Section):
    """A LoRA adapter, trained instead of the model; field names as in peft."""

    r: Count = _field(0, "rank of the adapter; 0: train the model itself; set optim.lr >= 1e-5")
    lora_alpha: PositiveInt = _field(32, "the update is scaled by lora_alpha / r")
    target_modules: tuple[str, ...] = _field((), "suffixes of layer names; (): all but the head")


class ModelConfig(Section):
    path: str = _field("tiny", "hub name, model folder, or 'tiny' for the built-in model")
    dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "dtype of the weights; auto: bfloat16 on CUDA, else float32"
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = _field(
        "auto", "attention over packed rows"
    )
    checkpointing: bool = _field(False, "recompute activations in the backward pass to save memory")
    liger: Literal["auto"] | bool = _field(
        "auto", "Liger kernels for norm, rotary embedding and MLP; auto: on CUDA"
    )
    compile: bool = _field(False, "use torch.compile, without the head")
    renderer: str = _field(
        "template", "'template': the model's chat template; else a name in the package renderers"
    )
    template_options: dict[str, bool | int | float | str] = _field(
        {}, "variables of the chat template, such as enable_thinking = false"
    )
    lora: LoraConfig = LoraConfig()


class RewardConfig(Section):
    """One entry of `[[env.rewards]]`: a function added to the rewards of the environment."""

    function: str = Field(description="a built-in reward, or 'module:function' of your own")
    on: Literal["turn", "call", "outcome"] = _field(
        "outcome", "score every turn, turns with tool calls, or the trajectory"
    )
    weight: float = _field(1.0, "factor of the returned reward")
    deadline_s: PositiveFloat = _field(10.0, "seconds per call; a late reward fails the rollout")
    name: str = _field("", "name in the metrics; '': the function's name")
    options: dict[str, Any] = _field({}, "arguments of the function")


class EnvConfig(Section):
    name: str = _field("lookup", "a built-in environment, or 'module:Class' of your own")
    options: dict[str, Any] = _field({}, "arguments of the class")
    rewards: tuple[RewardConfig, ...] = _field((), "more reward functions, as [[env.rewards]]")
    max_turns: PositiveInt = _field(4, "turns per trajectory")
    tool_timeout_s: PositiveFloat = _field(10.0, "seconds per tool call")


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = _field(16, "groups per training step")
    group_size: PositiveInt = _field(8, "rollouts per prompt")
    max_new_tokens: PositiveInt = _field(256, "sampled tokens per turn")
    max_context: PositiveInt = _field(2048, "tokens per trajectory, prompt included")
    temperature: PositiveFloat = _field(1.0, "sampling temperature")
    oversample: Share = _field(0.0, "share of extra prompts per step; the slowest are dropped")
    refill_waves: Count = _field(
        0, "replace groups without signal, up to this many × prompts_per_step"
    )
    overlong: Literal["train", "mask", "penalty"] = _field(
        "train", "trajectories cut by a limit: train, leave out, or penalise long turns"
    )
    overlong_buffer: PositiveInt = _field(
        64, "last tokens of a turn, over which the penalty grows to 1"
    )
    max_error_share: Share = _field(0.2, "a larger share of failed rollouts ends the run")
    trajectory_timeout_s: PositiveFloat = _field(600.0, "a slower trajectory counts as failed")
    step_timeout_s: PositiveFloat = _field(3600.0, "slower rollouts of a step end the run")


class SamplerConfig(Section):
    backend: Literal["auto", "vllm", "local"] = _field(
        "auto", "auto: vLLM if it can be used, else the trainer's own model"
    )
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = _field(
        0.45, "the sampler's share of the GPU memory"
    )
    max_sequences: PositiveInt = _field(256, "rollouts that generate at the same time")
    sleep: bool = _field(True, "free vLLM's memory during training (CUDA, no overlap)")
    probe_tolerance: PositiveFloat | None = _field(
        None, "largest log-prob gap between sampler and trainer; None: depends on the dtype"
    )


class CreditConfig(Section):
    rule: str = _field("mt_grpo", "credit rule; see the README for the list")
    options: dict[str, Any] = _field({}, "arguments of the rule")


class LossConfig(Section):
    clip_low: Annotated[float, Field(gt=0, le=1)] = _field(
        0.2, "lower limit of the ratio: 1 - clip_low"
    )
    clip_high: PositiveFloat = _field(0.2, "upper limit of the ratio: 1 + clip_high")
    ratio: Literal["token", "turn", "sequence"] = _field("token", "unit of the importance ratio")
    kind: Literal["ppo", "cispo"] = _field("ppo", "clipped objective")
    dual_clip: Annotated[float, Field(gt=1)] | None = _field(
        None, "upper bound on the ratio where the advantage is negative"
    )
    entropy_coef: float = _field(0.0, "weight of the entropy bonus")
    kl_coef: NonNegative = _field(0.0, "weight of the KL term (k3); 0: no reference policy")
    reference: str = _field("start", "reference policy: 'start' (the initial model) or a folder")
    is_cap: PositiveFloat | None = _field(
        None, "cap of the importance weight between trainer and sampler; None: no weight"
    )
    old_logprobs: Literal["trainer", "sampler"] = _field(
        "trainer", "log-probs in the denominator of the ratio"
    )
    max_logprob_gap: PositiveFloat = _field(0.02, "largest mean gap with old_logprobs = 'sampler'")
    normalizer: Literal["token", "sequence", "constant"] = _field(
        "token", "unit that the loss is averaged over"
    )
    impl: Literal["auto", "reference", "cpp", "triton"] = _field(
        "auto", "implementation of the loss head"
    )


class CriticConfig(Section):
    """For the rules in `VALUE_RULES` only."""

    lr_factor: PositiveFloat = _field(10.0, "learning rate as a multiple of optim.lr")
    coef: NonNegative = _field(0.5, "weight of the value loss")
    clip: PositiveFloat | None = _field(0.2, "largest change of a value within a step")


class OptimConfig(Section):
    lr: PositiveFloat = _field(1e-6, "learning rate of AdamW, constant after the warm-up")
    betas: tuple[Momentum, Momentum] = _field((0.9, 0.99), "betas of AdamW")
    weight_decay: NonNegative = _field(0.0, "decoupled weight decay")
    warmup_steps: Count = _field(20, "steps of linear warm-up")
    grad_clip: PositiveFloat = _field(0.1, "largest norm of the gradient")
    state: Literal["float32", "bfloat16"] = _field("float32", "dtype of AdamW's moments")


class TrainConfig(Section):
    steps: PositiveInt = _field(300, "training steps")
    updates_per_step: PositiveInt = _field(1, "optimizer steps on each step's rollouts")
    tokens_per_microbatch: PositiveInt = _field(16384, "bounds the memory, not the result")
    overlap: bool = _field(False, "roll out the next step during training; needs loss.is_cap")
    share_prefixes: bool = _field(True, "compute the common prefix of several rows once")
    seed: int = _field(0, "seed of data order, sampling and new weights")
    device: Literal["auto", "cpu", "cuda"] = _field("auto", "auto: CUDA if available")
    eval_every: Count = _field(20, "steps between evaluations; 0: at the start and the end only")
    eval_tasks: PositiveInt = _field(128, "held-out tasks per evaluation")
    save_every: Count = _field(50, "steps between checkpoints; 0: at the end only")
    keep_checkpoints: PositiveInt = _field(2, "newest checkpoints to keep")
    log_rollouts: Count = _field(4, "groups per step in rollouts.jsonl")
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = _field(
        (), "trackers that get a copy of the metrics"
    )


class SftConfig(Section):
    data: str = _field("", "JSONL file of conversations; '': the environment's demonstrations")
    steps: PositiveInt = _field(600, "optimizer steps")
    lr: PositiveFloat = _field(
        1e-5, "initial learning rate, decays to 0; 1e-4 for an adapter, 1e-3 for 'tiny'"
    )
    batch_tokens: PositiveInt = _field(8192, "tokens per optimizer step; bounds the memory")


class Config(Section):
    """A whole recipe; each part of a run gets its own section."""

    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampler: SamplerConfig = SamplerConfig()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    critic: CriticConfig = CriticConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
