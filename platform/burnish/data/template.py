"""Rendering with proved masks: a token is trained if and only if the served model would have to emit it.

For assistant turn i the server feeds P, the render of the messages before it with the generation prompt. Q, the
render up to and including the turn, must start with P. What follows P, up to and including the first stop token, is
the target. The tokens before it must be the server's own tokens of P. What cannot be shown is refused, by row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from burnish.data.conversation import Conversation, Message, Refused
from burnish.data.packing import Sample
from burnish.errors import DataError


class Tokenizer(Protocol):
    """What rendering needs of a fast Hugging Face tokenizer."""

    is_fast: bool
    bos_token_id: int | None
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, Any]

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """The rendered text of a conversation."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Token ids and character offsets of a text."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any:
        """The text of token ids."""


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text: ids int32 [n] and the characters [start, end) that each came from."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class Template:
    """A tokenizer with its resolved chat template, as the server will use them.

    `source` is Jinja text, `kwargs` its variables, `stop_ids` the tokens that end an answer (never empty).
    """

    tokenizer: Tokenizer
    source: str
    kwargs: Mapping[str, Any]
    stop_ids: frozenset[int]

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise DataError("the tokenizer has no fast version (tokenizer.json), so masks cannot be proved; convert it")
        if "strftime_now" in self.source and "date_string" not in self.kwargs:
            raise DataError(
                "the chat template reads the clock (strftime_now), so a run would train other text after midnight; "
                "write a fixed date, for example template.kwargs: {date_string: '01 Jan 2026'}"
            )
        if not self.stop_ids:
            raise DataError("no stop token is known; write template.stop_tokens, for example ['<|im_end|>']")

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """The render of these messages, with the generation prompt where `prompt`; raises Refused template-raises."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message.fields) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    chat_template=self.source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **self.kwargs,
                )
            )
        except Exception as error:  # a template may raise anything; it becomes one row's refusal
            raise Refused("template-raises", f"the template raises: {error}", len(messages) - 1) from None

    def encode(self, text: str) -> Encoding:
        """The tokens of rendered text; special tokens come from the text alone, so a BOS is never doubled."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        return Encoding(np.array(found["input_ids"], np.int32), offsets[:, 0], offsets[:, 1])

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """The text of token ids, special tokens included."""
        return str(
            self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


def render(
    conversation: Conversation,
    template: Template,
    max_length: int,
    train_on: Literal["assistant", "last_assistant"] = "assistant",
) -> list[Sample]:
    """The samples of a conversation: each wanted assistant turn trained once, in the context the server will feed.

    Raises Refused with a code where the template cannot express the conversation, where a mask cannot be proved, or
    where the sample is longer than `max_length` tokens.
    """
    turns = conversation.assistant_turns()
    turns = turns[-1:] if train_on == "last_assistant" else turns
    turns = [turn for turn in turns if conversation.messages[turn].train]
    if not turns:
        raise Refused("empty-target", "no assistant turn is to be trained; every one says train: false")
    _refuse_control_tokens(conversation, template)
    prompts = {turn: template.text(conversation.messages[:turn], conversation.tools, prompt=True) for turn in turns}
    full = template.text(conversation.messages[: turns[-1] + 1], conversation.tools, prompt=False)
    encoding = _encode_sample(template, full, prompts[turns[-1]])
    trained = np.zeros(len(encoding.ids), bool)
    for turn in turns:
        first, last = _target(conversation, turn, template, full, prompts[turn], encoding)
        trained[first : last + 1] = True
    bos = template.tokenizer.bos_token_id
    if bos is not None and len(encoding.ids) > 1 and encoding.ids[0] == encoding.ids[1] == bos:
        raise Refused("double-bos", "the render starts with two BOS tokens; the template must write one at most")
    if trained[0]:
        raise Refused("prompt-tokens", "the render starts with an answer; there is no prompt before it", turns[0])
    if len(encoding.ids) > max_length:
        raise Refused("overlong", f"{len(encoding.ids)} tokens, more than data.max_length ({max_length})")
    return [Sample(encoding.ids, trained, tuple(turns))]


def _encode_sample(template: Template, full: str, prompt: str) -> Encoding:
    """The tokens that the last turn has in serving: those of its prompt, then those of the rest.

    Encoding the whole text at once gives the same wherever no token crosses the border. Where one does (a prompt that
    ends in a newline before an answer that starts with one), both parts are encoded apart, as the server does.
    """
    whole, head = template.encode(full), template.encode(prompt)
    if not full.startswith(prompt) or np.array_equal(whole.ids[: len(head.ids)], head.ids):
        return whole
    rest = template.encode(full[len(prompt) :])
    ids = np.concatenate([head.ids, rest.ids])
    if template.decode(ids) != template.decode(whole.ids):
        return whole  # the tokenizer changes the start of a text, so the parts are not what the server would see
    shift = len(prompt)
    return Encoding(ids, np.append(head.starts, rest.starts + shift), np.append(head.ends, rest.ends + shift))


def _target(
    conversation: Conversation, turn: int, template: Template, full: str, prompt: str, encoding: Encoding
) -> tuple[int, int]:
    """First and last token of one answer, stop token included; raises Refused where a step of the proof fails."""
    until = template.text(conversation.messages[: turn + 1], conversation.tools, prompt=False)
    if not until.startswith(prompt):
        raise Refused(
            "unreachable-turn", "the render of the turn does not start with its prompt: " + _differ(prompt, until), turn
        )
    if not full.startswith(prompt):
        raise Refused("not-prefix-stable", "later turns change what stands before this one: " + _differ(prompt, full), turn)
    head = template.encode(prompt).ids
    first = len(head)
    if not np.array_equal(encoding.ids[:first], head):
        raise Refused("prompt-tokens", "the tokens before the answer are not those of the prompt alone", turn)
    stops = np.isin(encoding.ids[first:], list(template.stop_ids)) & (encoding.ends[first:] <= len(until))
    if not stops.any():
        shown = template.decode(encoding.ids[first:])[-60:]
        raise Refused("no-stop", f"no stop token after the answer; the render ends {shown!r}", turn)
    last = first + int(stops.argmax())
    end = int(encoding.ends[last])
    if full[:end] != until[:end]:
        raise Refused("not-prefix-stable", "later turns change this answer: " + _differ(until[:end], full[:end]), turn)
    answer = full[len(prompt) : int(encoding.starts[last])]
    for text in conversation.messages[turn].texts():
        if not any(form in answer for form in (text.strip(), *_escaped(text.strip()))):
            raise Refused("dropped-content", f"the template does not render {text.strip()[:60]!r} in this answer", turn)
    return first, last


def _refuse_control_tokens(conversation: Conversation, template: Template) -> None:
    """Raises Refused where a message holds the text of a special token, which would end or forge a turn."""
    # A tokenizer may list only BOS, EOS and padding as its own special tokens; the vocabulary marks all of them.
    added = (str(token.content) for token in template.tokenizer.added_tokens_decoder.values() if token.special)
    stops = (template.decode([i]) for i in template.stop_ids)
    control = {*template.tokenizer.all_special_tokens, *added, *stops}
    for turn, message in enumerate(conversation.messages):
        for text in [*message.texts(), str(message.fields.get("name", ""))]:
            for token in control:
                if token and token in text:
                    raise Refused("control-token-in-content", f"the text holds the control token {token!r}", turn)


def _escaped(text: str) -> tuple[str, str]:
    """How a string looks inside JSON, with and without ASCII escapes; templates print tool arguments so."""
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def _differ(expected: str, found: str) -> str:
    """Both strings around their first difference."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    left = max(0, at - 20)
    return f"at character {at} expected {expected[left : at + 30]!r}, found {found[left : at + 30]!r}"
