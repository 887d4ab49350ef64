"""A tokenizer with its chat template, exactly as the server will use them: text, tokens, stop tokens."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from burnish.data import syntax
from burnish.data.conversation import Conversation, Message, Refused, strings
from burnish.data.encoding import Encoding, Spelling
from burnish.errors import DataError

_KEPT_ENDINGS = 1024
"""Different endings of prompts whose tokens are kept; templates have a handful, each a few characters long."""

_KEPT_WORDS = 1 << 16
"""Different words whose tokens the tokenizer keeps: at most 30 MB. The library keeps 10,000, which texts of code exhaust."""


class Tokenizer(Protocol):
    """What rendering needs of a fast Hugging Face tokenizer."""

    is_fast: bool
    split_special_tokens: bool
    bos_token_id: int | None
    unk_token_id: int | None
    all_special_tokens: list[str]
    special_tokens_map: dict[str, Any]
    added_tokens_decoder: dict[int, Any]
    backend_tokenizer: Any

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """The rendered text of a conversation."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any:
        """The text of token ids."""


@dataclass(frozen=True)
class Template:
    """A tokenizer with its resolved chat template, as the server will use them.

    `source` is Jinja text, `kwargs` its variables, `stop_ids` the tokens that end an answer (never empty), `date` the day
    (ISO) that the tokenizer shows to a template that reads the clock, None for any other template.
    """

    tokenizer: Tokenizer
    source: str
    kwargs: Mapping[str, Any]
    stop_ids: frozenset[int]
    date: str | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise DataError("the tokenizer has no fast version (tokenizer.json), so masks cannot be proved; convert it")
        if self.syntax.reads_clock and self.date is None:
            raise DataError(
                "the chat template reads the clock (strftime_now), so a run would train other text after midnight; "
                "write a fixed day, for example template.date: 2026-01-31"
            )
        if not self.stop_ids:
            raise DataError("no stop token is known; write template.stop_tokens, for example ['<|im_end|>']")

    @cached_property
    def syntax(self) -> syntax.Syntax:
        """What the source says of itself."""
        return syntax.parse(self.source)

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The text of each stop token."""
        return tuple(filter(None, (self.decode([i]) for i in sorted(self.stop_ids))))

    @cached_property
    def _cuts(self) -> NDArray[np.bool_]:
        """For each id, whether the tokenizer cuts any text at this token before it looks at the rest."""
        added = self.tokenizer.added_tokens_decoder.items()
        return self._table(i for i, token in added if token.special and not (token.normalized or token.single_word))

    @cached_property
    def _stops(self) -> NDArray[np.bool_]:
        return self._table(self.stop_ids)

    def _table(self, ids: Iterable[int]) -> NDArray[np.bool_]:
        table = np.zeros(1 + max(self._backend.get_vocab(with_added_tokens=True).values()), bool)
        table[[i for i in ids if i < len(table)]] = True
        return table

    @cached_property
    def _control(self) -> re.Pattern[str]:
        # A tokenizer may list only BOS, EOS and padding as its own special tokens; the vocabulary marks all of them.
        added = (str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        control = {*self.tokenizer.all_special_tokens, *added, *self.stop_tokens} - {""}
        return re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)))

    @cached_property
    def _backend(self) -> Any:
        # A tokenizer.json may cut or pad every text by itself, as sentence encoders do.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        if hasattr(backend.model, "_resize_cache"):
            backend.model._resize_cache(_KEPT_WORDS)
        return backend

    def __getstate__(self) -> dict[str, Any]:
        # A pickled backend has forgotten what `_backend` sets: special tokens inside texts would be read as such again.
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    @cached_property
    def _endings(self) -> dict[str, NDArray[np.int32]]:
        return {}

    def text(self, messages: Sequence[Message], conversation: Conversation, prompt: bool) -> str:
        """The render of these messages with a conversation's tools and variables, with the generation prompt where `prompt`.

        Raises Refused template-raises.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message.fields) for message in messages],
                    tools=[dict(tool) for tool in conversation.tools] or None,
                    chat_template=self.source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **{**self.kwargs, **conversation.kwargs},
                )
            )
        except Exception as error:  # a template may raise anything; it becomes one row's refusal
            raise Refused("template-raises", f"the template raises: {error}", len(messages) - 1) from None

    def encode(self, text: str) -> Encoding:
        """The tokens of rendered text; special tokens come from the text alone, so a BOS is never doubled."""
        if self._spelling:
            # Without offsets the same ids come faster; what they spell says where they stand.
            ids = np.array(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)
            found = self._spelling.edges(ids, text)
            if found:
                return self._encoding(text, ids, *found)
        whole = self._backend.encode(text, add_special_tokens=False)
        edges = np.array(whole.offsets, np.int32).reshape(-1, 2)
        return self._encoding(text, np.array(whole.ids, np.int32), edges[:, 0], edges[:, 1])

    def _encoding(self, text: str, ids: NDArray[np.int32], starts: NDArray[np.int32], ends: NDArray[np.int32]) -> Encoding:
        return Encoding(text, ids, np.flatnonzero(self._cuts[ids]), np.flatnonzero(self._stops[ids]), starts, ends)

    @cached_property
    def _spelling(self) -> Spelling | None:
        """What the tokens of a byte-level vocabulary spell; None for another vocabulary."""
        if (self.vocabulary().get("decoder") or {}).get("type") != "ByteLevel":
            return None
        added = {i: str(token.content) for i, token in self.tokenizer.added_tokens_decoder.items()}
        return Spelling.of(self._backend.get_vocab(with_added_tokens=True), added)

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """The text of token ids, special tokens included."""
        return str(
            self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def vocabulary(self) -> Any:
        """The tokenizer's own JSON (tokenizer.json): vocabulary, merges, and every rule of cutting text into tokens."""
        return json.loads(self._backend.to_str())

    def tokens_of_prompt(self, encoding: Encoding, prompt: str) -> int | None:
        """How many tokens at the start of an encoding are exactly the tokens of `prompt` alone, with which its text starts.

        None where a token of the encoding crosses the prompt's end. Text before a control token is encoded apart from it
        (tokenizers, AddedVocabulary), so that only what follows the last one in the prompt is encoded again.
        """
        at = int(np.searchsorted(encoding.starts[encoding.cuts], len(prompt)))
        first = int(encoding.cuts[at - 1]) if at else 0
        ending = prompt[int(encoding.starts[first]) if at else 0 :]
        ids = self._endings.get(ending)
        if ids is None:
            ids = self.encode(ending).ids
            if len(self._endings) < _KEPT_ENDINGS and len(ending) < 64:
                self._endings[ending] = ids
        count = first + len(ids)
        if not np.array_equal(encoding.ids[first:count], ids):
            return None
        # A normalizer may cut the spaces at the end of the prompt alone, which then are the next token here.
        return None if count < len(encoding.ids) and encoding.starts[count] < len(prompt) else count

    def encode_apart(self, prompt: str, rest: str) -> Encoding | None:
        """The tokens of `prompt` followed by those of `rest`, as a server that feeds the prompt alone meets them.

        None where the tokenizer writes the start of a text otherwise than its middle, so that the parts do not say the rest.
        """
        head, whole = self.encode(prompt), self.decode(self.encode(prompt + rest).ids)
        # Behind a stop token, a tokenizer of the SentencePiece kind adds no space to the start of a text.
        for before in ("", self.stop_tokens[0]):
            tail = self.encode(before + rest)
            cut = 1 if before else 0
            ids = np.concatenate([head.ids, tail.ids[cut:]])
            if self.decode(ids) == whole or self.decode(tail.ids[cut:]).rstrip() == rest.rstrip():
                moved = len(prompt) - len(before)
                starts = np.concatenate([head.starts, tail.starts[cut:] + moved])
                ends = np.concatenate([head.ends, tail.ends[cut:] + moved])
                return self._encoding(prompt + rest, ids, starts, ends)
        return None

    @cached_property
    def _says_everything(self) -> bool:
        """Whether the vocabulary has a token for any text: all bytes, or a fallback to them."""
        rules = self.vocabulary()
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        bytes_of = pre_tokenizers.ByteLevel.alphabet()
        return bool(rules["model"].get("byte_fallback")) or all(byte in vocabulary for byte in bytes_of)

    @cached_property
    def _unknown_ids(self) -> frozenset[int]:
        model = self.vocabulary()["model"]
        named = self._backend.token_to_id(str(model["unk_token"])) if model.get("unk_token") else model.get("unk_id")
        return frozenset(i for i in (named, self.tokenizer.unk_token_id) if i is not None)

    def unsayable(self, encoding: Encoding, first: int, last: int) -> str:
        """A piece of the text of tokens [first, last) for which the vocabulary has no token; empty where it has all."""
        if self._says_everything:
            return ""
        before = int(encoding.starts[first])
        for token in range(first, last + 1):
            start, end = int(encoding.starts[token]), int(encoding.ends[token])
            piece = encoding.text[before:start] + (
                encoding.text[start:end] if encoding.ids[token] in self._unknown_ids else ""
            )
            if piece.strip():
                return piece
            before = max(before, end)
        return ""

    def refuse_unseen_fields(self, conversation: Conversation) -> None:
        """Raises Refused where a message has a field that the template reads and that is not passed to it."""
        for turn, message in enumerate(conversation.messages):
            for name in message.others:
                if name in self.syntax.names:
                    raise Refused(
                        "bad-row",
                        f"the template reads the field {name!r} of messages, which is not passed to it; put what it says "
                        "into content, reasoning_content or tool_calls, or take it out",
                        turn,
                    )

    def refuse_control_tokens(self, conversation: Conversation) -> None:
        """Raises Refused where a row holds the text of a special token, which would end or forge a turn."""
        rest = [*conversation.tools, conversation.kwargs]
        for turn, fields in enumerate([*(message.fields for message in conversation.messages), rest]):
            for text in strings(fields):
                found = self._control.search(text)
                if found:
                    raise Refused(
                        "control-token-in-content",
                        f"the text holds the control token {found[0]!r}, which a server would read as one; take it out",
                        turn if turn < len(conversation.messages) else None,
                    )
