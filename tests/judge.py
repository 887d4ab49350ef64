"""A judge of rendered samples that knows nothing of the code under test, and published templates on a small vocabulary.

It asks the tokenizer itself what a server would feed and what stands in the render, and looks for the words of each message.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken

from burnish.data.template import Template
from tests.conftest import make_tokenizer

CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<｜[^｜]+｜>|</?(?:start|end)_of_(?:turn|image)>|\[/?[A-Z_]{3,20}\]|\[gMASK\]|<sop>"
    r"|<[a-z_]+\|>|<\|\"\|>|<end_of_utterance>|<image>"
)
"""What the vocabularies of these models hold as special tokens."""
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
"""Tokens of their own in these vocabularies, but not special ones."""
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "glm4moe": ["<|user|>", "<|observation|>", "<|endoftext|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>"],
    "llava": ["</s>"],
    "muse_glimmer": ["<|eot|>", "<|eom|>"],
    "phi3": ["<|end|>"],
    "smolvlm": ["<end_of_utterance>"],
}
"""Stop tokens of the published generation configurations; the other families stop at <|im_end|>."""
_FOLDER = Path(str(importlib.util.find_spec("trl").submodule_search_locations[0])) / "chat_templates"
PUBLISHED = {path.stem: path for path in sorted(_FOLDER.glob("*.jinja")) if not path.stem.endswith("_training")}
"""The original chat templates that the trl package carries, by name."""


def template_of(name: str, source: str | None = None, **kwargs) -> Template:
    """A published template on a small vocabulary that has its control tokens."""
    source = PUBLISHED[name].read_text() if source is None else source
    stops = next((stops for prefix, stops in STOPS.items() if name.startswith(prefix)), ["<|im_end|>"])
    tokenizer = make_tokenizer(None)
    special = sorted({*CONTROL.findall(source), *stops, "<|begin_of_text|>", "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": stops[0]})
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tokenizer.chat_template = source
    ids = tokenizer.convert_tokens_to_ids(stops)
    date = "2026-01-31" if "strftime_now" in source else None
    return Template(tokenizer, source, kwargs, frozenset(ids), date)


def judge(template: Template, row, samples, turns=None, own_words=True) -> None:
    """Fails unless each of `turns` (all answers) is trained once, after the server's tokens, as the template renders it.

    Where messages share words, `own_words` is to be False.
    """
    plain = [{"content": "", **{k: v for k, v in message.items() if k != "train"}} for message in row["messages"]]

    def tokens(count, prompt):
        return template.tokenizer.apply_chat_template(
            plain[:count], tools=row.get("tools"), chat_template=template.source, add_generation_prompt=prompt,
            return_dict=False, **{**template.kwargs, **row.get("chat_template_kwargs", {})},
        )  # fmt: skip

    wanted = [turn for turn, message in enumerate(plain) if message["role"] == "assistant"] if turns is None else turns
    assert sorted(turn for sample in samples for turn in sample.turns) == wanted
    for sample in samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.trained.astype(int), [0]])))
        assert len(edges) == 2 * len(sample.turns)
        for turn, start, end in zip(sample.turns, edges[::2], edges[1::2], strict=True):
            assert sample.input_ids[:start].tolist() == tokens(turn, prompt=True), "the context is not the server's"
            span = sample.input_ids[start:end].tolist()
            stops = [i for i, token in enumerate(span) if token in template.stop_ids]
            assert stops == [len(span) - 1], "one stop token, at the end"
            text = template.tokenizer.decode(span, skip_special_tokens=False)
            everything = template.tokenizer.decode(tokens(turn + 1, prompt=False), skip_special_tokens=False)
            body = template.tokenizer.decode(span[:-1], skip_special_tokens=False)
            assert body in everything and (text in everything or everything.endswith(body)), "not what is rendered"
            judge_words(text, plain, turn, template.source, own_words)


def judge_words(text: str, messages, turn: int, source: str, own_words: bool) -> None:
    """Fails unless the text holds every word of this message and none that only another message and no template has."""
    own = words(messages[turn])
    assert not {word for word in own if word not in text}, own
    for other, message in enumerate(messages):
        if other != turn and own_words:
            strange = (words(message) - own) & words({"content": text})
            assert not {word for word in strange if word not in source}, strange


def words(message) -> set[str]:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    parts = [message.get("content") or "", message.get("reasoning_content") or "", *(call["name"] for call in calls)]
    for value in (value for call in calls for value in (*call["arguments"], *call["arguments"].values())):
        parts += map(str, value) if isinstance(value, list) else [str(value)]
    return {word for part in parts for word in re.findall(r"[\w.]+", part)}
