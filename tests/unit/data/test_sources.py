"""Files cut into windows that can be read apart."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish.config import SourceSpec
from burnish.data.sources import epoch_order, index, read
from burnish.errors import DataError
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
def test_windows_hold_every_row_once_and_can_be_read_in_any_order(tmp_path, kind):
    found = index([SourceSpec(path=str(write(tmp_path, kind)))], 5)
    assert [window.num_rows for window in found.windows] == [5, 5, 5, 5, 3]
    assert found.num_rows == 23
    rows = {position: row for window in reversed(found.windows) for position, row in read(window)}
    assert [rows[i] for i in range(23)] == ROWS


def test_a_weight_repeats_windows_and_keeps_a_share_of_the_last_pass(tmp_path):
    found = index([SourceSpec(path=str(write(tmp_path, "jsonl")), weight=2.5)], 100)
    assert [window.keep for window in found.windows] == [1.0, 1.0, 0.5]
    assert [window.window for window in found.windows] == [0, 1, 2]


def test_the_digest_follows_content_and_weight(tmp_path):
    path = write(tmp_path, "jsonl")
    one = index([SourceSpec(path=str(path))], 5).digest
    assert index([SourceSpec(path=str(path))], 7).digest == one
    assert index([SourceSpec(path=str(path), weight=2)], 5).digest != one
    path.write_text(path.read_text().replace('"n": 3', '"n": 4'))
    assert index([SourceSpec(path=str(path))], 5).digest != one


def test_a_broken_line_comes_as_text(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"n": 1}, "{broken", {"n": 2}])
    (window,) = index([SourceSpec(path=str(path))], 5).windows
    assert list(read(window)) == [(0, {"n": 1}), (1, "{broken\n"), (2, {"n": 2})]


def test_parquet_structs_lose_the_nulls_that_fill_them_and_jsonl_keeps_its_own(tmp_path):
    rows = [{"a": {"x": 1}}, {"a": {"y": [{"z": None}]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (window,) = index([SourceSpec(path=str(tmp_path / "a.parquet"))], 5).windows
    assert [row for _, row in read(window)] == [{"a": {"x": 1}}, {"a": {"y": [{}]}}]
    (window,) = index([SourceSpec(path=str(write_rows(tmp_path / "a.jsonl", rows)))], 5).windows
    assert [row for _, row in read(window)] == rows


def test_a_line_that_nests_without_end_and_a_damaged_row_group(tmp_path):
    deep = "[" * 100_000
    (window,) = index([SourceSpec(path=str(write_rows(tmp_path / "a.jsonl", [deep])))], 5).windows
    assert [row for _, row in read(window)] == [deep + "\n"]
    path = write(tmp_path, "parquet")
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    (window,) = index([SourceSpec(path=str(path))], 50).windows
    with pytest.raises(DataError, match="cannot be read"):
        list(read(window))


def test_an_epoch_visits_every_window_in_an_order_of_its_own():
    orders = [epoch_order(20, 7, epoch) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(20))
    assert epoch_order(20, 8, 0) != orders[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "holds no row"),
        ("blank.jsonl", b"\n\n", "holds no row"),
        ("a.csv", b"x", "cannot tell what this is"),
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
    with pytest.raises(DataError, match="is a folder"):
        index([SourceSpec(path=str(tmp_path))], 5)
