"""Templates are rendered without transformers' copies of every message, and give what transformers gives."""

import datetime

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from burnish.data.contract import renders
from burnish.data.conversation import Conversation, Refused
from burnish.data.template import Template
from burnish.data.tokenizer import dated
from tests.conftest import CHATML, make_tokenizer
from tests.judge import PUBLISHED, template_of


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_probe_renders_as_transformers_renders_it(name):
    plain = template_of(name)
    direct = dated(plain.tokenizer, plain.source, {}, plain.stop_ids, plain.date)
    assert type(direct.tokenizer) is not type(plain.tokenizer), "rendered directly"
    if plain.date:
        # Of its own, transformers gives a compiled template the clock; here it gets the same day.
        day = datetime.date.fromisoformat(plain.date)
        _compile_jinja_template(plain.source).globals["strftime_now"] = day.strftime
    assert list(renders(direct)) == list(renders(plain))


def test_variables_that_are_no_json_reach_a_template_as_transformers_hands_them_over():
    source = "{{ day }}{{ flag }}" + CHATML
    tokenizer = make_tokenizer(source)
    kwargs = {"day": datetime.date(2026, 1, 31), "flag": True}
    stops = frozenset([tokenizer.eos_token_id])
    direct = dated(tokenizer, source, kwargs, stops, None)
    assert list(renders(direct)) == list(renders(Template(tokenizer, source, kwargs, stops)))


def test_a_tokenizer_that_renders_in_a_way_of_its_own_keeps_it():
    tokenizer = make_tokenizer(CHATML)
    own = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda conversation, **more: own(conversation, **more).replace("Hi", "Ho")
    template = dated(tokenizer, CHATML, {}, frozenset([tokenizer.eos_token_id]), None)
    assert template.tokenizer is tokenizer


def test_a_rows_variable_cannot_hide_what_the_template_is_shown():
    tokenizer = make_tokenizer(CHATML)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    row = {"messages": messages, "chat_template_kwargs": {"messages": []}}
    conversation = Conversation.parse(row)
    template = dated(tokenizer, CHATML, {}, frozenset([tokenizer.eos_token_id]), None)
    with pytest.raises(Refused, match=r"multiple values .* 'messages'"):
        template.text(conversation.messages, conversation, prompt=True)
