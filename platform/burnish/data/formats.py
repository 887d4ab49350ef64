"""Rows of other shapes, converted to the `messages` form: ShareGPT, Alpaca, prompt and completion.

A row's keys decide, the first that matches: `messages`, `conversations`, `prompt` with `completion`, `instruction` with
`output`. Other keys of the row (`tools`, `chat_template_kwargs`) go along.
"""

import json
from collections.abc import Mapping
from typing import Any

from burnish.data.conversation import Refused

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "developer": "developer", "function_call": "assistant",
    "tool_call": "assistant", "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
"""What ShareGPT files write under `from`, and the role that it is."""
_CALLS = ("function_call", "tool_call")


def messages_form(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same conversation as a row with `messages`; raises Refused bad-row where the row has none of the known shapes."""
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("conversations") is not None:
        messages = _sharegpt(row["conversations"])
    elif "prompt" in row and "completion" in row:
        messages = _prompt_completion(row["prompt"], row["completion"])
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row)
    else:
        raise Refused(
            "bad-row",
            "the row needs `messages`, or `conversations` (ShareGPT), or `prompt` and `completion`, or `instruction` and "
            f"`output` (Alpaca); it has {', '.join(sorted(map(str, row))) or 'no keys'}",
        )
    rest = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key) is not None}
    return {**rest, "messages": _with_system(messages, row)}


def _with_system(messages: Any, row: Mapping[str, Any]) -> Any:
    """The messages behind the system prompt that the row has in a column of its own."""
    key = "system" if row.get("system") else "system_prompt"
    if not row.get(key) or not isinstance(messages, list):
        return messages
    system = {"role": "system", "content": _text(row[key], key)}
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [system, *messages]
    if first.get("content") != row[key]:
        raise Refused("bad-row", f"`{key}` and the first message are two different system prompts; keep one")
    return messages


def _sharegpt(turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise Refused("bad-row", f"`conversations` must be a list of turns with from and value; found {turns!r:.60}")
    return [_sharegpt_turn(turn, position) for position, turn in enumerate(turns)]


def _sharegpt_turn(turn: Any, position: int) -> Any:
    """One turn with `from` and `value`; one that has a role already is left as it is."""
    if not isinstance(turn, dict) or turn.get("role") is not None:
        return turn
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise Refused("bad-row", f"`from` must be one of {', '.join(_ROLES)}; found {speaker!r}", position)
    rest = {key: item for key, item in turn.items() if key not in ("from", "value", "role")}
    if speaker not in _CALLS:
        return {**rest, "role": _ROLES[speaker], "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Refused(
            "bad-row", f"the value of a {speaker} must be JSON with name and arguments: {value!r:.60}", position
        ) from None
    return {**rest, "role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _prompt_completion(prompt: Any, completion: Any) -> list[Any]:
    """Texts become a question and its answer; lists of messages are joined, and only the completion is trained."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    for name, part in (("prompt", prompt), ("completion", completion)):
        if not isinstance(part, list) or not all(isinstance(message, dict) for message in part):
            raise Refused(
                "bad-row", f"`prompt` and `completion` must both be texts or lists of messages; {name} is {part!r:.60}"
            )
    return [*({**message, "train": False} for message in prompt), *completion]


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    """Instruction and input, with a newline between, are the question; `history` holds earlier questions and answers."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise Refused("bad-row", f"`history` must be a list of pairs of question and answer; found {history!r:.60}")
    question = _text(row["instruction"], "instruction")
    question += "\n" + _text(row["input"], "input") if row.get("input") else ""
    pairs = [*history, (question, _text(row["output"], "output"))]
    turns = [({"role": "user", "content": asked}, {"role": "assistant", "content": answer}) for asked, answer in pairs]
    return [message for turn in turns for message in turn]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Refused("bad-row", f"`{key}` must be text; found {value!r:.60}")
    return value
