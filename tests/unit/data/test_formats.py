"""Rows of other shapes become the messages that a person would write for them, or say what is wrong."""

import json

import pytest

from burnish.data.conversation import Conversation, Refused
from burnish.data.formats import messages_form

U, A, S = "user", "assistant", "system"


def talk(row):
    """(role, content, trained) of each message."""
    return [(m.role, m.fields["content"], m.train) for m in Conversation.parse(messages_form(row)).messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b"}]}, [(U, "a", True), (A, "b", True)]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
            [(S, "s", True), (U, "a", True), (A, "b", False)],
        ),
        ({"conversations": [{"role": U, "content": "a"}, {"role": A, "content": "b"}]}, [(U, "a", True), (A, "b", True)]),
        ({"prompt": "a", "completion": "b"}, [(U, "a", True), (A, "b", True)]),
        (
            {
                "prompt": [{"role": U, "content": "a"}, {"role": A, "content": "b"}, {"role": U, "content": "c"}],
                "completion": [{"role": A, "content": "d"}],
            },
            [(U, "a", False), (A, "b", False), (U, "c", False), (A, "d", True)],
        ),
        ({"instruction": "Name", "input": "", "output": "b"}, [(U, "Name", True), (A, "b", True)]),
        ({"instruction": "Name", "input": "one", "output": "b"}, [(U, "Name\none", True), (A, "b", True)]),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            [(S, "s", True), (U, "a", True), (A, "b", True), (U, "c", True), (A, "d", True)],
        ),
        (
            {"system_prompt": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [(S, "s", True), (U, "a", True), (A, "b", True)],
        ),
        ({"system": "s", "prompt": "a", "completion": "b"}, [(S, "s", True), (U, "a", True), (A, "b", True)]),
        (
            {
                "system": "s",
                "messages": [{"role": S, "content": "s"}, {"role": U, "content": "a"}, {"role": A, "content": "b"}],
            },
            [(S, "s", True), (U, "a", True), (A, "b", True)],
        ),
        # A column that another shape needs, beside messages: UltraChat has both.
        (
            {"prompt": "x", "messages": [{"role": U, "content": "a"}, {"role": A, "content": "b"}]},
            [(U, "a", True), (A, "b", True)],
        ),
    ],
)
def test_each_shape_becomes_its_conversation(row, expected):
    assert talk(row) == expected


def test_sharegpt_tool_calls_and_results_and_tools_as_text():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})},
            {"from": "observation", "value": "12"},
            {"from": "gpt", "value": "b", "reasoning_content": "hm"},
        ],
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": False, "other": None},
    }
    conversation = Conversation.parse(messages_form(row))
    assert [message.role for message in conversation.messages] == [U, A, "tool", A]
    assert conversation.messages[1].fields["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert conversation.messages[3].fields["reasoning_content"] == "hm"
    assert list(conversation.tools) == tools and conversation.kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "turn", "words"),
    [
        ({"text": "x"}, None, "it has text"),
        ({}, None, "it has no keys"),
        ({"conversations": "x"}, None, "`conversations` must be a list"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, 0, "found 'narrator'"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}, 1, "content must be text; found None"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, 0, "must be JSON with name and arguments"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, 0, "found ['human']"),
        ({"system": "s", "messages": [{"role": S, "content": "t"}]}, None, "two different system prompts"),
        ({"prompt": "a", "completion": [{"role": A, "content": "b"}]}, None, "prompt is 'a'"),
        ({"prompt": [1], "completion": []}, None, "prompt is [1]"),
        ({"prompt": None, "completion": "b"}, None, "prompt is None"),
        ({"instruction": 3, "output": "b"}, None, "`instruction` must be text; found 3"),
        ({"instruction": "a", "output": None}, None, "`output` must be text; found None"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, None, "`history` must be a list of pairs"),
    ],
)
def test_a_row_that_cannot_be_converted_says_why(row, turn, words):
    with pytest.raises(Refused) as refusal:
        Conversation.parse(messages_form(row))
    assert (refusal.value.code, refusal.value.turn) == ("bad-row", turn)
    assert words in refusal.value.message, refusal.value.message
