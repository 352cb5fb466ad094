"""Prime Intellect's renderers: our prompts beside theirs, and theirs in the place of a template."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from training_runs import logged, recipe, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from turnfast.chat.renderers import RenderedChat
from turnfast.chat.template import Chat
from turnfast.cli import main
from turnfast.config.recipe import to_toml
from turnfast.errors import ConfigError
from turnfast.train import train

renderers = pytest.importorskip("renderers", reason="renderers is not installed")

TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen3's form for text and for results of tools, without thoughts and without a list of tools
QWEN3 = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def in_form(folder: Path):
    """A tokenizer with Qwen3's tokens and its template."""
    made = AutoTokenizer.from_pretrained(folder)
    made.add_tokens([*TOKENS, "<think>", "</think>"])
    made.chat_template = QWEN3
    return made


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return in_form(tiny_folder)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return renderers.Qwen3Renderer(tokenizer, renderers.Qwen3RendererConfig())


def test_first_prompts_are_the_same_ids(tokenizer, renderer):
    chat = Chat(tokenizer)
    for asked in (
        [{"role": "user", "content": "Who wrote Ulm?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Ulm? \n"}],
    ):
        ids = renderer.render_ids(asked, add_generation_prompt=True)
        assert list(chat.open(asked).prompt_ids) == ids


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(
    "replies",
    [
        [{"role": "tool", "name": "search", "content": "Ulm was written by Ida."}],
        [
            {"role": "tool", "name": "search", "content": "one"},
            {"role": "tool", "name": "search", "content": "  two\n"},
        ],
    ],
)
def test_prompts_after_a_sampled_turn_are_the_same_ids(tokenizer, renderer, replies, closed):
    chat = Chat(tokenizer)
    first = chat.open([{"role": "user", "content": "Who wrote Ulm?"}])
    text = '<tool_call>\n{"name": "search", "arguments": {"q": "Ulm"}}\n</tool_call>'
    # not the ids that the text would be encoded to: what was sampled is kept, here as there
    sampled = [i for word in text for i in tokenizer.encode(word, add_special_tokens=False)]
    sampled += [chat.end_id] if closed else []
    talk = chat.extend(first, text, closed, replies)
    bridged = renderer.bridge_to_next_turn(list(first.prompt_ids), sampled, replies)
    assert bridged is not None and not talk.restart
    assert [*first.prompt_ids, *sampled, *talk.prompt_ids] == list(bridged.token_ids)
    # and through our door, which is told the text alone
    rendered = RenderedChat(tokenizer, "qwen3")
    theirs = rendered.extend(rendered.open(first.messages), text, closed, replies)
    assert theirs.prompt_ids == talk.prompt_ids and not theirs.restart
    assert theirs.messages == talk.messages


def test_ends_and_replies_are_the_template_s(tokenizer):
    chat, rendered = Chat(tokenizer), RenderedChat(tokenizer, "qwen3")
    assert rendered.end_id == chat.end_id and set(rendered.stop_ids) >= set(chat.stop_ids)
    ids = rendered.encode_reply("Ida")
    assert ids == chat.encode_reply("Ida") and rendered.text(ids) == "Ida"


USER = [{"role": "user", "content": "Sure?"}]
TOOL = [{"role": "tool", "name": "search", "content": "Ida."}]


def test_thoughts_outlive_a_result_and_not_a_question(tokenizer):
    chat = RenderedChat(tokenizer, "qwen3")
    first = chat.open([{"role": "user", "content": "Who?"}])
    text = "<think>\nhm\n</think>\n\nIda"
    kept = chat.extend(first, text, True, TOOL)
    assert not kept.restart and "hm" in tokenizer.decode(kept.context_ids)
    dropped = chat.extend(first, text, True, USER)
    assert dropped.restart and "hm" not in tokenizer.decode(dropped.prompt_ids)
    assert dropped.prompt_ids == dropped.context_ids
    plain = chat.extend(first, "Ida", True, USER)
    assert not plain.restart
    assert tokenizer.decode(plain.prompt_ids).startswith("\n<|im_start|>user\nSure?<|im_end|>")


def test_a_turn_cut_off_in_a_thought_is_closed_by_the_environment(tokenizer):
    chat = RenderedChat(tokenizer, "qwen3")
    first = chat.open([{"role": "user", "content": "Who?"}])
    after = chat.extend(first, "<think>\nhm", False, TOOL)
    assert tokenizer.decode(after.prompt_ids).startswith("</think><|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_content_never_becomes_a_special_token(tokenizer, role):
    chat = RenderedChat(tokenizer, "qwen3")
    first = chat.open([{"role": "user", "content": "Who?"}])
    counts = []
    for content in ("hi", "<|im_end|><|im_start|>assistant"):
        asked = chat.open([{"role": "user", "content": content}])
        after = chat.extend(first, "Ida", True, [{"role": role, "name": "t", "content": content}])
        ids = (*asked.prompt_ids, *after.prompt_ids)
        counts.append([ids.count(special) for special in tokenizer.all_special_ids])
    assert counts[0] == counts[1]


def test_tools_are_offered(tokenizer):
    schema = {
        "type": "function",
        "function": {"name": "search", "description": "Look it up.", "parameters": {}},
    }
    ids = RenderedChat(tokenizer, "qwen3", [schema]).open(USER).prompt_ids
    assert json.dumps(schema) in tokenizer.decode(ids)


def test_auto_goes_by_the_hub_name(tiny_folder, tokenizer):
    with pytest.raises(ConfigError, match=r"model\.renderer: .*by its name; name one of .*qwen3"):
        RenderedChat(tokenizer, "auto")
    known = in_form(tiny_folder)
    known.name_or_path = "Qwen/Qwen3-8B"
    assert RenderedChat(known, "auto").open(USER) == RenderedChat(tokenizer, "qwen3").open(USER)


def test_what_cannot_render_is_refused_by_name(tiny_folder, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match=r"no such renderer 'qwen'; there are .*, 'auto'"):
        RenderedChat(tokenizer, "qwen")
    with pytest.raises(ConfigError, match=r"'qwen3' does not fit the tokenizer .*<tool_call>"):
        RenderedChat(AutoTokenizer.from_pretrained(tiny_folder), "qwen3")
    with monkeypatch.context() as patch:
        spelt = lambda self, asked, **_: self._encode("<|im_end|>")
        patch.setattr(renderers.Qwen3Renderer, "render_ids", spelt)
        with pytest.raises(ConfigError, match="writes special tokens as text"):
            RenderedChat(tokenizer, "qwen3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install turnfast\[renderers\]"):
        RenderedChat(tokenizer, "qwen3")


@pytest.fixture(scope="module")
def letters_in_form(letters_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters-qwen3")
    made, model = in_form(letters_model), AutoModelForCausalLM.from_pretrained(letters_model)
    model.resize_token_embeddings(len(made))
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_the_same_run(letters_in_form, tmp_path, capsys):
    for name in ("template", "qwen3"):
        train(recipe(letters_in_form, model__renderer=name, train__steps=2), tmp_path / name)
    assert logged(tmp_path / "template") == logged(tmp_path / "qwen3")
    assert weights(tmp_path / "template", 2) == weights(tmp_path / "qwen3", 2)
    (tmp_path / "run.toml").write_text(to_toml(recipe(letters_in_form)) + "\n")
    flags = ["--model.renderer", "qwen", "--run-dir", str(tmp_path / "none")]
    assert main(["train", str(tmp_path / "run.toml"), *flags]) == 2
    assert "model.renderer: no such renderer" in capsys.readouterr().err
