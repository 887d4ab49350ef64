"""The rendered samples of a slice of rows, and a cache of them that any run may share."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from burnish.config import Recipe, below
from burnish.data import files
from burnish.data.contract import Contract
from burnish.data.packing import Sample

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.int32())),
        ("refused", pa.string()),
        ("num_rows", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Rendered:
    """The samples of a slice laid end to end, and its refusals; a pure function of its rows, the template and the recipe.

    Invariant: `input_ids` int32 [n] and `trained` bool [n]; `lengths` int32 [samples] sums to n; `rows` int32 [samples] and
    the `row` of each refusal count from the slice's first row; `num_rows` are its rows.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    rows: NDArray[np.int32]
    refused: tuple[dict[str, Any], ...]
    num_rows: int

    @classmethod
    def of(cls, samples: Sequence[tuple[int, Sample]], refused: Sequence[dict[str, Any]], num_rows: int) -> "Rendered":
        """The slice of these samples, each with its row."""
        return cls(
            np.concatenate([sample.input_ids for _, sample in samples] or [np.empty(0, np.int32)]),
            np.concatenate([sample.trained for _, sample in samples] or [np.empty(0, bool)]),
            np.array([len(sample) for _, sample in samples], np.int32),
            np.array([row for row, _ in samples], np.int32),
            tuple(refused),
            num_rows,
        )

    def to_table(self) -> pa.Table:
        """One Arrow row."""
        columns = [self.input_ids, self.trained, self.lengths, self.rows]
        lists = [pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), pa.array(column)) for column in columns]
        rest = [pa.array([json.dumps(self.refused)], pa.string()), pa.array([self.num_rows], pa.int64())]
        return pa.Table.from_arrays([*lists, *rest], schema=_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table, row: int = 0) -> "Rendered":
        """What `to_table` wrote, without a copy where Arrow allows."""
        ids, trained, lengths, rows = (
            table.column(name)[row].values.to_numpy(zero_copy_only=False)
            for name in ("input_ids", "trained", "lengths", "rows")
        )
        refused = json.loads(table.column("refused")[row].as_py())
        return cls(ids, trained.astype(bool), lengths, rows, tuple(refused), int(table.column("num_rows")[row].as_py()))


@dataclass(frozen=True)
class Cache:
    """Rendered slices by the sha256 of all that they depend on, in a folder of any file system.

    A file is the sha256 of what follows it, which for a slice is an Arrow stream. Writers put whole files in place, equal
    ones under the same name, so that any number of them may write at once; a file that its sha256 does not fit is no entry.
    """

    folder: str
    key: str

    @classmethod
    def of(cls, recipe: Recipe, contract: Contract) -> "Cache | None":
        """The cache of a recipe under a template; None where the recipe wants none."""
        folder = recipe.cache_folder()
        if folder is None:
            return None
        data = recipe.data
        parts = {
            "rendering": [data.max_length, data.train_on, data.history, data.on_overlong],
            "template": [contract.template, contract.kwargs, contract.date, contract.stop_ids, contract.behaviour_sha256],
            "tokenizer": contract.tokenizer_sha256,
            "code": [_code_sha256(), *(version(library) for library in ("transformers", "tokenizers", "jinja2"))],
        }
        return cls(folder, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())

    def get(self, digest: str) -> Rendered | None:
        """The slice whose rows have this digest; None where it is not there, torn, damaged or out of reach."""
        payload = self.load(digest)
        return None if payload is None else Rendered.from_table(pa.ipc.open_stream(payload).read_all())

    def put(self, digest: str, rendered: Rendered) -> None:
        """Keeps a slice."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(rendered.to_table())
        self.store(digest, sink.getvalue().to_pybytes())

    def load(self, name: str) -> bytes | None:
        """What was stored under a name; None where it is not there, torn, damaged or out of reach."""
        try:
            system, path = files.filesystem(self._path(name))
            with system.open_input_file(path) as file:
                data: bytes = file.read()
        except (*files.UNREADABLE, FileNotFoundError):
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            logger.warning("%s is damaged; it is made again", self._path(name))
            return None
        return data[32:]

    def store(self, name: str, payload: bytes) -> None:
        """Keeps bytes under a name; where the folder cannot be written the run goes on without, and says so."""
        try:
            self._write(self._path(name), hashlib.sha256(payload).digest() + payload)
        except files.UNREADABLE as error:
            logger.warning("data.cache: %s cannot be written (%s); these rows will be rendered again", self.folder, error)

    def _path(self, digest: str) -> str:
        name = hashlib.sha256(f"{self.key} {digest}".encode()).hexdigest()
        return below(self.folder, f"{name[:2]}/{name}.arrow")

    @staticmethod
    def _write(path: str, data: bytes) -> None:
        if files.is_remote(path):  # an object appears when it is whole
            system, inner = files.filesystem(path)
            with files.create(system, inner) as file:
                file.write(data)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with open(unfinished, "wb") as local:
                local.write(data)
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _code_sha256() -> str:
    """The sha256 of the code that renders: another version of it may render otherwise."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()
