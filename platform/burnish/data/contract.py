"""The template contract: what serving must keep for the trained model to mean what it learned."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from burnish.data.conversation import Conversation, Refused
from burnish.data.probes import PROBES
from burnish.data.template import Template
from burnish.errors import DataError

_MODES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (False, True), "thinking": (False, True), "preserve_thinking": (True,), "keep_thinking": (True,),
    "truncate_history_thinking": (False,), "reasoning_effort": ("low", "high"), "tools_in_user_message": (False,),
}  # fmt: skip
"""Variables that a server's users set from request to request, where a template knows them, and the values to probe."""
_LIBRARIES = ("burnish", "transformers", "tokenizers", "jinja2")


@dataclass(frozen=True)
class Probe:
    """One render of a fixed conversation: its text and token ids, or the error that the template raised.

    `prompt` says whether it is what a server feeds (all messages but a last answer, with the generation prompt) or the
    whole conversation; `kwargs` are the variables that this probe sets beside the contract's own.
    """

    name: str
    kwargs: dict[str, Any]
    prompt: bool
    text: str | None
    ids: list[int] | None
    error: str | None

    def place(self) -> str:
        """What the probe is, for people."""
        kwargs = "".join(f", {name}={value}" for name, value in self.kwargs.items())
        return f"{self.name} ({'prompt' if self.prompt else 'whole'}{kwargs})"

    def behaviour(self) -> list[Any]:
        """What must stay as it is. Of an error only that it is one: libraries word the same error in many ways."""
        return [self.text, self.ids, self.error is not None]


@dataclass(frozen=True)
class Contract:
    """Template text, variables, stop tokens, and how they behave on fixed probes and on the first rows of the data.

    Two contracts are the same promise to serving if and only if `difference` finds nothing. `source_sha256` is of the
    template's text, `syntax_sha256` of its syntax tree, `behaviour_sha256` of every probe and the stop tokens. `rows` are
    the sha256 of the token ids and masks of the run's first rows; `masks` counts what of them is trained.
    """

    template: str
    kwargs: dict[str, Any]
    date: str | None
    stop_tokens: list[str]
    stop_ids: list[int]
    special_tokens: dict[str, Any]
    source_sha256: str
    syntax_sha256: str
    behaviour_sha256: str
    tokenizer_sha256: str
    versions: dict[str, str]
    masks: dict[str, Any]
    rows: dict[str, str]
    probes: list[Probe]

    @classmethod
    def of(
        cls, template: Template, masks: Mapping[str, Any] | None = None, rows: Mapping[str, str] | None = None
    ) -> "Contract":
        """The contract of a template: every probe rendered with and without the generation prompt, in every mode."""
        probes = [
            Probe(name, mode, prompt, text, None if text is None else template.encode(text).ids.tolist(), error)
            for name, mode, prompt, text, error in renders(template)
        ]
        stop_ids = sorted(template.stop_ids)
        behaviour = [[[probe.place(), *probe.behaviour()] for probe in probes], stop_ids]
        return cls(
            template=template.source,
            kwargs=dict(template.kwargs),
            date=template.date,
            stop_tokens=list(template.stop_tokens),
            stop_ids=stop_ids,
            special_tokens=dict(template.tokenizer.special_tokens_map),
            source_sha256=_sha256(template.source),
            syntax_sha256=template.syntax.sha256,
            behaviour_sha256=_sha256(json.dumps(behaviour, ensure_ascii=False)),
            tokenizer_sha256=_sha256(json.dumps(template.vocabulary(), sort_keys=True)),
            versions={library: version(library) for library in _LIBRARIES},
            masks=dict(masks or {}),
            rows=dict(rows or {}),
            probes=probes,
        )

    def to_json(self) -> str:
        """contract.json; token ids of a probe on one line."""
        tree = asdict(replace(self, probes=[]))
        probes = ",\n    ".join(json.dumps(asdict(probe), ensure_ascii=False) for probe in self.probes)
        head = json.dumps(tree, indent=2, ensure_ascii=False)
        return head.removesuffix('"probes": []\n}') + f'"probes": [\n    {probes}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Contract":
        """The contract in the text of a contract.json; raises ValueError or TypeError where it is none."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or not isinstance(tree.get("probes"), list):
            raise ValueError("it has no probes")
        return cls(**{**tree, "probes": [Probe(**probe) for probe in tree["probes"]]})

    @classmethod
    def read(cls, folder: Path) -> "Contract":
        """The contract.json of a folder; raises DataError where there is none or it is none."""
        try:
            return cls.from_json((folder / "contract.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder}: has no contract.json, so nobody knows which template it was trained with") from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder / 'contract.json'}: is no contract that this version reads: {error}") from None

    def sha256(self) -> str:
        """The sha256 of contract.json, by which weights name their contract."""
        return _sha256(self.to_json())


def difference(was: Contract, now: Contract) -> str | None:
    """The first probe that behaves otherwise than before, both strings at the first difference; None where none does.

    Another text of the same behaviour (comments, spacing, quoting) is no difference.
    """
    if was.stop_ids != now.stop_ids:
        return f"answers ended at {was.stop_tokens} and end now at {now.stop_tokens}"
    before, after = _by_place(was), _by_place(now)
    for place in dict.fromkeys([*before, *after]):
        # A mode of a variable that one of them does not know is no mode there: the variable changes nothing.
        old, new = (probes.get(place) or probes.get((place[0], (), place[2])) for probes in (before, after))
        if old is None or new is None:
            continue  # a probe that the other version of burnish did not have
        if old.behaviour() != new.behaviour():
            return f"the probe {(new if place in after else old).place()} {_changed(old, new)}"
    if was.tokenizer_sha256 != now.tokenizer_sha256 and was.versions["tokenizers"] == now.versions["tokenizers"]:
        return "the tokenizer has another vocabulary or other rules, which no probe shows"
    for row, digest in was.rows.items():
        if now.rows.get(row, digest) != digest:
            return f"the row {row} has other tokens or another mask"
    return None


def _by_place(contract: Contract) -> dict[tuple[str, tuple[Any, ...], bool], Probe]:
    return {(probe.name, tuple(sorted(probe.kwargs.items())), probe.prompt): probe for probe in contract.probes}


def _changed(old: Probe, new: Probe) -> str:
    if old.text is None or new.text is None:
        raised, rendered = (old, new) if old.text is None else (new, old)
        order = ("raised", "renders now") if old.text is None else ("raises now", "was rendered")
        return f"{order[0]} {raised.error!r}, and {order[1]} as {str(rendered.text)[-60:]!r}"
    if old.text != new.text:
        return differ(old.text, new.text)
    before, after = old.ids or [], new.ids or []
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    return f"has the same text and other tokens from token {at} on: {before[at : at + 8]}, now {after[at : at + 8]}"


def differ(expected: str, found: str) -> str:
    """Both strings around their first difference."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    left = max(0, at - 20)
    return f"at character {at} expected {expected[left : at + 30]!r}, found {found[left : at + 30]!r}"


def _modes(template: Template) -> list[dict[str, Any]]:
    """The variables to probe beside the recipe's own: none, and each that the template knows with each of its values."""
    modes: list[dict[str, Any]] = [{}]
    for name, values in _MODES.items():
        if name in template.syntax.variables and name not in template.kwargs:
            modes += [{name: value} for value in values]
    return modes


def renders(template: Template) -> Iterator[tuple[str, dict[str, Any], bool, str | None, str | None]]:
    """What a template makes of every probe in every mode: name, mode, whether it is a prompt, text, or the error instead."""
    for mode in _modes(template):
        for name in PROBES:
            conversation = replace(Conversation.parse(PROBES[name]), kwargs=mode)
            messages = conversation.messages
            fed = messages[:-1] if messages[-1].role == "assistant" else messages
            for part, prompt in ((messages, False), (fed, True)):
                try:
                    yield name, mode, prompt, template.text(part, conversation, prompt), None
                except Refused as refused:
                    yield name, mode, prompt, None, refused.message


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
