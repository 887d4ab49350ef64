"""Rows of conversations, cut into slices that can be read apart, and the windows in which an epoch draws them."""

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from burnish.data import files
from burnish.data.conversation import Refused
from burnish.errors import DataError
from burnish.sections import SourceSpec

MAX_ROW_BYTES = 32 << 20
"""A longer line is refused without being kept in memory: it is far beyond any context."""
_SLICES_IN_WINDOW = 16
"""Places of the files that a window is drawn from, where the files can be read from any place."""
_LEAST_ROWS = 8
"""Rows of a slice at least, since each costs a task."""
_DATASET = "dataset:"


@dataclass(frozen=True)
class Slice:
    """`num_rows` rows of one file from `first_row` on, of which a seeded share `keep` belongs to an epoch.

    `slice` numbers the slices of a source list from 0; the same files give the same slices on every machine. `name` is the
    file for people, `path` for reading. `offset` is the byte at which the slice starts in an uncompressed JSONL file, else
    -1. `digest` is the sha256 of what it holds, with which a file that changes under a run is noticed; of a Parquet or Arrow
    file, whose slices have no bytes of their own, `stamp` notices it. `dropped` are the rows, from 0 on, that data.filters
    leave out, each with a code and a reason.
    """

    slice: int
    name: str
    path: str
    first_row: int
    num_rows: int
    offset: int
    keep: float
    digest: str
    stamp: str = ""
    dropped: Sequence[tuple[int, str, str]] = ()

    def row_name(self, row: int) -> str:
        """How messages and records name a row of the file: ``path#index``."""
        return f"{self.name}#{row}"

    def to_json(self) -> dict[str, Any]:
        """Plain types for a Ray Data row."""
        return asdict(self)


@dataclass(frozen=True)
class Index:
    """All slices of a list of sources, the number of source rows, and the sha256 of what they hold."""

    slices: tuple[Slice, ...]
    num_rows: int
    digest: str


def index(sources: Sequence[SourceSpec], window_rows: int) -> Index:
    """The slices of these sources; each file is read through once, to count rows and hash bytes.

    A weight of 2.5 gives two passes over all rows and a third over a seeded half. Raises DataError for a file that is
    missing, unreadable, of an unknown kind, or without a row.
    """
    slices: list[Slice] = []
    slice_rows = min(window_rows, max(_LEAST_ROWS, window_rows // _SLICES_IN_WINDOW))
    digest = hashlib.sha256()
    rows = 0
    for source in sources:
        for name, path in _files(source):
            parts = _scan(name, path, slice_rows, window_rows)
            if not parts:
                raise DataError(f"{name}: holds no row; write one conversation a line, or take it out of the recipe")
            for _, _, _, part in parts:
                digest.update(f"{part} {source.weight}\n".encode())
            rows += sum(num_rows for _, num_rows, _, _ in parts)
            stamp = _stamp(path)
            for keep in [1.0] * int(source.weight) + ([source.weight % 1] if source.weight % 1 else []):
                for first, num_rows, offset, part in parts:
                    slices.append(Slice(len(slices), name, path, first, num_rows, offset, keep, part, stamp))
    return Index(tuple(slices), rows, digest.hexdigest())


def windows(slices: Sequence[Slice], window_rows: int, seed: int, epoch: int | None) -> list[list[int]]:
    """The slices of each window of an epoch: all of them in an order that is a pure function of (seed, epoch).

    A window takes slices until it has `window_rows` rows. Without an epoch, the order is that of the files.
    """
    order = range(len(slices)) if epoch is None else np.random.default_rng([seed, epoch]).permutation(len(slices))
    found: list[list[int]] = []
    rows = float(window_rows)
    for number in order:
        if rows >= window_rows:
            found.append([])
            rows = 0.0
        found[-1].append(int(number))
        rows += slices[number].num_rows * slices[number].keep
    return found


def read(part: Slice) -> Iterator[tuple[int, Any]]:
    """The rows of a slice with their positions in the file; a row that cannot be read comes as the Refused that says why.

    Raises DataError where the file cannot be read, or where it is no longer what it was when the index was made.
    """
    kind = _DATASET if part.path.startswith(_DATASET) else files.kind_of(part.path)
    try:
        if part.stamp != _stamp(part.path):
            raise DataError(
                f"{part.name}: is not what it was when the run looked at it first; put the old file back, or start a run of "
                "another name on the new one"
            )
        if kind == _DATASET:
            rows = _read_dataset(part)
        elif kind == "parquet":
            rows = _read_parquet(part)
        else:
            rows = _read_arrow(part) if kind == "arrow" else _read_jsonl(part)
        yield from rows
    except files.UNREADABLE as error:
        raise DataError(f"{part.name}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _files(source: SourceSpec) -> list[tuple[str, str]]:
    """(name, path) of each file of a source, or of the one data set that it names."""
    place = Path(source.path).expanduser()
    saved = (place / "state.json").exists() or (place / "dataset_dict.json").exists()
    hub = not place.exists() and not files.is_remote(source.path) and source.path.count("/") == 1
    hub = hub and files.kind_of(source.path) is None and source.path[0] not in "./~*"
    if saved or source.split is not None:
        named = [str(place.absolute()) if place.exists() else source.path, source.subset, source.split, source.revision]
        about = "".join(f":{part}" for part in (source.subset, source.split) if part)
        return [(f"{source.path}{about}", _DATASET + json.dumps(named))]
    if hub:
        raise DataError(
            f"{source.path}: no such file; to read a data set of the Hub, name its split, for example split: train"
        )
    found = files.expand(source.path)
    if len(found) == 1 and place.is_file():
        return [(source.path, found[0])]
    return [(file.partition("?")[0] if files.is_remote(file) else file, file) for file in found]


Part = tuple[int, int, int, str]
"""First row, number of rows, byte offset or -1, and sha256 of a slice."""


def _scan(name: str, path: str, slice_rows: int, window_rows: int) -> list[Part]:
    """The slices of one file; those of a compressed one are as long as a window, since reading one reads all before it."""
    try:
        if path.startswith(_DATASET):
            return _scan_dataset(path, slice_rows)
        kind = files.kind_of(path)
        if kind in ("parquet", "arrow"):
            return _scan_table(path, kind, slice_rows)
        return _scan_lines(name, path, slice_rows if kind == "jsonl" else window_rows)
    except files.UNREADABLE as error:
        raise DataError(f"{name}: cannot be read as {files.kind_of(path)}: {' '.join(str(error).split())[:200]}") from None


def _scan_lines(name: str, path: str, slice_rows: int) -> list[Part]:
    parts: list[Part] = []
    digest = hashlib.sha256()
    offset = start = rows = 0
    seekable = files.kind_of(path) == "jsonl"
    with files.open_lines(path) as file:
        for line, size in _lines(file):
            if line.strip():
                if rows == 0 and line.lstrip().startswith(b"["):
                    raise DataError(f"{name}: is one JSON array; write one object a line, for example with jq -c '.[]'")
                if rows % slice_rows == 0:
                    digest, start = hashlib.sha256(), offset
                    parts.append((rows, 0, start if seekable else -1, ""))
                digest.update(line)
                rows += 1
                first = parts[-1][0]
                if rows - first == slice_rows:
                    parts[-1] = (first, slice_rows, parts[-1][2], digest.hexdigest())
            offset += size
    if parts and not parts[-1][3]:
        first, _, begin, _ = parts[-1]
        parts[-1] = (first, rows - first, begin, digest.hexdigest())
    return parts


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each line of a file, no more of it than `MAX_ROW_BYTES` + 1, and its size."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        size, ended = len(line), line.endswith(b"\n")
        while not ended and size > MAX_ROW_BYTES and (rest := file.readline(1 << 20)):
            size, ended = size + len(rest), rest.endswith(b"\n")
        yield line, size


def _read_jsonl(part: Slice) -> Iterator[tuple[int, Any]]:
    digest = hashlib.sha256()
    with files.open_lines(part.path) as file:
        row = part.first_row if part.offset >= 0 else 0
        if part.offset >= 0:
            file.seek(part.offset)
        for line, size in _lines(file):
            if not line.strip():
                continue
            if row >= part.first_row + part.num_rows:
                break
            if row >= part.first_row:
                digest.update(line)
                yield row, _row(line, size)
            row += 1
    if digest.hexdigest() != part.digest:
        raise DataError(
            f"{part.name}: rows {part.first_row} to {part.first_row + part.num_rows - 1} are not what they were when the "
            "run looked at the file first; put the old file back, or start a run of another name on the new one"
        )


def _row(line: bytes, size: int) -> Any:
    """The JSON of a line, or the Refused that says why there is none."""
    if size > MAX_ROW_BYTES:
        return Refused("bad-row", f"the line has {size:,} bytes, more than {MAX_ROW_BYTES:,}; cut it into conversations")
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Refused("bad-row", f"the line is not UTF-8: byte {line[error.start]:#04x} at position {error.start}")
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode("utf-8", errors="replace")
        return Refused("bad-row", f"the line is not a JSON object: {error}; found {shown!r}")


def _scan_table(path: str, kind: str, slice_rows: int) -> list[Part]:
    digest = hashlib.sha256()
    with files.open_random(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if kind == "parquet":
        with files.open_random(path) as file:
            rows = int(pq.ParquetFile(file).metadata.num_rows)
    else:
        rows = sum(batch.num_rows for batch in _arrow_batches(path))
    whole = digest.hexdigest()
    return [(first, *_ranged(whole, first, min(slice_rows, rows - first))) for first in range(0, rows, slice_rows)]


def _stamp(path: str) -> str:
    """The size of a table's file and the sha256 of its end, where it says what lies where; empty for other files."""
    if path.startswith(_DATASET) or files.kind_of(path) not in ("parquet", "arrow"):
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


def _read_arrow(part: Slice) -> Iterator[tuple[int, Any]]:
    return _cut(_arrow_batches(part.path), 0, part)


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
    import datasets

    folder, subset, split, revision = json.loads(path.removeprefix(_DATASET))
    datasets.disable_progress_bars()
    try:
        if (Path(folder) / "state.json").exists() or (Path(folder) / "dataset_dict.json").exists():
            found = datasets.load_from_disk(folder)
            found = found[split] if split is not None and isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(folder, subset, split=split, revision=revision)
    except Exception as error:  # the library and its loaders raise of every kind
        raise DataError(f"{folder}: no data set could be loaded: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(found, datasets.Dataset):
        raise DataError(
            f"{folder}: holds the splits {', '.join(map(str, found))}; name one, for example split: {next(iter(found))}"
        )
    return found.with_format("arrow")


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
