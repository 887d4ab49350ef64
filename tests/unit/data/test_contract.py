"""The contract alarms for behaviour and for nothing else."""

import pytest

from burnish.data.contract import Contract, difference
from burnish.data.template import Template
from tests.conftest import CHATML, make_tokenizer
from tests.judge import template_of


def contract(source: str, **kwargs) -> Contract:
    tokenizer = make_tokenizer(CHATML)
    return Contract.of(Template(tokenizer, source, kwargs, frozenset([tokenizer.eos_token_id])))


def test_a_cosmetic_edit_changes_the_source_and_not_the_behaviour():
    plain, edited = contract(CHATML), contract("{# a comment #}" + CHATML.replace("m.role", "m['role']"))
    assert plain.source_sha256 != edited.source_sha256
    assert plain.behaviour_sha256 == edited.behaviour_sha256


def test_a_changed_literal_or_variable_or_stop_token_changes_the_behaviour():
    plain = contract(CHATML).behaviour_sha256
    assert contract(CHATML.replace("assistant\n", "assistant")).behaviour_sha256 != plain
    assert contract(CHATML.replace("{{- m.content }}", "{{- m.content | trim }}")).behaviour_sha256 != plain
    tokenizer = make_tokenizer(CHATML)
    other = Template(tokenizer, CHATML, {}, frozenset([tokenizer.eos_token_id, 0]))
    assert Contract.of(other).behaviour_sha256 != plain


def test_a_contract_survives_its_file():
    one = contract(CHATML, enable_thinking=False)
    assert Contract.from_json(one.to_json()) == one
    assert one.stop_tokens == ["<|im_end|>"]


CALLS = "(call.function | tojson)"
CHANGES = {
    "arguments as ASCII": (CHATML, CALLS, "(call.function | tojson(ensure_ascii=True))"),
    "tools as ASCII": (CHATML, "(tools | tojson)", "(tools | tojson(ensure_ascii=True))"),
    "escaped arguments": (CHATML, CALLS, "(call.function | tojson | replace('<', '&lt;'))"),
    "quotes in arguments": (CHATML, CALLS, "(call.function | tojson | replace(\"'\", '`'))"),
    "answers cut": (CHATML, "{{- m.content }}", "{{- m.content[:2000] }}"),
    "old turns forgotten": (CHATML, "for m in messages", "for m in messages[-10:]"),
    "null": (CHATML, CALLS, "(call.function | tojson | replace('null', 'None'))"),
    "true": (CHATML, CALLS, "(call.function | tojson | replace('true', 'True'))"),
    "floats": (CHATML, CALLS, "(call.function | tojson | replace('0.25', '0.3'))"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_only_unusual_messages_show_is_found(change):
    source, old, new = CHANGES[change]
    assert old in source
    assert difference(contract(source), contract(source.replace(old, new))), change


def test_a_template_that_learns_or_forgets_a_variable_is_judged_by_what_it_does():
    dead = contract("{%- if enable_thinking is defined %}{%- endif %}" + CHATML)
    live = contract("{%- if enable_thinking is defined %}{{- 'on' }}{%- endif %}" + CHATML)
    plain = contract(CHATML)
    assert difference(dead, plain) is None and difference(plain, dead) is None
    assert "enable_thinking=False" in difference(plain, live) and "enable_thinking=False" in difference(live, plain)


def test_a_vocabulary_that_grew_where_no_probe_looks_is_found():
    one, other = template_of("llama3"), template_of("llama3")
    other.tokenizer.add_tokens(["zirconium"])
    assert "vocabulary" in difference(Contract.of(one), Contract.of(other))
