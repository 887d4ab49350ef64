"""A template with its tokenizer: what makes it unusable, and its tokens."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import ByT5Tokenizer

from burnish.data.template import Template
from burnish.errors import DataError
from tests.conftest import CHATML, make_tokenizer


def test_a_template_that_reads_the_clock_needs_a_fixed_day():
    source = "{{ strftime_now('%d %b %Y') }}" + CHATML
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(DataError, match=r"template\.date"):
        Template(tokenizer, source, {}, frozenset([2]))
    assert Template(tokenizer, source, {}, frozenset([2]), "2026-01-31")


def test_a_template_without_stop_tokens_is_refused():
    with pytest.raises(DataError, match="stop_tokens"):
        Template(make_tokenizer(CHATML), CHATML, {}, frozenset())


def test_a_template_that_is_no_jinja_is_refused_with_its_line():
    with pytest.raises(DataError, match=r"no Jinja: .*line 2"):
        Template(make_tokenizer(CHATML), "\n{% if %}", {}, frozenset([2]))


def test_a_slow_tokenizer_is_refused():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Template(tokenizer, CHATML, {}, frozenset([1]))


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_neither_here():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    template = Template(tokenizer, CHATML, {}, frozenset([2]))
    text = "one two three four five six seven"
    assert template.decode(template.encode(text).ids) == text


def test_a_tokenizer_that_splits_special_tokens_does_so_in_every_process():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.split_special_tokens = True
    template = Template(tokenizer, CHATML, {}, frozenset([2]))
    ids = template.encode("<|im_end|>").ids
    assert len(ids) > 1
    assert pickle.loads(pickle.dumps(template)).encode("<|im_end|>").ids.tolist() == ids.tolist()


def test_prompt_tokens_found_at_the_end_alone_are_those_of_the_whole_prompt():
    template = Template(make_tokenizer(CHATML), CHATML, {}, frozenset([2]))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there<|im_end|>\n"
    encoding = template.encode(text)
    for end in range(1, len(text)):
        alone = template.encode(text[:end]).ids
        same = len(alone) if np.array_equal(encoding.ids[: len(alone)], alone) else None
        assert template.tokens_of_prompt(encoding, text[:end]) == same, text[:end]


def composed() -> Template:
    """A vocabulary that composes letters with their accents, as Qwen's does, and a token that eats the spaces behind it."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<eats>", rstrip=True, special=False, normalized=False)])
    return Template(tokenizer, CHATML, {}, frozenset([2]))


PIECES = ["<|im_start|>", "<|im_end|>", "<eats>", " ", "\n\n", "👩‍👩‍👧", "e\u0301", "é", "한", "\x00", "copper", "<|im"]
SPELLED = {"plain": Template(make_tokenizer(CHATML), CHATML, {}, frozenset([2])), "composed": composed()}


@pytest.mark.parametrize("kind", SPELLED)
@given(text=st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"])))).map("".join))
def test_every_token_knows_its_characters(kind, text):
    # What tokenizers itself says, token by token, is what the bytes of the tokens say where they spell the text.
    template = SPELLED[kind]
    expected = template.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    encoding = template.encode(text)
    assert encoding.ids.tolist() == expected.ids
    assert list(zip(encoding.starts.tolist(), encoding.ends.tolist(), strict=True)) == expected.offsets
