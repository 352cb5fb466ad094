"""What a run can be told: one frozen record, a section per room, checked whole before a run.

Every field is checked for type and range here; the pairs that cannot work together are in pairs.py,
and how a record is read from TOML and flags, with both checks, in recipe.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


VALUE_RULES = ("mt_ppo", "turn_ppo")
"""Credit rules that compare a rollout with a critic's values, not with other rollouts."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


class LoraConfig(Section):
    """An adapter that is trained in the place of the model; the names are peft's."""

    r: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="rank of an adapter to train instead of the model; wants optim.lr >= 1e-5",
    )
    lora_alpha: PositiveInt = Field(default=32, description="it counts lora_alpha / r")
    target_modules: tuple[str, ...] = Field(
        default=(), description="ends of layers' names; default: all linear ones but the head"
    )


class ModelConfig(Section):
    path: str = Field(
        default="tiny", description="hub name, local folder, or 'tiny' for the built-in one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    freeze_head: bool = Field(default=False, description="train all but the output projection")
    checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass"
    )
    liger: Literal["auto"] | bool = Field(
        default="auto", description="Liger's norm, rotary and MLP kernels; auto: on CUDA"
    )
    compile: bool = Field(default=False, description="torch.compile of the model's body")
    renderer: str = Field(
        default="template", description="or, of the package renderers, 'auto' or a name of its"
    )
    template_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="for the chat template, such as enable_thinking = false"
    )
    lora: LoraConfig = LoraConfig()


class RewardConfig(Section):
    """One entry of `[[env.rewards]]`: a function that adds to the rewards of the environment."""

    function: str = Field(description="a built-in one, or 'module:function' of your own")
    on: Literal["turn", "call", "outcome"] = Field(
        default="outcome", description="scores every turn, turns with tool calls, or the whole"
    )
    weight: float = 1.0
    deadline_s: PositiveFloat = 10.0
    name: str = Field(default="", description="its name in the metrics; default the function's")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the function")


class EnvConfig(Section):
    name: str = Field(default="lookup", description="a built-in one, or 'module:Class' of your own")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the class")
    rewards: tuple[RewardConfig, ...] = Field(
        default=(), description="further reward functions, [[env.rewards]]"
    )
    max_turns: PositiveInt = Field(default=4, description="a rollout ends there and is scored")
    tool_timeout_s: PositiveFloat = Field(default=10.0, description="per tool call")


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 16
    group_size: PositiveInt = Field(default=8, description="rollouts per prompt")
    max_new_tokens: PositiveInt = Field(default=256, description="per turn")
    max_context: PositiveInt = Field(
        default=2048, description="prompt, replies and samples together"
    )
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="only 1 can be trained on; refused below"
    )
    oversample: Share = Field(
        default=0.0, description="share of prompts started beyond those a step waits for"
    )
    refill_waves: Annotated[int, Field(ge=0)] = Field(
        default=0, description="replace groups without signal, by at most so many × prompts"
    )
    overlong: Literal["train", "mask", "penalty"] = Field(
        default="train", description="for rollouts cut off by a limit; 'penalty': by length of turn"
    )
    overlong_buffer: PositiveInt = Field(
        default=64, description="tokens before max_new_tokens over which the penalty grows to 1"
    )
    max_error_share: Share = Field(
        default=0.2, description="more failed rollouts in a step end the run"
    )
    trajectory_timeout_s: PositiveFloat = Field(
        default=600.0, description="a rollout that takes longer counts as failed"
    )
    step_timeout_s: PositiveFloat = Field(
        default=3600.0, description="rollouts of a step that take longer end the run"
    )


class SamplerConfig(Section):
    backend: Literal["auto", "vllm", "local"] = "auto"
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.45, description="share of a GPU's memory for the engine"
    )
    max_sequences: PositiveInt = Field(
        default=256, description="rollouts that generate at the same time"
    )
    sleep: bool = Field(
        default=True, description="free the engine's memory while training (CUDA, without overlap)"
    )
    probe_tolerance: PositiveFloat | None = Field(
        default=None, description="largest log-prob gap between sampler and trainer; None: by dtype"
    )


class CreditConfig(Section):
    rule: str = Field(
        default="mt_grpo", description="mt_grpo_unbiased, return_to_go, grpo_or, …: see the README"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the rule")


class LossConfig(Section):
    clip_low: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="the ratio is clipped to 1 - clip_low …"
    )
    clip_high: PositiveFloat = Field(default=0.2, description="… 1 + clip_high")
    ratio: Literal["token", "turn", "sequence"] = "token"
    kind: Literal["ppo", "cispo"] = "ppo"
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="bound on the ratio's effect where the advantage is negative"
    )
    entropy_coef: float = Field(default=0.0, description="weight of the entropy bonus")
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the k3 KL to the reference; 0 loads no reference"
    )
    reference: str = Field(default="start", description="'start', or the folder of a model")
    is_cap: PositiveFloat | None = Field(
        default=None, description="truncated importance weight's cap"
    )
    old_logprobs: Literal["trainer", "sampler"] = Field(
        default="trainer", description="of the ratio's denominator: of the first pass, or reused"
    )
    max_logprob_gap: PositiveFloat = Field(
        default=0.02, description="largest mean gap at which the sampler's can be reused"
    )
    normalizer: Literal["token", "sequence", "constant"] = "token"
    impl: Literal["auto", "reference", "cpp", "triton"] = "auto"


class CriticConfig(Section):
    """For the rules mt_ppo and turn_ppo; others have no critic."""

    lr_factor: PositiveFloat = Field(default=10.0, description="its rate over optim.lr")
    coef: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="weight of the value loss beside the policy's"
    )
    clip: PositiveFloat | None = Field(
        default=0.2, description="how far a value may leave its old one within a step"
    )


class OptimConfig(Section):
    lr: PositiveFloat = Field(default=1e-6, description="AdamW's; constant after the warm-up")
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    grad_clip: PositiveFloat = Field(default=0.1, description="largest norm of the gradient")
    state: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of AdamW's moments"
    )


class TrainConfig(Section):
    steps: PositiveInt = 300
    updates_per_step: PositiveInt = Field(
        default=1, description="optimizer steps on each step's rollouts"
    )
    tokens_per_microbatch: PositiveInt = Field(
        default=16384, description="memory is bounded by it; the result does not depend on it"
    )
    overlap: bool = Field(
        default=False, description="roll out the next step while this one trains; needs loss.is_cap"
    )
    share_prefixes: bool = Field(
        default=True, description="compute what several rows begin with once"
    )
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: Annotated[int, Field(ge=0)] = Field(
        default=20, description="0: only first and last"
    )
    eval_tasks: PositiveInt = Field(default=128, description="held-out tasks per evaluation")
    save_every: Annotated[int, Field(ge=0)] = Field(default=50, description="0: only at the end")
    keep_checkpoints: PositiveInt = 2
    log_rollouts: Annotated[int, Field(ge=0)] = Field(
        default=4, description="groups written per step"
    )
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="where else the metrics go"
    )


class SftConfig(Section):
    data: str = Field(
        default="", description="JSONL file of conversations; '': the environment's demonstrations"
    )
    steps: PositiveInt = 600
    lr: PositiveFloat = Field(
        default=1e-5, description="falls to 0; an adapter wants ten times that, 'tiny' a hundred"
    )
    batch_tokens: PositiveInt = Field(
        default=8192, description="of an optimizer step, and of its memory"
    )


class Config(Section):
    """A whole recipe; one section per room, and each room is handed only its own."""

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
