"""Settings that are right one by one and cannot work together, or of which one does nothing.

A function per pair: the whole recipe in, what to tell the user out, None where nothing is wrong.
The text begins with the name of the field to change and ends with the way out.

A setting that would do nothing is refused where it differs from its default, and not where it was
merely written down: the config.toml of a run holds every field, and has to be read again.
"""

from __future__ import annotations

from collections.abc import Callable

from .schema import VALUE_RULES, Config, CriticConfig, Section


def refusals(config: Config) -> list[str]:
    """What is wrong with a recipe whose fields are each in order; empty where nothing is."""
    return [told for pair in PAIRS if (told := pair(config)) is not None]


def _group_of_one(config: Config) -> str | None:
    if config.rollout.group_size >= 2 or config.credit.rule in VALUE_RULES:
        return None
    return (
        "rollout.group_size: 1 rollout has no baseline, its advantage is always 0; set it to 2 or "
        "more, or take a rule with a critic, credit.rule = 'mt_ppo'"
    )


def _frozen_head_beside_adapter(config: Config) -> str | None:
    if not (config.model.freeze_head and config.model.lora.r):
        return None
    return (
        "model.freeze_head: with model.lora.r nothing but the adapter is trained, and the head has "
        "none; leave it at false"
    )


def _adapter_of_rank_0(config: Config) -> str | None:
    lora = config.model.lora
    name = _changed(lora, "lora_alpha", "target_modules")
    if lora.r or name is None:
        return None
    return (
        f"model.lora.{name}: there is no adapter with model.lora.r = 0; set that (such as 32), or "
        f"leave {name} out"
    )


def _template_options_of_a_renderer(config: Config) -> str | None:
    if not config.model.template_options or config.model.renderer == "template":
        return None
    return (
        f"model.template_options: model.renderer = {config.model.renderer!r} takes the place of "
        "the chat template that they are for; leave them out, or set the renderer to 'template'"
    )


def _refills_for_a_critic(config: Config) -> str | None:
    if not config.rollout.refill_waves or config.credit.rule not in VALUE_RULES:
        return None
    return (
        f"rollout.refill_waves: every rollout teaches the critic of {config.credit.rule}, none is "
        "without signal; leave it at 0"
    )


def _critic_without_a_rule(config: Config) -> str | None:
    name = _changed(config.critic, *CriticConfig.model_fields)
    if config.credit.rule in VALUE_RULES or name is None:
        return None
    return (
        f"critic.{name}: credit.rule = {config.credit.rule!r} has no critic; leave it out, or take "
        f"one of the rules {' and '.join(VALUE_RULES)}"
    )


def _ratio_of_turns_with_token_credit(config: Config) -> str | None:
    if config.credit.rule != "mt_ppo" or config.loss.ratio != "turn":
        return None
    return (
        "loss.ratio: 'turn' needs one advantage per turn, mt_ppo has one per token; take 'token' "
        "or 'sequence', or credit.rule = 'turn_ppo'"
    )


def _reference_without_kl(config: Config) -> str | None:
    if config.loss.reference == "start" or config.loss.kl_coef:
        return None
    return (
        f"loss.reference: {config.loss.reference!r} is never looked at with loss.kl_coef = 0; set "
        "that, or leave the reference out"
    )


def _dual_clip_of_another_kind(config: Config) -> str | None:
    if config.loss.dual_clip is None or config.loss.kind == "ppo":
        return None
    return f"loss.dual_clip: loss.kind = {config.loss.kind!r} has no such clip; leave it out"


def _weight_of_reused_logprobs(config: Config) -> str | None:
    if config.loss.old_logprobs != "sampler" or config.loss.is_cap is None:
        return None
    return (
        "loss.is_cap: the importance weight is always 1 where the sampler's log-probs are reused; "
        "leave it out, or set loss.old_logprobs = 'trainer'"
    )


def _gap_of_logprobs_not_reused(config: Config) -> str | None:
    name = _changed(config.loss, "max_logprob_gap")
    if config.loss.old_logprobs == "sampler" or name is None:
        return None
    return (
        f"loss.{name}: with loss.old_logprobs = 'trainer' no log-probs of the sampler are reused; "
        "leave it out, or set that to 'sampler'"
    )


def _overlong_buffer(config: Config) -> str | None:
    rollout = config.rollout
    if rollout.overlong != "penalty":
        if _changed(rollout, "overlong_buffer") is None:
            return None
        return (
            f"rollout.overlong_buffer: rollout.overlong = {rollout.overlong!r} has no penalty to "
            "grow; leave it out, or set that to 'penalty'"
        )
    if rollout.overlong_buffer <= rollout.max_new_tokens:
        return None
    return (
        f"rollout.overlong_buffer: {rollout.overlong_buffer} is more than rollout.max_new_tokens = "
        f"{rollout.max_new_tokens}; every turn would pay"
    )


def _filtered_samples(config: Config) -> str | None:
    if config.rollout.top_p == 1.0:
        return None
    return (
        "rollout.top_p: below 1 the sampled distribution is not the trained one and the ratio is "
        "biased; leave it at 1.0 and use rollout.temperature"
    )


def _no_room_for_a_prompt(config: Config) -> str | None:
    rollout = config.rollout
    if rollout.max_new_tokens < rollout.max_context:
        return None
    return (
        f"rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt in "
        f"rollout.max_context = {rollout.max_context}"
    )


def _sampler_that_always_sleeps(config: Config) -> str | None:
    if config.sampler.backend != "local" or config.sampler.sleep:
        return None
    return (
        "sampler.sleep: sampler.backend = 'local' always frees its cache while a GPU trains; leave "
        "sleep at true"
    )


def _overlap_without_weight(config: Config) -> str | None:
    if not config.train.overlap or config.loss.is_cap is not None:
        return None
    return (
        "train.overlap: its rollouts are one step older than the weights they train, which needs "
        "an importance weight; set loss.is_cap (such as 2.0), or leave overlap off"
    )


def _attention_without_trees(config: Config) -> str | None:
    if not config.train.share_prefixes or config.model.attention not in ("flash", "varlen"):
        return None
    return (
        f"model.attention: {config.model.attention!r} cannot attend over rows that share a prefix; "
        "leave it at 'auto', or set train.share_prefixes = false"
    )


def _microbatch_below_a_row(config: Config) -> str | None:
    if config.train.tokens_per_microbatch >= config.rollout.max_context:
        return None
    return (
        f"train.tokens_per_microbatch: {config.train.tokens_per_microbatch} cannot hold one row of "
        f"rollout.max_context = {config.rollout.max_context} tokens"
    )


def _changed(section: Section, *names: str) -> str | None:
    """The first of these fields that differs from its default."""
    fields = type(section).model_fields
    return next((name for name in names if getattr(section, name) != fields[name].default), None)


PAIRS: tuple[Callable[[Config], str | None], ...] = (
    _group_of_one,
    _frozen_head_beside_adapter,
    _adapter_of_rank_0,
    _template_options_of_a_renderer,
    _refills_for_a_critic,
    _critic_without_a_rule,
    _ratio_of_turns_with_token_credit,
    _reference_without_kl,
    _dual_clip_of_another_kind,
    _weight_of_reused_logprobs,
    _gap_of_logprobs_not_reused,
    _overlong_buffer,
    _filtered_samples,
    _no_room_for_a_prompt,
    _sampler_that_always_sleeps,
    _overlap_without_weight,
    _attention_without_trees,
    _microbatch_below_a_row,
)
