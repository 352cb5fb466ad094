"""Calls as Llama 3, Mistral and Hermes write them: there and back, and anything in between."""

from __future__ import annotations

import json

import pytest
from by_script import play
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.envs import Task, ToolEnv, tool
from turnfast.tools import MalformedCall, ToolCall, parse_calls, read_calls, write_calls

FORMS = ("hermes", "llama3", "mistral")
NAMES = st.from_regex(r"[a-zA-Z_][\w-]{0,20}", fullmatch=True).filter(str.isascii)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.text(max_size=12)
    | st.sampled_from(["</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", '"}; {"', "[ARGS]{"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments: ToolCall(name=name, arguments=arguments),
    NAMES,
    st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=3),
)


def holds_a_marker(calls) -> bool:
    """A marker of one format in the text of another is an attempt in that one; and thoughts are
    taken out first."""
    text = json.dumps([[c.name, dict(c.arguments)] for c in calls])
    marks = ("<tool", "</tool", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "<reasoning>")
    return any(mark in text for mark in marks)


@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from(FORMS))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(calls, form):
    if holds_a_marker(calls):
        assert parse_calls(write_calls(calls, form))  # an attempt, whatever it is read as
        return
    read, rest = read_calls(write_calls(calls, form))
    assert read == tuple(calls) and not rest.strip()


@given(st.lists(CALLS, min_size=1, max_size=2), st.sampled_from(FORMS), st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_raises_or_invents_a_call(calls, form, data):
    text = write_calls(calls, form)
    cut = data.draw(st.integers(0, len(text)))
    junk = data.draw(st.text(max_size=5) | st.sampled_from(["}", "]", ";", '"', "[TOOL_CALLS]"]))
    for attempt in parse_calls(text[:cut] + junk + text[cut:]) + parse_calls(text[:cut]):
        assert isinstance(attempt, ToolCall | MalformedCall)
        if isinstance(attempt, MalformedCall):
            assert 0 < len(attempt.reason) < 100


ULM = ToolCall(name="search", arguments={"query": "Ulm"})
ROM = ToolCall(name="search", arguments={"query": "Rom"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        # Llama 3: alone, marked, typed, with spaces, several, as a list, after thoughts
        ('{"name": "search", "parameters": {"query": "Ulm"}}', [ULM]),
        ('<|python_tag|>{"name": "search", "parameters": {"query": "Ulm"}}', [ULM]),
        ('{"type": "function", "name": "search", "parameters": {"query": "Ulm"}}', [ULM]),
        ('\n {"name":"search","parameters":{"query":"Ulm"}} \n', [ULM]),
        (
            '{"name": "search", "parameters": {"query": "Ulm"}}; '
            '{"name": "search", "parameters": {"query": "Rom"}}',
            [ULM, ROM],
        ),
        (
            '<think>{"name": "x"}</think>{"name": "search", "parameters": {"query": "Rom"}}',
            [ROM],
        ),
        ('I search. <|python_tag|>{"name": "search", "parameters": {"query": "Ulm"}}', [ULM]),
        # Mistral: both spellings, with and without id and space, several
        (
            '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ulm"}, "id": "a1b2c3d4e"}]',
            [ULM],
        ),
        ('[TOOL_CALLS][{"name": "search", "arguments": {"query": "Ulm"}}]', [ULM]),
        (
            '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ulm"}}, '
            '{"name": "search", "arguments": {"query": "Rom"}}]',
            [ULM, ROM],
        ),
        ('[TOOL_CALLS]search[ARGS]{"query": "Ulm"}', [ULM]),
        (
            '[TOOL_CALLS]search[CALL_ID]a1b2c3d4e[ARGS]{"query": "Ulm"}'
            '[TOOL_CALLS]search[ARGS]{"query": "Rom"}',
            [ULM, ROM],
        ),
        ('Let me see.[TOOL_CALLS]search[ARGS]{"query": "Ulm"}', [ULM]),
        # neither: an answer in JSON, prose, code
        ('{"answer": "Ulm"}', []),
        ('The call {"name": "search", "parameters": {}} would do.', []),
        ("{", []),
        ("[]", []),
    ],
)
def test_spellings(text, calls):
    assert list(parse_calls(text)) == calls


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "search", "parameters": {"query": "Ulm"', "not valid JSON"),
        ('{"name": "search", "parameters": "Ulm"}', '"parameters" is not an object'),
        ('{"name": "search", "arguments": {}}', "unknown key 'arguments'"),
        ('{"name": 3, "parameters": {}}', '"name" is missing'),
        ('{"name": "search", "parameters": {"n": NaN}}', "not valid JSON"),
        ('{"type": "code", "name": "search", "parameters": {}}', "unknown key 'type'"),
        ("<|python_tag|>print(1)", "not valid JSON"),
        ("<|python_tag|>", "nothing follows <|python_tag|>"),
        ("<|python_tag|>[[]]", "not a JSON object"),
        ("[TOOL_CALLS]", "no valid JSON after [TOOL_CALLS]"),
        ("[TOOL_CALLS] {}", "[TOOL_CALLS] needs a list of calls"),
        ("[TOOL_CALLS] []", "[TOOL_CALLS] needs a list of calls"),
        ("[TOOL_CALLS] [3]", "not a JSON object"),
        ('[TOOL_CALLS] [{"name": "search", "parameters": {}}]', "unknown key 'parameters'"),
        ('[TOOL_CALLS] [{"name": "search", "arguments": {}, "id": 3}]', "unknown key 'id'"),
        ("[TOOL_CALLS]search[ARGS][1]", '"arguments" is not an object'),
        ('[TOOL_CALLS]search{"query": 1}', "no valid JSON after [TOOL_CALLS]"),
        ("[TOOL_CALLS]" + "[" * 100_000, "no valid JSON after [TOOL_CALLS]"),
    ],
)
def test_malformed_attempts_are_named(text, reason):
    assert parse_calls(text) == (MalformedCall(reason=reason),)


def test_mistrals_own_tokenizer_writes_what_is_read():
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall
    from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    called = [
        TheirCall(id=f"{i}1b2c3d4e", function=FunctionCall(name="search", arguments=arguments))
        for i, arguments in enumerate(['{"query": "Ulm"}', '{"query": "Rom"}'])
    ]
    for tokenizer in (MistralTokenizer.v3(), MistralTokenizer.v3(is_tekken=True)):
        talk = [UserMessage(content="?"), AssistantMessage(content=None, tool_calls=called)]
        talk += [ToolMessage(content="Ida", tool_call_id=call.id, name="search") for call in called]
        request = ChatCompletionRequest(messages=talk)
        ids = tokenizer.encode_chat_completion(request).tokens
        written = tokenizer.instruct_tokenizer.tokenizer.decode(
            ids, special_token_policy=SpecialTokenPolicy.KEEP
        )
        # pieces of the sentencepiece tokenizer spell a space as U+2581
        turn = written.replace("\u2581", " ").split("[/INST]")[1].split("</s>")[0]
        assert turn.startswith("[TOOL_CALLS]")
        assert parse_calls(turn) == (ULM, ROM)


class Books(ToolEnv):
    def tasks(self, split):
        return [Task(id="q", question="?", answers=("Ida",))]

    @tool
    def search(self, query: str) -> str:
        """Find one passage."""
        return f"{query}: by Ida."


@pytest.mark.parametrize("form", FORMS)
def test_an_environment_takes_and_rewards_every_family_in_its_own_form(form):
    env = Books(call_format="native")

    call = f"<think>hm</think>{write_calls([ULM], form)}"
    _, (first, _), outcome = play(env, env.tasks("train")[0], call, "<answer>Ida</answer>")
    assert first.messages == ({"role": "tool", "name": "search", "content": "Ulm: by Ida."},)
    assert first.reward == pytest.approx(0.7)
    assert outcome.reward == pytest.approx(1.9)


def test_prose_around_a_call_is_not_the_form():
    env = Books(call_format="native")

    call = "Well. " + write_calls([ULM], "mistral")
    _, _, outcome = play(env, env.tasks("train")[0], call, "<answer>Ida</answer>")
    assert outcome.reward_parts["format"] == pytest.approx(0.1)
