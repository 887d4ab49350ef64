"""A run's report: what its folder holds, at any time of the run, and no text of the data but as text."""

import datetime
import json
import re
from html import unescape
from pathlib import Path

from burnish.cli import main
from burnish.config import load
from burnish.data.order import Cursor, StepMeta
from burnish.report import page
from burnish.train.home import Home
from burnish.train.ledger import Ledger
from burnish.train.prepare import make_run_folder, prepare, write_run_folder
from tests.conftest import CHATML


def run_folder(make_recipe, refusals=()):
    recipe = make_recipe(data={"max_length": 64})
    folder = Path(recipe.run_place())
    make_run_folder(folder)
    write_run_folder(prepare(recipe), Home(folder))
    ledger = Ledger.open(folder, 0, 100)
    for step in range(1, 4):
        meta = StepMeta(((0, 0, step),), 60, 20, 0.1, Cursor(), tuple(refusals) if step == 2 else (), 4, 1.0)
        ledger.record(step, meta, 5.0 / step, {"train/loss": 5.0 / step, "data/wait_share": 0.25})
    ledger.measure(3, {"eval/loss": 1.5, "eval/perplexity": 4.48})
    return recipe, folder


def test_a_report_counts_what_was_trained_and_what_was_not_by_code(make_recipe, capsys):
    evil = "<script>alert(1)</script>"
    refusals = [{"row": f"{evil}#{i}", "code": "no-stop", "turn": 1, "message": f"why {i} {evil}"} for i in range(5)]
    refusals.append({"row": "rows#9", "code": "overlong", "turn": None, "message": "99 tokens"})
    _, folder = run_folder(make_recipe, refusals)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace(str(folder.parent.parent), "")
    assert "<th>not trained: no-stop<td>5" in page and "<th>not trained: overlong<td>1" in page
    assert page.count("<th>no-stop") == 3 and page.count("why ") == 3 and "99 tokens" in page
    assert f"<th>rows of data.train<td>{json.loads((folder / 'data.json').read_text())['rows']['train']}" in page
    assert "<td>3, 93.8% full" in page and "<td>180, of them 60 trained" in page
    assert "not finished" in page and "<dd>1.6667</dd>" in page and "<dd>4.480</dd>" in page and "25.0%" in page
    titles = re.findall(r"<figcaption><span>(.*?)</span><b>(.*?)</b>", page)
    assert titles == [("loss", "1.667"), ("held-out loss", "1.5"), ("share of a step waiting for data", "0.25")]
    assert json.loads((folder / "contract.json").read_text())["behaviour_sha256"] in page


def test_a_report_shows_answers_before_and_after_training_as_text(make_recipe):
    _, folder = run_folder(make_recipe)
    ledger = Ledger.open(folder, 3, 100)
    for step in range(9):
        answer = {
            "row": "held#0",
            "prompt": "<b>ask",
            "reference": "the <i>row's",
            "answer": f"<u>said {step}",
            "stopped": step > 7,
        }
        ledger.generate(step, [answer])
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "prompt of held#0" in page and "&lt;b&gt;ask" in page and "<th>in the row<td>the &lt;i&gt;row&#x27;s" in page
    assert (
        "<th>before training<td>&lt;u&gt;said 0 ... (no stop token)" in page
        and "<th>after step 8<td>&lt;u&gt;said 8\n" not in page
    )
    assert re.findall(r"said (\d)", page) == ["0", "4", "5", "6", "7", "8"] and page.count("(no stop token)") == 5


def test_a_folder_that_is_no_run_or_lacks_its_contract_is_named(make_recipe, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run; name a run folder" in capsys.readouterr().err
    _, folder = run_folder(make_recipe)
    (folder / "contract.json").write_text("{}")
    assert main(["report", str(folder)]) == 3
    assert "is no contract that this version reads" in capsys.readouterr().err and not (folder / "report.html").exists()


def test_a_metric_that_is_no_number_in_some_steps_is_drawn_without_them(make_recipe):
    _, folder = run_folder(make_recipe)
    ledger = Ledger.open(folder, 3, 100)
    for step, norm in ((4, 2.0), (5, float("inf")), (6, float("nan")), (7, 3.0)):
        ledger.measure(step, {"train/grad_norm": norm})
    shown = re.search(r"gradient norm</span><b>(.*?)</b>.*?points='(.*?)'", page(folder), re.S)
    assert shown[1] == "3" and len(set(shown[2].split())) == 2 and "nan" not in shown[2]


def test_the_command_that_repeats_a_run_names_its_day_and_is_a_recipe(make_recipe, tmp_path):
    def command(text, name: str, place: str | None = None) -> list[str]:
        template = tmp_path / "template.jinja"
        template.write_text(text)
        recipe = make_recipe(name=name, template={"path": str(template)})
        folder = Path(recipe.run_place())
        make_run_folder(folder)
        write_run_folder(prepare(recipe), Home(folder))
        if place is not None:
            text = (folder / "recipe.yaml").read_text()
            (folder / "recipe.yaml").write_text(text.replace(f"storage: {folder.parent}", f"storage: {place}"))
        return unescape(re.search("<h2>Again</h2>.*?<pre>(.*?)</pre>", page(folder), re.S)[1]).split()

    dated = command("{{- strftime_now('%Y-%m-%d') }}" + CHATML, "dated")
    assert dated[-1] == f"template.date={datetime.date.today()}"
    long = command(CHATML, "a" * 47)
    assert long[3] == f"name={'a' * 41}-again" and len(long) == 4
    load(long[2], long[3:])
    assert command(CHATML, "remote", "s3://bucket/runs")[2] == "recipe.yaml"


def test_a_run_that_trained_nothing_yet_has_a_report(make_recipe):
    _, folder = run_folder(make_recipe)
    for name in ("ledger.jsonl", "metrics.jsonl", "refused.jsonl"):
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert "<svg" not in (folder / "report.html").read_text()
