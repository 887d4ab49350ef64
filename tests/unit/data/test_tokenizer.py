"""Templates are rendered without transformers' copies of every message, and give what transformers gives."""

import datetime
import re

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from burnish.data.contract import renders
from burnish.data.conversation import Conversation, Refused
from burnish.data.template import Template
from burnish.data.tokenizer import _Direct, dated, load_template
from burnish.errors import DataError, RecipeError
from burnish.preview import rows
from burnish.train.prepare import prepare
from tests.conftest import CHATML, make_tokenizer
from tests.conftest import conversation as conversation_of
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


def test_a_variable_that_the_template_does_not_read_is_refused(make_recipe, tmp_path):
    template = tmp_path / "thinking.jinja"
    template.write_text("{%- if enable_thinking is defined and not enable_thinking %}!{%- endif %}" + CHATML)
    given = {"path": str(template), "kwargs": {"enable_thinking": False}}
    assert load_template(make_recipe(template=given)).kwargs == {"enable_thinking": False}
    words = "no 'enable_thinkin'; did you mean 'enable_thinking'?; it reads enable_thinking"
    with pytest.raises(RecipeError, match=re.escape(f"template.kwargs: the chat template reads {words}")):
        load_template(make_recipe(template={**given, "kwargs": {"enable_thinkin": False}}))


ESCAPES = {
    "the class tree": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__base__.__subclasses__() }}",
    "by a filter": "{{ (''|attr('__class__')).__mro__ }}",
    "by subscript": "{{ ''['__class__']['__mro__'] }}",
    "globals of a function": "{{ raise_exception.__globals__['os'] }}",
    "globals by a filter": "{{ (raise_exception|attr('__globals__'))['os'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__['os'] }}",
    "globals of the loop": "{% for m in messages %}{{ loop.__init__.__globals__['os'] }}{% endfor %}",
    "by a format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "the clock": "{{ strftime_now.__self__.__class__.__mro__ }}",
    "changed messages": "{{ messages.append(messages[0]) }}",
    "a changed message": "{{ messages[0].update({'content': 'x'}) }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_that_leaves_the_sandbox_is_refused_on_every_way(escape, make_recipe, tmp_path):
    source = ESCAPES[escape] + CHATML
    tokenizer = make_tokenizer(CHATML)
    ways = [dated(tokenizer, source, {}, frozenset([tokenizer.eos_token_id]), "2026-01-31").tokenizer]
    ways += [_Direct(tokenizer, datetime.date(2026, 1, 31)), tokenizer]
    conversation = Conversation.parse(conversation_of(0))
    for way in ways:
        template = Template(way, source, {}, frozenset([tokenizer.eos_token_id]), "2026-01-31")
        with pytest.raises(Refused, match=r"the template raises: access to attribute .* is unsafe") as refused:
            template.text(conversation.messages, conversation, prompt=True)
        assert refused.value.code == "template-raises"
        assert {(text, error is not None) for _, _, _, text, error in renders(template)} == {(None, True)}
    (tmp_path / "escape.jinja").write_text(source)
    recipe = make_recipe(template={"path": str(tmp_path / "escape.jinja")})
    with pytest.raises(DataError, match=r"none of the first 40 rows can be trained\. .*template-raises"):
        prepare(recipe)
    [row] = rows(recipe, 1)
    assert row.refused.code == "template-raises" and row.samples == ()


def test_a_filter_that_asks_for_the_class_tree_sees_nothing():
    # Jinja gives a filter an undefined value there, which is empty; only reading on from it is an error.
    tokenizer = make_tokenizer(CHATML)
    source = (
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__'))|attr('__mro__') }}{{ [['']]|map(attribute='__class__')|list }}"
    )
    template = dated(tokenizer, source + CHATML, {}, frozenset([tokenizer.eos_token_id]), None)
    parsed = Conversation.parse(conversation_of(0))
    assert template.text(parsed.messages, parsed, prompt=False).startswith("[Undefined]<|im_start|>")
