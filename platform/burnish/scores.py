"""Scores of an exported model on tasks of lm-eval (EleutherAI), asked through the template that was trained."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish import tracking
from burnish.config import load
from burnish.data.contract import Contract
from burnish.errors import RecipeError, one_line
from burnish.train.ledger import replace_text


def score(path: Path, tasks: Sequence[str], limit: int | None = None, include: Path | None = None) -> dict[str, float]:
    """The scores by `task/metric` of the export of a run, or of an exported folder; kept in its scores.json and in MLflow.

    `limit` takes so many questions of each task, `include` is a folder with tasks of one's own (lm-eval's YAML). Every
    question is a user's message in the trained template. Raises RecipeError where lm-eval is not installed, where there is
    no export, and for a task that is not known.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--tasks: lm-eval is not installed; write pip install 'burnish[eval]'")
    folder = path / "export" if (path / "export").is_dir() else path
    if not (folder / "export.json").exists():
        raise RecipeError(f"{folder}: is no export; first type: burnish export {path}")
    found = _run(folder, tasks, limit, include)
    scores = {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if isinstance(value, float | int) and "stderr" not in metric and metric not in ("sample_len", "alias")
    }
    replace_text(folder / "scores.json", json.dumps({"limit": limit, "scores": scores}, indent=2) + "\n")
    _track(path, scores)
    return scores


def _run(folder: Path, tasks: Sequence[str], limit: int | None, include: Path | None) -> dict[str, dict[str, Any]]:
    """What lm-eval says of each task."""
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise RecipeError(
            f"--tasks: lm-eval knows no {unknown[0]!r}; `lm_eval ls tasks` lists them, --include adds your own"
        )
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(folder)
    model = {"pretrained": base, "tokenizer": str(folder), "dtype": "auto"}
    if adapter.exists():
        model["peft"] = str(folder)
    kwargs = Contract.read(folder).kwargs
    try:
        result: dict[str, Any] = lm_eval.simple_evaluate(
            model="hf",
            model_args=model | ({"chat_template_args": dict(kwargs)} if kwargs else {}),
            tasks=list(tasks),
            limit=limit,
            device="cuda" if torch.cuda.is_available() else "cpu",
            apply_chat_template=True,
            task_manager=manager,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"--tasks {','.join(tasks)}: {one_line(error)}") from None
    found: dict[str, dict[str, Any]] = result["results"]
    return found


def _track(run: Path, scores: dict[str, float]) -> None:
    """Adds the scores to the run in MLflow, where a run has one."""
    known, recipe = run / "mlflow.json", run / "recipe.yaml"
    if known.exists() and recipe.exists():
        run_id = json.loads(known.read_text())["run_id"]
        tracking.add_scores(load(recipe), run_id, {f"lm_eval/{name}": value for name, value in scores.items()})
        rows = [{"task": name, "score": value} for name, value in scores.items()]
        tracking.add_table(load(recipe), run_id, "scores.json", rows)
