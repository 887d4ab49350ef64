"""The sources of a recipe: their files found, counted and cut into slices, and the rows of a slice read."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from burnish.data import files, tables
from burnish.data.conversation import Refused
from burnish.data.slices import Index, Part, Slice
from burnish.errors import DataError, InfrastructureError, one_line
from burnish.sections import SourceSpec

MAX_ROW_BYTES = 32 << 20
"""A longer line is refused without being kept in memory: it is far beyond any context."""
_SLICES_IN_WINDOW = 16
"""Places of the files that a window is drawn from, where the files can be read from any place."""
_LEAST_ROWS = 8
"""Rows of a slice at least, since each costs a task."""


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
            stamp = tables.stamp(path)
            for keep in [1.0] * int(source.weight) + ([source.weight % 1] if source.weight % 1 else []):
                for first, num_rows, offset, part in parts:
                    slices.append(Slice(len(slices), name, path, first, num_rows, offset, keep, part, stamp))
    return Index(tuple(slices), rows, digest.hexdigest())


def read(part: Slice) -> Iterator[tuple[int, Any]]:
    """The rows of a slice with their positions in the file; a row that cannot be read comes as the Refused that says why.

    Raises DataError where the file is no longer there, or no longer what it was when the index was made, or damaged;
    InfrastructureError where its storage fails, which it may not do the next time.
    """
    try:
        if part.stamp != tables.stamp(part.path):
            raise DataError(
                f"{part.name}: is not what it was when the run looked at it first; put the old file back, or start a run of "
                "another name on the new one"
            )
        yield from tables.read(part) if tables.is_table(part.path) else _read_lines(part)
    except files.UNREADABLE as error:
        kind = InfrastructureError if _may_pass(error, part.path) else DataError
        raise kind(f"{part.name}: cannot be read: {one_line(error)}") from None


def _may_pass(error: BaseException, path: str) -> bool:
    """Whether a storage failed, and not the file. Libraries say without a number that a file of this machine is damaged."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError | gzip.BadGzipFile):
        return False
    return error.errno is not None or files.is_remote(path)


def _files(source: SourceSpec) -> list[tuple[str, str]]:
    """(name, path) of each file of a source, or of the one data set that it names."""
    place = Path(source.path).expanduser()
    saved = (place / "state.json").exists() or (place / "dataset_dict.json").exists()
    hub = not place.exists() and not files.is_remote(source.path) and source.path.count("/") == 1
    hub = hub and files.kind_of(source.path) is None and source.path[0] not in "./~*"
    if saved or source.split is not None:
        named = [str(place.absolute()) if place.exists() else source.path, source.subset, source.split, source.revision]
        about = "".join(f":{part}" for part in (source.subset, source.split) if part)
        return [(f"{source.path}{about}", tables.DATASET + json.dumps(named))]
    if hub:
        raise DataError(
            f"{source.path}: no such file; to read a data set of the Hub, name its split, for example split: train"
        )
    found = files.expand(source.path)
    if len(found) == 1 and place.is_file():
        return [(source.path, found[0])]
    return [(file.partition("?")[0] if files.is_remote(file) else file, file) for file in found]


def _scan(name: str, path: str, slice_rows: int, window_rows: int) -> list[Part]:
    """The slices of one file; those of a compressed one are as long as a window, since reading one reads all before it."""
    try:
        if tables.is_table(path):
            return tables.scan(path, slice_rows)
        return _scan_lines(name, path, slice_rows if files.kind_of(path) == "jsonl" else window_rows)
    except files.UNREADABLE as error:
        raise DataError(f"{name}: cannot be read as {files.kind_of(path)}: {one_line(error)}") from None


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


def _read_lines(part: Slice) -> Iterator[tuple[int, Any]]:
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
