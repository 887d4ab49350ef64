"""Rendering with masks proved twice: a token is trained if and only if the served model would have to emit it.

For assistant turn i the server feeds P, the render of the messages before it with the generation prompt. Q, the render up
to and including the turn, says what the model must emit: what follows P in Q, up to and including the first stop token.
Turns that meet the same context share one sample; a turn whose context a template rewrites later gets a sample of its own,
so that each is trained once, in exactly the tokens that the server would feed. The second proof is the dye (data/dye.py):
between P and the stop token stands the whole answer and nobody else's text. What cannot be shown is refused, by row.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from burnish.data.contract import differ
from burnish.data.conversation import Conversation, Message, Refused
from burnish.data.dye import trace
from burnish.data.encoding import Encoding
from burnish.data.packing import Sample
from burnish.data.template import Template
from burnish.data.trace import Trace

_APART = {"not-prefix-stable", "prompt-tokens"}
"""Why a turn cannot share a later turn's sample, and can have one of its own."""


@dataclass(frozen=True)
class _Exchange:
    """One turn as serving meets it: `text` starts with the prompt; `seam` is where the answer starts in the render Q."""

    prompt: str
    text: str
    seam: int
    grafted: bool


@dataclass(frozen=True)
class _Row:
    """The text of one sample, its tokens, and where each character came from."""

    text: str
    encoding: Encoding
    trace: Trace


@dataclass(frozen=True)
class _Scene:
    """A conversation under a template; renders are kept, since turns and rows share them."""

    conversation: Conversation
    template: Template
    exchanges: dict[int, _Exchange] = field(default_factory=dict)
    renders: dict[tuple[int, bool], str] = field(default_factory=dict)
    traces: dict[tuple[int, bool], Trace] = field(default_factory=dict)

    def exchange(self, turn: int) -> _Exchange:
        """What the server feeds and hears at a turn; raises Refused where the render of the turn has another seam."""
        if turn not in self.exchanges:
            self.exchanges[turn] = self._exchange(turn)
        return self.exchanges[turn]

    def _exchange(self, turn: int) -> _Exchange:
        prompt, until = self._render(turn, prompt=True), self._render(turn + 1, prompt=False)
        grafted = not until.startswith(prompt)
        seam = self._graft(turn, prompt, until) if grafted else len(prompt)
        answer = until[seam:]
        if not any(stop in answer for stop in self.template.stop_tokens):
            answer += self._next_header(turn, until)
        return _Exchange(prompt, prompt + answer, seam, grafted)

    def _render(self, count: int, prompt: bool) -> str:
        if (count, prompt) not in self.renders:
            messages = self.conversation.messages[:count]
            self.renders[count, prompt] = self.template.text(messages, self.conversation, prompt)
        return self.renders[count, prompt]

    def trace(self, count: int, prompt: bool) -> Trace:
        """Where the characters of the render of the first `count` messages came from."""
        if (count, prompt) not in self.traces:
            self.traces[count, prompt] = trace(
                self.conversation.messages[:count],
                self._render(count, prompt),
                self.template.syntax.literals,
                lambda painted: self.template.text(painted, self.conversation, prompt),
            )
        return self.traces[count, prompt]

    def _graft(self, turn: int, prompt: str, until: str) -> int:
        """Where the answer starts in a render whose history is not the prompt's, as where a system prompt moves.

        What follows the last character of the conversation must be the same in both, up to the answer.
        """
        in_prompt, owner = self.trace(turn, True).last_owned(turn)
        in_until, same = self.trace(turn + 1, False).last_owned(turn)
        header = prompt[in_prompt + 1 :]
        if in_until < 0 or same != owner or not until.startswith(header, in_until + 1):
            raise Refused(
                "unreachable-turn",
                f"the server's prompt is not how the template renders this answer: {differ(prompt, until)}. Give the turn "
                "what the prompt opens (reasoning_content after <think>), or set the variable that closes it, for example "
                "enable_thinking: false, in template.kwargs or in the row's chat_template_kwargs",
                turn,
            )
        return in_until + 1 + len(header)

    def _next_header(self, turn: int, until: str) -> str:
        """The stop token that a template writes at the start of the next turn's header instead of at the end of this one."""
        role = "tool" if self.conversation.messages[turn].fields.get("tool_calls") else "user"
        following = Message({"role": role, "content": "?"})
        own = self.conversation.messages[: turn + 1]

        def draw(messages: Sequence[Message]) -> str:
            return self.template.text([*messages, following], self.conversation, prompt=False)

        tail = until[self.trace(turn + 1, False).last_owned(turn + 1)[0] + 1 :]
        try:
            continued = draw(own)
            rest = continued[trace(own, continued, self.template.syntax.literals, draw).last_owned(turn + 1)[0] + 1 :]
        except Refused:
            rest = tail  # the template cannot go on, so it shows no stop token
        for stop in self.template.stop_tokens:
            if rest.startswith(tail + stop):
                return stop
        stops = ", ".join(map(repr, self.template.stop_tokens))
        raise Refused(
            "no-stop",
            f"no stop token ({stops}) after the answer: the render ends {until[-40:]!r}, and with another message it goes "
            f"on {rest[:40]!r}. Name the token at which serving stops in template.stop_tokens, or mend the template",
            turn,
        )

    def row(self, turn: int) -> _Row:
        """The sample that ends with a turn: its tokens are those of the server's prompt, then those of the rest."""
        exchange = self.exchange(turn)
        encoding: Encoding | None = self.template.encode(exchange.text)
        assert encoding is not None
        if self._tokens_of_prompt(encoding, turn) is None:
            encoding = self.template.encode_apart(exchange.prompt, exchange.text[len(exchange.prompt) :])
            if encoding is None:
                raise Refused(
                    "prompt-tokens", "the answer merges with its prompt into one token, and cannot be cut off", turn
                )
        own = self.trace(turn + 1, False)
        if exchange.grafted:
            own = self.trace(turn, True).followed_by(own, exchange.seam)
        return _Row(exchange.text, encoding, own.padded(exchange.text[len(own.owner) :]))

    def target(self, row: _Row, turn: int) -> tuple[int, int]:
        """First and last token of an answer in a row; raises Refused where one of the proofs fails."""
        exchange = self.exchange(turn)
        if not row.text.startswith(exchange.prompt):
            raise Refused("not-prefix-stable", differ(exchange.prompt, row.text), turn)
        first = self._tokens_of_prompt(row.encoding, turn)
        if first is None:
            raise Refused("prompt-tokens", "the tokens before the answer are not those of the prompt alone", turn)
        last = self._first_stop(row.encoding, first)
        if last is None:
            raise Refused("no-stop", f"no stop token after the answer; the render ends {exchange.text[-60:]!r}", turn)
        end = int(row.encoding.ends[last])
        if end > len(exchange.text) or row.text[:end] != exchange.text[:end]:
            raise Refused("not-prefix-stable", differ(exchange.text[:end], row.text[:end]), turn)
        self._check_whole(row, turn, first, last)
        return first, last

    def _tokens_of_prompt(self, encoding: Encoding, turn: int) -> int | None:
        """How many tokens are the server's prompt; None where one of them reaches into the answer."""
        prompt = self.exchange(turn).prompt
        count = self.template.tokens_of_prompt(encoding, prompt)
        # A control token may eat the spaces behind it: those that the template writes, but not an answer's own.
        fields = self.conversation.messages[turn].fields
        spaced = any(str(fields.get(key) or "")[:1].isspace() for key in ("content", "reasoning_content"))
        eaten = count and spaced and bool(encoding.ends[count - 1] > len(prompt))
        return None if eaten else count

    def _first_stop(self, encoding: Encoding, first: int) -> int | None:
        at = int(np.searchsorted(encoding.stops, first))
        return int(encoding.stops[at]) if at < len(encoding.stops) else None

    def _check_whole(self, row: _Row, turn: int, first: int, last: int) -> None:
        """The second proof: raises Refused unless tokens [first, last) hold the whole answer, and nobody else's text."""
        start, end = int(row.encoding.starts[first]), int(row.encoding.starts[last])
        row.trace.check_answer(turn, len(self.exchange(turn).prompt), start, end)
        for value in self.conversation.messages[turn].plain_values():
            forms = {value, json.dumps(value, ensure_ascii=False)[1:-1], value.capitalize()}
            if not any(re.search(rf"(?<![\w.]){re.escape(form)}(?![\w.])", row.text[start:end]) for form in forms):
                raise Refused("dropped-content", f"the template does not render {value!r} in this answer as it is", turn)
        missing = self.template.unsayable(row.encoding, first, last)
        if missing:
            raise Refused("unknown-token", f"the vocabulary has no token for a character near {missing!r}", turn)


def render(
    conversation: Conversation,
    template: Template,
    max_length: int,
    train_on: Literal["assistant", "last_assistant"] = "assistant",
    history: Literal["serve_exact", "last_turn"] = "serve_exact",
    on_overlong: Literal["drop", "truncate_turns"] = "drop",
) -> list[Sample]:
    """The samples of a conversation: each wanted assistant turn trained once, in the context the server will feed.

    With history `last_turn`, only the turns that share the context of the last one are trained. With on_overlong
    `truncate_turns`, a sample longer than `max_length` tokens loses whole turns from its start (system messages stay), and
    is rendered and proved again. Raises Refused with a code where the template cannot express the conversation, where a
    mask cannot be proved, or where a sample is too long.
    """
    turns = conversation.assistant_turns()
    turns = turns[-1:] if train_on == "last_assistant" else turns
    turns = [turn for turn in turns if conversation.messages[turn].train]
    if not turns:
        raise Refused("empty-target", "no assistant turn is to be trained; every one says train: false")
    for turn in turns:
        if not conversation.messages[turn].says():
            raise Refused("empty-target", "the answer is empty; give it content or tool calls, or write train: false", turn)
    template.refuse_control_tokens(conversation)
    template.refuse_unseen_fields(conversation)
    scene = _Scene(conversation, template)
    samples: list[Sample] = []
    while turns:
        try:
            sample = _sample(scene, turns, max_length)
        except Refused as refusal:
            if refusal.code != "overlong" or on_overlong == "drop":
                raise
            sample = _shortened(scene, turns, max_length, refusal)
        samples.append(sample)
        turns = [turn for turn in turns if turn not in sample.turns] if history == "serve_exact" else []
    return samples[::-1]


def _sample(scene: _Scene, turns: list[int], max_length: int) -> Sample:
    """The sample that ends with the last of these turns and trains all of them that meet their own context in it."""
    row = scene.row(turns[-1])
    ids = row.encoding.ids
    if len(ids) > max_length:
        raise Refused("overlong", f"{len(ids)} tokens, more than data.max_length ({max_length})")
    row.trace.check_context(turns[-1])
    trained = np.zeros(len(ids), bool)
    joined = []
    for turn in turns:
        try:
            first, last = scene.target(row, turn)
        except Refused as refusal:
            if turn == turns[-1] or refusal.code not in _APART:
                raise
            continue  # it gets a sample of its own
        trained[first : last + 1] = True
        joined.append(turn)
    bos = scene.template.tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        raise Refused("double-bos", "the render starts with two BOS tokens; the template must write one at most")
    if trained[0]:
        raise Refused("prompt-tokens", "the render starts with an answer; there is no prompt before it", turns[0])
    return Sample(ids, trained, tuple(joined))


def _shortened(scene: _Scene, turns: list[int], max_length: int, overlong: Refused) -> Sample:
    """The longest sample that fits and ends with the last of these turns, whole turns taken from the conversation's start.

    Raises Refused overlong where the last exchange alone, with the system messages, is too long.
    """
    messages = scene.conversation.messages
    starts = [i for i in range(1, turns[-1]) if messages[i].role == "user" and messages[i - 1].role != "user"]

    def sample(start: int) -> Sample | None:
        kept = [i for i in range(turns[-1] + 1) if i >= start or messages[i].role in ("system", "developer")]
        shorter = replace(scene.conversation, messages=tuple(messages[i] for i in kept))
        wanted = [position for position, turn in enumerate(kept) if turn in turns]
        try:
            found = _sample(_Scene(shorter, scene.template), wanted, max_length)
        except Refused as refusal:
            if refusal.code == "overlong":
                return None
            raise Refused(refusal.code, refusal.message, None if refusal.turn is None else kept[refusal.turn]) from None
        return replace(found, turns=tuple(kept[position] for position in found.turns))

    # The later the start the shorter the sample, so the first start that fits is found by halving.
    at = bisect_left(starts, True, key=lambda start: sample(start) is not None)
    longest = sample(starts[at]) if at < len(starts) else None
    if longest is not None:
        return longest
    raise Refused("overlong", f"{overlong.message}, even without the turns before the last question", turns[-1])
