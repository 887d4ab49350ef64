"""Masks, for any text under many templates: each answer exactly what the server would have to hear, or refused, never wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data import dye
from burnish.data.conversation import Conversation, Refused
from burnish.data.render import _Scene, render
from burnish.data.template import Template
from tests.conftest import CHATML, LLAMA3
from tests.judge import judge, template_of
from tests.shapes import TOOL
from tests.unit.data.test_render import template

NAMES = [
    "qwen2_5",
    "qwen3",
    "qwen3_6",
    "llama3_2",
    "glm4moe",
    "gemma3",
    "gptoss",
    "lfm2_2_5",
    "phi3",
    "cohere2",
    "deepseekv3",
]
TEMPLATES = [template(CHATML), template(LLAMA3), *map(template_of, NAMES)]
PIECES = ["</think>", "<think>", "<tool_call>", "<tool_response>", "```", "[[", "]]", "\n\n", " ", "\t", '{"a": 1}', "{{ x }}",
          "👩‍👩‍👧", "é", "<|im_end|>", "<b>&amp;", '"', "'", "\\", "user", "assistant", "ꀀ", "한", "一"]  # fmt: skip
"""What templates and tokenizers stumble over: their own literals, quoting, combining characters, letters of the dye."""
character = st.characters(exclude_categories=["Cs", "Co", "Cn"])
text = st.lists(st.one_of(st.sampled_from(PIECES), st.text(character, min_size=1, max_size=12)), min_size=1, max_size=4).map(
    "".join
)
arguments = st.dictionaries(
    st.sampled_from(["city", "days"]), st.one_of(text, st.integers(0, 99), st.lists(text, max_size=2))
)


@st.composite
def rows(draw):
    """A conversation with reasoning and tool loops here and there."""
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        answer = {"role": "assistant", "content": draw(text)}
        if draw(st.integers(0, 3)) == 0:
            answer["reasoning_content"] = draw(text)
        if draw(st.integers(0, 3)) == 0:
            call = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": draw(arguments)}}
            messages += [{**answer, "content": "", "tool_calls": [call]}, {"role": "tool", "content": draw(text)}]
            answer = {"role": "assistant", "content": draw(text)}
        messages.append(answer)
    return {"messages": messages, **({"tools": [TOOL]} if draw(st.booleans()) else {})}


@settings(max_examples=400, deadline=None)
@given(rows(), st.sampled_from(TEMPLATES))
def test_each_answer_is_exact_or_refused(row, source):
    try:
        samples = render(Conversation.parse(row), source, 100_000)
    except Refused as refusal:
        assert refusal.code and refusal.message
        return
    judge(source, row, samples, own_words=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20), min_size=2, max_size=8))
def test_plain_talk_is_never_refused(words):
    messages = [{"role": "assistant" if i % 2 else "user", "content": word} for i, word in enumerate(words)]
    for source in TEMPLATES[:3]:
        if any(token in word for word in words for token in ("<|", "|>")):
            continue
        row = json.loads(json.dumps({"messages": messages}))
        judge(source, row, render(Conversation.parse(row), source, 100_000), own_words=False)


ROW = {
    "messages": [
        {"role": "user", "content": "Name one"}, {"role": "assistant", "content": "Copper wire"},
        {"role": "user", "content": "And two"}, {"role": "assistant", "content": "Tin foil"},
    ]
}  # fmt: skip


def late_start(planted):
    whole = Template.tokens_of_prompt
    planted.setattr(Template, "tokens_of_prompt", lambda *a: whole(*a) + 1)


def last_stop(planted):
    def wrong(scene, encoding, first):
        return max(i for i, token in enumerate(encoding.ids) if token in scene.template.stop_ids)

    planted.setattr(_Scene, "_first_stop", wrong)


def swapped_dye(planted):
    whole = dye.trace

    def wrong(*a):
        found = whole(*a)
        return replace(found, owner=np.where(found.owner == 1, 0, found.owner))

    planted.setattr("burnish.data.render.trace", wrong)


def shifted_dye(planted):
    whole = dye.trace

    def wrong(*a):
        found = whole(*a)
        return replace(found, owner=np.roll(found.owner, 1))

    planted.setattr("burnish.data.render.trace", wrong)


@pytest.mark.parametrize("plant", [late_start, last_stop, swapped_dye, shifted_dye])
def test_a_fault_in_one_proof_is_caught_by_the_other(monkeypatch, plant):
    conversation = Conversation.parse(ROW)
    assert len(render(conversation, TEMPLATES[0], 256)) == 1
    plant(monkeypatch)
    try:
        samples = render(conversation, TEMPLATES[0], 256)
    except Refused:
        return
    # A stop too late is told by the text of the turn alone, which gets a sample of its own with no later stop in it.
    assert plant is last_stop and len(samples) == 2
    judge(TEMPLATES[0], ROW, samples)
