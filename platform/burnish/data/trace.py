"""What the dye shows of a render: which text of which message each of its characters came from, and what that proves."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from burnish.data.conversation import Refused


@dataclass(frozen=True)
class Text:
    """One text of one message; for each of its characters the code point (uint32) and whether it was dyed (bool)."""

    turn: int
    role: str
    text: str
    points: NDArray[np.uint32]
    dyed: NDArray[np.bool_]


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
        owned = np.flatnonzero(self.owner >= 0)
        owner = self.owner[owned].astype(np.int16)
        order = np.argsort(owner, kind="stable")
        edges = np.searchsorted(owner[order], np.arange(len(self.texts) + 1))
        return [owned[order[start:end]] for start, end in pairwise(edges)]

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        return code_points(self.render)

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


def code_points(text: str) -> NDArray[np.uint32]:
    """The code points of a text, uint32 [n]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _short(text: Text) -> str:
    return repr(text.text if len(text.text) <= 60 else text.text[:57] + "...")
