"""Settings that cannot work together, and settings that would do nothing, are refused by name."""

from __future__ import annotations

import tomllib

import pytest

from turnfast.config.conflicts import PAIRS, refusals
from turnfast.config.recipe import build_config, load_config, to_toml
from turnfast.config.schema import Config
from turnfast.errors import ConfigError

REFUSED = [
    ({"rollout": {"group_size": 1}}, "rollout.group_size: 1 rollout has no baseline"),
    ({"model": {"freeze_head": True, "lora": {"r": 4}}}, "model.freeze_head: with model.lora.r"),
    ({"model": {"lora": {"lora_alpha": 16}}}, "model.lora.lora_alpha: there is no adapter"),
    (
        {"model": {"lora": {"target_modules": ("q_proj",)}}},
        "model.lora.target_modules: there is no adapter",
    ),
    (
        {"model": {"renderer": "qwen3", "template_options": {"enable_thinking": False}}},
        "model.template_options: model.renderer = 'qwen3' takes the place",
    ),
    (
        {"rollout": {"refill_waves": 1}, "credit": {"rule": "turn_ppo"}},
        "rollout.refill_waves: every rollout teaches the critic of turn_ppo",
    ),
    ({"critic": {"lr_factor": 5.0}}, "critic.lr_factor: credit.rule = 'mt_grpo' has no critic"),
    ({"critic": {"clip": 0.1}}, "critic.clip: credit.rule = 'mt_grpo' has no critic"),
    ({"credit": {"rule": "mt_ppo"}, "loss": {"ratio": "turn"}}, "loss.ratio: 'turn' needs one"),
    ({"loss": {"reference": "elsewhere"}}, "loss.reference: 'elsewhere' is never looked at"),
    ({"loss": {"dual_clip": 3.0, "kind": "cispo"}}, "loss.dual_clip: loss.kind = 'cispo'"),
    ({"loss": {"is_cap": 2.0, "old_logprobs": "sampler"}}, "loss.is_cap: the importance weight"),
    ({"loss": {"max_logprob_gap": 0.1}}, "loss.max_logprob_gap: with loss.old_logprobs = 'trai"),
    ({"rollout": {"overlong_buffer": 32}}, "rollout.overlong_buffer: rollout.overlong = 'train'"),
    (
        {"rollout": {"overlong_buffer": 32, "overlong": "mask"}},
        "rollout.overlong_buffer: rollout.overlong = 'mask' has no penalty",
    ),
    (
        {"rollout": {"overlong": "penalty", "max_new_tokens": 32}},
        "rollout.overlong_buffer: 64 is more than rollout.max_new_tokens = 32",
    ),
    ({"rollout": {"top_p": 0.9}}, "rollout.top_p: below 1"),
    ({"rollout": {"max_new_tokens": 2048}}, "rollout.max_new_tokens: 2048 leaves no room"),
    ({"sampler": {"backend": "local", "sleep": False}}, "sampler.sleep: sampler.backend = 'local'"),
    ({"train": {"overlap": True}}, "train.overlap: its rollouts are one step older"),
    ({"model": {"attention": "flash"}}, "model.attention: 'flash' cannot attend over rows"),
    ({"train": {"tokens_per_microbatch": 100}}, "train.tokens_per_microbatch: 100 cannot hold"),
]


@pytest.mark.parametrize(("tree", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_pair_is_refused_by_the_name_of_the_field_to_change(tree, said):
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    assert str(caught.value).startswith(f"config: {said}")
    assert len(str(caught.value).splitlines()) == 1


def test_every_pair_is_met_above():
    configs = [Config.model_validate(tree) for tree, _ in REFUSED]
    assert {pair for pair in PAIRS if any(map(pair, configs))} == set(PAIRS)


WORKS = [
    {"model": {"lora": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}}},
    {"credit": {"rule": "mt_ppo"}, "critic": {"lr_factor": 5.0, "clip": 0.1}},
    {"loss": {"max_logprob_gap": 0.1, "old_logprobs": "sampler"}},
    {"rollout": {"overlong": "penalty", "overlong_buffer": 32}},
    {"sampler": {"sleep": False}},
    {"model": {"template_options": {"enable_thinking": False, "date": "today", "depth": 2}}},
    {"loss": {"is_cap": 2.0}, "train": {"overlap": True}},
    {},
]


@pytest.mark.parametrize("tree", WORKS)
def test_where_the_setting_counts_it_is_taken_and_read_again(tree):
    """A run's config.toml holds every field, those of parts that are off as well."""
    config = build_config(tree)
    assert refusals(config) == []
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_all_pairs_are_told_at_once_and_a_flag_is_told_from_the_file(tmp_path):
    path = tmp_path / "search.toml"
    path.write_text("[critic]\ncoef = 1.0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--rollout.top-p", "0.9"])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}: critic.coef: ") and second.startswith("--rollout.top_p: ")
