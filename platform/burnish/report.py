"""The report of a run as one web page, made from its folder alone: what it learned from which data, and how to repeat it."""

import json
import math
import shlex
import statistics
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from burnish import html
from burnish.config import Recipe, load
from burnish.data.contract import Contract
from burnish.errors import RecipeError
from burnish.train.home import Home
from burnish.train.ledger import lines, replace_text

_CURVES = {
    "train/loss": "loss", "eval/loss": "held-out loss", "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm", "train/tokens_per_second": "tokens a second", "train/mfu": "model FLOPs utilisation",
    "data/wait_share": "share of a step waiting for data", "data/packing_efficiency": "packing efficiency",
    "data/balance": "balance over workers",
}  # fmt: skip
_ANSWERS = 6
"""Answers shown to a question, the first and the newest."""
_LONGEST = 41
"""Characters of a run's name that leave room for "-again"."""
_EXAMPLES = 3
"""Rows shown of each reason for which rows were not trained."""


def report_of(run: str) -> str:
    """Writes `report.html` of the run in a folder or at a place, and gives its path. Raises what `report` raises."""
    home = Home.at(run).arrive()
    try:
        report(home.folder)
        home.keep()
        return home.path("report.html")
    finally:
        home.leave()


def report(folder: Path) -> Path:
    """Writes `report.html` into a run folder, whether the run has ended or not, and gives its path.

    Raises RecipeError where the folder is no run or cannot be written, DataError where its contract cannot be read.
    """
    if not (folder / "recipe.yaml").exists():
        raise RecipeError(f"{folder}: no run; name a run folder, for example runs/quickstart")
    path = folder / "report.html"
    try:
        replace_text(path, page(folder))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def page(folder: Path) -> str:
    """The HTML of a run's report; text of the data stands in it only escaped."""
    recipe = load(folder / "recipe.yaml")
    measured = list(lines(folder / "metrics.jsonl"))
    steps = list(lines(folder / "ledger.jsonl"))
    contract = Contract.read(folder)
    curves = "".join(html.curve(title, points) for name, title in _CURVES.items() if (points := _points(measured, name)))
    body = (
        f"{html.facts(_summary(folder, measured, steps))}<div class=curves>{curves}</div>"
        f"{_generations(folder)}<h2>From rows to tokens</h2>{_funnel(folder, recipe, steps)}"
        f"<h2>Template</h2>{_template(contract)}"
        f"<h2>Again</h2>{_again(folder, recipe, contract.date)}"
    )
    return html.document(f"{recipe.name}: report", escape(recipe.model.path), body)


def _points(measured: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """A metric over the steps, as far as it is a number: a norm in float16 may be infinite."""
    return [(line["step"], line[name]) for line in measured if name in line and math.isfinite(line[name])]


def _summary(folder: Path, measured: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, str]:
    newest: dict[str, float] = {}
    for line in measured:
        newest |= line
    speeds = [speed for _, speed in _points(measured, "train/tokens_per_second")]
    waits = [wait for _, wait in _points(measured, "data/wait_share")]
    used = [share for _, share in _points(measured, "train/mfu")]
    named = {
        "state": "finished" if (folder / "result.json").exists() else "not finished",
        "steps": f"{len(steps):,}",
        "loss": f"{newest['train/loss']:.4f}" if "train/loss" in newest else "",
        "held-out loss": f"{newest['eval/loss']:.4f}" if "eval/loss" in newest else "",
        "perplexity": f"{newest['eval/perplexity']:.3f}" if "eval/perplexity" in newest else "",
        "tokens": f"{sum(step['tokens'] for step in steps):,}",
        "trained tokens": f"{sum(step['trained_tokens'] for step in steps):,}",
        "tokens a second (median)": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "model FLOPs utilisation (median)": f"{statistics.median(used):.1%}" if used else "",
        "peak memory of a worker": f"{newest['train/peak_memory_gib']:.2f} GiB" if "train/peak_memory_gib" in newest else "",
        "layout": _layout(newest),
        "goodput": f"{newest['run/goodput']:.1%}" if "run/goodput" in newest else "",
        "waited for data (median)": f"{statistics.median(waits):.1%}" if waits else "",
    }
    return {name: value for name, value in named.items() if value}


def _layout(newest: dict[str, float]) -> str:
    """How the run lay in memory, where its workers said so."""
    if "engine/zero_stage" not in newest:
        return ""
    kept = "recomputed" if newest["engine/activation_checkpointing"] else "kept"
    expected = f"{newest['engine/estimated_memory_gib']:.2f} GiB of tensors expected"
    return f"ZeRO-{newest['engine/zero_stage']:.0f}, activations {kept}, {expected}"


def _funnel(folder: Path, recipe: Recipe, steps: list[dict[str, Any]]) -> str:
    """How many rows the sources have, which of them were not trained and why, and what became of the others."""
    refused = list(lines(folder / "refused.jsonl"))
    codes = Counter(row["code"] for row in refused)
    known = json.loads((folder / "data.json").read_text()).get("rows", {})
    packs, tokens = sum(len(step["packs"]) for step in steps), sum(step["tokens"] for step in steps)
    rows: list[tuple[object, ...]] = [(f"rows of data.{name}", f"{count:,}") for name, count in known.items()]
    rows += [(f"not trained: {code}", f"{count:,}") for code, count in codes.most_common()]
    rows += [
        (
            "packs trained",
            f"{packs:,}, {tokens / max(1, packs * recipe.data.max_length):.1%} full",
        ),
        ("tokens", f"{tokens:,}, of them {sum(step['trained_tokens'] for step in steps):,} trained"),
    ]
    examples = [
        (row["code"], row["row"], row["message"])
        for code in codes
        for row in [r for r in refused if r["code"] == code][:_EXAMPLES]
    ]
    shown = f"<h2>Rows that were not trained, for example</h2>{html.table(examples)}" if examples else ""
    return html.table(rows) + shown


def _generations(folder: Path) -> str:
    """What the model answered to each held-out question before training and after evaluations, beside the row's answer."""
    answers = list(lines(folder / "generations.jsonl"))
    shown = []
    for row in dict.fromkeys(line["row"] for line in answers):
        own = [line for line in answers if line["row"] == row]
        told = [(_when(line), line["answer"] + ("" if line["stopped"] else " ... (no stop token)")) for line in own]
        drawn = told if len(told) <= _ANSWERS else [told[0], *told[1 - _ANSWERS :]]
        shown.append(html.hidden(f"prompt of {row}", own[0]["prompt"]))
        shown.append(html.table([*drawn, ("in the row", own[0]["reference"])]))
    return f"<h2>Answers to held-out questions</h2>{''.join(shown)}" if shown else ""


def _when(line: dict[str, Any]) -> str:
    return f"after step {line['step']:,}" if line["step"] else "before training"


def _template(contract: Contract) -> str:
    masks = contract.masks
    rows: list[tuple[object, ...]] = [
        ("stop tokens", ", ".join(contract.stop_tokens)),
        ("variables", json.dumps(contract.kwargs, ensure_ascii=False)),
        ("day shown", contract.date or "none"),
        ("behaviour", f"sha256 {contract.behaviour_sha256}, {len(contract.probes)} probes"),
        ("source", f"sha256 {contract.source_sha256}"),
        ("tokenizer", f"sha256 {contract.tokenizer_sha256}"),
        ("first rows", ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in masks.items() if name != "refused")),
        ("libraries", ", ".join(f"{name} {number}" for name, number in contract.versions.items())),
    ]
    return html.table(rows) + html.hidden("chat_template.jinja", contract.template)


def _again(folder: Path, recipe: Recipe, date: str | None) -> str:
    """The command that trains the same once more, on the day that the template showed, and the recipe that it reads."""
    remote = "://" in recipe.run_place()
    path = "recipe.yaml" if remote else str(folder / "recipe.yaml")
    day = [f"template.date={date}"] if date is not None else []
    command = shlex.join(["burnish", "train", path, f"name={recipe.name[:_LONGEST]}-again", *day])
    where = "<p>With the recipe below in recipe.yaml:</p>" if remote else ""
    return f"{where}<pre>{escape(command)}</pre>" + html.hidden("recipe.yaml", (folder / "recipe.yaml").read_text())
