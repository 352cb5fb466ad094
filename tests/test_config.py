"""Reading and writing recipes, and the errors of wrong ones."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.config.recipe import (
    build_config,
    describe_fields,
    field_names,
    load_config,
    recipe_path,
    shipped_recipes,
    to_toml,
)
from turnfast.config.schema import Config
from turnfast.errors import ConfigError


@pytest.fixture
def recipe(tmp_path):
    def write(text: str):
        path = tmp_path / "search.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error_of(recipe, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, flags)
    return str(caught.value)


def test_shipped_recipes_are_valid_and_short():
    for name, path in shipped_recipes().items():
        load_config(name)
        settings = [
            line
            for line in path.read_text().splitlines()
            if line.strip() and not line.startswith(("#", "["))
        ]
        assert len(settings) < 20 and path.read_text().startswith("# ")


def test_fields_are_few_and_described():
    assert len(field_names()) <= 74
    lines = dict(line.split(maxsplit=1) for line in describe_fields())
    assert len(lines) == len(field_names())
    assert lines["--loss.ratio"].split(maxsplit=1)[1].startswith("token | turn | sequence; ")
    assert lines["--model.liger"].split(maxsplit=1)[1].startswith("Liger kernels")
    assert all(len(line.split()) > 2 for line in lines.values())


def test_flags_override_the_file(recipe):
    path = recipe('[loss]\nclip_high = 0.3\nratio = "turn"\n[env.options]\nhops = 1\n')
    flags = "--loss.clip-high 0.28 --env.options.hops=[1,2] --env.options.reasoning true"
    flags += " --model.path Qwen/Qwen2.5-7B --loss.entropy-coef -0.01 --optim.betas=[0.9,0.95]"
    flags += ' --train.sinks ["tensorboard"]'
    config = load_config(path, [*flags.split(), "--env.options.questions", "a = b.jsonl"])
    assert (config.loss.clip_high, config.loss.ratio) == (0.28, "turn")
    assert config.env.options == {"hops": [1, 2], "reasoning": True, "questions": "a = b.jsonl"}
    assert config.model.path == "Qwen/Qwen2.5-7B" and config.loss.entropy_coef == -0.01
    assert config.optim.betas == (0.9, 0.95) and config.train.sinks == ("tensorboard",)
    assert load_config(path, ["--train.seed=1", "--train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "[loss]\nclip_hihg = 0.3",
            "loss.clip_hihg: no such field; did you mean 'loss.clip_high'?",
        ),
        ("[los]\nclip_high = 0.3", "los: no such field; did you mean 'loss'?"),
        ("lr = 0.1", "lr: no such field; did you mean 'optim.lr' or 'sft.lr'?"),
        ("[loss]\nlr = 0.1", "loss.lr: no such field; did you mean 'optim.lr' or 'sft.lr'?"),
        ("[zzz]\nqqq = 1", "zzz: no such field; known: model, env, rollout"),
        ("[train]\nsteps = 1.5", "train.steps: "),
        ('[train]\nsteps = "3"', "train.steps: Input should be a valid integer (got '3')"),
        ("[train]\nsteps = true", "train.steps: "),
        ("[train]\nsteps = 0", "train.steps: Input should be greater than or equal to 1 (got 0)"),
        ("train = 3", "train: expected a section, [train] (got 3)"),
        ("[optim]\nlr = nan", "optim.lr: "),
        ("[optim]\nlr = inf", "optim.lr: "),
        ("[optim]\nbetas = [0.9, 1.0]", "optim.betas.1: "),
        ("[optim]\nbetas = [0.9]", "optim.betas.1: "),
        ("[loss]\nentropy_coef = nan", "loss.entropy_coef: "),
        ("[loss]\nclip_low = 1.5", "loss.clip_low: "),
        ("[loss]\ndual_clip = 1.0", "loss.dual_clip: "),
        ('[loss]\nratio = "word"', "loss.ratio: Input should be 'token', 'turn' or 'sequence'"),
        ("[rollout]\noversample = 1.5", "rollout.oversample: "),
        ("[rollout]\nrefill_waves = -1", "rollout.refill_waves: "),
        ("[train]\nsinks = ['mlflow']", "train.sinks.0: "),
        ("[env]\noptions = 3", "env.options: "),
    ],
)
def test_a_mistake_is_reported_with_file_and_field(recipe, content, text):
    path = recipe(content)
    message = error_of(path)
    assert message.startswith(f"{path}: {text}") and "\n" not in message


def test_all_mistakes_are_reported_at_once(recipe):
    message = error_of(recipe("[loss]\nx = 1\n[train]\nsteps = 0"))
    assert len(message.splitlines()) == 2 and "loss.x" in message and "train.steps" in message


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--loss.clip-hihg", "0.3"], "--loss.clip_hihg: no such field; did you"),
        (["--rollout.group-size=1"], "--rollout.group_size: the advantage of"),
        (["--train.steps", "many"], "--train.steps: Input should be a valid integer"),
        (["--train.steps"], "--train.steps: a value is missing"),
        (["train.steps", "3"], "train.steps: expected a dotted flag such as"),
        (["--train.steps.more", "3"], "'steps' is a value, not a section"),
        (["--train", "3"], "--train: "),
    ],
)
def test_a_wrong_flag_is_named_as_a_flag(recipe, flags, text):
    assert text in error_of(recipe("[train]\nsteps = 2\n"), *flags)


@pytest.mark.parametrize(
    "content",
    [b"[train\n", b"steps = = 3", b"\xff\xfe", b"[train]\nsteps = 1\nsteps = 2", b"\x00"],
)
def test_a_file_that_is_not_toml(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: not valid TOML: ")


def test_a_recipe_is_a_file_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "demoo: no such recipe; did you mean 'demo'?" in error_of("demoo")
    (tmp_path / "folder.toml").mkdir()
    for name in ("absent.toml", "folder.toml"):
        assert error_of(name).startswith(f"{name}: no such recipe; ")
    # a folder of that name, such as one for runs, does not hide the shipped recipe
    (tmp_path / "demo").mkdir()
    assert recipe_path("demo") == shipped_recipes()["demo"]
    (tmp_path / "mine").write_text("[train]\nsteps = 7\n")
    assert load_config("mine").train.steps == 7


def test_an_empty_recipe_has_the_default_values(recipe):
    assert load_config(recipe("")) == Config()


@settings(deadline=None)
@given(
    options=st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.one_of(
                st.booleans(),
                st.integers(-(2**63), 2**63 - 1),
                st.floats(allow_nan=False, allow_infinity=False),
                st.text(max_size=12),
            ),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=4), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=4,
    ),
    lr=st.floats(1e-9, 10.0),
    path=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    cap=st.none() | st.floats(0.5, 8),
)
def test_a_written_recipe_reads_back_equal(options, lr, path, cap):
    config = build_config(
        {
            "env": {"options": options},
            "optim": {"lr": lr},
            "model": {"path": path},
            "loss": {"is_cap": cap},
        }
    )
    again = build_config(tomllib.loads(to_toml(config)))
    assert again == config and to_toml(again) == to_toml(config)


def test_a_config_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        Config().train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
