"""Other kinds of tokenizers under other kinds of templates: SentencePiece, tokens that eat spaces, moving system prompts."""

import string

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from burnish.data.conversation import Conversation, Refused
from burnish.data.render import render
from burnish.data.template import Template
from tests.conftest import TEXTS, make_tokenizer
from tests.judge import judge
from tests.shapes import SHAPES

MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set talk = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set talk = messages %}{%- endif %}{{- '<s>' }}"
    "{%- for m in talk %}{%- if m.role == 'user' %}"
    "{%- if loop.last and system %}{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"
)
"""The system prompt stands before the last user message only, so a whole conversation does not show it at all."""
PLAIN = (
    "{%- for m in messages %}{{- '<s>' if loop.first else '' }}{{- m.role + ': ' + m.content + '</s>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
"""A header of plain words; its colon and space may merge with what follows."""


def sentencepiece(prepend: str, special: list[str], rstrip: bool = False) -> PreTrainedTokenizerFast:
    """A unigram vocabulary that writes spaces as a mark, with the mark before the text or before each piece of it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    alphabet = sorted({*string.printable, "▁"})
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": [AddedToken(t, rstrip=rstrip, normalized=False) for t in special]})
    return fast


def byte_level(special: list[str]) -> PreTrainedTokenizerFast:
    fast = make_tokenizer(None)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": special})
    return fast


def template(tokenizer: PreTrainedTokenizerFast, source: str) -> Template:
    tokenizer.chat_template = source
    return Template(tokenizer, source, {}, frozenset([tokenizer.eos_token_id]))


TALKS = {
    **{name: SHAPES[name] for name in ("single", "system", "three turns", "brackets")},
    "system and turns": {"messages": [{"role": "system", "content": "Be kind"}, *SHAPES["three turns"]["messages"]]},
}
INST = ["[INST]", "[/INST]"]
MAKERS = {
    "byte level": lambda: byte_level(INST),
    "first": lambda: sentencepiece("first", INST),
    "always": lambda: sentencepiece("always", INST),
    "never": lambda: sentencepiece("never", INST),
    "eats spaces": lambda: sentencepiece("first", INST, rstrip=True),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("source", [MISTRAL, PLAIN], ids=["mistral", "plain"])
def test_every_kind_of_tokenizer_gives_exact_spans_or_a_refusal(kind, source):
    under_test = template(MAKERS[kind](), source)
    exact = 0
    for name, row in TALKS.items():
        try:
            samples = render(Conversation.parse(row), under_test, 10_000)
        except Refused as refusal:
            # An answer that merges with its header into one token, under a vocabulary that marks the start of every text.
            assert refusal.code == "prompt-tokens", (name, refusal.message)
            continue
        judge(under_test, row, samples)
        exact += 1
    assert exact == len(TALKS) or (source == PLAIN and kind != "byte level"), exact


def test_a_system_prompt_that_moves_to_the_last_turn_is_in_every_sample():
    under_test = template(byte_level(INST), MISTRAL)
    row = TALKS["system and turns"]
    samples = render(Conversation.parse(row), under_test, 10_000)
    assert [sample.turns for sample in samples] == [(2,), (4,), (6,)]
    for sample in samples:
        assert under_test.decode(sample.input_ids).count("Be kind") == 1
    first = under_test.decode(samples[0].input_ids)
    assert first == "<s>[INST]Be kind\n\nHello there[/INST] Good day.</s>"


def test_an_answer_without_its_stop_token_at_the_end_gets_the_one_that_the_next_turn_would_show():
    source = PLAIN.replace("+ '</s>\n'", "+ ('' if loop.last and m.role == 'assistant' else '</s>\n')")
    under_test = template(byte_level([]), source)
    samples = render(Conversation.parse(SHAPES["single"]), under_test, 10_000)
    assert under_test.decode(samples[0].input_ids).endswith("assistant: Copper, of course.</s>")
    judge(under_test, SHAPES["single"], samples)


def test_an_answer_that_the_vocabulary_cannot_say_is_refused():
    under_test = template(sentencepiece("first", INST), MISTRAL)
    row = {"messages": [{"role": "user", "content": "Say 한"}, {"role": "assistant", "content": "Copper"}]}
    judge(under_test, row, render(Conversation.parse(row), under_test, 10_000))
    row["messages"][1]["content"] = "Copper 한"
    with pytest.raises(Refused) as refusal:
        render(Conversation.parse(row), under_test, 10_000)
    assert (refusal.value.code, refusal.value.turn) == ("unknown-token", 1)


def test_a_vocabulary_without_an_unknown_token_drops_nothing_in_silence():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({*string.printable, "▁"})
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", *INST], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    under_test = template(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"), MISTRAL)
    row = {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "Copper wire"}]}
    judge(under_test, row, render(Conversation.parse(row), under_test, 10_000))
    row["messages"][1]["content"] = "Copper 한국 wire"
    with pytest.raises(Refused, match="unknown-token"):
        render(Conversation.parse(row), under_test, 10_000)


def test_spaces_of_an_answer_that_a_control_token_would_eat_are_trained():
    source = (
        "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
    )
    tokenizer = byte_level([])
    tokens = [AddedToken(token, rstrip=True, normalized=False) for token in ("<|user|>", "<|assistant|>", "</s>")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    under_test = template(tokenizer, source)
    row = {"messages": [{"role": "user", "content": "Code"}, {"role": "assistant", "content": "    return 1"}]}
    (sample,) = render(Conversation.parse(row), under_test, 10_000)
    assert under_test.decode(sample.input_ids[sample.trained]) == "    return 1</s>"


def test_a_normalizer_that_strips_the_prompt_does_not_get_its_newline_trained():
    tokenizer = byte_level([])
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    under_test = template(tokenizer, PLAIN.replace("+ ': '", "+ '\n'").replace("assistant: ", "assistant\n"))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    try:
        (sample,) = render(Conversation.parse(row), under_test, 10_000)
    except Refused as refusal:
        assert refusal.code == "prompt-tokens"
    else:
        assert under_test.decode(sample.input_ids[sample.trained]) == "Hello</s>"
