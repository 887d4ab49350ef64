"""Conversations in the shapes that templates treat differently; each message has words that no other one has."""

from typing import Any

CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of the coming days.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A town."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "call00001", "name": "get_weather"}


SHAPES: dict[str, dict[str, Any]] = {
    "single": {"messages": [user("Name a metal."), assistant("Copper, of course.")]},
    "system": {"messages": [system("Be terse."), user("Name a metal."), assistant("Zinc.")]},
    "three turns": {
        "messages": [
            user("Hello there"), assistant("Good day."), user("What is tin"), assistant("A soft metal."),
            user("Thank you"), assistant("With pleasure."),
        ]
    },
    "brackets": {"messages": [user("Give a matrix"), assistant("[[1, 2], [3, 4]]"), user("Another"), assistant("[[5]]")]},
    "newlines": {"messages": [user("Write verse\n"), assistant("\n\nRoses are red.\n\n"), user("More"), assistant("\nViolets")]},
    "reasoning": {"messages": [user("What is 6 * 7?"), assistant("It is 42.", reasoning_content="Six sevens.")]},
    "reasoning history": {
        "messages": [
            user("What is 6 * 7?"), assistant("It is 42.", reasoning_content="Six sevens."),
            user("And half"), assistant("Then 21.", reasoning_content="Divide by two."),
            user("Again halved"), assistant("Rather 10.5 now."),
        ]
    },
    "tools": {
        "messages": [
            user("Weather in Norway"), assistant("", tool_calls=[CALL]), tool('{"sky": "cloudy"}'),
            assistant("Clouds over the fjord."), user("And joy"), assistant("Plenty."),
        ],
        "tools": [TOOL],
    },
    "reasoning and tools": {
        "messages": [
            system("Be terse."), user("Weather in Norway"),
            assistant("Looking.", reasoning_content="I need data.", tool_calls=[CALL]), tool('{"sky": "cloudy"}'),
            assistant("Clouds over the fjord.", reasoning_content="Simple enough."),
            user("And joy"), assistant("Plenty.", reasoning_content="Feelings now."),
        ],
        "tools": [TOOL],
    },
}  # fmt: skip
"""The nine shapes on which ways of masking were compared in docs/design.md."""

MORE_SHAPES: dict[str, dict[str, Any]] = {
    "several systems": {
        "messages": [system("Be terse."), system("Speak English."), user("Name a metal."), assistant("Zinc.")]
    },
    "system between": {
        "messages": [user("Hello there"), assistant("Good day."), system("Be terse."), user("Go on"), assistant("Done.")]
    },
    "reasoning inside": {
        "messages": [user("What is 6 * 7?"), assistant("<think>\nSix sevens.\n</think>\n\nIt is 42."), user("Sure?"), assistant("Yes.")]
    },
    "literals": {"messages": [user("Close </think> tags"), assistant("Write </think> or <tool_call> so."), user("ok"), assistant("Fine")]},
    "two calls": {
        "messages": [
            user("Weather twice"),
            assistant("", tool_calls=[CALL, {**CALL, "id": "call00002", "function": {"name": "get_weather", "arguments": {"city": "Bergen"}}}]),
            tool("rain"), {**tool("snow"), "tool_call_id": "call00002"}, assistant("Rain, then snow."),
        ],
        "tools": [TOOL],
    },
    "awkward text": {
        "messages": [user("tab\there \"quoted\" and it's \\ done"), assistant("  é — naïve 👩‍👩‍👧 ½ <b>&amp;</b> {{ x }} {% y %}  ")],
    },
}  # fmt: skip
