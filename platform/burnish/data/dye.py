"""The second proof of a mask: which text of which message every rendered character came from.

The conversation is rendered once more with each text dyed: its letters replaced by one letter that stands nowhere else,
another one for each text. A template that only places, trims, splits or quotes texts gives a render of the same length,
and where the dye shows, the character of the plain render belongs to that text. Nothing of this looks at prompts, stop
tokens or tokens, on which the first proof rests.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.data.conversation import Message, Refused

_SCRIPTS = ((0xA000, 1165), (0x3400, 6592), (0xAC00, 11172), (0x4E00, 20992))
"""First letter and number of letters of Yi, two CJK blocks and Hangul (Unicode 16, Blocks.txt): letters without case, which
templates trim, match and quote as they do any other letter."""


@dataclass(frozen=True)
class Text:
    """One text of one message, and which of its characters were dyed (bool, as long as the text)."""

    turn: int
    role: str
    text: str
    dyed: NDArray[np.bool_]

    @cached_property
    def points(self) -> NDArray[np.uint32]:
        """The code points of the text."""
        return _points(self.text)


@dataclass(frozen=True)
class Trace:
    """A render and for each of its characters the number of the text that it came from, -1 for the template's own.

    Invariant: `owner` int32 is as long as the render. `kept` are the template's literals that stand in some text, and were
    not dyed.
    """

    render: str
    owner: NDArray[np.int32]
    texts: tuple[Text, ...]
    kept: tuple[str, ...]

    @cached_property
    def _places(self) -> list[NDArray[np.intp]]:
        """For each text the positions of the characters that came from it, in order."""
        # NumPy sorts 16 bits by radix; no script has letters for more texts than that.
        owner = self.owner.astype(np.int16)
        order = np.argsort(owner, kind="stable")
        edges = np.searchsorted(owner[order], np.arange(len(self.texts) + 1))
        return [order[start:end] for start, end in pairwise(edges)]

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        return _points(self.render)

    @cached_property
    def _turns(self) -> NDArray[np.int32]:
        return np.array([text.turn for text in self.texts], np.int32)

    def last_owned(self, turn: int) -> tuple[int, int]:
        """Position and owner of the last character that came from a message before `turn`; (-1, -1) where there is none."""
        before = int(np.searchsorted(self._turns, turn))
        owned = np.flatnonzero((self.owner >= 0) & (self.owner < before))
        return (int(owned[-1]), int(self.owner[owned[-1]])) if len(owned) else (-1, -1)

    def followed_by(self, other: "Trace", start: int) -> "Trace":
        """This render followed by another one of the same conversation from its character `start` on."""
        owner = np.append(self.owner, other.owner[start:])
        return Trace(self.render + other.render[start:], owner, max(self.texts, other.texts, key=len), other.kept)

    def padded(self, text: str) -> "Trace":
        """This render with text of the template's own behind it."""
        own = np.full(len(text), -1, np.int32)
        return replace(self, render=self.render + text, owner=np.append(self.owner, own)) if text else self

    def check_answer(self, turn: int, prompt_end: int, start: int, end: int) -> None:
        """Raises Refused unless characters [start, end) hold every text of this message whole, and no other message's.

        What the server's prompt, characters [0, prompt_end), says of the answer already (an opened <think>) counts too.
        """
        inside = self.owner[start:end]
        foreign = np.flatnonzero((inside >= 0) & (self._turns[inside] != turn))
        if len(foreign):
            other = int(self._turns[inside[foreign[0]]])
            shown = self.shown(start + int(foreign[0]))
            raise Refused("foreign-text", f"the template puts text of message {other} into this answer: {shown}", turn)
        for number in np.flatnonzero(self._turns == turn):
            text, everywhere = self.texts[number], self._places[number]
            if not text.dyed.any():
                self._check_undyed(text, start, end)
                continue
            said = everywhere[(everywhere < prompt_end) | ((everywhere >= start) & (everywhere < end))]
            if self._holds(text, said):
                if self._unchanged(text, int(said[0])):
                    continue
            elif self._holds(text, everywhere):
                raise Refused("uncovered", f"{_short(text)} is not all between the prompt and the stop token", turn)
            raise Refused(
                "dropped-content",
                f"the template does not render {_short(text)} in this answer as it is; take it out of the row, write "
                "train: false, or choose a template that shows it",
                turn,
            )

    def _check_undyed(self, text: Text, start: int, end: int) -> None:
        """Raises Refused for a text of which nothing was dyed, unless it is quotes and spaces, and these are there."""
        if text.text.strip() not in self.render[start:end]:
            raise Refused("dropped-content", f"the template does not render {_short(text)} in this answer", text.turn)
        if text.text.strip("\"'\\ \t\r\n"):
            raise Refused(
                "untraceable",
                f"{_short(text)} is all that is said here, and cannot be told from the template's own text; take it out of "
                "the row, or write train: false",
                text.turn,
            )

    def check_context(self, turn: int) -> None:
        """Raises Refused where what somebody else than the model said before this turn is not in the render."""
        for number, text in enumerate(self.texts):
            if text.turn >= turn or text.role == "assistant":
                continue
            shown = self._holds(text, self._places[number]) if text.dyed.any() else text.text.strip() in self.render
            if not shown:
                raise Refused(
                    "dropped-content",
                    f"the template does not render this {text.role} message as it is: {_short(text)}; a server would not "
                    "either. Take it out of the row, or choose a template that shows it",
                    text.turn,
                )

    def shown(self, at: int) -> str:
        """The render around a character."""
        return repr(self.render[max(0, at - 20) : at + 30])

    def _holds(self, text: Text, places: NDArray[np.intp]) -> bool:
        """Whether the characters at these places are a text, letter by letter in its order, once or several times."""
        letters = text.points[text.dyed]
        times, rest = divmod(len(places), len(letters))
        return times > 0 and rest == 0 and bool((self._points[places].reshape(times, -1) == letters).all())

    def _unchanged(self, text: Text, first: int) -> bool:
        """Whether also what is no letter stands around a text's letters as in the text: lines, indents, quotes.

        `first` is the place of its first letter. Only spaces at its ends may be missing. A template that looks for one of
        its literals in a text may space it anew; inside a tool call JSON or a language's quotes may lengthen it.
        """
        lead = len(text.text) - len(text.text.lstrip())
        said, before = text.text.strip(), text.text[lead : int(np.argmax(text.dyed))]
        for quote in _QUOTES:
            start = first - len(quote(before))
            if start >= 0 and self.render.startswith(quote(said), start):
                return True
        marks = "|".join(re.escape(literal) for literal in self.kept if not literal.isalnum())
        if not marks:
            return False
        spaced = re.compile(rf"\s*(?:{marks})\s*")
        near = self.render[max(0, first - len(before) - 20) : first + 2 * len(said) + 20]
        return spaced.sub(lambda mark: mark[0].strip(), said) in spaced.sub(lambda mark: mark[0].strip(), near)


_QUOTES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: text.replace("\\", "\\\\").replace("'", "\\'"),
    lambda text: repr(text + "'")[1:-2],
    lambda text: text.replace("'", "\\'"),
)
"""How templates write a text: as it is, as JSON, and between single or double quotes of a language like Python."""


def trace(
    messages: Sequence[Message], plain: str, literals: Sequence[str], draw: Callable[[Sequence[Message]], str]
) -> Trace:
    """Where each character of the render `plain` of these messages came from; `draw` renders other messages alike.

    `literals` are the template's string constants: a template may look for them in a text and then do something else, so
    they stay as they are. Raises Refused untraceable where the render depends on other letters too.
    """
    points = _points(plain)
    found = [(turn, text) for turn, message in enumerate(messages) for text in _texts(message.fields)]
    first = _unused_letters(points, len(found))
    everything = "\0".join(text for _, text in found)
    kept = tuple(literal for literal in literals if literal in everything)
    # A template may look for its own literals in a text and then do something else, and may quote what is no letter: what
    # the render shows to depend on is left undyed at the next try.
    tries = [((), _visible()), (kept, _visible()), (kept, _alphanumeric())]
    for left, dyeable in tries if kept else tries[1:]:
        texts = tuple(Text(turn, messages[turn].role, text, _dyed(text, left, dyeable)) for turn, text in found)
        brush = iter(range(len(texts)))

        def paint(_: str, texts: tuple[Text, ...] = texts, brush: Iterator[int] = brush) -> str:
            number = next(brush)
            return _text(np.where(texts[number].dyed, first + number, texts[number].points))

        painted = [Message(_each_text(message.fields, paint), message.train) for message in messages]
        try:
            dyed = _points(draw(painted))
        except Refused:
            continue
        if len(dyed) == len(points):
            owner = dyed.astype(np.int32) - first
            owner[(owner < 0) | (owner >= len(texts))] = -1
            if bool((dyed == points)[owner < 0].all()):
                return Trace(plain, owner, texts, left)
    raise Refused(
        "untraceable",
        "the render changes with the letters of the text, so it cannot be shown where its characters come from",
        len(messages) - 1,
    )


def _texts(fields: Mapping[str, Any]) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _each_text(fields, note)
    return found


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


def _dyed(text: str, literals: Sequence[str], dyeable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which characters of a text are dyed: those of the table that are no part of a literal."""
    dyed = dyeable[_points(text)]
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


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _text(points: NDArray[Any]) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")


def _short(text: Text) -> str:
    return repr(text.text if len(text.text) <= 60 else text.text[:57] + "...")
