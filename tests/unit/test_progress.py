"""The live line of a run: always its newest metrics, and never the end of it."""

import json
import os

from burnish.progress import ProgressLine


def metrics(step: int, filler: str = "") -> str:
    names = ("loss", "progress", "learning_rate", "grad_norm", "tokens_per_second")
    line = {"step": step, **{f"train/{name}": step / 100 for name in names}, "data/wait_share": 0.0, "filler": filler}
    return json.dumps(line) + "\n"


def test_a_file_that_an_attempt_began_anew_is_read_from_its_start(make_recipe, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(metrics(step) for step in range(1, 13)))
    progress = ProgressLine(make_recipe())
    progress(tmp_path, {"max_steps": 100})
    # Longer than the file before, so that where reading ended is in the midst of a line now.
    again = tmp_path / "again"
    again.write_text(metrics(1, "x" * 3 * path.stat().st_size) + metrics(7))
    os.replace(again, path)
    progress(tmp_path, {"max_steps": 100})
    progress.__exit__(None, None, None)
    assert "step 7  7%" in capsys.readouterr().err


def test_a_torn_line_is_passed_over(make_recipe, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(metrics(1) + metrics(2)[:20] + "\n" + metrics(3) + metrics(4)[:20])
    progress = ProgressLine(make_recipe())
    progress(tmp_path, {"max_steps": None})
    progress.__exit__(None, None, None)
    assert "step 3" in capsys.readouterr().err
