"""The contract alarms for behaviour and for nothing else."""

from burnish.data.contract import Contract
from burnish.data.template import Template
from tests.conftest import CHATML, make_tokenizer


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
