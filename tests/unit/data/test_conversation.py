"""Rows that are conversations, and rows that are not."""

import pytest

from burnish.data.conversation import Conversation, Message, Refused


def m(role, content="x", **more):
    return {"role": role, "content": content, **more}


def tool(name, **more):
    return {"type": "function", "function": {"name": name, **more}}


CALL = {"function": {"name": "f", "arguments": '{"a": ["b", 1], "c": null}'}}
DECODED = {"type": "function", "function": {"name": "f", "arguments": {"a": ["b", 1], "c": None}}}


@pytest.mark.parametrize(
    ("row", "code", "turn", "words"),
    [
        ({}, "bad-row", None, "`messages` must be a list"),
        ({"messages": [m("user"), m("assistant")], "chat_template_kwargs": "[1]"}, "bad-row", None, "template variables"),
        ({"conversations": []}, "bad-row", None, "the row has conversations"),
        ({"messages": []}, "bad-row", None, "`messages` must be a list"),
        ({"messages": "hi"}, "bad-row", None, "found 'hi'"),
        ({"messages": ["hi"]}, "bad-row", 0, "a message must be an object"),
        ({"messages": [m("user"), m("bot")]}, "bad-row", 1, "found 'bot'"),
        ({"messages": [m("user", 3), m("assistant")]}, "bad-row", 0, "content must be text"),
        ({"messages": [m("user", None), m("assistant")]}, "bad-row", 0, "content must be text"),
        ({"messages": [m("user", [{"type": "image"}]), m("assistant")]}, "bad-row", 0, "not text"),
        ({"messages": [m("user"), m("assistant", train="no")]}, "bad-row", 1, "train must be true or false"),
        ({"messages": [m("user"), m("assistant", tool_calls="f")]}, "bad-row", 1, "tool_calls"),
        ({"messages": [m("user"), m("assistant", tool_calls=[{"function": "f"}])]}, "bad-row", 1, "function.name"),
        ({"messages": [m("user"), m("assistant", tool_calls=[{"name": "f", "arguments": "{"}])]}, "bad-row", 1, "no JSON"),
        ({"messages": [m("user"), m("assistant", train=0)]}, "bad-row", 1, "train must be true or false"),
        ({"messages": [m("user"), m("assistant", weight=0.5)]}, "bad-row", 1, "weight must be 0 or 1"),
        ({"messages": [m("user", "cut \ud83d"), m("assistant")]}, "bad-row", 0, "surrogate"),
        ({"messages": [m("user"), m("assistant")], "tools": "{"}, "bad-row", None, "not JSON"),
        ({"messages": [m("user"), m("assistant", function_call={"name": "f"})]}, "bad-row", 1, "write tool_calls"),
        ({"messages": [m("user"), m("assistant", reasoning="a", thinking="b")]}, "bad-row", 1, "say different things"),
        (
            {"messages": [m("user"), m("assistant", tool_calls=[tool("f", parameters={"x": 1})])]},
            "bad-row",
            1,
            "found parameters",
        ),
        (
            {"messages": [m("user"), m("assistant", tool_calls=[{**tool("f"), "arguments": {}}])]},
            "bad-row",
            1,
            "beside function",
        ),
        (
            {"messages": [m("user"), m("assistant", tool_calls=[tool("f", arguments='{"x": "\\ud83d"}')])]},
            "bad-row",
            1,
            "surrogate",
        ),
        ({"messages": [m("user"), m("assistant")], "tools": '[{"x": "\\ud83d"}]'}, "bad-row", None, "surrogate"),
        ({"messages": [m("user"), m("assistant", tool_calls=[tool("f", arguments="[" * 99999)])]}, "bad-row", 1, "no JSON"),
        ({"messages": [m("user")]}, "no-assistant", None, "no assistant turn"),
        ({"messages": [m("assistant"), m("user")]}, "assistant-first", 0, "before any user"),
        ({"messages": [m("system"), m("assistant")]}, "assistant-first", 1, "before any user"),
        ({"messages": [m("user"), m("assistant"), m("assistant")]}, "role-order", 2, "two assistant turns"),
        ({"messages": [m("user"), m("tool"), m("assistant")]}, "role-order", 1, "must follow"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused(row, code, turn, words):
    with pytest.raises(Refused) as refusal:
        Conversation.parse(row)
    assert (refusal.value.code, refusal.value.turn) == (code, turn)
    assert words in refusal.value.message


def test_nulls_and_text_parts_are_read_as_plain_messages():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "train": None},
            {"role": "tool", "content": "r", "tool_calls": None},
            {"role": "assistant", "content": "done", "tool_calls": []},
        ],
        "tools": None,
    }
    conversation = Conversation.parse(row)
    assert [dict(message.fields) for message in conversation.messages] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [DECODED]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "done"},
    ]
    assert conversation.assistant_turns() == [1, 3]
    assert [Conversation.parse({"messages": [m("user"), m("assistant", weight=w)]}).messages[1].train for w in (0, 1)] == [
        False,
        True,
    ]
    assert conversation.messages[1].says() and not Message({"role": "assistant", "content": " "}).says()
    assert conversation.messages[1].plain_values() == ["a", "c", "1"]


def test_reasoning_under_any_of_its_names_and_fields_that_no_template_sees():
    for name in ("reasoning_content", "reasoning", "thinking"):
        row = {"messages": [m("user", id="7"), m("assistant", **{name: "hm"}, model="x", annotations=[])]}
        user, answer = Conversation.parse(row).messages
        assert answer.fields["reasoning_content"] == "hm" and "thinking" not in answer.fields
        assert (user.others, answer.others) == (("id",), ("model",))
