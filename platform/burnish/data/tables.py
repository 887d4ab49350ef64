"""Rows of Parquet and Arrow files and of Hugging Face data sets, which are read in ranges of rows, never whole."""

import bisect
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from burnish.data import files
from burnish.data.slices import Part, Slice
from burnish.errors import DataError, one_line
from burnish.interrupts import uninterrupted

DATASET = "dataset:"
"""Begins the path of a data set; behind it stand its folder or Hub id, subset, split and revision as JSON."""


def is_table(path: str) -> bool:
    """Whether a path is read here, and not line by line."""
    return path.startswith(DATASET) or files.kind_of(path) in ("parquet", "arrow")


def scan(path: str, slice_rows: int) -> list[Part]:
    """The slices of a table, each of `slice_rows` rows but the last; raises what the file system and the formats raise."""
    if path.startswith(DATASET):
        return _scan_dataset(path, slice_rows)
    digest = hashlib.sha256()
    with files.open_random(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if files.kind_of(path) == "parquet":
        with files.open_random(path) as file:
            rows = int(pq.ParquetFile(file).metadata.num_rows)
    else:
        rows = sum(batch.num_rows for batch in _arrow_batches(path))
    whole = digest.hexdigest()
    return [(first, *_ranged(whole, first, min(slice_rows, rows - first))) for first in range(0, rows, slice_rows)]


def read(part: Slice) -> Iterator[tuple[int, Any]]:
    """The rows of a slice of a table with their positions in it; raises DataError where it has fewer rows by now."""
    if part.path.startswith(DATASET):
        return _read_dataset(part)
    return _read_parquet(part) if files.kind_of(part.path) == "parquet" else _cut(_arrow_batches(part.path), 0, part)


def stamp(path: str) -> str:
    """The size of a file and the sha256 of its end, where it says what lies where; empty for what a digest guards."""
    if path.startswith(DATASET) or not is_table(path):
        return ""
    with files.open_random(path) as file:
        size = int(file.size())
        file.seek(max(0, size - (1 << 16)))
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"


def _ranged(whole: str, first: int, num_rows: int) -> tuple[int, int, str]:
    return num_rows, -1, hashlib.sha256(f"{whole} {first} {num_rows}".encode()).hexdigest()


def _read_parquet(part: Slice) -> Iterator[tuple[int, Any]]:
    with files.open_random(part.path) as opened:
        file = pq.ParquetFile(opened)
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        group = bisect.bisect_right(ends.tolist(), part.first_row)
        at = int(ends[group - 1]) if group else 0
        groups = list(range(group, file.num_row_groups))
        yield from _cut(file.iter_batches(max(64, part.num_rows), groups), at, part)


def _arrow_batches(path: str) -> Iterator[Any]:
    """The record batches of an Arrow file or stream."""
    with files.open_random(path) as file:
        if file.read(6) == b"ARROW1":
            file.seek(0)
            opened = pa.ipc.open_file(file)
            for number in range(opened.num_record_batches):
                yield opened.get_batch(number)
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _cut(batches: Iterator[Any], at: int, part: Slice) -> Iterator[tuple[int, Any]]:
    """The rows of a slice out of record batches of which the first starts at row `at` of the file."""
    stop = part.first_row + part.num_rows
    for batch in batches:
        inside = batch.slice(max(0, part.first_row - at), max(0, stop - max(at, part.first_row)))
        for row, item in enumerate(inside.to_pylist(), max(at, part.first_row)):
            yield row, _without_nulls(item)
        at += batch.num_rows
        if at >= stop:
            return
    raise DataError(f"{part.name}: ends before row {stop - 1}, which was there when the run looked at it first")


@lru_cache(maxsize=8)
def _dataset(path: str) -> Any:
    """A data set of the Hub, or of a folder that the datasets library wrote or can read; raises DataError."""
    with uninterrupted():  # a data task may be cancelled here
        import datasets

    folder, subset, split, revision = json.loads(path.removeprefix(DATASET))
    datasets.disable_progress_bars()
    try:
        if (Path(folder) / "state.json").exists() or (Path(folder) / "dataset_dict.json").exists():
            _check_inside(Path(folder))
            found = datasets.load_from_disk(folder)
            found = found[split] if split is not None and isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(folder, subset, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # the library and its loaders raise of every kind
        raise DataError(f"{folder}: no data set could be loaded: {one_line(error)}") from None
    if not isinstance(found, datasets.Dataset):
        raise DataError(
            f"{folder}: holds the splits {', '.join(map(str, found))}; name one, for example split: {next(iter(found))}"
        )
    return found.with_format("arrow")


def _check_inside(folder: Path) -> None:
    """Raises DataError where a saved data set names a split or a file that lies outside of its folder."""
    listed = folder / "dataset_dict.json"
    for split in json.loads(listed.read_text())["splits"] if listed.exists() else [""]:
        state = json.loads((folder / split / "state.json").read_text())
        for place in (folder / split, *(folder / split / entry["filename"] for entry in state["_data_files"])):
            if not place.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{folder}: names {place}, which lies outside of it; save the data set again with its files")


def _scan_dataset(path: str, slice_rows: int) -> list[Part]:
    found = _dataset(path)
    starts = range(0, len(found), slice_rows)
    return [
        (first, min(slice_rows, len(found) - first), -1, _table_digest(found[first : first + slice_rows]))
        for first in starts
    ]


def _table_digest(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _read_dataset(part: Slice) -> Iterator[tuple[int, Any]]:
    table = _dataset(part.path)[part.first_row : part.first_row + part.num_rows]
    if _table_digest(table) != part.digest:
        raise DataError(f"{part.name}: is not what it was when the run looked at it first; name a revision")
    for row, item in enumerate(table.to_pylist(), part.first_row):
        yield row, _without_nulls(item)


def _without_nulls(value: Any) -> Any:
    """A value without the None-valued keys with which Arrow fills every struct up to its schema."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
