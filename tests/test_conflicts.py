"""Conflicting fields and fields without effect are reported by name."""

from __future__ import annotations

import tomllib

import pytest

from turnfast.config.recipe import build_config, load_config, to_toml
from turnfast.errors import ConfigError


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"group_size": 1}}, "rollout.group_size: the advantage of a single rollout"),
        ({"model": {"lora": {"lora_alpha": 16}}}, "model.lora.lora_alpha: has no effect"),
        (
            {"model": {"lora": {"target_modules": ("q_proj",)}}},
            "model.lora.target_modules: has no effect",
        ),
        (
            {"model": {"renderer": "qwen3", "template_options": {"enable_thinking": False}}},
            "model.template_options: have no effect with model.renderer = 'qwen3'",
        ),
        (
            {"rollout": {"refill_waves": 1}, "credit": {"rule": "turn_ppo"}},
            "rollout.refill_waves: the critic of turn_ppo learns",
        ),
        ({"critic": {"lr_factor": 5.0}}, "critic.lr_factor: credit.rule = 'mt_grpo' has no critic"),
        ({"critic": {"clip": 0.1}}, "critic.clip: credit.rule = 'mt_grpo' has no critic"),
        ({"credit": {"rule": "mt_ppo"}, "loss": {"ratio": "turn"}}, "loss.ratio: 'turn' needs one"),
        ({"loss": {"reference": "elsewhere"}}, "loss.reference: 'elsewhere' has no effect"),
        (
            {"loss": {"dual_clip": 3.0, "kind": "cispo"}},
            "loss.dual_clip: has no effect with loss.kind = 'cispo'",
        ),
        (
            {"loss": {"is_cap": 2.0, "old_logprobs": "sampler"}},
            "loss.is_cap: the importance weight is always 1",
        ),
        ({"loss": {"max_logprob_gap": 0.1}}, "loss.max_logprob_gap: has no effect"),
        (
            {"rollout": {"overlong_buffer": 32}},
            "rollout.overlong_buffer: has no effect with rollout.overlong = 't",
        ),
        (
            {"rollout": {"overlong_buffer": 32, "overlong": "mask"}},
            "rollout.overlong_buffer: has no effect with rollout.overlong = 'mask'",
        ),
        (
            {"rollout": {"overlong": "penalty", "max_new_tokens": 32}},
            "rollout.overlong_buffer: 64 is more than rollout.max_new_tokens = 32",
        ),
        ({"rollout": {"max_new_tokens": 2048}}, "rollout.max_new_tokens: 2048 must be less"),
        ({"sampler": {"backend": "local", "sleep": False}}, "sampler.sleep: false has no effect"),
        ({"train": {"overlap": True}}, "train.overlap: the rollouts come from weights"),
        ({"model": {"attention": "flash"}}, "model.attention: 'flash' does not support shared"),
        ({"train": {"tokens_per_microbatch": 100}}, "train.tokens_per_microbatch: 100 is less"),
    ],
)
def test_a_conflict_names_the_field_to_change(sections, message):
    with pytest.raises(ConfigError) as caught:
        build_config(sections)
    assert str(caught.value).startswith(f"config: {message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"lora": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}}},
        {"credit": {"rule": "mt_ppo"}, "critic": {"lr_factor": 5.0, "clip": 0.1}},
        {"loss": {"max_logprob_gap": 0.1, "old_logprobs": "sampler"}},
        {"rollout": {"overlong": "penalty", "overlong_buffer": 32}},
        {"sampler": {"sleep": False}},
        {"model": {"template_options": {"enable_thinking": False, "date": "today", "depth": 2}}},
        {"loss": {"is_cap": 2.0}, "train": {"overlap": True}},
        {},
    ],
)
def test_fields_with_an_effect_are_accepted_and_config_toml_can_be_read_again(sections):
    config = build_config(sections)
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_all_conflicts_are_reported_with_their_file_or_flag(tmp_path):
    path = tmp_path / "search.toml"
    path.write_text("[critic]\ncoef = 1.0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--rollout.group-size", "1"])
    critic, group_size = str(caught.value).splitlines()
    assert critic.startswith(f"{path}: critic.coef: ")
    assert group_size.startswith("--rollout.group_size: ")
