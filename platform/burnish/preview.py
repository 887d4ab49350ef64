"""What is trained and what is not, row by row, before a GPU is paid for."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
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
from burnish.sections import FiltersSpec, SourceSpec
from burnish.train.model import check_model

FILTERED = "data.filters may leave out some of these rows; `burnish plan` counts them"


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
    """The first `limit` rows, one of each source in turn, rendered as training will render them.

    Each stands once, whatever its weight, and those too that data.filters leave out.
    """
    if template is None:
        check_model(recipe)
        template = load_template(recipe)
    turns = zip_longest(*(_read(source, recipe.data.window_rows) for source in recipe.data.train))
    for name, row in islice((each for turn in turns for each in turn if each is not None), limit):
        try:
            yield PreviewRow(name, None, tuple(render_row(row, template, recipe)))
        except Refused as refusal:
            yield PreviewRow(name, refusal, ())


def _read(source: SourceSpec, window_rows: int) -> Iterator[tuple[str, Any]]:
    """The rows of a source by name, in the order of its files."""
    index = sources.index([source.model_copy(update={"weight": 1.0})], window_rows)
    return ((part.row_name(at), row) for part in index.slices for at, row in sources.read(part))


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
    if recipe.data.filters != FiltersSpec():
        console.print(FILTERED)


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
