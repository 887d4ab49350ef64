"""Rows that are not worth their cost: copies, near copies, rows of an evaluation, and rows that train next to nothing.

Nothing here knows a language: a word is a run of letters and digits, or one letter of a script that writes no spaces.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from burnish.data import formats
from burnish.data.conversation import Conversation, Refused
from burnish.data.rendered import Rendered
from burnish.sections import FiltersSpec

LEFT_OUT = frozenset({"overlong", "duplicate", "near-duplicate", "contaminated", "short-answer", "low-share"})
"""Codes of rows that a recipe leaves out on purpose; they do not count as refused."""
SHINGLE_WORDS = 5
"""Words in the runs by which rows are compared, and in the shortest evaluation text that is looked for."""
NUM_PERM = 128
"""Hash functions of a MinHash; the estimated similarity is off by 1/sqrt(128) = 0.09 at most in two cases of three."""
_SCHEME: Literal["affine32"] = "affine32"
PLANNED = FiltersSpec(exact_duplicates=True, near_duplicates=0.8, min_trained_tokens=4, min_trained_share=0.01)
"""What `burnish plan` counts where the recipe names nothing."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters (Unicode 16, Blocks.txt)."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, odd: multiplying by it loses nothing (Knuth, TAOCP 3, 6.4)."""

Grams = Mapping[int, NDArray[np.uint64]]
"""Hashes of all runs of words of some texts, ascending, by the number of words in a run."""


@dataclass(frozen=True)
class Marks:
    """What comparing a row with others needs of it: a sha256 of the conversation, a MinHash of its runs of words (uint32
    [NUM_PERM], or empty where none is wanted), and a run of words that it shares with an evaluation, or nothing."""

    digest: bytes
    minhash: NDArray[np.uint32]
    shared: str


@dataclass(frozen=True)
class Finding:
    """A row that a filter would leave out: its place among the rows compared, code, reason, and whether the recipe does."""

    position: int
    code: str
    message: str
    dropped: bool


def marks(row: Any, evaluation: Grams, near: bool) -> Marks | None:
    """What comparing a row needs; None for a row that is no conversation, which rendering refuses."""
    try:
        conversation = Conversation.parse(formats.messages_form(row))
    except (Refused, RecursionError, TypeError, AttributeError):
        return None
    whole = [[dict(message.fields) for message in conversation.messages], list(conversation.tools), conversation.kwargs]
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).digest()
    texts = [_words(text) for text in _texts(conversation)]
    return Marks(digest, _minhash(texts) if near else np.empty(0, np.uint32), _shared(texts, evaluation))


def evaluation_grams(rows: Iterable[Any], num_words: int) -> Grams:
    """Hashes of every run of `num_words` words in evaluation rows, and of whole texts of fewer, at least `SHINGLE_WORDS`.

    A row may be a conversation, of which system messages are left out, or any object, of which every string counts.
    """
    found: dict[int, list[NDArray[np.uint64]]] = {}
    for row in rows:
        if isinstance(row, Refused):
            continue
        try:
            texts = _texts(Conversation.parse(formats.messages_form(row)))
        except (Refused, RecursionError, TypeError, AttributeError):
            texts = list(_values(row))
        for words in map(_words, texts):
            length = min(num_words, len(words))
            if length >= SHINGLE_WORDS:
                found.setdefault(length, []).append(_hashes(words, length))
    return {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}


def judge(rows: Iterable[tuple[str, Marks | None]], filters: FiltersSpec) -> Iterator[Finding]:
    """Every row that is contaminated, a copy or a near copy of an earlier row that is trained; `rows` are named, in order.

    The recipe's `filters` decide which of them are dropped. Near copies are sought where the marks have a MinHash, at
    `near_duplicates` or else at the threshold of `PLANNED`.
    """
    from datasketch import MinHash, MinHashLSH

    near = float(filters.near_duplicates or PLANNED.near_duplicates or 1)
    # Weighing misses more than false finds, which the estimate below sorts out.
    buckets = MinHashLSH(threshold=near, num_perm=NUM_PERM, weights=(0.1, 0.9))
    first: dict[bytes, str] = {}
    kept: dict[int, tuple[str, NDArray[np.uint32]]] = {}
    for position, (name, found) in enumerate(rows):
        if found is None:
            continue
        if found.shared:
            dropped = bool(filters.decontaminate)
            yield Finding(position, "contaminated", f"an evaluation file says {found.shared!r} too", dropped)
            if dropped:
                continue
        if found.digest in first:
            yield Finding(position, "duplicate", f"says exactly what {first[found.digest]} says", filters.exact_duplicates)
            continue
        if len(found.minhash):
            minhash = MinHash(NUM_PERM, hashvalues=found.minhash, scheme=_SCHEME)
            alike = [(float((kept[i][1] == found.minhash).mean()), kept[i][0]) for i in sorted(buckets.query(minhash))]
            share, other = max(alike, default=(0.0, ""), key=lambda each: each[0])
            if share >= near:
                dropped = filters.near_duplicates is not None
                yield Finding(position, "near-duplicate", f"{share:.0%} of its runs of words stand in {other}", dropped)
                if dropped:
                    continue
            else:
                buckets.insert(position, minhash)
                kept[position] = (name, found.minhash)
        first[found.digest] = name


def too_little(tokens: NDArray[np.int64], trained: NDArray[np.int64], filters: FiltersSpec) -> list[tuple[int, str, str]]:
    """Rows that train too few tokens, or too small a share, each with a code and a reason; rows without tokens apart."""
    few = (tokens > 0) & (trained < (filters.min_trained_tokens or 0))
    low = (tokens > 0) & (trained < (filters.min_trained_share or 0) * tokens)
    return [
        (row, "short-answer" if few[row] else "low-share", f"{trained[row]} of {tokens[row]} tokens are trained")
        for row in np.flatnonzero(few | low).tolist()
    ]


def tokens_of_rows(rendered: Rendered) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and trained tokens of each row of a slice, int64 [num_rows], 0 for one that gave no sample."""
    sums = np.concatenate([[0], np.cumsum(rendered.trained, dtype=np.int64)])
    ends = np.cumsum(rendered.lengths, dtype=np.int64)
    counts = (rendered.lengths, sums[ends] - sums[ends - rendered.lengths])
    tokens, trained = (np.bincount(rendered.rows, count, rendered.num_rows).astype(np.int64) for count in counts)
    return tokens, trained


def _texts(conversation: Conversation) -> list[str]:
    """What is said in a conversation; without system messages and tools, which many rows share."""
    said = [message.fields for message in conversation.messages if message.role not in ("system", "developer")]
    parts = [[fields["content"], fields.get("reasoning_content"), *_values(fields.get("tool_calls"))] for fields in said]
    return [text for part in parts for text in part if text]


def _values(value: Any) -> Iterator[str]:
    """Every string inside JSON, names of fields apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _values(item)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _hashes(words: Sequence[str], length: int) -> NDArray[np.uint64]:
    """A hash of each run of `length` words, uint64 [len(words) - length + 1]: a polynomial in the hashes of its words."""
    if len(words) < length:
        return np.empty(0, np.uint64)
    each = np.array([_word_hash(word) for word in words], np.uint64)
    sums = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        sums = sums * _ODD + each[place : place + len(sums)]
    return sums


def _minhash(texts: Sequence[Sequence[str]]) -> NDArray[np.uint32]:
    from datasketch import MinHash

    runs = [_hashes(words, min(SHINGLE_WORDS, len(words))) for words in texts if words]
    if not runs:
        return np.empty(0, np.uint32)
    minhash = MinHash(NUM_PERM, hashfunc=int, scheme=_SCHEME)
    minhash.update_batch((np.unique(np.concatenate(runs)) >> np.uint64(32)).tolist())
    return np.asarray(minhash.hashvalues, np.uint32)


def _shared(texts: Sequence[Sequence[str]], evaluation: Grams) -> str:
    """The first run of words that stands in an evaluation too; empty where none does."""
    for words in texts:
        for length, known in evaluation.items():
            own = _hashes(words, length)
            at = np.flatnonzero(known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own)
            if len(at):
                return " ".join(words[at[0] : at[0] + length])
    return ""
