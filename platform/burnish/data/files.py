"""Where source files lie: on this machine, or on any file system that pyarrow or fsspec reaches."""

import glob
import io
import re
import zlib
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs

from burnish.errors import DataError, one_line

KINDS = {
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "gzip": (".jsonl.gz", ".json.gz", ".ndjson.gz"),
    "zstd": (".jsonl.zst", ".json.zst", ".ndjson.zst"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
}
"""How a file is read, by how its name ends."""
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)
"""What libraries raise for a file that is missing, damaged or not allowed."""
_OBJECT_STORES = ("s3", "gcs", "abfs")
_WILD = re.compile(r"[*?\[]")


def kind_of(path: str) -> str | None:
    """How a file is read, from its name; None for a name that says nothing."""
    name = path.partition("?")[0].lower() if is_remote(path) else path.lower()
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), None)


def is_remote(path: str) -> bool:
    """Whether a path names another file system, as s3://bucket/rows.jsonl does."""
    return "://" in path


def expand(path: str) -> list[str]:
    """The files that a path of a recipe means, sorted: a file, those that a glob matches, or all data files below a folder.

    Local paths come out absolute. Raises DataError where there is none, or where a file's name does not say what it is.
    """
    try:
        found = _expand_remote(path) if is_remote(path) else _expand_local(path)
    except UNREADABLE as error:
        advice = "; check the name and the credentials in every node's environment (as AWS_ACCESS_KEY_ID)"
        raise DataError(f"{path}: cannot be reached: {one_line(error)}{advice if is_remote(path) else ''}") from None
    strange = [file for file in found if kind_of(file) is None]
    if strange:
        endings = ", ".join(ending for endings in KINDS.values() for ending in endings[:1])
        raise DataError(f"{strange[0]}: cannot tell what this is; its name must end like {endings}")
    return found


def _expand_local(path: str) -> list[str]:
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        return _data_files(path, [str(file) for file in place.rglob("*") if file.is_file()])
    if not place.exists() and _WILD.search(path):
        found = [file for file in glob.glob(str(place), recursive=True) if Path(file).is_file()]
        return _data_files(path, found)
    if not place.exists():
        raise DataError(f"{place}: no such file; data.train and data.eval name files, folders, globs or Hub data sets")
    return [str(place)]


def _expand_remote(path: str) -> list[str]:
    scheme, _, rest = path.partition("://")
    rest, mark, query = rest.partition("?") if scheme in ("s3", "gs", "gcs") and "=" in path else (rest, "", "")
    wild = _WILD.search(rest)
    base = rest[: rest.rfind("/", 0, wild.start()) + 1].rstrip("/") if wild else rest.rstrip("/")
    system, inner = filesystem(f"{scheme}://{base}{mark}{query}")
    info = system.get_file_info(inner)
    if info.type == fs.FileType.File:
        return [path]
    if info.type == fs.FileType.NotFound:
        raise DataError(f"{path}: no such file or folder")
    below = [item.path for item in system.get_file_info(fs.FileSelector(inner, recursive=True)) if item.is_file]
    if wild:
        below = [file for file in below if fnmatchcase(file[len(inner) :], rest[len(base) :])]
    return _data_files(path, [f"{scheme}://{base}{file[len(inner) :]}{mark}{query}" for file in below])


def _data_files(path: str, found: list[str]) -> list[str]:
    """Those of the files that rows can be read from, sorted; hidden ones are left out, as are cards and licences."""
    data = sorted(file for file in found if kind_of(file) and not re.search(r"/[._][^/]*$", file.partition("?")[0]))
    if not data:
        endings = ", ".join(ending for endings in KINDS.values() for ending in endings[:1])
        raise DataError(f"{path}: no file there has rows; their names end like {endings}")
    return data


@lru_cache(maxsize=64)
def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path and the path inside it; raises DataError for a scheme that nobody here knows."""
    if not is_remote(path):
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        system, inner = fs.FileSystem.from_uri(path)
        return system, inner
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    from fsspec.core import url_to_fs

    try:
        system, inner = url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(f"{path}: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), inner


def create(system: fs.FileSystem, path: str) -> Any:
    """A new file, open for writing; folders on the way are made where the file system has any."""
    if system.type_name not in _OBJECT_STORES:
        system.create_dir(path.rpartition("/")[0], recursive=True)
    return system.open_output_stream(path, compression=None)


def open_random(path: str) -> Any:
    """A file as pyarrow reads it, from any place in it; local ones are mapped into memory."""
    if not is_remote(path):
        return pa.memory_map(path) if Path(path).stat().st_size else pa.OSFile(path)
    system, inner = filesystem(path)
    return system.open_input_file(inner)


def open_lines(path: str) -> IO[bytes]:
    """The lines of a JSONL file, decompressed; only an uncompressed one can be read from any place in it."""
    import gzip

    raw = io.BufferedReader(open_random(path) if is_remote(path) else io.FileIO(path), 1 << 20)
    kind = kind_of(path)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # a binary stream in all but its type
    if kind == "zstd":
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw
