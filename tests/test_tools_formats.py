"""Tool calls in the formats of Llama 3, Mistral and Hermes."""

from __future__ import annotations

import json

import pytest
from by_script import play
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.envs import Task, ToolEnv, tool
from turnfast.tools import MalformedCall, ToolCall, parse_calls, read_calls

FORMATS = ("hermes", "llama3", "mistral")
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


def write_calls(calls, call_format) -> str:
    """Write calls as the chat templates of the model families do."""
    key = "parameters" if call_format == "llama3" else "arguments"
    objects = [{"name": call.name, key: dict(call.arguments)} for call in calls]
    if call_format == "mistral":
        return f"[TOOL_CALLS] {json.dumps([{**o, 'id': 'a1b2c3d4e'} for o in objects])}"
    if call_format == "llama3":
        return "; ".join(json.dumps(o, ensure_ascii=False) for o in objects)
    return "\n".join(f"<tool_call>\n{json.dumps(o)}\n</tool_call>" for o in objects)


def contains_marker(calls) -> bool:
    """Whether a call contains the markers of another format or of reasoning."""
    text = json.dumps([[c.name, dict(c.arguments)] for c in calls])
    markers = ("<tool", "</tool", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "<reasoning>")
    return any(marker in text for marker in markers)


@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from(FORMATS))
@settings(max_examples=200, deadline=None)
def test_written_calls_are_parsed(calls, call_format):
    attempts, rest = read_calls(write_calls(calls, call_format))
    assert attempts
    if not contains_marker(calls):
        assert attempts == tuple(calls) and not rest.strip()


@given(st.lists(CALLS, min_size=1, max_size=2), st.sampled_from(FORMATS), st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_calls_do_not_raise(calls, call_format, data):
    text = write_calls(calls, call_format)
    cut = data.draw(st.integers(0, len(text)))
    inserted = data.draw(st.text(max_size=5) | st.sampled_from([*'}];"', "[TOOL_CALLS]"]))
    for attempt in parse_calls(text[:cut] + inserted + text[cut:]) + parse_calls(text[:cut]):
        assert isinstance(attempt, ToolCall | MalformedCall)
        if isinstance(attempt, MalformedCall):
            assert 0 < len(attempt.reason) < 100


ULM, ROM = (ToolCall(name="search", arguments={"query": query}) for query in ("Ulm", "Rom"))
LLAMA, LLAMA_ROM = (write_calls([call], "llama3") for call in (ULM, ROM))
MISTRAL = write_calls([ULM], "mistral")
NAMED, NAMED_ROM = (f'[TOOL_CALLS]search[ARGS]{{"query": "{query}"}}' for query in ("Ulm", "Rom"))


@pytest.mark.parametrize(
    ("text", "calls", "rest"),
    [
        (LLAMA, [ULM], ""),
        (f"<|python_tag|>{LLAMA}", [ULM], ""),
        ('{"type": "function", "name": "search", "parameters": {"query": "Ulm"}}', [ULM], ""),
        ('\n {"name":"search","parameters":{"query":"Ulm"}} \n', [ULM], ""),
        (f"{LLAMA}; {LLAMA_ROM}", [ULM, ROM], ""),
        (f'<think>{{"name": "x"}}</think>{LLAMA_ROM}', [ROM], ""),
        (f"I search. <|python_tag|>{LLAMA}", [ULM], "I search."),
        (f"{LLAMA} It was Ida.", [ULM], "It was Ida."),
        (f"Hm. <|python_tag|>{LLAMA} Ida.", [ULM], "Hm. Ida."),
        (f"{LLAMA}; {LLAMA_ROM} Ida.", [ULM, ROM], "Ida."),
        (MISTRAL, [ULM], ""),
        ('[TOOL_CALLS][{"name": "search", "arguments": {"query": "Ulm"}}]', [ULM], ""),
        (write_calls([ULM, ROM], "mistral"), [ULM, ROM], ""),
        (NAMED, [ULM], ""),
        (
            f'[TOOL_CALLS]search[CALL_ID]a1b2c3d4e[ARGS]{{"query": "Ulm"}}{NAMED_ROM}',
            [ULM, ROM],
            "",
        ),
        (f"Let me see.{NAMED} It was Ida.", [ULM], "Let me see. It was Ida."),
        (f"Hm. {MISTRAL} Ida.", [ULM], "Hm.  Ida."),
        (f"{NAMED} and {NAMED_ROM}", [ULM, ROM], "and"),
        # no calls
        ('{"answer": "Ulm"}', [], '{"answer": "Ulm"}'),
        (f"The call {LLAMA} is enough.", [], f"The call {LLAMA} is enough."),
        ("{", [], "{"),
        ("[]", [], "[]"),
    ],
)
def test_calls_and_the_text_around_them(text, calls, rest):
    attempts, outside = read_calls(text)
    assert (list(attempts), outside.strip()) == (calls, rest)


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
def test_malformed_calls_give_the_reason(text, reason):
    assert parse_calls(text) == (MalformedCall(reason=reason),)


def test_calls_written_by_the_tokenizer_of_mistral_are_parsed():
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall
    from mistral_common.protocol.instruct.tool_calls import ToolCall as MistralCall
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    calls = [
        MistralCall(id=f"{i}1b2c3d4e", function=FunctionCall(name="search", arguments=arguments))
        for i, arguments in enumerate(['{"query": "Ulm"}', '{"query": "Rom"}'])
    ]
    for tokenizer in (MistralTokenizer.v3(), MistralTokenizer.v3(is_tekken=True)):
        messages = [UserMessage(content="?"), AssistantMessage(content=None, tool_calls=calls)]
        for call in calls:
            messages.append(ToolMessage(content="Ida", tool_call_id=call.id, name="search"))
        request = ChatCompletionRequest(messages=messages)
        ids = tokenizer.encode_chat_completion(request).tokens
        written = tokenizer.instruct_tokenizer.tokenizer.decode(
            ids, special_token_policy=SpecialTokenPolicy.KEEP
        )
        # The sentencepiece tokenizer writes a space as U+2581.
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


@pytest.mark.parametrize("call_format", FORMATS)
def test_an_environment_runs_and_rewards_calls_in_every_format(call_format):
    env = Books(call_format="native")
    call, answer = write_calls([ULM], call_format), "<answer>Ida</answer>"
    _, (first, _), outcome = play(env, env.tasks("train")[0], f"<think>hm</think>{call}", answer)
    assert first.messages == ({"role": "tool", "name": "search", "content": "Ulm: by Ida."},)
    assert first.reward == pytest.approx(0.7)
    assert outcome.reward == pytest.approx(1.9)
    _, _, outcome = play(env, env.tasks("train")[0], f"{call} Well.", answer)
    assert outcome.reward_parts["format"] == pytest.approx(0.1)
