"""The second proof of a mask: which text of which message every rendered character came from.

The conversation is rendered once more with each text dyed: its letters replaced by one letter that stands nowhere else,
another one for each text. A template that only places, trims, splits or quotes texts gives a render of the same length,
and where the dye shows, the character of the plain render belongs to that text. Nothing of this looks at prompts, stop
tokens or tokens, on which the first proof rests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.data.conversation import Message, Refused
from burnish.data.trace import Text, Trace, code_points

_SCRIPTS = ((0xA000, 1165), (0x3400, 6592), (0xAC00, 11172), (0x4E00, 20992))
"""First letter and number of letters of Yi, two CJK blocks and Hangul (Unicode 16, Blocks.txt): letters without case, which
templates trim, match and quote as they do any other letter."""


def trace(
    messages: Sequence[Message], plain: str, literals: Sequence[str], draw: Callable[[Sequence[Message]], str]
) -> Trace:
    """Where each character of the render `plain` of these messages came from; `draw` renders other messages alike.

    `literals` are the template's string constants: a template may look for them in a text and then do something else, so
    they stay as they are. Raises Refused untraceable where the render depends on other letters too.
    """
    points = code_points(plain)
    found = [(turn, text) for turn, message in enumerate(messages) for text in _texts(message.fields)]
    first = _unused_letters(points, len(found))
    joined = "\0".join(text for _, text in found)
    said = code_points(joined)
    ends = list(accumulate(len(text) + 1 for _, text in found))
    spans = [(end - 1 - len(text), end - 1) for end, (_, text) in zip(ends, found, strict=True)]
    letters = (first + np.arange(len(found), dtype=np.uint32)).repeat(np.diff(ends, prepend=0))[: len(said)]
    for left, dyeable in _tries(literals, joined):
        dyed = _dyed(joined, said, left, dyeable)
        painted = _text(np.where(dyed, letters, said))
        try:
            shown = code_points(draw(_with_texts(messages, [painted[start:end] for start, end in spans])))
        except Refused:
            continue
        if len(shown) == len(points):
            owner = shown.astype(np.int32) - first
            owner[(owner < 0) | (owner >= len(found))] = -1
            if bool((shown == points)[owner < 0].all()):
                texts = tuple(
                    Text(turn, messages[turn].role, text, said[start:end], dyed[start:end])
                    for (turn, text), (start, end) in zip(found, spans, strict=True)
                )
                return Trace(plain, owner, texts, left)
    raise Refused(
        "untraceable",
        "the render changes with the letters of the text, so it cannot be shown where its characters come from",
        len(messages) - 1,
    )


def _tries(literals: Sequence[str], joined: str) -> Iterator[tuple[tuple[str, ...], NDArray[np.bool_]]]:
    """The literals to leave undyed, and the characters to dye, from most dye to least.

    A template may look for its own literals in a text and then do something else, and may quote what is no letter: what
    the render shows to depend on is left undyed at the next try.
    """
    yield (), _visible()
    kept = tuple(literal for literal in literals if literal in joined)
    if kept:
        yield kept, _visible()
    yield kept, _alphanumeric()


def _texts(fields: Mapping[str, Any]) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _each_text(fields, note)
    return found


def _with_texts(messages: Sequence[Message], texts: Sequence[str]) -> list[Message]:
    """The messages with `texts` in place of their own, in order."""
    left = iter(texts)
    return [Message(_each_text(message.fields, lambda _: next(left)), message.train) for message in messages]


def _each_text(fields: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The fields of a message with every text that a template shows changed: content, reasoning, names and arguments."""
    out = dict(fields)
    for key in ("content", "reasoning_content"):
        if fields.get(key):
            out[key] = change(fields[key])
    if fields.get("tool_calls"):
        out["tool_calls"] = [_each_text_of_call(call, change) for call in fields["tool_calls"]]
    return out


def _each_text_of_call(call: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    function = call["function"]
    arguments = _each_string(function["arguments"], change)
    return {**call, "function": {**function, "name": change(function["name"]), "arguments": arguments}}


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """The arguments of a tool call with every string in them changed; names of arguments stay, since templates sort them."""
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, Mapping):
        return {key: _each_string(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_string(item, change) for item in value]
    return value


def _dyed(text: str, points: NDArray[np.uint32], literals: Sequence[str], dyeable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which characters of a text are dyed: those of the table that are no part of a literal."""
    dyed = dyeable[points]
    for literal in literals:
        at = text.find(literal)
        while at >= 0:
            dyed[at : at + len(literal)] = False
            at = text.find(literal, at + 1)
    return dyed


def _unused_letters(points: NDArray[np.uint32], count: int) -> int:
    """The first of `count` letters in a row that do not stand in a render."""
    for first, size in _SCRIPTS:
        if count <= size and not bool(((points >= first) & (points < first + count)).any()):
            return first
    raise Refused("untraceable", f"no script has {count} letters that this conversation does not use itself")


@cache
def _visible() -> NDArray[np.bool_]:
    """For each code point, whether JSON and Python's repr both write it as one character as it is."""
    table = np.array([chr(point).isprintable() for point in range(0x110000)])
    table[[ord(character) for character in " \"'\\"]] = False
    return table


@cache
def _alphanumeric() -> NDArray[np.bool_]:
    return np.array([chr(point).isalnum() for point in range(0x110000)])


def _text(points: NDArray[Any]) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")
