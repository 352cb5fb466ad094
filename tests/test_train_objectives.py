"""Whole runs with a critic or a reference, with the local sampler."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from training_runs import logged, recipe, training_lines, weights

from turnfast.config.recipe import build_config
from turnfast.errors import ConfigError
from turnfast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"train__steps": 16, "train__eval_every": 0, "train__save_every": 0}
GROUPS_OF_ONE = {"rollout__prompts_per_step": 16, "rollout__group_size": 1}


@pytest.mark.parametrize("rule", ["mt_ppo", "turn_ppo"])
def test_rules_with_a_critic_raise_the_reward_in_groups_of_one(letters_model, tmp_path, rule):
    config = recipe(
        letters_model, credit__rule=rule, credit__options={"whiten": True}, **GROUPS_OF_ONE, **LONG,
        train__tokens_per_microbatch=512,
    )  # fmt: skip
    train(config, tmp_path / "run")
    lines = training_lines(tmp_path / "run")
    rewards = [line["reward/turn"] + line["reward/outcome"] for line in lines]
    assert fmean(rewards[-4:]) > fmean(rewards[:4]) + 0.15, rewards
    assert all(line["value_loss"] >= 0 and "nonfinite" not in line for line in lines)
    assert lines[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    # the critic learns the value of early states
    assert lines[-1]["value"] > 0.3
    assert all(line["tokens_trained"] == line["tokens_sampled"] for line in lines)
    assert all(line["zero_signal_groups"] == 0.0 for line in lines)
    groups = map(json.loads, (tmp_path / "run" / "rollouts.jsonl").open())
    first = next(group for group in groups if group["split"] == "train")
    assert first["rule"] == rule and first["rollouts"][0]["turns"][0]["advantage"] is not None


def test_a_resumed_run_with_a_critic_equals_an_uninterrupted_run(letters_model, tmp_path):
    def run(name: str, *, steps: int, resume: bool = False) -> Path:
        config = recipe(letters_model, credit__rule="mt_ppo", train__steps=steps)
        train(config, tmp_path / name, resume=resume)
        return tmp_path / name

    straight = run("straight", steps=4)
    run("legs", steps=2)
    legs = run("legs", steps=4, resume=True)
    assert weights(straight, 4) == weights(legs, 4)
    critic = "checkpoints/step_000004/trainer/critic.safetensors"
    assert (straight / critic).read_bytes() == (legs / critic).read_bytes()
    assert logged(straight) == logged(legs)


def test_a_resumed_run_keeps_the_reference_of_its_start(letters_model, tmp_path):
    kl = {"loss__kl_coef": 0.1}
    train(recipe(letters_model, **kl), tmp_path / "straight")
    lines = training_lines(tmp_path / "straight")
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl"] > 1e-4
    train(recipe(letters_model, train__steps=2, **kl), tmp_path / "legs")
    train(recipe(letters_model, **kl), tmp_path / "legs", resume=True)
    assert weights(tmp_path / "legs", 4) == weights(tmp_path / "straight", 4)


def test_masked_rollouts_are_counted_but_not_failed(letters_model, tmp_path):
    # turns of two tokens have no end token: all are cut off
    changed = {"rollout__overlong": "mask", "rollout__max_new_tokens": 2, "train__steps": 1}
    train(recipe(letters_model, **changed), tmp_path / "run")
    (line,) = training_lines(tmp_path / "run")
    assert line["status/overlong"] > 0.5 and line["failed"] == 0.0


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"rollout": {"group_size": 1}}, r"rollout\.group_size: .* credit\.rule = 'mt_ppo'"),
        ({"credit": {"rule": "mt_ppo"}, "loss": {"ratio": "turn"}}, r"loss\.ratio: 'turn' needs"),
        (
            {"credit": {"rule": "mt_ppo"}, "rollout": {"refill_waves": 1}},
            r"rollout\.refill_waves: the critic of mt_ppo",
        ),
        ({"critic": {"lr_factor": 0.0}}, r"critic\.lr_factor"),
        ({"loss": {"kl_coef": -0.1}}, r"loss\.kl_coef"),
        ({"loss": {"reference": "other"}}, r"loss\.reference: 'other' has no effect"),
        ({"rollout": {"overlong": "drop"}}, r"rollout\.overlong"),
    ],
)
def test_conflicting_fields_are_refused(tree, words):
    with pytest.raises(ConfigError, match=words):
        build_config(tree)
    build_config({"credit": {"rule": "turn_ppo"}, "loss": {"ratio": "turn"}})
