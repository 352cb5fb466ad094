"""Token identity: what is trained is what was sampled, whatever the text spells."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from turnfast.chat.base import ChatError
from turnfast.chat.open import open_chat
from turnfast.chat.template import Chat
from turnfast.config.schema import ModelConfig
from turnfast.errors import ConfigError
from turnfast.packing.rows import rows_of
from turnfast.types import Turn

SPELLED = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "",
    "\n",
    " ",
    "é𝄞\u202e",
    "\x00",
]
TEXT = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(SPELLED)), max_size=4).map("".join)

# keeps an assistant's reasoning only while its turn is the last one, as several models do
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@settings(max_examples=150, deadline=None)
@given(
    question=TEXT,
    replies=st.lists(TEXT, min_size=1, max_size=4),
    closed=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_training_ids_are_the_sampled_ids(chat, question, replies, closed, seed):
    draw = random.Random(seed)
    talk = chat.open([{"role": "user", "content": question}])
    seen: list[int] = []
    turns = []
    for k, reply in enumerate(replies):
        # any id but a stop id: real samples are full of ids no tokenizer would produce
        body = [draw.randrange(3, 300) for _ in range(draw.randrange(0, 8))]
        ids = tuple(body + [chat.end_id] * (closed[k] or not body))
        turn = Turn(
            prompt_ids=talk.prompt_ids,
            sampled_ids=ids,
            logprobs=(-1.0,) * len(ids),
            text=chat.text(ids),
            finish="stop" if ids[-1] == chat.end_id else "length",
            restart=talk.restart,
        )
        turns.append(turn)
        seen += [*turn.prompt_ids, *ids]
        talk = chat.extend(
            talk, turn.text, turn.finish == "stop", [{"role": "user", "content": reply}]
        )
        assert not talk.restart
        # exactly one end of turn between the sample and the next header, whoever produced it
        assert ([*ids, *talk.prompt_ids].count(chat.end_id)) == 2
    row = rows_of([turns], [1.0] * len(turns))
    targets = row.targets_N.tolist()
    assert len(row) == 1 and targets == [token for turn in turns for token in turn.sampled_ids]
    assert row.tokens_T.tolist() == seen[:-1]
    assert [seen[place + 1] for place in row.states_N] == targets


def test_a_prompt_equals_the_template(chat):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    expected = chat.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert list(chat.open(messages).prompt_ids) == expected


def test_a_prompt_that_is_kept_is_not_a_stale_one(chat):
    """Equal messages are rendered once; an environment may write into the ones it has."""
    messages = [{"role": "user", "content": "Who wrote Ulm?"}]
    first = chat.open(messages)
    assert chat.open([{"role": "user", "content": "Who wrote Ulm?"}]) is first
    messages[0]["content"] = "Who wrote Oslo?"
    second = chat.open(messages)
    assert second.prompt_ids != first.prompt_ids
    assert second.messages[0]["content"] == "Who wrote Oslo?"


def test_a_content_never_becomes_a_special_token(chat):
    ids = chat.open([{"role": "user", "content": "<|im_end|><|im_start|>"}]).prompt_ids
    clean = chat.open([{"role": "user", "content": "hi"}]).prompt_ids
    for special in chat.tokenizer.all_special_ids:
        assert ids.count(special) == clean.count(special)
    assert chat.end_id not in chat.encode_reply("<|im_end|>")[:-1]


def test_a_template_that_forgets_splits_the_trajectory(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = FORGETFUL
    chat = Chat(tokenizer)
    talk = chat.open([{"role": "user", "content": "Who?"}])
    plain = chat.extend(talk, "Ida", True, [{"role": "user", "content": "Sure?"}])
    assert not plain.restart
    split = chat.extend(talk, "<think>hm</think>Ida", True, [{"role": "user", "content": "Sure?"}])
    assert split.restart
    assert "hm" not in tokenizer.decode(split.prompt_ids)
    assert tokenizer.decode(split.prompt_ids).startswith("<|im_start|>user\nWho?")


def test_a_template_that_trims_stays_append_only(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content | trim")
    chat = Chat(tokenizer)
    talk = chat.open([{"role": "user", "content": "Who?"}])
    after = chat.extend(talk, " Ida \n", True, [{"role": "user", "content": "Sure?"}])
    assert not after.restart
    assert tokenizer.decode(after.prompt_ids).startswith("\n<|im_start|>user\nSure?")


# as Qwen3's: without thinking the next turn begins after an empty thought, which the first of these
# keeps before what was said and the second leaves out
ASKED_NOT_TO_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and keep %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("kept", [True, False])
def test_the_template_is_told_its_options_in_every_turn(tiny_folder, kept):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = ASKED_NOT_TO_THINK
    told, untold = Chat(tokenizer, (), {"enable_thinking": False, "keep": kept}), Chat(tokenizer)
    asked = [{"role": "user", "content": "Who?"}]
    talk = told.open(asked)
    text = tokenizer.decode(talk.prompt_ids)
    assert text == tokenizer.decode(untold.open(asked).prompt_ids) + "<think></think>"
    after = told.extend(talk, "Ida", True, [{"role": "user", "content": "Sure?"}])
    # what was sampled is kept as it was drawn where the template agrees, and never rewritten
    assert after.restart == (not kept)
    text = tokenizer.decode(after.prompt_ids)
    assert text.endswith("Sure?<|im_end|>\n<|im_start|>assistant\n<think></think>")
    assert text.startswith("\n<|im_start|>user\nSure?" if kept else "<|im_start|>user\nWho?")


def test_options_that_a_template_does_not_have_are_refused(policy):
    policy.tokenizer.chat_template = ASKED_NOT_TO_THINK

    def chat(**options):
        config = ModelConfig(template_options=options)
        return open_chat(config, policy.tokenizer, policy.folder, [])

    opened = chat(enable_thinking=False).open([{"role": "user", "content": "Who?"}])
    assert policy.tokenizer.decode(opened.prompt_ids).endswith("<think></think>")
    for name in ("thinking", "chat_template", "messages", "add_generation_prompt"):
        with pytest.raises(
            ConfigError, match=rf"^model\.template_options\.{name}: the model's chat"
        ):
            chat(enable_thinking=False, **{name: "x"})


def test_no_template_is_refused(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = None
    with pytest.raises(ChatError, match="chat template"):
        Chat(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ChatError, match="special token"):
        Chat(tokenizer)


# like Mistral's: a tool's result only after a turn with calls, matched by ids of nine characters
STRICT = (
    "{% for m in messages if m.role != 'tool' and not m.tool_calls %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}'
    "[/TOOL_RESULTS]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "said",
    [
        '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ulm"}}]',
        '[TOOL_CALLS][{"arguments":{},"name":"search"}, {"name": "search", "arguments": {}}]',
        "[TOOL_CALLS] rubbish",
    ],
)
@pytest.mark.parametrize("closed", [True, False])
def test_a_template_that_wants_ids_is_given_them_and_the_sample_is_kept(tiny_folder, said, closed):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = STRICT
    chat = Chat(tokenizer, [{"type": "function", "function": {"name": "search"}}])
    results = [
        {"role": "tool", "name": "search", "content": f"<|im_end|>{i}"}
        for i in range(said.count("search") or 1)
    ]
    talk = chat.open([{"role": "user", "content": "Who?"}])
    after = chat.extend(talk, said, closed, results)
    assert not after.restart
    appended = tokenizer.decode(after.prompt_ids)
    assert appended == tokenizer.eos_token * (not closed) + "".join(
        f'[TOOL_RESULTS] {{"content": {result["content"]}, "call_id": "c0001{i:04d}"}}'
        "[/TOOL_RESULTS]"
        for i, result in enumerate(results)
    )
    assert after.prompt_ids.count(chat.end_id) == int(not closed)
    last = chat.extend(after, "Ida", True, [{"role": "user", "content": "Sure?"}])
    assert not last.restart
    assert tokenizer.decode(last.prompt_ids) == "[INST] Sure?[/INST]"
    again = chat.extend(last, said, True, results)
    number = f'"call_id": "c{len(last.messages):04d}'  # ids tell the exchanges apart
    assert not again.restart and number in tokenizer.decode(again.prompt_ids)
