"""Fields that are valid one by one and conflict with each other, or have no effect.

Each check takes the whole recipe and returns an error message, or None. The message begins with the
field to change and ends with the fix. A field without effect is an error only if it differs from
its default, because the config.toml of a run holds every field and must be readable again.
"""

from __future__ import annotations

from collections.abc import Callable

from .schema import VALUE_RULES, Config, CriticConfig, Section


def find_conflicts(config: Config) -> list[str]:
    """Return the messages of all checks that fail."""
    return [message for check in CHECKS if (message := check(config)) is not None]


def _group_of_one(config: Config) -> str | None:
    if config.rollout.group_size >= 2 or config.credit.rule in VALUE_RULES:
        return None
    return (
        "rollout.group_size: the advantage of a single rollout is always 0; set it to 2 or more, "
        "or use a rule with a critic, such as credit.rule = 'mt_ppo'"
    )


def _frozen_head_with_adapter(config: Config) -> str | None:
    if not (config.model.freeze_head and config.model.lora.r):
        return None
    return (
        "model.freeze_head: has no effect with model.lora.r, which trains the adapter only; set it "
        "to false"
    )


def _adapter_options_without_adapter(config: Config) -> str | None:
    lora = config.model.lora
    name = _changed(lora, "lora_alpha", "target_modules")
    if lora.r or name is None:
        return None
    return (
        f"model.lora.{name}: has no effect with model.lora.r = 0; remove it, or set model.lora.r "
        "(such as 32)"
    )


def _template_options_with_renderer(config: Config) -> str | None:
    if not config.model.template_options or config.model.renderer == "template":
        return None
    return (
        f"model.template_options: model.renderer = {config.model.renderer!r} does not use the chat "
        "template; remove them, or set model.renderer = 'template'"
    )


def _refills_with_critic(config: Config) -> str | None:
    if not config.rollout.refill_waves or config.credit.rule not in VALUE_RULES:
        return None
    return (
        f"rollout.refill_waves: the critic of {config.credit.rule} learns from every group, so "
        "none is replaced; set it to 0"
    )


def _critic_options_without_critic(config: Config) -> str | None:
    name = _changed(config.critic, *CriticConfig.model_fields)
    if config.credit.rule in VALUE_RULES or name is None:
        return None
    return (
        f"critic.{name}: credit.rule = {config.credit.rule!r} has no critic; remove it, or set "
        f"credit.rule to {' or '.join(map(repr, VALUE_RULES))}"
    )


def _turn_ratio_with_token_credit(config: Config) -> str | None:
    if config.credit.rule != "mt_ppo" or config.loss.ratio != "turn":
        return None
    return (
        "loss.ratio: 'turn' needs one advantage per turn, but mt_ppo gives one per token; set it "
        "to 'token' or 'sequence', or credit.rule = 'turn_ppo'"
    )


def _reference_without_kl(config: Config) -> str | None:
    if config.loss.reference == "start" or config.loss.kl_coef:
        return None
    return (
        f"loss.reference: {config.loss.reference!r} has no effect with loss.kl_coef = 0; set "
        "loss.kl_coef, or remove the reference"
    )


def _dual_clip_with_other_kind(config: Config) -> str | None:
    if config.loss.dual_clip is None or config.loss.kind == "ppo":
        return None
    return f"loss.dual_clip: has no effect with loss.kind = {config.loss.kind!r}; remove it"


def _importance_weight_of_reused_logprobs(config: Config) -> str | None:
    if config.loss.old_logprobs != "sampler" or config.loss.is_cap is None:
        return None
    return (
        "loss.is_cap: the importance weight is always 1 with loss.old_logprobs = 'sampler'; remove "
        "it, or set loss.old_logprobs = 'trainer'"
    )


def _logprob_gap_without_reuse(config: Config) -> str | None:
    name = _changed(config.loss, "max_logprob_gap")
    if config.loss.old_logprobs == "sampler" or name is None:
        return None
    return (
        f"loss.{name}: has no effect with loss.old_logprobs = 'trainer'; remove it, or set "
        "loss.old_logprobs = 'sampler'"
    )


def _overlong_buffer(config: Config) -> str | None:
    rollout = config.rollout
    if rollout.overlong != "penalty":
        if _changed(rollout, "overlong_buffer") is None:
            return None
        return (
            f"rollout.overlong_buffer: has no effect with rollout.overlong = {rollout.overlong!r}; "
            "remove it, or set rollout.overlong = 'penalty'"
        )
    if rollout.overlong_buffer <= rollout.max_new_tokens:
        return None
    return (
        f"rollout.overlong_buffer: {rollout.overlong_buffer} is more than rollout.max_new_tokens = "
        f"{rollout.max_new_tokens}, so every turn would be penalised; lower it"
    )


def _turn_longer_than_context(config: Config) -> str | None:
    rollout = config.rollout
    if rollout.max_new_tokens < rollout.max_context:
        return None
    return (
        f"rollout.max_new_tokens: {rollout.max_new_tokens} must be less than rollout.max_context = "
        f"{rollout.max_context}, which also holds the prompt; lower it"
    )


def _local_sampler_always_sleeps(config: Config) -> str | None:
    if config.sampler.backend != "local" or config.sampler.sleep:
        return None
    return (
        "sampler.sleep: false has no effect with sampler.backend = 'local', which always frees its "
        "cache during training; set it to true"
    )


def _overlap_without_importance_weight(config: Config) -> str | None:
    if not config.train.overlap or config.loss.is_cap is not None:
        return None
    return (
        "train.overlap: the rollouts come from weights that are one step old, which needs an "
        "importance weight; set loss.is_cap (such as 2.0), or overlap to false"
    )


def _attention_without_trees(config: Config) -> str | None:
    if not config.train.share_prefixes or config.model.attention not in ("flash", "varlen"):
        return None
    return (
        f"model.attention: {config.model.attention!r} does not support shared prefixes; set it to "
        "'auto', or train.share_prefixes = false"
    )


def _microbatch_smaller_than_row(config: Config) -> str | None:
    tokens, context = config.train.tokens_per_microbatch, config.rollout.max_context
    if tokens >= context:
        return None
    return (
        f"train.tokens_per_microbatch: {tokens} is less than one row of rollout.max_context = "
        f"{context} tokens; raise it, or lower rollout.max_context"
    )


def _changed(section: Section, *names: str) -> str | None:
    """The first of these fields that differs from its default."""
    fields = type(section).model_fields
    return next((name for name in names if getattr(section, name) != fields[name].default), None)


CHECKS: tuple[Callable[[Config], str | None], ...] = (
    _group_of_one,
    _frozen_head_with_adapter,
    _adapter_options_without_adapter,
    _template_options_with_renderer,
    _refills_with_critic,
    _critic_options_without_critic,
    _turn_ratio_with_token_credit,
    _reference_without_kl,
    _dual_clip_with_other_kind,
    _importance_weight_of_reused_logprobs,
    _logprob_gap_without_reuse,
    _overlong_buffer,
    _turn_longer_than_context,
    _local_sampler_always_sleeps,
    _overlap_without_importance_weight,
    _attention_without_trees,
    _microbatch_smaller_than_row,
)
