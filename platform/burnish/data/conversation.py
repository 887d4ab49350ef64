"""Conversations in the OpenAI shape, and the refusal of a row that is none."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names for what a model thinks before it answers; transformers shows each of them to a template under all of them."""
_ENCODER = json.JSONEncoder(ensure_ascii=False)
ROLES = ("system", "developer", "user", "assistant", "tool")


class Refused(Exception):
    """One row that cannot be trained as it is: a code, the turn it concerns, and what to do about it."""

    def __init__(self, code: str, message: str, turn: int | None = None) -> None:
        super().__init__(code, message, turn)
        self.code, self.message, self.turn = code, message, turn

    def to_json(self) -> dict[str, Any]:
        """The refusal as `burnish preview --json` and refused.jsonl show it."""
        return {"code": self.code, "turn": self.turn, "message": self.message}


@dataclass(frozen=True)
class Message:
    """One message: exactly the fields that the template will see, and whether its answer bears loss.

    `fields` holds role, content and, where the row has them, tool_calls, reasoning_content, name and tool_call_id; `others`
    names the fields of the row that the template will not see.
    """

    fields: Mapping[str, Any]
    train: bool = True
    others: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """One of `ROLES`."""
        return str(self.fields["role"])

    def says(self) -> bool:
        """Whether the message holds anything: content, reasoning or a tool call."""
        return any(str(self.fields.get(key) or "").strip() for key in ("content", "reasoning_content")) or bool(
            self.fields.get("tool_calls")
        )

    def plain_values(self) -> list[str]:
        """Names of arguments, and arguments that are numbers or true or false, as JSON writes them."""
        calls = [call["function"] for call in self.fields.get("tool_calls") or ()]
        return [text for call in calls for text in _names_and_numbers(call["arguments"]) if text.strip()]


@dataclass(frozen=True)
class Conversation:
    """Messages in an order that a server could meet, at least one of them an assistant's; their tools and variables.

    Invariant: the assistant never opens and never answers itself; a tool message follows an assistant's tool calls or
    another tool message. `kwargs` are variables of the template for this conversation alone, as a request may set them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> "Conversation":
        """The conversation of one row in `messages` form; raises Refused where it is none."""
        raw = row.get("messages")
        if not isinstance(raw, list) or not raw:
            found = f"the row has {', '.join(sorted(row)) or 'no keys'}" if raw is None else f"found {raw!r:.60}"
            raise Refused("bad-row", f"`messages` must be a list of messages with role and content; {found}")
        messages = tuple(_message(item, turn) for turn, item in enumerate(raw))
        _check_order(messages)
        tools, kwargs = _json(row, "tools") or [], _json(row, "chat_template_kwargs") or {}
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Refused("bad-row", f"`tools` must be a list of tool descriptions; found {tools!r:.60}")
        if not isinstance(kwargs, dict):
            raise Refused("bad-row", f"`chat_template_kwargs` must be an object of template variables; found {kwargs!r:.60}")
        _check_text([tools, kwargs], None)
        return cls(messages, tuple(tools), {name: value for name, value in kwargs.items() if value is not None})

    def assistant_turns(self) -> list[int]:
        """Positions of the assistant's messages, in order."""
        return [turn for turn, message in enumerate(self.messages) if message.role == "assistant"]


def _message(item: Any, turn: int) -> Message:
    """One message, checked field by field; raises Refused that names the field."""
    if not isinstance(item, dict):
        raise Refused("bad-row", f"a message must be an object with role and content; found {item!r:.60}", turn)
    item = {key: value for key, value in item.items() if value is not None}
    role = item.get("role")
    if role not in ROLES:
        raise Refused("bad-row", f"role must be one of {', '.join(ROLES)}; found {role!r}", turn)
    if item.get("function_call"):
        raise Refused("bad-row", "function_call is no longer rendered by templates; write tool_calls", turn)
    fields: dict[str, Any] = {"role": role, "content": _content(item, turn)}
    for key in ("name", "tool_call_id", *_REASONING):
        if key in item:
            if not isinstance(item[key], str):
                raise Refused("bad-row", f"{key} must be text; found {item[key]!r:.60}", turn)
            if key not in _REASONING:
                fields[key] = item[key]
    reasoning = {item[key] for key in _REASONING if item.get(key)}
    if len(reasoning) > 1:
        raise Refused("bad-row", f"{', '.join(key for key in _REASONING if item.get(key))} say different things", turn)
    if reasoning:
        fields["reasoning_content"] = reasoning.pop()
    calls = item.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise Refused("bad-row", f"tool_calls must be a list of objects; found {calls!r:.60}", turn)
        fields["tool_calls"] = [_call(call, turn) for call in calls]
    _check_text(fields, turn)
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise Refused("bad-row", f"train must be true or false; found {train!r}", turn)
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Refused("bad-row", f"weight must be 0 or 1; found {weight!r}", turn)
    known = {*fields, *_REASONING, "tool_calls", "function_call", "train", "weight"}
    others = tuple(str(key) for key, value in item.items() if key not in known and value not in ("", [], {}))
    return Message(fields, train is not False and weight != 0, others)


def _content(item: Mapping[str, Any], turn: int) -> str:
    """The text of a message; a list of text parts is joined."""
    content = item.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise Refused("bad-row", "content holds parts that are not text; only text is supported", turn)
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str) and not (content is None and item.get("tool_calls")):
        raise Refused("bad-row", f"content must be text; found {content!r:.60}", turn)
    return content or ""


def _check_text(value: Any, turn: int | None) -> None:
    """Raises Refused where a value is no JSON, or holds text that no tokenizer can read."""
    try:
        _ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        raise Refused("bad-row", "the text holds half of a surrogate pair, as a cut emoji leaves it", turn) from None
    except (TypeError, ValueError, RecursionError):
        raise Refused("bad-row", f"this is no JSON: {value!r:.60}", turn) from None


def _call(call: Any, turn: int) -> dict[str, Any]:
    """One tool call in the shape that servers give to templates: arguments are an object, not the JSON text that travels."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("bad-row", f"a tool call must be an object with function.name; found {call!r:.60}", turn)
    about = {"id", "type", "index"}
    strange = [key for key in {**call, **function} if key not in {*about, "function", "name", "arguments"}]
    if strange or ("function" in call and {"name", "arguments"} & set(call)):
        odd = ", ".join(map(str, strange)) or "name or arguments beside function"
        raise Refused("bad-row", f"a tool call holds id, type and function with name and arguments; found {odd}", turn)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Refused("bad-row", f"the arguments of a tool call are no JSON: {arguments!r:.60}", turn) from None
    whole = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"type": "function", **{key: call[key] for key in about if key in call}, "function": whole}


def _check_order(messages: tuple[Message, ...]) -> None:
    """Raises Refused unless a server could have met these messages in this order."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise Refused("no-assistant", f"no assistant turn to train on; the roles are {', '.join(roles)}")
    before = None
    for turn, role in enumerate(roles):
        if role == "assistant" and not {"user", "tool"} & set(roles[:turn]):
            raise Refused("assistant-first", "the assistant speaks before any user message; put a user turn first", turn)
        if role == "assistant" and before == "assistant":
            raise Refused("role-order", "two assistant turns in a row; join them or put a user turn between", turn)
        if (
            role == "tool"
            and before != "tool"
            and not (before == "assistant" and messages[turn - 1].fields.get("tool_calls"))
        ):
            raise Refused("role-order", "a tool message must follow an assistant turn with tool_calls", turn)
        before = role


def _json(row: Mapping[str, Any], key: str) -> Any:
    """A value of a row that may be written as JSON text."""
    value = row.get(key)
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Refused("bad-row", f"`{key}` is text that is not JSON: {value!r:.60}") from None


def strings(value: Any) -> Iterator[str]:
    """Every string inside JSON, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _names_and_numbers(value: Any) -> list[str]:
    """The names, the numbers and the truth values inside the arguments of a tool call."""
    if isinstance(value, int | float):
        return [json.dumps(value)]
    names = list(map(str, value)) if isinstance(value, Mapping) else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return names + [text for item in items for text in _names_and_numbers(item)]
