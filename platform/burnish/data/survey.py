"""Reads a whole data set before it is trained, on the cluster, to find the rows that are not worth their cost."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from burnish.config import Recipe
from burnish.data import pipeline, quality, sources
from burnish.data.quality import Finding, Marks
from burnish.data.rendered import Cache
from burnish.data.slices import Index, Slice

_SCHEMA = pa.schema(
    [
        ("digest", pa.binary()),
        ("minhash", pa.list_(pa.uint32())),
        ("shared", pa.string()),
        ("tokens", pa.int64()),
        ("trained", pa.int64()),
    ]
)
"""One row a source row; a null digest is a row that is no conversation, no tokens one that was refused."""


@dataclass(frozen=True)
class Survey:
    """The rows of an index, each once, and what is wrong with them.

    `places` are (slice, row in it) of each row in source order, `findings` name rows by their position there; `tokens` and
    `trained` (int64 [rows]) are 0 where a row gives no sample or where tokens were not asked for.
    """

    index: Index
    places: list[tuple[Slice, int]]
    findings: list[Finding]
    tokens: NDArray[np.int64]
    trained: NDArray[np.int64]

    def name(self, finding: Finding) -> str:
        """The row that a finding is about, as messages name it."""
        part, row = self.places[finding.position]
        return part.row_name(part.first_row + row)

    def kept(self) -> Index:
        """The index without the rows that the recipe leaves out."""
        dropped: dict[tuple[str, int], list[tuple[int, str, str]]] = {}
        for finding in self.findings:
            if finding.dropped:
                part, row = self.places[finding.position]
                dropped.setdefault((part.path, part.first_row), []).append((row, finding.code, finding.message))
        return _without(self.index, dropped)


def drop(
    recipe: Recipe,
    index: Index,
    evaluation: Index | None,
    cache: Cache | None,
    labels: dict[str, str] | None,
) -> Index:
    """The index without the rows that data.filters leave out for what they say. Reads all rows, unless the cache knows.

    `evaluation` are the files of data.filters.decontaminate; tasks run on nodes with `labels`. Raises DataError where a file
    cannot be read.
    """
    filters = recipe.data.filters
    if not (filters.exact_duplicates or filters.near_duplicates or filters.decontaminate):
        return index
    # What is dropped is kept by path, and its reasons name files.
    places = [[part.path, part.first_row] for part in index.slices]
    held_out = evaluation.digest if evaluation else ""
    about = [filters.model_dump(mode="json"), index.digest, held_out, places, version("datasketch")]
    name = f"filters {hashlib.sha256(json.dumps(about).encode()).hexdigest()}"
    known = cache.load(name) if cache else None
    if known is not None:
        return _without(index, {(path, row): rows for path, row, rows in json.loads(known)})
    found = survey(recipe, index, evaluation, None, labels).kept()
    if cache:
        entries = [[part.path, part.first_row, part.dropped] for part in found.slices if part.dropped]
        cache.store(name, json.dumps(entries).encode())
    return found


def survey(
    recipe: Recipe,
    index: Index,
    evaluation: Index | None,
    rendering: pipeline.Rendering | None,
    labels: dict[str, str] | None,
) -> Survey:
    """Reads and compares all rows of an index in source order; with `rendering`, also counts their tokens.

    Near copies are sought where the recipe names them, or with `rendering`. Raises DataError where a file cannot be read.
    """
    filters = recipe.data.filters
    rows = (row for part in evaluation.slices for _, row in sources.read(part)) if evaluation else iter(())
    grams = quality.evaluation_grams(rows, filters.decontaminate_words)
    parts = list({(part.path, part.first_row): part for part in reversed(index.slices)}.values())[::-1]
    near = rendering is not None or filters.near_duplicates is not None
    shared = ray.put(pickle.dumps((rendering, grams, near)))
    items = [{"slice": json.dumps(part.to_json())} for part in parts]
    stream = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _marks_task, batch_size=None, batch_format="pyarrow", fn_kwargs={"shared": [shared]}
    )
    stream.context.execution_options.preserve_order = True
    stream.context.execution_options.label_selector = labels
    places: list[tuple[Slice, int]] = []
    counts: list[NDArray[np.int64]] = []

    def marked() -> Iterator[tuple[str, Marks | None]]:
        for part, table in zip(parts, stream.iter_batches(batch_size=None, batch_format="pyarrow"), strict=True):
            counts.append(np.stack([table.column(name).to_numpy() for name in ("tokens", "trained")]))
            for row, found in enumerate(_read_marks(table)):
                places.append((part, row))
                yield part.row_name(part.first_row + row), found

    findings = list(quality.judge(marked(), filters))
    tokens, trained = np.concatenate([np.empty((2, 0), np.int64), *counts], axis=1)
    return Survey(index, places, findings, tokens, trained)


def _marks_task(table: pa.Table, shared: list[Any]) -> Iterator[pa.Table]:
    """Descriptions of slices to the marks of their rows, a block each."""
    rendering, grams, near = pipeline.unpickled(shared[0])
    for item in table.to_pylist():
        part = Slice(**json.loads(item["slice"]))
        yield _table([quality.marks(row, grams, near) for _, row in sources.read(part)], rendering, part)


def _table(found: list[Marks | None], rendering: pipeline.Rendering | None, part: Slice) -> pa.Table:
    tokens = trained = np.zeros(len(found), np.int64)
    if rendering is not None:
        tokens, trained = quality.tokens_of_rows(pipeline.rendered_slice(part, rendering))
    columns = [
        pa.array([None if each is None else each.digest for each in found], pa.binary()),
        pa.array([None if each is None else each.minhash for each in found], pa.list_(pa.uint32())),
        pa.array(["" if each is None else each.shared for each in found], pa.string()),
        pa.array(tokens),
        pa.array(trained),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _read_marks(table: pa.Table) -> Iterator[Marks | None]:
    digests, minhashes, shared = (table.column(name) for name in ("digest", "minhash", "shared"))
    for row in range(table.num_rows):
        digest = digests[row].as_py()
        yield None if digest is None else Marks(digest, minhashes[row].values.to_numpy(), shared[row].as_py())


def _without(index: Index, dropped: dict[tuple[str, int], Any]) -> Index:
    found = {place: tuple((row, code, why) for row, code, why in rows) for place, rows in dropped.items()}
    parts = (replace(part, dropped=found.get((part.path, part.first_row), ())) for part in index.slices)
    return replace(index, slices=tuple(parts))
