"""Whether a model folder, and the server that runs it, still keep the template contract of the training."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from burnish.complaint import nearest
from burnish.data.contract import Contract, Probe, difference
from burnish.data.probes import PROBES
from burnish.data.template import Template
from burnish.data.tokenizer import dated
from burnish.errors import DataError, RecipeError, one_line
from burnish.serving import Prompt, Server

_REMEDY = (
    "Give the server this folder's tokenizer and chat_template.jinja. A probe of something that it cannot express and you "
    "never send is left out by --skip NAME"
)


@dataclass(frozen=True)
class Verdict:
    """A contract that was kept: how many probes were compared, with what, and what else is worth knowing."""

    probes: int
    against: str
    notes: tuple[str, ...]


def verify(path: Path) -> Verdict:
    """Compares an exported folder with its contract, offline.

    Raises DataError with the first difference: another behaviour of template or tokenizer, other stop tokens, an adapter
    of another contract. RecipeError where the folder is no export.
    """
    folder, contract = _exported(path)
    tokenizer: Any = _tokenizer(folder)
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: the tokenizer has no chat template; the contract's stands in {folder / 'contract.json'}")
    now = Contract.of(_template(folder, tokenizer, contract))
    changed = difference(replace(contract, rows={}), now)
    if changed is not None:
        raise DataError(f"{folder}: does not keep its contract: {changed}")
    for file in sorted(folder.glob("adapter_model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            named = (tensors.metadata() or {}).get("chat_contract")
        if named != f"sha256:{contract.behaviour_sha256}":
            raise DataError(f"{file}: was trained under the contract {named}, this folder's is {contract.behaviour_sha256}")
    return Verdict(len(contract.probes), str(folder), tuple(_notes(contract, now)))


def verify_server(
    path: Path, url: str, model: str | None = None, api_key: str | None = None, skip: Collection[str] = ()
) -> Verdict:
    """Asks a running server for the prompt of every probe but `skip`, after `verify` of the folder, and compares token ids.

    Raises DataError with the first difference in context, InfrastructureError where the server does not answer, RecipeError
    for a name in `skip` that no probe has.
    """
    for name in skip:
        if name not in PROBES:
            raise RecipeError(f"--skip {name!r}: no probe has this name{nearest(name, set(PROBES))}")
    offline = verify(path)
    folder, contract = _exported(path)
    tokenizer: Any = _tokenizer(folder)
    # The server reads today's clock, so what it is compared with shows today too.
    template = _template(folder, tokenizer, replace(contract, date=None))
    server = Server.find(url, model, api_key)
    compared, failures = 0, dict[str, str]()
    for probe in Contract.of(template).probes:
        if not probe.prompt or probe.ids is None or probe.name in skip:
            continue  # servers only render prompts; where the template raises, there is nothing to feed
        row = PROBES[probe.name]
        messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        try:
            found = server.prompt(messages, row.get("tools", []), {**contract.kwargs, **probe.kwargs})
            wrong = _differs(probe, found, template)
        except DataError as error:
            wrong = f"it refuses the probe {probe.place()}: {error}"
        compared += 1
        if wrong is not None:
            failures.setdefault(probe.name, wrong)
    if failures:
        others = list(failures)[1:]
        more = f" {len(others)} other probes differ too: {', '.join(others)}." if others else ""
        raise DataError(f"{server.url}: does not keep the contract: {next(iter(failures.values()))}.{more} {_REMEDY}")
    skipped = f"; skipped: {', '.join(skip)}" if skip else ""
    return Verdict(compared, f"{server.url} ({server.seen}{skipped})", offline.notes)


def _differs(probe: Probe, found: Prompt, template: Template) -> str | None:
    """How a server's prompt is another than the probe's, at the first difference; None where it is the same."""
    expected = probe.ids or []
    if found.ids is None:
        same, text = found.count == len(expected), str(probe.text)
        return (
            None
            if same
            else f"{found.count} tokens for the probe {probe.place()} instead of {len(expected)}: {text[-200:]!r}"
        )
    if found.ids == expected:
        return None
    pairs = enumerate(zip(expected, found.ids, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found.ids)))
    left = max(0, at - 8)
    return (
        f"other tokens for the probe {probe.place()} from token {at} on: expected "
        f"{template.decode(expected[left : at + 8])!r} {expected[at : at + 4]}, found "
        f"{template.decode(found.ids[left : at + 8])!r} {found.ids[at : at + 4]}"
    )


def _exported(path: Path) -> tuple[Path, Contract]:
    """The folder of an export, or of a run's export, and its contract."""
    folder = path / "export" if (path / "export").is_dir() else path
    if (folder / "recipe.yaml").exists():
        raise RecipeError(f"{folder}: is a run without an export; first type: burnish export {folder}")
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; name an exported one, for example runs/quickstart/export")
    return folder, Contract.read(folder)


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: has no tokenizer that loads without code of its own: {one_line(error)}") from None


def _template(folder: Path, tokenizer: Any, contract: Contract) -> Template:
    """The template as it stands in the folder today, with the contract's variables."""
    try:
        stops = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except (OSError, json.JSONDecodeError):
        stops = tokenizer.eos_token_id
    ids = frozenset(stops if isinstance(stops, list) else [stops])
    return dated(tokenizer, tokenizer.get_chat_template(), contract.kwargs, ids, contract.date)


def _notes(was: Contract, now: Contract) -> Iterator[str]:
    if was.source_sha256 != now.source_sha256:
        kind = "comments or spacing" if was.syntax_sha256 == now.syntax_sha256 else "wording"
        yield f"the template's {kind} differs from the one that was trained; every probe behaves the same"
    if was.tokenizer_sha256 != now.tokenizer_sha256:
        yield "the tokenizer's file differs from the one that was trained; every probe has the same tokens"
    for library, version in was.versions.items():
        if now.versions[library] != version:
            yield f"{library} {now.versions[library]} here, {version} in training"
