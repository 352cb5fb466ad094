"""Fields that are valid one by one and conflict with each other, or have no effect.

A message begins with the field to change and ends with the fix. A field without effect is an error
only if it differs from its default, because the config.toml of a run holds every field and must be
readable again.
"""

from __future__ import annotations

from collections.abc import Iterator

from .schema import VALUE_RULES, Config, CriticConfig, Section


def find_conflicts(config: Config) -> Iterator[str]:
    """Yield one message per conflict."""
    rollout, loss, train = config.rollout, config.loss, config.train
    rule, has_critic = config.credit.rule, config.credit.rule in VALUE_RULES
    yield from _without_effect(config)
    if rollout.group_size < 2 and not has_critic:
        yield (
            "rollout.group_size: the advantage of a single rollout is always 0; set it to 2 or "
            "more, or use a rule with a critic, such as credit.rule = 'mt_ppo'"
        )
    if rollout.refill_waves and has_critic:
        yield (
            f"rollout.refill_waves: the critic of {rule} learns from every group, so none is "
            "replaced; set it to 0"
        )
    if rollout.max_new_tokens >= rollout.max_context:
        yield (
            f"rollout.max_new_tokens: {rollout.max_new_tokens} must be less than "
            f"rollout.max_context = {rollout.max_context}, which also holds the prompt; lower it"
        )
    if rollout.overlong == "penalty" and rollout.overlong_buffer > rollout.max_new_tokens:
        yield (
            f"rollout.overlong_buffer: {rollout.overlong_buffer} is more than "
            f"rollout.max_new_tokens = {rollout.max_new_tokens}, so every turn would be penalised; "
            "lower it"
        )
    if rule == "mt_ppo" and loss.ratio == "turn":
        yield (
            "loss.ratio: 'turn' needs one advantage per turn, but mt_ppo gives one per token; set "
            "it to 'token' or 'sequence', or credit.rule = 'turn_ppo'"
        )
    if train.overlap and loss.is_cap is None:
        yield (
            "train.overlap: the rollouts come from weights that are one step old, which needs an "
            "importance weight; set loss.is_cap (such as 2.0), or overlap to false"
        )
    if train.share_prefixes and config.model.attention in ("flash", "varlen"):
        yield (
            f"model.attention: {config.model.attention!r} does not support shared prefixes; set it "
            "to 'auto', or train.share_prefixes = false"
        )
    if train.tokens_per_microbatch < rollout.max_context:
        yield (
            f"train.tokens_per_microbatch: {train.tokens_per_microbatch} is less than one row of "
            f"rollout.max_context = {rollout.max_context} tokens; raise it, or lower "
            "rollout.max_context"
        )


def _without_effect(config: Config) -> Iterator[str]:
    model, loss, overlong = config.model, config.loss, config.rollout.overlong
    if not model.lora.r:
        for name in _changed(model.lora, "lora_alpha", "target_modules"):
            yield (
                f"model.lora.{name}: has no effect with model.lora.r = 0; remove it, or set "
                "model.lora.r (such as 32)"
            )
    if model.template_options and model.renderer != "template":
        yield (
            f"model.template_options: have no effect with model.renderer = {model.renderer!r}; "
            "remove them, or set model.renderer = 'template'"
        )
    if config.credit.rule not in VALUE_RULES:
        for name in _changed(config.critic, *CriticConfig.model_fields):
            yield (
                f"critic.{name}: credit.rule = {config.credit.rule!r} has no critic; remove it, or "
                f"set credit.rule to {' or '.join(map(repr, VALUE_RULES))}"
            )
    if loss.reference != "start" and not loss.kl_coef:
        yield (
            f"loss.reference: {loss.reference!r} has no effect with loss.kl_coef = 0; set "
            "loss.kl_coef, or remove the reference"
        )
    if loss.dual_clip is not None and loss.kind != "ppo":
        yield f"loss.dual_clip: has no effect with loss.kind = {loss.kind!r}; remove it"
    if loss.is_cap is not None and loss.old_logprobs == "sampler":
        yield (
            "loss.is_cap: the importance weight is always 1 with loss.old_logprobs = 'sampler'; "
            "remove it, or set loss.old_logprobs = 'trainer'"
        )
    if loss.old_logprobs == "trainer" and _changed(loss, "max_logprob_gap"):
        yield (
            "loss.max_logprob_gap: has no effect with loss.old_logprobs = 'trainer'; remove it, or "
            "set loss.old_logprobs = 'sampler'"
        )
    if overlong != "penalty" and _changed(config.rollout, "overlong_buffer"):
        yield (
            f"rollout.overlong_buffer: has no effect with rollout.overlong = {overlong!r}; remove "
            "it, or set rollout.overlong = 'penalty'"
        )
    if config.sampler.backend == "local" and not config.sampler.sleep:
        yield (
            "sampler.sleep: false has no effect with sampler.backend = 'local', which always frees "
            "its cache during training; set it to true"
        )


def _changed(section: Section, *names: str) -> list[str]:
    """Those of the fields that differ from their default."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]
