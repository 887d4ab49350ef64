"""Masks, byte for byte, on two template families; and every refusal with its code and turn."""

import pytest
from transformers import PreTrainedTokenizerFast

from burnish.data.conversation import Conversation, Refused
from burnish.data.render import render
from burnish.data.template import Template
from tests.conftest import CHATML, LLAMA3, QWEN3_HISTORY, make_tokenizer
from tests.judge import template_of

U, A, S = "user", "assistant", "system"


def template(source: str) -> Template:
    tokenizer = make_tokenizer(source)
    return Template(tokenizer, source, {}, frozenset([tokenizer.eos_token_id]))


CHATML_TEMPLATE, LLAMA3_TEMPLATE = template(CHATML), template(LLAMA3)


def talk(*messages, **more):
    return Conversation.parse({"messages": [{"role": r, "content": c} for r, c in messages], **more})


def marked(sample, source: Template) -> str:
    """The text of a sample with trained runs between {+ and +}."""
    text, inside = "", False
    for token, trained in zip(sample.input_ids, sample.trained, strict=True):
        text += ("{+" if trained else "+}") if trained != inside else ""
        text, inside = text + source.decode([token]), trained
    return text + ("+}" if inside else "")


SHAPES = {
    "one turn": [(U, "Hi"), (A, "Hello.")],
    "system": [(S, "Be brief."), (U, "Hi"), (A, "Hello.")],
    "three turns": [(U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "e"), (A, "f")],
    "brackets": [(U, "list"), (A, "[[1, 2], [3]]")],
    "same answers": [(U, "x"), (A, "yes"), (U, "x"), (A, "yes")],
    "unfinished": [(U, "a"), (A, "b"), (U, "c")],
}


def chatml(messages, trained=lambda turn: True) -> str:
    out = ""
    for turn, (role, content) in enumerate(messages):
        body = f"{{+{content}<|im_end|>+}}" if role == A and trained(turn) else f"{content}<|im_end|>"
        out += f"<|im_start|>{role}\n{body}\n"
    return out


def llama3(messages, trained=lambda turn: True) -> str:
    out = "<|begin|>"
    for turn, (role, content) in enumerate(messages):
        body = f"{{+{content}<|eot_id|>+}}" if role == A and trained(turn) else f"{content}<|eot_id|>"
        out += f"<|start_header_id|>{role}<|end_header_id|>\n\n{body}"
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("source", "expected"), [(CHATML_TEMPLATE, chatml), (LLAMA3_TEMPLATE, llama3)], ids=["chatml", "llama3"]
)
def test_exactly_the_answers_and_their_stop_tokens_are_trained(shape, source, expected):
    messages = SHAPES[shape]
    (sample,) = render(talk(*messages), source, 256)
    kept = messages[:-1] if messages[-1][0] == U else messages  # nothing is rendered after the last answer
    assert marked(sample, source) == expected(kept)
    assert sample.turns == tuple(turn for turn, (role, _) in enumerate(kept) if role == A)


def test_the_labels_of_a_small_conversation_token_by_token():
    (sample,) = render(talk((U, "Hi"), (A, "ok")), CHATML_TEMPLATE, 256)
    ids = sample.input_ids.tolist()
    tokens = [CHATML_TEMPLATE.decode([i]) for i in ids]
    text = "".join(tokens)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    labels = sample.labels().tolist()
    kept = [i for i, label in enumerate(labels) if label != -100]
    assert "".join(tokens[i] for i in kept) == "ok<|im_end|>"
    assert kept == list(range(kept[0], kept[-1] + 1)) and len(ids) - 1 == kept[-1] + 1
    assert [labels[i] for i in kept] == [ids[i] for i in kept]


def test_train_on_last_assistant_and_train_false():
    messages = SHAPES["three turns"]
    (sample,) = render(talk(*messages), CHATML_TEMPLATE, 256, "last_assistant")
    assert marked(sample, CHATML_TEMPLATE) == chatml(messages, trained=lambda turn: turn == 5)
    row = {"messages": [{"role": r, "content": c, "train": c != "d"} for r, c in messages]}
    (sample,) = render(Conversation.parse(row), CHATML_TEMPLATE, 256)
    assert marked(sample, CHATML_TEMPLATE) == chatml(messages, trained=lambda turn: turn in (1, 5))
    assert sample.turns == (1, 5)


def test_an_answer_that_merges_with_its_prompt_is_encoded_as_the_server_does():
    # "\n" of the prompt and "\n\n" of the answer are one token when encoded together; the server never sees that token.
    (sample,) = render(talk((U, "Hi"), (A, "\n\nok")), CHATML_TEMPLATE, 256)
    prompt_text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prompt = CHATML_TEMPLATE.encode(prompt_text).ids.tolist()
    whole = CHATML_TEMPLATE.encode(prompt_text + "\n\nok<|im_end|>\n").ids.tolist()
    assert whole[: len(prompt)] != prompt, "without a merge this test shows nothing"
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert marked(sample, CHATML_TEMPLATE) == chatml([(U, "Hi"), (A, "\n\nok")])


def test_an_earlier_answer_that_merges_with_its_prompt_gets_a_sample_of_its_own():
    messages = [(U, "Hi"), (A, "\n\nok"), (U, "And"), (A, "fine")]
    first, second = render(talk(*messages), CHATML_TEMPLATE, 256)
    assert marked(first, CHATML_TEMPLATE) == chatml(messages[:2])
    assert marked(second, CHATML_TEMPLATE) == chatml(messages, trained=lambda turn: turn == 3)


def test_tool_calls_and_reasoning_are_trained_and_tool_results_are_not():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": 'Zürich "x"'}}}
    row = {
        "messages": [
            {"role": U, "content": "Weather?"},
            {"role": A, "content": "", "reasoning_content": "look it up", "tool_calls": [call]},
            {"role": "tool", "content": "12 degrees", "tool_call_id": "1"},
            {"role": A, "content": "It is 12."},
        ],
        "tools": [{"type": "function", "function": {"name": "get_weather"}}],
    }  # fmt: skip
    (sample,) = render(Conversation.parse(row), CHATML_TEMPLATE, 512)
    text = marked(sample, CHATML_TEMPLATE)
    assert text.count("{+") == 2
    assert "{+<think>look it up</think>" in text and "get_weather" in text.split("{+")[1].split("+}")[0]
    assert "<|im_start|>tool\n12 degrees<|im_end|>" in text
    assert "{+It is 12.<|im_end|>+}" in text


@pytest.mark.parametrize(
    ("messages", "source", "code", "turn"),
    [
        ([(U, "a"), (A, "b<|im_end|>c")], CHATML, "control-token-in-content", 1),
        ([(U, "x<|im_start|>system"), (A, "b")], CHATML, "control-token-in-content", 0),
        ([(U, "a"), (A, "b")], CHATML.replace("'<|im_end|>\n' }}{%- endfor", "'\n' }}{%- endfor"), "no-stop", 1),
        ([(U, "a"), (A, "b")], CHATML.replace("assistant\n", "assistant:"), "unreachable-turn", 1),
        ([(U, "a"), (A, "Long answer")], CHATML.replace("{{- m.content }}", "{{- m.content[:4] }}"), "dropped-content", 1),
        ([(U, "a"), (A, "b")], "{{ raise_exception('no') }}", "template-raises", 0),
        ([(U, "a"), (A, "b")], "{{ 1 // 0 }}", "template-raises", 0),
        ([(U, "a"), (A, "b")], LLAMA3.replace("{{- bos_token }}", "{{- bos_token + bos_token }}"), "double-bos", None),
        ([(U, "word " * 300), (A, "b")], CHATML, "overlong", None),
    ],
)
def test_what_cannot_be_proved_is_refused_with_code_and_turn(messages, source, code, turn):
    with pytest.raises(Refused) as refusal:
        render(talk(*messages), template(source), 256)
    assert (refusal.value.code, refusal.value.turn) == (code, turn), refusal.value.message


REASONED = {
    "messages": [
        {"role": U, "content": "a"},
        {"role": A, "content": "b", "reasoning_content": "hm"},
        {"role": U, "content": "c"},
        {"role": A, "content": "d"},
        {"role": U, "content": "e"},
        {"role": A, "content": "f", "train": False},
    ]
}


def test_where_a_template_rewrites_history_each_turn_is_trained_once_in_the_context_that_it_meets():
    source = template(QWEN3_HISTORY)
    first, second = render(Conversation.parse(REASONED), source, 256)
    assert (
        marked(first, source) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{+<think>hm</think>b<|im_end|>+}\n"
    )
    assert marked(second, source).endswith(
        "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{+d<|im_end|>+}\n"
    )
    assert (first.turns, second.turns) == ((1,), (3,))


def test_history_last_turn_trains_only_what_shares_the_last_context():
    (sample,) = render(Conversation.parse(REASONED), template(QWEN3_HISTORY), 256, history="last_turn")
    assert sample.turns == (3,)
    (sample,) = render(talk(*SHAPES["three turns"]), CHATML_TEMPLATE, 256, history="last_turn")
    assert sample.turns == (1, 3, 5)


def test_reasoning_that_the_template_ignores_is_refused():
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "reasoning_content": "hm"}]}
    with pytest.raises(Refused) as refusal:
        render(Conversation.parse(row), LLAMA3_TEMPLATE, 256)
    assert (refusal.value.code, refusal.value.turn) == ("dropped-content", 1)


def test_a_row_in_which_every_answer_says_train_false_is_refused():
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "train": False}]}
    with pytest.raises(Refused, match="empty-target"):
        render(Conversation.parse(row), CHATML_TEMPLATE, 256)


def test_tool_arguments_are_trained_as_servers_render_them():
    # The OpenAI shape has the arguments as JSON text; a server decodes it before its template prints it.
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": None, "tool_calls": [call]}]}
    (sample,) = render(Conversation.parse(row), CHATML_TEMPLATE, 256)
    assert '"arguments": {"city": "Paris"}' in marked(sample, CHATML_TEMPLATE)


def test_control_tokens_that_only_the_vocabulary_knows_are_refused_too():
    vocabulary = make_tokenizer(LLAMA3).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<|begin|>", eos_token="<|eot_id|>")
    assert "<|start_header_id|>" not in tokenizer.all_special_tokens
    source = Template(tokenizer, LLAMA3, {}, frozenset([tokenizer.eos_token_id]))
    with pytest.raises(Refused, match="control-token-in-content"):
        render(talk((U, "a"), (A, "b<|start_header_id|>user")), source, 256)


def test_truncate_turns_takes_whole_turns_away_and_trains_each_answer_once():
    messages = [(S, "Be brief.")]
    for number in range(6):
        messages += [(U, f"question {number}"), (A, f"answer {number}")]
    whole = len(render(talk(*messages), CHATML_TEMPLATE, 10_000)[0])
    with pytest.raises(Refused, match="overlong"):
        render(talk(*messages), CHATML_TEMPLATE, whole - 1)
    limit = whole * 2 // 3
    samples = render(talk(*messages), CHATML_TEMPLATE, limit, on_overlong="truncate_turns")
    assert len(samples) > 1 and all(len(sample) <= limit for sample in samples)
    assert sorted(turn for sample in samples for turn in sample.turns) == list(range(2, 13, 2))
    last = marked(samples[-1], CHATML_TEMPLATE)
    kept = [messages[0], *messages[1 + 2 * (6 - len(samples[-1].turns)) :]]
    assert last == chatml(kept) and samples[-1].turns[-1] == 12
    assert marked(samples[0], CHATML_TEMPLATE) == chatml(messages[: 1 + 2 * len(samples[0].turns)])


def test_truncate_turns_refuses_a_last_exchange_that_is_too_long_alone_and_never_starts_at_a_tool_result():
    with pytest.raises(Refused, match="even without the turns before") as refusal:
        render(talk((U, "a"), (A, "b"), (U, "word " * 300), (A, "c")), CHATML_TEMPLATE, 200, on_overlong="truncate_turns")
    assert (refusal.value.code, refusal.value.turn) == ("overlong", 3)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {
        "messages": [
            {"role": U, "content": "long " * 40}, {"role": A, "content": "early"}, {"role": U, "content": "use f"},
            {"role": A, "content": "", "tool_calls": [call]}, {"role": "tool", "content": "r"}, {"role": A, "content": "done"},
        ]
    }  # fmt: skip
    samples = render(Conversation.parse(row), CHATML_TEMPLATE, 150, on_overlong="truncate_turns")
    assert [sample.turns for sample in samples][-1] == (3, 5)
    assert marked(samples[-1], CHATML_TEMPLATE).startswith("<|im_start|>user\nuse f")


def test_an_empty_answer_is_refused_where_it_would_be_trained():
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": " \n"}]}
    with pytest.raises(Refused) as refusal:
        render(Conversation.parse(row), CHATML_TEMPLATE, 256)
    assert (refusal.value.code, refusal.value.turn) == ("empty-target", 1)


def test_a_row_sets_variables_of_its_own():
    source = template(CHATML + "{%- if add_generation_prompt and quiet %}{{- '<quiet>' }}{%- endif %}")
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "<quiet>b"}]}
    (plain,) = render(Conversation.parse(row), source, 256)
    (quiet,) = render(Conversation.parse({**row, "chat_template_kwargs": {"quiet": True}}), source, 256)
    assert "{+<quiet>b" in marked(plain, source) and "<quiet>{+b" in marked(quiet, source)


@pytest.mark.parametrize(
    ("change", "code", "turn"),
    [
        (("{{- m.content }}", "{{- m.content | upper if m.role == 'assistant' else m.content }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content.split() | reverse | join(' ') }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content if m.role == 'assistant' else '...' }}"), "dropped-content", 0),
        (("{{- m.content }}", "{{- m.content.split() | join('  ') }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content | replace(' ', '\\n') }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content.rstrip('.') }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content | replace('*', '') }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content | replace('/now', '') }}"), "dropped-content", 1),
        (("{{- m.content }}", "{{- m.content | e }}"), "dropped-content", 1),
        (
            ("{{- m.content }}", "{{- m.content + messages[0].content if m.role == 'assistant' else m.content }}"),
            "foreign-text",
            1,
        ),
        (("{{- m.content }}", "{{- m.content[:4] + '<|im_end|>' + m.content[4:] }}"), "uncovered", 1),
        (("{{- m.content }}", "{{- m.content if 'W' in m.content or m.role == 'user' else 'x' }}"), "untraceable", 1),
    ],
)
def test_the_dye_finds_what_a_template_does_to_an_answer(change, code, turn):
    with pytest.raises(Refused) as refusal:
        render(talk((U, "hello"), (A, "*Word* by word < /now.")), template(CHATML.replace(*change)), 256)
    assert (refusal.value.code, refusal.value.turn) == (code, turn), refusal.value.message


def test_what_the_prompt_says_of_the_answer_already_is_not_trained_again():
    source = template(CHATML + "{%- if add_generation_prompt %}{{- '<think>' + '\n' }}{%- endif %}")
    (sample,) = render(talk((U, "a"), (A, "<think>\nhm\n</think>\n\nb")), source, 256)
    assert marked(sample, source).endswith("assistant\n<think>\n{+hm\n</think>\n\nb<|im_end|>+}\n")
    with pytest.raises(Refused, match="unreachable-turn"):
        render(talk((U, "a"), (A, "b")), source, 256)


def test_a_field_that_the_template_reads_and_does_not_get_is_refused():
    row = {"messages": [{"role": U, "content": "a", "mood": "dark"}, {"role": A, "content": "b", "id": 7}]}
    assert render(Conversation.parse(row), CHATML_TEMPLATE, 256)
    with pytest.raises(Refused, match="reads the field 'mood'") as refusal:
        render(Conversation.parse(row), template("{{- messages[0].mood }}" + CHATML), 256)
    assert (refusal.value.code, refusal.value.turn) == ("bad-row", 0)


@pytest.mark.parametrize(("value", "drawn"), [(3, False), (True, False), ("Oslo", True)])
def test_an_argument_that_the_template_drops_is_refused(value, drawn):
    call = {"type": "function", "function": {"name": "get_days", "arguments": {"days": value, "city": "city 13"}}}
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "", "tool_calls": [call]}]}
    strings = (
        "{{- call.function.name }}{%- for k, v in call.function.arguments.items() %}"
        "{{- ' ' + k + '=' + v if v is string else ' ' + k + '=' }}{%- endfor %}"
    )
    source = template(CHATML.replace("{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}", strings))
    assert render(Conversation.parse(row), CHATML_TEMPLATE, 256)
    if drawn:
        assert render(Conversation.parse(row), source, 256)
        return
    with pytest.raises(Refused, match="dropped-content"):
        render(Conversation.parse(row), source, 256)


def test_truncate_turns_keeps_system_messages_wherever_they_stand():
    row = {
        "messages": [
            {"role": U, "content": "long " * 60}, {"role": A, "content": "no", "train": False},
            {"role": S, "content": "Answer in French"}, {"role": U, "content": "again"}, {"role": A, "content": "Oui."},
        ]
    }  # fmt: skip
    (sample,) = render(Conversation.parse(row), CHATML_TEMPLATE, 120, on_overlong="truncate_turns")
    assert marked(sample, CHATML_TEMPLATE) == chatml([(S, "Answer in French"), (U, "again"), (A, "Oui.")])
    assert sample.turns == (4,)


def test_history_last_turn_still_refuses_an_earlier_answer_that_cannot_be_proved():
    row = {
        "messages": [
            {"role": U, "content": "a"},
            {"role": A, "content": "b", "reasoning_content": "hm"},
            *REASONED["messages"][2:4],
        ]
    }
    for history in ("serve_exact", "last_turn"):
        with pytest.raises(Refused, match="dropped-content"):
            render(Conversation.parse(row), LLAMA3_TEMPLATE, 256, history=history)


@pytest.mark.parametrize(
    ("answer", "code"),
    [("</think>", "untraceable"), ("\n</think>\n", "untraceable"), ("</think></think>", "dropped-content")],
)
def test_an_answer_that_is_nothing_but_what_the_template_looks_for_is_refused(answer, code):
    # Qwen3 takes all of it for the end of a reasoning, and writes an empty think block that holds the same letters.
    with pytest.raises(Refused) as refusal:
        render(talk((U, "Hi"), (A, answer)), template_of("qwen3"), 256)
    assert (refusal.value.code, refusal.value.turn) == (code, 1), refusal.value.message


@pytest.mark.parametrize("answer", ["user", "assistant", '"', "\\", "?", "👍"])
def test_an_answer_of_one_word_or_mark_is_no_such(answer):
    (sample,) = render(talk((U, "Hi </think>"), (A, answer)), CHATML_TEMPLATE, 256)
    assert CHATML_TEMPLATE.decode(sample.input_ids[sample.trained]) == f"{answer}<|im_end|>"


def test_arguments_of_quotes_and_lines_are_no_such():
    call = {"type": "function", "function": {"name": "cut", "arguments": {"at": "\n", "quote": '"', "escape": "\\"}}}
    row = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "", "tool_calls": [call]}]}
    (sample,) = render(Conversation.parse(row), template_of("qwen3"), 256)
    assert r'{"at": "\n", "quote": "\"", "escape": "\\"}' in marked(sample, template_of("qwen3"))
