"""The preview's web page: every token with its mask, text of the data only as text."""

import json
import re
from html import unescape
from pathlib import Path

from burnish.cli import main
from burnish.preview import FILTERED
from tests.conftest import conversation, write_rows


def test_sources_take_turns_and_filters_are_named(make_recipe, tmp_path, capsys):
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [conversation(i) for i in range(count)])
        for name, count in (("a", 3), ("b", 1))
    ]
    sources = [{"path": str(file)} for file in files]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(data={"train": sources, "filters": {"exact_duplicates": True}}).to_yaml())
    assert main(["preview", str(recipe), "--json"]) == 0
    named = [Path(json.loads(line)["row"]).name for line in capsys.readouterr().out.splitlines()]
    assert named == ["a.jsonl#0", "b.jsonl#0", "a.jsonl#1", "a.jsonl#2"]
    assert main(["preview", str(recipe)]) == 0
    assert FILTERED in " ".join(capsys.readouterr().out.split())
    assert main(["preview", str(recipe), "--html", str(tmp_path / "see.html")]) == 0
    assert FILTERED in (tmp_path / "see.html").read_text()


def test_the_page_shows_each_token_and_each_refusal_and_runs_no_text_of_the_data(make_recipe, tmp_path, capsys):
    evil = "<script>alert(1)</script> 👩‍👩‍👧 & </pre>"
    talk = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": talk}, {"messages": []}, conversation(1, 2)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(data={"train": [{"path": str(rows)}]}).to_yaml())
    assert main(["preview", str(recipe), "--html", str(tmp_path / "see.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "see.html")
    page = (tmp_path / "see.html").read_text()
    assert page.count("<script>") == 1 and "http" not in page.replace(str(tmp_path), "")
    assert main(["preview", str(recipe), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bodies = re.findall(r"<pre>(.*?)</pre>", page, re.S)
    samples = [sample for line in lines for sample in line["samples"]]
    shown = [re.findall(r'<([ib]) data-id="([^"]*)">(.*?)</[ib]>', body, re.S) for body in bodies if "data-id" in body]
    assert len(shown) == len(samples) == 2
    for tokens, sample in zip(shown, samples, strict=True):
        ids = [(int(i), tag == "b") for tag, each, _ in tokens for i in each.split()]
        assert ids == [(i, label != -100) for i, label in zip(sample["input_ids"], sample["labels"], strict=True)]
    text = unescape("".join(text for _, _, text in shown[0])).replace("\u21b5", "")
    assert text.count(evil) == 2
    assert "rows.jsonl#1" in page and "bad-row" in page
    assert main(["preview", str(recipe), "--html", str(tmp_path / "no" / "folder.html")]) == 2
