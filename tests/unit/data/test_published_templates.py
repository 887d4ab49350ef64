"""All chat templates that the trl package carries, on shapes of conversations: every trained span exact, or refused by name."""

import json

import pytest

from burnish.data.contract import Contract, difference
from burnish.data.conversation import Conversation, Refused
from burnish.data.render import render
from tests.judge import PUBLISHED, judge, template_of
from tests.shapes import MORE_SHAPES, SHAPES

CANNOT = {
    "reasoning": "cohere cohere2 gemma gemma3 gemma4 gemma4_v2 gemma4_v3 gemma4_v4 lfm2 lfm2_v2 llama3 llama3_1 llama3_2 phi3 phi3_5 "
    "qwen2_5 qwen2_5_vl qwen3_instruct_2507 qwen3_vl",
    "tools": "cohere cohere2 gemma gemma3 lfm2 llama3 phi3 phi3_5 qwen2_5_vl",
    "system": "gemma",
    "anything": "idefics3 llava_next smolvlm",  # they read lists of parts, not text
    "an answer without reasoning": "deepseek_r1_distill deepseekv3 nemotron_3_5_lightning nemotron_3_nano nemotron_3_super "
    "nemotron_3_ultra",  # the prompt opens <think>
}  # fmt: skip
"""What a template has no words for, read in its source."""


def expressible(name: str, shape: str) -> bool:
    """Whether a template can say a conversation of one of the nine shapes, judged from its source by a person."""

    def cannot(what: str) -> bool:
        return name in CANNOT[what].split()

    if cannot("anything") or (cannot("reasoning") and "reasoning" in shape) or (cannot("tools") and "tools" in shape):
        return False
    if cannot("system") and shape in ("system", "reasoning and tools"):
        return False
    if cannot("an answer without reasoning"):
        return name.startswith("nemotron") and shape in ("reasoning", "reasoning and tools")
    if name == "qwen3_5_nothink" or name == "muse_glimmer":  # closes <think> in the prompt; ends reasoning with a stop token
        return "reasoning" not in shape
    # It puts text and tool call of one message on both sides of the result, or forbids them together.
    return not (shape == "reasoning and tools" and name in ("gemma4_v5", "diffusion_gemma", "gptoss"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_turn_is_exact_or_refused_by_name(name):
    template = template_of(name)
    found = {}
    for shape, row in {**SHAPES, **MORE_SHAPES}.items():
        try:
            samples = render(Conversation.parse(row), template, 100_000)
        except Refused as refusal:
            assert refusal.code in ("dropped-content", "unreachable-turn", "template-raises", "uncovered"), refusal.message
            assert refusal.turn is not None and refusal.message
            found[shape] = refusal.code
            continue
        judge(template, row, samples)
        found[shape] = "exact"
    assert {shape: found[shape] == "exact" for shape in SHAPES} == {shape: expressible(name, shape) for shape in SHAPES}, (
        found
    )


def test_no_template_went_missing():
    assert len(PUBLISHED) >= 41


CLOSED = {"reasoning", "reasoning history", "reasoning and tools"}
"""Shapes with reasoning, which a prompt that closes <think> cannot lead to."""


@pytest.mark.parametrize(
    ("name", "kwargs", "refused"),
    [
        ("qwen3", {"enable_thinking": False}, CLOSED),
        ("qwen3", {"enable_thinking": True}, set()),
        ("qwen3_6", {"preserve_thinking": True}, set()),
        ("qwen3_8", {"preserve_thinking": True, "enable_thinking": False}, CLOSED),
        ("qwen3_5_nothink", {"enable_thinking": True}, set()),
        ("nemotron_3_nano", {"enable_thinking": False}, CLOSED),
        ("glm4moe", {"enable_thinking": False}, CLOSED),
        ("lfm2_2_5", {"preserve_thinking": True}, set()),
        ("llama3_1", {"tools_in_user_message": False}, CLOSED),
        ("llama3_2", {"date_string": "1 Jan 2020"}, CLOSED),
        ("gptoss", {"reasoning_effort": "high"}, {"reasoning and tools"}),
    ],
)
def test_variables_of_a_template_change_the_prompt_and_every_turn_stays_exact(name, kwargs, refused):
    template = template_of(name, None, **kwargs)
    found = set()
    for shape, row in SHAPES.items():
        try:
            samples = render(Conversation.parse(row), template, 100_000)
        except Refused:
            found.add(shape)
        else:
            judge(template, row, samples)
    assert found == refused


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_cosmetic_edit_is_no_alarm_and_another_role_is(name):
    template = template_of(name)
    contract = Contract.of(template)
    assert Contract.from_json(contract.to_json()) == contract
    source = template.source
    for edited in ("{# a comment #}" + source, source.replace("{{-", "{{-  ").replace("{%-", "{%-  ") + "\n"):
        other = Contract.of(template_of(name, edited))
        assert difference(contract, other) is None and other.behaviour_sha256 == contract.behaviour_sha256
        assert other.syntax_sha256 == contract.syntax_sha256 and other.source_sha256 != contract.source_sha256
    changed = Contract.of(template_of(name, source + "{{ ' ' }}"))
    told = difference(contract, changed)
    assert told and "one turn" in told and changed.behaviour_sha256 != contract.behaviour_sha256
    assert json.loads(contract.to_json())["probes"][0]["name"] == "one turn"
