"""data.filters on a simulated cluster: what is found does not depend on how the files are cut, and is trained around."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from burnish.cli import main
from burnish.data import survey
from burnish.errors import DataError
from burnish.plan import show
from burnish.sections import FiltersSpec
from burnish.train.home import Home
from burnish.train.prepare import check_same_run, make_run_folder, prepare, write_run_folder
from tests.conftest import conversation, write_rows

pytestmark = pytest.mark.distributed

FILTERS = {"exact_duplicates": True, "near_duplicates": 0.8, "min_trained_tokens": 2}


def talk(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def rows(tmp_path):
    """40 rows of their own, and behind them a copy, a near copy, one that an evaluation has, and one with an empty answer."""
    # The questions of `conversation` differ by a number alone; ten words of its own make each row unlike the others.
    own = [{"messages": [talk(" ".join(f"w{i}x{j}" for j in range(10)), "?")["messages"][0], *each["messages"][1:]]}
           for i, each in enumerate(conversation(i, 1 + i % 3) for i in range(40))]  # fmt: skip
    near = json.loads(json.dumps(own[3]).replace("w3x0", "w3y0"))
    asked = "which is the largest planet of all in our own solar system by mass"
    odd = [own[0], near, talk(f"So {asked} then", "It is Jupiter"), {"messages": []}]
    evaluation = write_rows(tmp_path / "eval.jsonl", [{"question": asked, "choices": ["Mars", "Jupiter"]}])
    return write_rows(tmp_path / "rows.jsonl", own + odd), evaluation


def dropped(index):
    """The rows that an index leaves out, by name, with their codes."""
    return {part.row_name(part.first_row + row): code for part in index.slices for row, code, _ in part.dropped}


def drop(recipe, prepared):
    return survey.drop(recipe, prepared.train, prepared.decontaminate, prepared.rendering().cache, None)


@pytest.mark.parametrize("window_rows", [8, 4096])
def test_what_is_left_out_does_not_depend_on_how_files_are_cut_and_is_read_once(cluster, make_recipe, rows, window_rows):
    path, evaluation = rows
    filters = {**FILTERS, "decontaminate": [str(evaluation)]}
    data = {"train": [{"path": str(path), "weight": 2}], "window_rows": window_rows, "filters": filters, "max_refused": 0.1}
    recipe = make_recipe(data=data)
    prepared = prepare(recipe)
    found = drop(recipe, prepared)
    assert dropped(found) == {f"{path}#40": "duplicate", f"{path}#41": "near-duplicate", f"{path}#42": "contaminated"}
    assert len([part for part in found.slices if part.dropped]) % 2 == 0, "in both passes of weight 2"
    path.unlink()
    assert drop(recipe, prepared) == found, "the cache knows, and no file is read"
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"filters": FiltersSpec(near_duplicates=0.9)})})
    with pytest.raises((DataError, ray.exceptions.RayTaskError), match="cannot be read"):
        drop(other, prepared)


def test_without_filters_nothing_is_read_and_nothing_left_out(cluster, make_recipe, rows):
    path, _ = rows
    recipe = make_recipe(data={"train": [{"path": str(path)}], "max_refused": 0.1})
    prepared = prepare(recipe)
    path.unlink()
    assert drop(recipe, prepared) is prepared.train


def test_plan_counts_what_is_not_named_and_train_leaves_out_what_is(cluster, make_recipe, rows, tmp_path, capsys):
    path, evaluation = rows
    recipe = tmp_path / "recipe.yaml"
    data = {"train": [{"path": str(path)}], "max_refused": 0.1}
    recipe.write_text(make_recipe(data=data).to_yaml())
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"] == 44 and plan["samples"] == 43 and plan["refused"] == {"bad-row": 1}
    assert {code: (about["rows"], about["left_out"]) for code, about in plan["quality"].items()} == {
        "duplicate": (1, 0), "near-duplicate": (1, 0),
    }  # fmt: skip
    assert plan["quality"]["duplicate"]["examples"] == [f"{path}#40: says exactly what {path}#0 says"]

    named = [
        f"data.filters={json.dumps({**FILTERS, 'decontaminate': [str(evaluation)]})}",
        "data.filters.min_trained_tokens=4",
    ]
    wanted = {"bad-row": 1, "duplicate": 1, "near-duplicate": 1, "contaminated": 1}
    assert main(["plan", str(recipe), "--json", *named]) == 0
    plan = json.loads(capsys.readouterr().out)
    show(plan)
    shown = capsys.readouterr().out
    assert "near duplicate" in shown and "1 of them left out" in shown
    short = plan["refused"].pop("short-answer", 0)
    assert plan["refused"] == wanted and plan["samples"] == 40 - short and plan["quality"]["contaminated"]["left_out"] == 1

    assert main(["train", str(recipe), *named]) == 0, capsys.readouterr().err
    run = tmp_path / "runs/small"
    refused = [json.loads(line) for line in (run / "refused.jsonl").read_text().splitlines()]
    assert Counter(line["code"] for line in refused) == {**wanted, **({"short-answer": short} if short else {})}
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["tokens"] for line in ledger) == plan["total_tokens"]
    page = (run / "report.html").read_text()
    assert "<th>not trained: contaminated<td>1" in page and "says exactly what" in page


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_file_that_breaks_off_in_the_middle_is_named_without_rays_traceback(
    cluster, make_recipe, tmp_path, capsys, command
):
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.Table.from_pylist([conversation(i) for i in range(1200)]), path, row_group_size=600, compression="none"
    )
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(data={"train": [{"path": str(path)}], "filters": {"exact_duplicates": True}}).to_yaml())
    assert main([command, str(recipe)]) == 3
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and f"burnish {command}: {path}: cannot be read" in shown


def test_an_evaluation_that_changed_is_another_run(cluster, make_recipe, rows):
    path, evaluation = rows
    recipe = make_recipe(
        data={"train": [{"path": str(path)}], "max_refused": 0.1, "filters": {"decontaminate": [str(evaluation)]}}
    )
    folder = Path(recipe.run_place())
    make_run_folder(folder)
    write_run_folder(prepare(recipe), Home(folder))
    (folder / "checkpoints" / "step-00000002").mkdir()
    check_same_run(prepare(recipe), Home(folder))
    write_rows(evaluation, [{"question": "something else that is asked here"}])
    with pytest.raises(DataError, match=r"has changed since it was started \(decontaminate\)"):
        check_same_run(prepare(recipe), Home(folder))
