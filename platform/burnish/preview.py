"""What is trained and what is not, row by row, before a GPU is paid for."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from burnish.config import Recipe
from burnish.data import sources
from burnish.data.conversation import Refused
from burnish.data.packing import Sample
from burnish.data.pipeline import render_row
from burnish.data.template import Template
from burnish.data.tokenizer import load_template
from burnish.train.model import check_model


@dataclass(frozen=True)
class PreviewRow:
    """One source row: its samples, or why it is refused."""

    row: str
    refused: Refused | None
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `burnish preview --json` prints for a row."""
        samples = [
            {"turns": list(sample.turns), "input_ids": sample.input_ids.tolist(), "labels": sample.labels().tolist()}
            for sample in self.samples
        ]
        return {"row": self.row, "refused": self.refused.to_json() if self.refused else None, "samples": samples}


def rows(recipe: Recipe, limit: int | None = None, template: Template | None = None) -> Iterator[PreviewRow]:
    """The first `limit` rows of the training files in file order, each once, rendered as training will render them."""
    if template is None:
        check_model(recipe)
        template = load_template(recipe)
    index = sources.index(
        [source.model_copy(update={"weight": 1.0}) for source in recipe.data.train], recipe.data.window_rows
    )
    source_rows = ((part.row_name(at), row) for part in index.slices for at, row in sources.read(part))
    for name, row in islice(source_rows, limit):
        try:
            yield PreviewRow(name, None, tuple(render_row(row, template, recipe)))
        except Refused as refusal:
            yield PreviewRow(name, refusal, ())


def show(recipe: Recipe, limit: int) -> None:
    """Prints rows for people: trained tokens in green, the rest dim, refusals in red, and a summary."""
    console = Console(file=sys.stdout, highlight=False)
    check_model(recipe)
    template = load_template(recipe)
    codes: Counter[str] = Counter()
    tokens = trained = 0
    for row in rows(recipe, limit, template):
        console.rule(Text(row.row), align="left")
        if row.refused:
            codes[row.refused.code] += 1
            turn = "" if row.refused.turn is None else f" (turn {row.refused.turn})"
            console.print(Text(f"refused: {row.refused.code}{turn}: {row.refused.message}", style="red"), soft_wrap=True)
        for sample in row.samples:
            tokens, trained = tokens + len(sample), trained + int(sample.trained.sum())
            console.print(_coloured(sample, template, console.is_terminal), soft_wrap=True)
    share = f"{trained / tokens:.0%}" if tokens else "none"
    refused = ", ".join(f"{code} {count}" for code, count in codes.items()) or "none"
    console.rule()
    console.print(f"{tokens} tokens, {share} trained (green, or between {{+ and +}}); refused: {refused}", markup=False)


def _coloured(sample: Sample, template: Template, colour: bool) -> Text:
    """The text of a sample, runs of trained tokens green and marked where there is no colour."""
    text = Text()
    start = 0
    for end in range(1, len(sample) + 1):
        if end == len(sample) or sample.trained[end] != sample.trained[start]:
            part = template.decode(sample.input_ids[start:end])
            if sample.trained[start]:
                text.append(part if colour else "{+" + part + "+}", style="bold green")
            else:
                text.append(part, style="dim")
            start = end
    return text
