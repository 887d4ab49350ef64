"""Masks, for any text: what is trained is what the server would have to hear, token for token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.conversation import Conversation, Refused
from burnish.data.template import render
from tests.conftest import CHATML, LLAMA3
from tests.unit.data.test_template import template

TEMPLATES = [template(CHATML), template(LLAMA3)]
text = st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=30).filter(str.strip)
talks = st.lists(st.tuples(text, text), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(talks, st.sampled_from(TEMPLATES), st.none() | text)
def test_each_answer_is_trained_in_the_context_that_the_server_feeds(pairs, source, system):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    conversation = Conversation.parse({"messages": messages})
    try:
        samples = render(conversation, source, 100_000)
    except Refused as refusal:
        # An answer whose first character merges with its prompt, before the last turn, has no one sample.
        assert refusal.code == "prompt-tokens"
        return
    assert sorted(turn for sample in samples for turn in sample.turns) == conversation.assistant_turns()
    (sample,) = samples
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.trained.astype(int), [0]])))
    assert len(edges) == 2 * len(pairs)
    for turn, start, end in zip(conversation.assistant_turns(), edges[::2], edges[1::2], strict=True):
        prompt = source.text(conversation.messages[:turn], (), prompt=True)
        assert sample.input_ids[:start].tolist() == source.encode(prompt).ids.tolist()
        assert sample.input_ids[end - 1] in source.stop_ids
        answer = source.decode(sample.input_ids[start : end - 1])
        expected = messages[turn]["content"]
        assert answer in (expected, expected.strip())
