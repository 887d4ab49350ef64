"""Fixed conversations that reach the branches in which chat templates differ; the contract renders each of them."""

from typing import Any


def _says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _talk(*contents: str) -> list[dict[str, Any]]:
    return [_says("assistant" if turn % 2 else "user", content) for turn, content in enumerate(contents)]


def _call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(number: int, content: str) -> dict[str, Any]:
    return _says("tool", content, tool_call_id=f"call0000{number}", name="look_up")


_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a word.",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string", "description": "The word."},
                "limit": {"type": "integer", "default": 3},
                "order": {"type": "string", "enum": ["up", "down"]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["word"],
        },
    },
}
_RICH = {
    "type": "function",
    "function": {
        "name": "größe",
        "description": "Masse < 3 & 'mehr' \"so\".",
        "parameters": {
            "type": "object",
            "properties": {
                "flag": {"type": "boolean"},
                "ratio": {"type": "number", "minimum": 0.5, "nullable": True},
                "place": {
                    "type": "object",
                    "properties": {"lat": {"type": "number"}, "names": {"type": "array", "items": {"type": "string"}}},
                    "required": ["lat"],
                },
                "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"type": ["string", "null"], "default": None},
            },
            "required": [],
        },
        "returns": {"type": "object", "properties": {"ok": {"type": "boolean", "description": "Done."}}},
    },
}
"""Every kind of parameter that templates print in ways of their own."""
_RICH_ARGUMENTS = {
    "flag": True, "off": False, "ratio": 0.25, "count": 3, "none": None, "text": "é <b> 'a' \"b\" \\ {c}\n\tend",
    "place": {"lat": 1.5, "names": ["x", "y'z"]}, "list": [1, True, None, "two"], "empty": {},
}  # fmt: skip
_ASKED = _says("user", "What does burnish mean?")
_CALLED = _says("assistant", "", tool_calls=[_call(1, "look_up", word="burnish", limit=1)])
_TOLD = _result(1, '{"meaning": "to polish"}')

PROBES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": _talk("Hi", "Hello.")},
    "system": {"messages": [_says("system", "Be brief."), *_talk("What is 2 + 2?", "4")]},
    "developer": {"messages": [_says("developer", "Be brief."), *_talk("What is 2 + 2?", "4")]},
    "two systems": {"messages": [_says("system", "Be brief."), _says("system", "Be kind."), *_talk("Hi", "Hello.")]},
    "late system": {"messages": [*_talk("Hi", "Hello."), _says("system", "Be brief."), *_talk("And now?", "Bye.")]},
    "three turns": {"messages": _talk("a", "b", "c", "d", "e", "f")},
    "spaces": {"messages": _talk(" a\n\nb ", "\n\nYes. ", "\tSure?\n", " No")},
    "brackets": {"messages": _talk("List", "[[1, 2]]", "{}", '{"a": "b"}')},
    "scripts": {"messages": _talk("Grüße 👋 e\u0301", "你好, مرحبا", "½ ﬁ", "ok")},
    "code": {"messages": _talk("Show code", "```python\nprint('a < b & c')\n```")},
    "no content": {"messages": _talk("Say nothing", "", "Again", "Done")},
    "reasoning": {"messages": [*_talk("Why?"), _says("assistant", "Because.", reasoning_content="Let me think.")]},
    "reasoning in history": {
        "messages": [
            *_talk("Why?"), _says("assistant", "Because.", reasoning_content="Let me think."),
            *_talk("Sure?"), _says("assistant", "Ok", reasoning_content="Short."),
        ]
    },
    "reasoning in content": {"messages": _talk("Why?", "<think>\nHm.\n</think>\n\nBecause.", "Sure?", "Ok")},
    "tools unused": {"messages": _talk("Hi", "Hello."), "tools": [_TOOL]},
    "tools and system": {"messages": [_says("system", "Be brief."), *_talk("Hi", "Hello.")], "tools": [_TOOL]},
    "tool call": {"messages": [_ASKED, _CALLED], "tools": [_TOOL]},
    "tool result": {
        "messages": [_ASKED, _CALLED, _TOLD, _says("assistant", "To polish."), *_talk("Thanks", "Welcome.")],
        "tools": [_TOOL],
    },
    "two tool calls": {
        "messages": [
            _ASKED,
            _says("assistant", "Both.", tool_calls=[_call(1, "look_up", word="a"), _call(2, "look_up", tags=["x", "y"])]),
            _TOLD, _result(2, "nothing"), _says("assistant", "Here."),
        ],
        "tools": [_TOOL],
    },
    "reasoning and tool": {
        "messages": [
            _ASKED, {**_CALLED, "reasoning_content": "Look it up."},
            _TOLD, _says("assistant", "To polish.", reasoning_content="Found."),
        ],
        "tools": [_TOOL],
    },
    "rich tools": {
        "messages": [
            _ASKED, _says("assistant", "", tool_calls=[_call(1, "größe", **_RICH_ARGUMENTS)]),
            _result(1, "é <b> 'a' \"b\""), _says("assistant", "Done."),
        ],
        "tools": [_RICH, _TOOL],
    },
    "thought in the last answer": {"messages": _talk("Why?", "<think>\nHm.\n</think>\n\nBecause.")},
    "long": {"messages": _talk(*(f"{number} " + "word " * (500 if number == 2 else 3) for number in range(14)))},
    "no tools listed": {"messages": [_ASKED, _CALLED, _TOLD, _says("assistant", "To polish.")]},
}  # fmt: skip
"""Each a row in `messages` form, by name."""
