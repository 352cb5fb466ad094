"""The chat template: prompts only grow, and the trained ids are the sampled ids."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import DROPS_REASONING, EMPTY_THOUGHT, NEEDS_CALL_IDS
from transformers import AutoTokenizer

from turnfast.chat.open import open_chat
from turnfast.chat.template import Chat
from turnfast.config.schema import ModelConfig
from turnfast.errors import ConfigError
from turnfast.packing.rows import rows_of
from turnfast.types import Turn

SPECIAL_STRINGS = ("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "", "\n", " ", "\x00")
TEXT = st.lists(st.text(max_size=12) | st.sampled_from(SPECIAL_STRINGS), max_size=4).map("".join)
QUESTION = [{"role": "user", "content": "Who?"}]
FOLLOW_UP = [{"role": "user", "content": "Sure?"}]


@pytest.fixture
def tokenizer(tiny_folder):
    """A tokenizer whose template a test may replace."""
    return AutoTokenizer.from_pretrained(tiny_folder)


@settings(max_examples=150, deadline=None)
@given(
    question=TEXT,
    replies=st.lists(TEXT, min_size=1, max_size=4),
    closed=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_trained_ids_are_the_sampled_ids(chat, question, replies, closed, seed):
    draw = random.Random(seed)
    conversation = chat.open([{"role": "user", "content": question}])
    context: list[int] = []
    turns = []
    for k, reply in enumerate(replies):
        # any id but a stop id: samples contain id sequences that no tokenizer would produce
        body = [draw.randrange(3, 300) for _ in range(draw.randrange(0, 8))]
        ids = tuple(body + [chat.end_id] * (closed[k] or not body))
        turn = Turn(
            prompt_ids=conversation.prompt_ids,
            sampled_ids=ids,
            logprobs=(-1.0,) * len(ids),
            text=chat.decode_turn(ids),
            finish="stop" if ids[-1] == chat.end_id else "length",
        )
        turns.append(turn)
        context += [*turn.prompt_ids, *ids]
        message = {"role": "user", "content": reply}
        conversation = chat.extend(conversation, turn.text, turn.finish == "stop", [message])
        assert not conversation.restart
        # one end of turn after the sample and one after the reply, sampled or appended
        assert ([*ids, *conversation.prompt_ids].count(chat.end_id)) == 2
    row = rows_of([turns], [1.0] * len(turns))
    targets = row.targets_N.tolist()
    assert len(row) == 1 and targets == [token for turn in turns for token in turn.sampled_ids]
    assert row.tokens_T.tolist() == context[:-1]
    assert [context[place + 1] for place in row.states_N] == targets


def test_the_first_prompt_is_the_rendered_template_and_copies_the_messages(chat):
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    expected = chat.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    first = chat.open(messages)
    assert list(first.prompt_ids) == expected
    messages[0]["content"] = "changed"
    assert first.messages[0]["content"] == "Be brief."


def test_contents_never_become_special_tokens(chat):
    ids = chat.open([{"role": "user", "content": "<|im_end|><|im_start|>"}]).prompt_ids
    plain = chat.open([{"role": "user", "content": "hi"}]).prompt_ids
    for special in chat.tokenizer.all_special_ids:
        assert ids.count(special) == plain.count(special)
    assert chat.end_id not in chat.encode_turn("<|im_end|>")[:-1]


def test_only_stop_ids_are_left_out_of_decoded_turns(chat):
    ids = chat.encode_turn("Ida")
    eos = chat.tokenizer.eos_token_id
    assert chat.decode_turn((ids[0], chat.end_id, eos, *ids[1:])) == "Ida"
    start = chat.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert chat.decode_turn((start, *ids)) == "<|im_start|>Ida"


def test_eos_and_llamas_end_of_message_stop_a_turn(tokenizer):
    assert set(Chat(tokenizer).stop_ids) == {
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.eos_token_id,
    }
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eom_id|>"]})
    chat = Chat(tokenizer)
    eom = tokenizer.convert_tokens_to_ids("<|eom_id|>")
    assert eom in chat.stop_ids and eom != chat.end_id
    assert chat.decode_turn((*chat.encode_turn("Ida")[:-1], eom)) == "Ida"


def test_a_template_that_drops_reasoning_restarts_the_conversation(tokenizer):
    tokenizer.chat_template = DROPS_REASONING
    chat = Chat(tokenizer)
    first = chat.open(QUESTION)
    assert not chat.extend(first, "Ida", True, FOLLOW_UP).restart
    restarted = chat.extend(first, "<think>hm</think>Ida", True, FOLLOW_UP)
    assert restarted.restart
    text = tokenizer.decode(restarted.prompt_ids)
    assert text.startswith("<|im_start|>user\nWho?") and "hm" not in text


def test_a_template_that_strips_contents_only_appends(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content | trim")
    chat = Chat(tokenizer)
    after = chat.extend(chat.open(QUESTION), " Ida \n", True, FOLLOW_UP)
    assert not after.restart
    assert tokenizer.decode(after.prompt_ids).startswith("\n<|im_start|>user\nSure?")


@pytest.mark.parametrize("kept", [True, False])
def test_template_options_apply_to_every_turn(tokenizer, kept):
    tokenizer.chat_template = EMPTY_THOUGHT
    chat, default = Chat(tokenizer, (), {"enable_thinking": False, "keep": kept}), Chat(tokenizer)
    first = chat.open(QUESTION)
    expected = tokenizer.decode(default.open(QUESTION).prompt_ids) + "<think></think>"
    assert tokenizer.decode(first.prompt_ids) == expected
    after = chat.extend(first, "Ida", True, FOLLOW_UP)
    assert after.restart == (not kept)
    text = tokenizer.decode(after.prompt_ids)
    assert text.endswith("Sure?<|im_end|>\n<|im_start|>assistant\n<think></think>")
    assert text.startswith("\n<|im_start|>user\nSure?" if kept else "<|im_start|>user\nWho?")


@pytest.mark.parametrize("name", ["thinking", "chat_template", "messages", "add_generation_prompt"])
def test_unknown_template_options_are_errors(tokenizer, name):
    tokenizer.chat_template = EMPTY_THOUGHT
    options: dict = {"enable_thinking": False}
    open_chat(ModelConfig(template_options=options), tokenizer, [])
    options[name] = "x"
    with pytest.raises(ConfigError, match=rf"^model\.template_options\.{name}: the model's chat"):
        open_chat(ModelConfig(template_options=options), tokenizer, [])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, r"^model\.path: .* no chat template"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            r"^model\.path: .* special token",
        ),
    ],
)
def test_templates_without_an_end_of_turn_are_errors(tokenizer, template, text):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=text):
        open_chat(ModelConfig(), tokenizer, [])


@pytest.mark.parametrize(
    "turn",
    [
        '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ulm"}}]',
        '[TOOL_CALLS][{"arguments":{},"name":"search"}, {"name": "search", "arguments": {}}]',
        "[TOOL_CALLS] not JSON",
    ],
)
@pytest.mark.parametrize("closed", [True, False])
def test_templates_that_need_call_ids_get_them(tokenizer, turn, closed):
    tokenizer.chat_template = NEEDS_CALL_IDS
    chat = Chat(tokenizer, [{"type": "function", "function": {"name": "search"}}])
    results = [
        {"role": "tool", "name": "search", "content": f"<|im_end|>{i}"}
        for i in range(turn.count("search") or 1)
    ]
    after = chat.extend(chat.open(QUESTION), turn, closed, results)
    assert not after.restart
    assert tokenizer.decode(after.prompt_ids) == tokenizer.eos_token * (not closed) + "".join(
        f'[TOOL_RESULTS] {{"content": {result["content"]}, "call_id": "c0001{i:04d}"}}'
        "[/TOOL_RESULTS]"
        for i, result in enumerate(results)
    )
    assert after.prompt_ids.count(chat.end_id) == int(not closed)
    last = chat.extend(after, "Ida", True, FOLLOW_UP)
    assert not last.restart
    assert tokenizer.decode(last.prompt_ids) == "[INST] Sure?[/INST]"
    again = chat.extend(last, turn, True, results)
    call_id = f'"call_id": "c{len(last.messages):04d}'  # unique in the conversation
    assert not again.restart and call_id in tokenizer.decode(again.prompt_ids)
