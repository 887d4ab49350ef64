"""Sources wherever they lie: folders, globs, data sets of the datasets library, a real S3 server, fsspec."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish.data import sources
from burnish.errors import DataError, RecipeError
from burnish.sections import SourceSpec
from tests.conftest import free_port, write_rows

ROWS = [{"n": i, "text": "é" * (i % 5)} for i in range(40)]


def rows_of(**spec) -> list:
    """Every row of a source, read slice by slice from the last to the first."""
    found = sources.index([SourceSpec(**spec)], 128)
    assert len({part.digest for part in found.slices}) == len(found.slices)
    rows = [item for part in reversed(found.slices) for item in reversed(list(sources.read(part)))]
    return [row for _, row in reversed(rows)]


def write_arrow(path, opener):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=7):
            writer.write_batch(batch)
    return path


@pytest.mark.parametrize("opener", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams(tmp_path, opener):
    assert rows_of(path=str(write_arrow(tmp_path / "rows.arrow", opener))) == ROWS


def test_a_folder_and_a_glob_mean_their_data_files_in_order(tmp_path):
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    write_rows(folder / "b.jsonl", ROWS[10:20])
    write_rows(folder.parent / "a.jsonl", ROWS[:10])
    pq.write_table(pa.Table.from_pylist(ROWS[20:]), folder.parent / "z.parquet")
    (folder.parent / "README.md").write_text("a card")
    (folder / ".hidden.jsonl").write_text("no row of ours")
    assert rows_of(path=str(tmp_path / "data")) == ROWS
    assert rows_of(path=str(tmp_path / "data" / "*.jsonl")) == ROWS[:10]
    assert rows_of(path=str(tmp_path / "data" / "**" / "*.jsonl")) == ROWS[:20]
    found = sources.index([SourceSpec(path=str(tmp_path / "data"))], 128)
    assert found.slices[1].row_name(3).endswith("/data/a.jsonl#3")
    with pytest.raises(DataError, match="no file there has rows"):
        sources.index([SourceSpec(path=str(tmp_path / "data" / "*.csv"))], 128)


def test_a_data_set_that_the_datasets_library_saved_or_loads(tmp_path):
    import datasets

    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])})
    both.save_to_disk(tmp_path / "saved")
    both["train"].save_to_disk(tmp_path / "one")
    assert rows_of(path=str(tmp_path / "saved"), split="train") == ROWS
    assert rows_of(path=str(tmp_path / "saved"), split="test") == ROWS[:3]
    assert rows_of(path=str(tmp_path / "one")) == ROWS
    with pytest.raises(DataError, match="holds the splits train, test; name one"):
        rows_of(path=str(tmp_path / "saved"))
    # A folder of files, as the Hub holds them: loaded by the library's own code for it.
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "train.jsonl", ROWS)
    write_rows(tmp_path / "hub" / "test.jsonl", ROWS[:3])
    assert rows_of(path=str(tmp_path / "hub"), split="test") == ROWS[:3]
    with pytest.raises(DataError, match="no data set could be loaded"):
        rows_of(path=str(tmp_path / "hub"), split="validation")


def test_a_hub_id_needs_a_split_and_without_a_network_says_so():
    with pytest.raises(DataError, match="name its split, for example split: train"):
        rows_of(path="nobody/no-such-data")
    with pytest.raises(DataError, match="nobody/no-such-data: no data set could be loaded"):
        rows_of(path="nobody/no-such-data", split="train")


def test_fsspec_reaches_what_pyarrow_does_not():
    import fsspec

    with fsspec.open("memory://bucket/rows.jsonl", "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    with fsspec.open("memory://bucket/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    assert rows_of(path="memory://bucket/rows.jsonl") == ROWS
    assert rows_of(path="memory://bucket/rows.jsonl.gz") == ROWS
    assert rows_of(path="memory://bucket") == ROWS + ROWS
    with pytest.raises(DataError, match="no such file"):
        rows_of(path="memory://bucket/other.jsonl")
    with pytest.raises(DataError, match="nosuch"):
        rows_of(path="nosuch://bucket/other.jsonl")


def put(system, path, data: bytes) -> None:
    with system.open_output_stream(path, compression=None) as file:
        file.write(data)


def test_s3_is_read_in_ranges_by_file_folder_and_glob(s3):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    put(s3, "bucket/rows/a.jsonl", text)
    put(s3, "bucket/rows/b.jsonl.gz", gzip.compress(text))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=7)
    put(s3, "bucket/rows/c.parquet", sink.getvalue().to_pybytes())
    url = "s3://bucket/rows"
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert rows_of(path=f"{url}/{name}") == ROWS
    assert rows_of(path=url) == ROWS * 3
    assert rows_of(path=f"{url}/*.jsonl*") == ROWS * 2
    found = sources.index([SourceSpec(path=f"{url}/a.jsonl")], 128)
    assert found.slices[0].row_name(3) == "s3://bucket/rows/a.jsonl#3"
    put(s3, "bucket/rows/a.jsonl", text.replace(b'"n": 39', b'"n": 40'))
    assert len(list(sources.read(found.slices[0]))) == 8
    with pytest.raises(DataError, match=r"rows 32 to 39 are not what they were"):
        list(sources.read(found.slices[-1]))
    with pytest.raises(DataError, match="no such file"):
        rows_of(path=f"{url}/absent.jsonl")


def test_a_server_that_is_not_there_is_said_so(s3, monkeypatch):
    port = free_port()
    url = f"s3://bucket/rows/a.jsonl?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"
    with pytest.raises(DataError, match="cannot be reached"):
        rows_of(path=url)


def test_credentials_that_the_server_refuses_are_said_so(s3):
    put(s3, "bucket/rows/a.jsonl", b"{}\n")
    from moto.core.responses import ActionAuthenticatorMixin, settings

    with pytest.MonkeyPatch.context() as patch:  # from now on the server asks who it is
        patch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        patch.setattr(ActionAuthenticatorMixin, "request_count", 0)
        for path in ("s3://bucket/rows/a.jsonl", "s3://bucket/rows", "s3://bucket/rows/*.jsonl"):
            with pytest.raises(DataError, match=rf"^{re.escape(path)}: .*ACCESS_DENIED.* credentials in every node"):
                rows_of(path=path)
    assert rows_of(path="s3://bucket/rows/a.jsonl") == [{}]


def test_credentials_in_a_path_are_refused(make_recipe):
    for path in ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a.jsonl?secret_key=abc"):
        with pytest.raises(RecipeError, match="holds credentials") as error:
            make_recipe(data={"train": [{"path": path}]})
        assert "abc" not in str(error.value) and "key:secret" not in str(error.value)


@pytest.mark.parametrize("way", ["above", "absolute", "symlink", "split"])
def test_a_saved_data_set_that_names_files_outside_of_its_folder_is_refused(tmp_path, way):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"n": 1}])}).save_to_disk(tmp_path / "saved")
    Dataset.from_list([{"n": 2}]).save_to_disk(tmp_path / "other")
    state = tmp_path / "saved/train/state.json"
    tree = json.loads(state.read_text())
    [file] = tmp_path.glob("other/*.arrow")
    if way == "above":
        tree["_data_files"] = [{"filename": f"../../other/{file.name}"}]
    elif way == "absolute":
        tree["_data_files"] = [{"filename": str(file)}]
    elif way == "symlink":
        (tmp_path / "saved/train/link.arrow").symlink_to(file)
        tree["_data_files"] = [{"filename": "link.arrow"}]
    else:
        (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    state.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="lies outside of it"):
        rows_of(path=str(tmp_path / "saved"), split="../other" if way == "split" else "train")


def test_a_file_that_is_cut_after_it_was_looked_at_is_not_what_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (part,) = sources.index([SourceSpec(path=str(path))], 1024).slices
    assert len(list(sources.read(part))) == len(ROWS)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=rf"rows 0 to {len(ROWS) - 1} are not what they were"):
        list(sources.read(part))
