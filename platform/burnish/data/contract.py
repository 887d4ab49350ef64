"""The template contract: what serving must keep for the trained model to mean what it learned."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from burnish.data.conversation import Conversation, Refused
from burnish.data.template import Template

_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    [
        {"role": "user", "content": " a\n\nb "},
        {"role": "assistant", "content": "[[1, 2]]"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "\n\nYes."},
    ],
    [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because.", "reasoning_content": "Let me think."},
        {"role": "user", "content": "Grüße 👋"},
        {"role": "assistant", "content": "Ok", "reasoning_content": "Short."},
    ],
)
"""Fixed conversations that reach the branches in which templates differ: system prompts, trimming, history, reasoning."""


@dataclass(frozen=True)
class Contract:
    """Template text, variables, stop tokens, and the sha256 of how they behave on fixed probes.

    Two contracts are the same promise to serving if and only if their `behaviour_sha256` are equal.
    """

    template: str
    kwargs: dict[str, Any]
    stop_tokens: list[str]
    stop_ids: list[int]
    source_sha256: str
    behaviour_sha256: str

    @classmethod
    def of(cls, template: Template) -> "Contract":
        """The contract of a template: every probe rendered with and without the generation prompt, and its token ids."""
        behaviour: list[Any] = []
        for probe in _PROBES:
            conversation = Conversation.parse({"messages": probe})
            for count, prompt in [(len(probe), False), (len(probe) - 1, True)]:
                try:
                    text = template.text(conversation.messages[:count], (), prompt)
                    behaviour.append([text, template.encode(text).ids.tolist()])
                except Refused as refused:
                    behaviour.append(refused.message)
        stop_ids = sorted(template.stop_ids)
        stop_tokens = [template.decode([i]) for i in stop_ids]
        promise = json.dumps([behaviour, stop_ids], ensure_ascii=False)
        return cls(
            template.source,
            dict(template.kwargs),
            stop_tokens,
            stop_ids,
            hashlib.sha256(template.source.encode()).hexdigest(),
            hashlib.sha256(promise.encode()).hexdigest(),
        )

    def to_json(self) -> str:
        """contract.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Contract":
        """The contract in the text of a contract.json; raises ValueError or TypeError where it is none."""
        return cls(**json.loads(text))
