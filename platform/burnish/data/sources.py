"""Files of conversations, cut into windows of rows that can be read apart."""

import bisect
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from burnish.config import SourceSpec
from burnish.errors import DataError

_UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Window:
    """`num_rows` rows of one file from `first_row` on, of which a seeded share `keep` belongs to an epoch.

    `offset` is the byte at which the window starts in an uncompressed JSONL file, else -1. `window` numbers the
    windows of a source list from 0; the same files give the same windows on every machine. `name` is the path as the
    recipe writes it, `path` the absolute one.
    """

    window: int
    name: str
    path: str
    first_row: int
    num_rows: int
    offset: int
    keep: float

    def row_name(self, row: int) -> str:
        """How messages and records name a row: ``path#index``."""
        return f"{self.name}#{row}"

    def to_json(self) -> dict[str, Any]:
        """Plain types for a Ray Data row."""
        return asdict(self)


@dataclass(frozen=True)
class Index:
    """All windows of a list of sources, the rows of an epoch, and the sha256 of what the files hold."""

    windows: tuple[Window, ...]
    num_rows: int
    digest: str


def index(sources: Sequence[SourceSpec], window_rows: int) -> Index:
    """The windows of these files; each file is read through once, to count rows and hash bytes.

    A weight of 2.5 gives two windows over all rows and a third over a seeded half. Raises DataError for a file that
    is missing, unreadable, of an unknown kind, or without a row.
    """
    windows: list[Window] = []
    digest = hashlib.sha256()
    rows = 0
    for source in sources:
        path = Path(source.path).expanduser().absolute()
        starts, num_rows, file_digest = _scan(path, window_rows)
        if num_rows == 0:
            raise DataError(f"{source.path}: holds no row; write one conversation a line, or take it out of the recipe")
        digest.update(f"{file_digest} {source.weight}\n".encode())
        rows += num_rows
        for keep in [1.0] * int(source.weight) + ([source.weight % 1] if source.weight % 1 else []):
            for first, offset in starts:
                size = min(window_rows, num_rows - first)
                windows.append(Window(len(windows), source.path, str(path), first, size, offset, keep))
    return Index(tuple(windows), rows, digest.hexdigest())


def epoch_order(windows: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes its windows: a permutation that is a pure function of (seed, epoch)."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(windows)]


def read(window: Window) -> Iterator[tuple[int, Any]]:
    """The rows of a window with their positions in the file; a broken JSON line comes as the text itself.

    Raises DataError where the file cannot be read.
    """
    try:
        if _kind(Path(window.path)) == "parquet":
            yield from _read_parquet(window)
        else:
            yield from _read_jsonl(window)
    except _UNREADABLE as error:
        raise DataError(f"{window.name}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _kind(path: Path) -> str:
    """How a file is read, from its name; raises DataError for a name that says nothing."""
    name = path.name.lower()
    for kind, endings in {
        "parquet": (".parquet", ".pq"),
        "gzip": (".jsonl.gz", ".json.gz"),
        "zstd": (".jsonl.zst", ".json.zst"),
        "jsonl": (".jsonl", ".json", ".ndjson"),
    }.items():
        if name.endswith(endings):
            return kind
    raise DataError(f"{path}: cannot tell what this is; name it .jsonl, .jsonl.gz, .jsonl.zst or .parquet")


def _open(path: Path) -> IO[bytes]:
    """The lines of a JSONL file, decompressed."""
    kind = _kind(path)
    if kind == "gzip":
        return gzip.open(path, "rb")  # type: ignore[return-value]  # GzipFile is a binary stream in all but its type
    if kind == "zstd":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return open(path, "rb")


def _scan(path: Path, window_rows: int) -> tuple[list[tuple[int, int]], int, str]:
    """(first row, byte offset) of each window, the number of rows, and the sha256 of the content."""
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}; data.train and data.eval name JSONL or Parquet files")
    kind = _kind(path)
    digest = hashlib.sha256()
    try:
        if kind == "parquet":
            num_rows = int(pq.ParquetFile(path).metadata.num_rows)
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            return [(first, -1) for first in range(0, num_rows, window_rows)], num_rows, digest.hexdigest()
        starts: list[tuple[int, int]] = []
        num_rows = offset = 0
        with _open(path) as file:
            for line in file:
                digest.update(line)
                if line.strip():
                    if num_rows % window_rows == 0:
                        starts.append((num_rows, offset if kind == "jsonl" else -1))
                    num_rows += 1
                offset += len(line)
        return starts, num_rows, digest.hexdigest()
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as {kind}: {' '.join(str(error).split())[:200]}") from None


def _read_jsonl(window: Window) -> Iterator[tuple[int, Any]]:
    with _open(Path(window.path)) as file:
        row = window.first_row if window.offset >= 0 else 0
        if window.offset >= 0:
            file.seek(window.offset)
        for line in file:
            if not line.strip():
                continue
            if row >= window.first_row + window.num_rows:
                return
            if row >= window.first_row:
                try:
                    yield row, json.loads(line)
                except (ValueError, RecursionError):
                    yield row, line.decode("utf-8", errors="replace")
            row += 1


def _read_parquet(window: Window) -> Iterator[tuple[int, Any]]:
    file = pq.ParquetFile(window.path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = [int(end) for end in np.cumsum(sizes)]
    row, stop = window.first_row, window.first_row + window.num_rows
    while row < stop:
        group = bisect.bisect_right(ends, row)
        start = ends[group] - sizes[group]
        rows = file.read_row_group(group).slice(row - start, stop - row)
        for item in rows.to_pylist():
            yield row, _without_nulls(item)
            row += 1


def _without_nulls(value: Any) -> Any:
    """A value without the None-valued keys with which Parquet fills every struct up to its schema."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
