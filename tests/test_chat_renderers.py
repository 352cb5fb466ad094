"""Our prompts beside those of Prime Intellect's renderers, which write Qwen3's form in Python.

The package comes with verifiers<0.4: `make test-verifiers`.
"""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from turnfast.chat import Chat

renderers = pytest.importorskip("renderers", reason="renderers is missing: make test-verifiers")

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


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    made = AutoTokenizer.from_pretrained(tiny_folder)
    made.add_tokens([*TOKENS, "<think>", "</think>"])
    made.chat_template = QWEN3
    return made


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
