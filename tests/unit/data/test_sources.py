"""Files cut into windows that can be read apart."""

import errno
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish.data import sources
from burnish.data.conversation import Refused
from burnish.data.slices import Slice, windows
from burnish.data.sources import index, read
from burnish.errors import DataError, InfrastructureError
from burnish.sections import SourceSpec
from tests.conftest import write_rows

ROWS = [{"n": i, "text": "é" * (i % 5)} for i in range(23)]


def write(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" + ("\n" if row["n"] % 4 == 0 else "") for row in ROWS)
    if kind == "jsonl":
        path.write_text(text)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "jsonl.zst":
        path.write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_slices_hold_every_row_once_and_can_be_read_in_any_order(tmp_path, kind):
    found = index([SourceSpec(path=str(write(tmp_path, kind)))], 5)
    assert [part.num_rows for part in found.slices] == [5, 5, 5, 5, 3]
    assert found.num_rows == 23
    rows = {position: row for part in reversed(found.slices) for position, row in read(part)}
    assert [rows[i] for i in range(23)] == ROWS


def test_a_weight_repeats_slices_and_keeps_a_share_of_the_last_pass(tmp_path):
    found = index([SourceSpec(path=str(write(tmp_path, "jsonl")), weight=2.5)], 1600)
    assert [part.keep for part in found.slices] == [1.0, 1.0, 0.5]
    assert [part.slice for part in found.slices] == [0, 1, 2]


def test_the_digest_follows_content_and_weight(tmp_path):
    path = write(tmp_path, "jsonl")
    one = index([SourceSpec(path=str(path))], 5).digest
    assert index([SourceSpec(path=str(path), weight=2)], 5).digest != one
    path.write_text(path.read_text().replace('"n": 3', '"n": 4'))
    assert index([SourceSpec(path=str(path))], 5).digest != one


def whole(path) -> Slice:
    """The one slice of a small file."""
    (part,) = index([SourceSpec(path=str(path))], 1600).slices
    return part


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{broken", "not a JSON object: Expecting property name .* found '{broken"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at position 7"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "has 2,010 bytes, more than 1,000"),
    ],
)
def test_a_line_that_cannot_be_read_comes_as_its_refusal_and_the_others_as_they_are(tmp_path, monkeypatch, line, words):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1000 if b"xx" in line else 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 2}')
    (zero, first), (one, refusal), (two, last) = read(whole(path))
    assert (zero, first, one, two, last) == (0, {"n": 1}, 1, 2, {"n": 2})
    assert isinstance(refusal, Refused)
    with pytest.raises(Refused, match=words):
        raise refusal


def test_parquet_structs_lose_the_nulls_that_fill_them_and_jsonl_keeps_its_own(tmp_path):
    rows = [{"a": {"x": 1}}, {"a": {"y": [{"z": None}]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read(whole(tmp_path / "a.parquet"))] == [{"a": {"x": 1}}, {"a": {"y": [{}]}}]
    assert [row for _, row in read(whole(write_rows(tmp_path / "a.jsonl", rows)))] == rows


def test_a_damaged_row_group(tmp_path):
    path = write(tmp_path, "parquet")
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        list(read(whole(path)))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), InfrastructureError),
        (FileNotFoundError(errno.ENOENT, "No such file"), DataError),
        (gzip.BadGzipFile("Not a gzipped file"), DataError),
        (EOFError("ended early"), DataError),
    ],
)
def test_a_storage_that_fails_is_no_fault_of_the_rows(tmp_path, monkeypatch, error, kind):
    (part, *_) = index([SourceSpec(path=str(write(tmp_path, "jsonl")))], 5).slices

    def fail(*_):
        raise error

    monkeypatch.setattr(sources, "_read_lines", fail)
    with pytest.raises(kind, match=r"rows.jsonl: cannot be read"):
        list(read(part))


def test_an_epoch_draws_its_windows_from_all_files_in_an_order_of_its_own(tmp_path):
    specs = [SourceSpec(path=str(write_rows(tmp_path / f"{name}.jsonl", [{"n": i} for i in range(160)]))) for name in "ab"]
    found = index(specs, 64)
    orders = [windows(found.slices, 64, 7, epoch) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(number for window in orders[2] for number in window) == list(range(40))
    assert windows(found.slices, 64, 8, 0) != orders[0]
    assert [len(window) for window in orders[0]] == [8] * 5
    assert all({found.slices[number].path[-7] for number in window} == {"a", "b"} for window in orders[0])
    assert windows(found.slices, 64, 7, None)[0] == list(range(8)), "held-out files are read in their order"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "holds no row"),
        ("blank.jsonl", b"\n\n", "holds no row"),
        ("a.csv", b"x", "cannot tell what this is"),
        ("array.json", b'[\n{"messages": []}]', r"one JSON array; write one object a line, for example with jq -c '\.\[\]'"),
        ("broken.parquet", b"PAR1 this is none", "cannot be read as parquet"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read as gzip"),
        ("broken.jsonl.zst", b"no zstd", "cannot be read as zstd"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        index([SourceSpec(path=str(tmp_path / name))], 5)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "change", [lambda rows: rows[::-1], lambda rows: [{**rows[0], "n": 7}, *rows[1:]], lambda rows: rows[:20]]
)
def test_a_table_that_changes_under_a_run_is_noticed(tmp_path, change):
    # Its rows would else be trained, and kept in the cache under the digest of the old ones.
    path = write(tmp_path, "parquet")
    found = index([SourceSpec(path=str(path))], 5)
    assert list(read(found.slices[0]))
    pq.write_table(pa.Table.from_pylist(change(ROWS)), path, row_group_size=7)
    for part in found.slices:
        with pytest.raises(DataError, match="is not what it was when the run looked at it first"):
            list(read(part))
