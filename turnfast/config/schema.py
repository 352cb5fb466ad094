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


class LoraConfig(Section):
    """A LoRA adapter, trained instead of the model; field names as in peft."""

    r: Count = Field(
        default=0,
        description="rank of the adapter; 0: train the model itself; set optim.lr >= 1e-5",
    )
    lora_alpha: PositiveInt = Field(
        default=32, description="the update is scaled by lora_alpha / r"
    )
    target_modules: tuple[str, ...] = Field(
        default=(), description="suffixes of layer names; (): all linear layers except the head"
    )


class ModelConfig(Section):
    path: str = Field(
        default="tiny", description="hub name, model folder, or 'tiny' for the built-in model"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of the weights; auto: bfloat16 on CUDA, else float32"
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = Field(
        default="auto", description="attention over packed rows"
    )
    freeze_head: bool = Field(default=False, description="do not train the output projection")
    checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    liger: Literal["auto"] | bool = Field(
        default="auto", description="Liger kernels for norm, rotary embedding, MLP; auto: on CUDA"
    )
    compile: bool = Field(default=False, description="use torch.compile, without the head")
    renderer: str = Field(
        default="template",
        description="'template': the model's chat template; else a name in the package renderers",
    )
    template_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="variables of the chat template, such as enable_thinking = false",
    )
    lora: LoraConfig = LoraConfig()


class RewardConfig(Section):
    """One entry of `[[env.rewards]]`: a function added to the rewards of the environment."""

    function: str = Field(description="a built-in reward, or 'module:function' of your own")
    on: Literal["turn", "call", "outcome"] = Field(
        default="outcome", description="score every turn, turns with tool calls, or the trajectory"
    )
    weight: float = 1.0
    deadline_s: PositiveFloat = 10.0
    name: str = Field(default="", description="name in the metrics; '': the function's name")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the function")


class EnvConfig(Section):
    name: str = Field(
        default="lookup", description="a built-in environment, or 'module:Class' of your own"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the class")
    rewards: tuple[RewardConfig, ...] = Field(
        default=(), description="more reward functions, as [[env.rewards]]"
    )
    max_turns: PositiveInt = Field(default=4, description="turns per trajectory")
    tool_timeout_s: PositiveFloat = Field(default=10.0, description="seconds per tool call")


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = Field(default=16, description="groups per training step")
    group_size: PositiveInt = Field(default=8, description="rollouts per prompt")
    max_new_tokens: PositiveInt = Field(default=256, description="sampled tokens per turn")
    max_context: PositiveInt = Field(
        default=2048, description="tokens per trajectory: prompt, replies and sampled tokens"
    )
    temperature: PositiveFloat = Field(default=1.0, description="sampling temperature")
    oversample: Share = Field(
        default=0.0, description="extra prompts started per step, as a share; the slowest wait"
    )
    refill_waves: Count = Field(
        default=0,
        description="replace groups without signal, by up to this many times prompts_per_step",
    )
    overlong: Literal["train", "mask", "penalty"] = Field(
        default="train", description="what to do with trajectories cut off by a limit"
    )
    overlong_buffer: PositiveInt = Field(
        default=64, description="tokens before max_new_tokens over which the penalty grows to 1"
    )
    max_error_share: Share = Field(
        default=0.2, description="end the run if a larger share of a step's rollouts fails"
    )
    trajectory_timeout_s: PositiveFloat = Field(
        default=600.0, description="a trajectory that takes longer counts as failed"
    )
    step_timeout_s: PositiveFloat = Field(
        default=3600.0, description="end the run if the rollouts of a step take longer"
    )


class SamplerConfig(Section):
    backend: Literal["auto", "vllm", "local"] = Field(
        default="auto", description="auto: vLLM if it can be used, else the trainer's own model"
    )
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.45, description="the sampler's share of the GPU memory"
    )
    max_sequences: PositiveInt = Field(
        default=256, description="rollouts that generate at the same time"
    )
    sleep: bool = Field(
        default=True, description="free the sampler's memory during training (CUDA, no overlap)"
    )
    probe_tolerance: PositiveFloat | None = Field(
        default=None,
        description="largest log-prob gap between sampler and trainer; None: depends on the dtype",
    )


class CreditConfig(Section):
    rule: str = Field(default="mt_grpo", description="credit rule; see the README for the list")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the rule")


class LossConfig(Section):
    clip_low: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="the ratio is clipped below 1 - clip_low"
    )
    clip_high: PositiveFloat = Field(
        default=0.2, description="the ratio is clipped above 1 + clip_high"
    )
    ratio: Literal["token", "turn", "sequence"] = Field(
        default="token", description="unit of the importance ratio"
    )
    kind: Literal["ppo", "cispo"] = Field(default="ppo", description="clipped objective")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="upper bound on the ratio where the advantage is negative"
    )
    entropy_coef: float = Field(default=0.0, description="weight of the entropy bonus")
    kl_coef: NonNegative = Field(
        default=0.0, description="weight of the KL term (k3); 0: no reference policy is loaded"
    )
    reference: str = Field(
        default="start", description="reference policy: 'start' (the initial model) or a folder"
    )
    is_cap: PositiveFloat | None = Field(
        default=None, description="cap of the importance weight between trainer and sampler"
    )
    old_logprobs: Literal["trainer", "sampler"] = Field(
        default="trainer", description="whose log-probs are the ratio's denominator"
    )
    max_logprob_gap: PositiveFloat = Field(
        default=0.02, description="largest mean gap at which the sampler's can be reused"
    )
    normalizer: Literal["token", "sequence", "constant"] = Field(
        default="token", description="what the loss is averaged over"
    )
    impl: Literal["auto", "reference", "cpp", "triton"] = Field(
        default="auto", description="implementation of the loss head"
    )


class CriticConfig(Section):
    """For the rules in `VALUE_RULES` only."""

    lr_factor: PositiveFloat = Field(
        default=10.0, description="learning rate of the critic, as a multiple of optim.lr"
    )
    coef: NonNegative = Field(default=0.5, description="weight of the value loss")
    clip: PositiveFloat | None = Field(
        default=0.2, description="largest change of a value within a step"
    )


class OptimConfig(Section):
    lr: PositiveFloat = Field(
        default=1e-6, description="learning rate of AdamW, constant after the warm-up"
    )
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.99), description="betas of AdamW")
    weight_decay: NonNegative = Field(default=0.0, description="decoupled weight decay")
    warmup_steps: Count = Field(default=20, description="steps of linear warm-up")
    grad_clip: PositiveFloat = Field(default=0.1, description="largest norm of the gradient")
    state: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of AdamW's moments"
    )


class TrainConfig(Section):
    steps: PositiveInt = Field(default=300, description="training steps")
    updates_per_step: PositiveInt = Field(
        default=1, description="optimizer steps on each step's rollouts"
    )
    tokens_per_microbatch: PositiveInt = Field(
        default=16384, description="bounds the memory; does not change the result"
    )
    overlap: bool = Field(
        default=False, description="roll out the next step during training; needs loss.is_cap"
    )
    share_prefixes: bool = Field(
        default=True, description="compute the common prefix of several rows once"
    )
    seed: int = Field(default=0, description="seed of data order, sampling and new weights")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA if available"
    )
    eval_every: Count = Field(
        default=20, description="steps between evaluations; 0: at the start and the end only"
    )
    eval_tasks: PositiveInt = Field(default=128, description="held-out tasks per evaluation")
    save_every: Count = Field(
        default=50, description="steps between checkpoints; 0: at the end only"
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="newest checkpoints to keep")
    log_rollouts: Count = Field(default=4, description="groups per step in rollouts.jsonl")
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="trackers that get a copy of the metrics"
    )


class SftConfig(Section):
    data: str = Field(
        default="", description="JSONL file of conversations; '': the environment's demonstrations"
    )
    steps: PositiveInt = Field(default=600, description="optimizer steps")
    lr: PositiveFloat = Field(
        default=1e-5,
        description="initial learning rate, decays to 0; 1e-4 for an adapter, 1e-3 for 'tiny'",
    )
    batch_tokens: PositiveInt = Field(
        default=8192, description="tokens per optimizer step; bounds the memory"
    )


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
