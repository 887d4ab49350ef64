"""The tokens of a text and where each came from, without the offsets that cost a tokenizer a third of its time."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTES = {letter: ord(letter) for letter in _LETTERS if ord(letter) < 256} | dict(
    zip(
        [letter for letter in _LETTERS if ord(letter) >= 256],
        [byte for byte in range(256) if chr(byte) not in _LETTERS],
        strict=True,
    )
)
"""The byte for which each letter of a byte-level vocabulary stands: printable ones for themselves, the others in order from
U+0100 on (GPT-2, encoder.py, bytes_to_unicode)."""


@dataclass(frozen=True)
class Encoding:
    """Tokens of `text`, ids int32 [n]; `cuts` are the positions of control tokens, `stops` those of stop tokens.

    Token i came from characters [starts[i], ends[i]) of the text (int32 [n]); where a character takes several tokens,
    each of them has it whole.
    """

    text: str
    ids: NDArray[np.int32]
    cuts: NDArray[np.intp]
    stops: NDArray[np.intp]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]


@dataclass(frozen=True)
class Spelling:
    """The bytes of a byte-level vocabulary laid end to end: token i is `data[starts[i] : starts[i] + sizes[i]]`."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int32]
    sizes: NDArray[np.int32]

    @classmethod
    def of(cls, vocabulary: Mapping[str, int], added: Mapping[int, str]) -> "Spelling":
        """The spelling of a whole vocabulary; `added` are the texts of its ids that stand for themselves."""
        spelled = [b""] * (1 + max(vocabulary.values()))
        for token, i in vocabulary.items():
            own = i not in added and all(letter in _BYTES for letter in token)
            spelled[i] = bytes(_BYTES[letter] for letter in token) if own else token.encode()
        sizes = np.array([len(each) for each in spelled], np.int32)
        return cls(np.frombuffer(b"".join(spelled), np.uint8), np.cumsum(sizes, dtype=np.int32) - sizes, sizes)

    def edges(self, ids: NDArray[np.int32], text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """First character and the one after the last of each token (int32 [n]); None where `ids` do not spell `text`."""
        data, sizes = text.encode(), self.sizes[ids]
        ends = np.cumsum(sizes, dtype=np.int32)
        if int(sizes.sum()) != len(data) or not sizes.all():
            return None
        # Byte j of the whole is byte j - (ends - sizes) of its token.
        spelled = self.data[np.repeat(self.starts[ids] - ends + sizes, sizes) + np.arange(len(data), dtype=np.int32)]
        if bytes(spelled) != data:
            return None
        if text.isascii():
            return ends - sizes, ends
        begun = np.cumsum((spelled & 0xC0) != 0x80, dtype=np.int32)
        return begun[ends - sizes] - 1, begun[ends - 1]
