"""Scores of an exported model on tasks of lm-eval (EleutherAI), asked through the template that was trained."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish import tracking
from burnish.chat import Chat
from burnish.config import load
from burnish.errors import RecipeError, one_line
from burnish.train.ledger import replace_text


def score(path: Path, tasks: Sequence[str], limit: int | None = None, include: Path | None = None) -> dict[str, float]:
    """The scores by `task/metric` of the export of a run, or of an exported folder; kept in its scores.json and in MLflow.

    The model, its stop tokens and its template are those of `burnish chat`. `limit` takes so many questions of each task,
    and its scores have names of their own in MLflow; `include` is a folder with tasks of one's own (lm-eval's YAML). Every
    question is a user's message in the trained template. Raises RecipeError where lm-eval is not installed, where there is
    no export, for a task that is not known or cannot be read, and what `Chat.open` raises.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--tasks: lm-eval is not installed; write pip install -e '.[eval]'")
    folder = path / "export" if (path / "export").is_dir() else path
    if not (folder / "export.json").exists():
        raise RecipeError(f"{folder}: is no export; first type: burnish export {path}")
    scores = {
        # "exact_match,strict-match" is a metric behind a filter; MLflow takes no comma.
        f"{task}/{metric.removesuffix(',none').replace(',', '/')}": float(value)
        for task, metrics in _run(folder, tasks, limit, include).items()
        for metric, value in metrics.items()
        if isinstance(value, float | int) and "stderr" not in metric and metric not in ("sample_len", "alias")
    }
    kept, step = folder / "scores.json", json.loads((folder / "export.json").read_text()).get("step")
    known = json.loads(kept.read_text()) if kept.exists() else {}
    known |= {name: {"score": value, "limit": limit} for name, value in scores.items()}
    replace_text(kept, json.dumps(known, indent=2) + "\n")
    _track(path if folder != path else path.parent, scores, limit, step)
    return scores


def _run(folder: Path, tasks: Sequence[str], limit: int | None, include: Path | None) -> dict[str, dict[str, Any]]:
    """What lm-eval says of each task."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise RecipeError(
            f"--tasks: lm-eval knows no {unknown[0]!r}; `lm_eval ls tasks` lists them, --include adds your own"
        )
    chat = Chat.open(folder)
    model = HFLM(
        pretrained=chat.model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=chat.tokenizer,
        add_bos_token=False,  # the template writes what it needs
        chat_template_args=dict(chat.kwargs),
    )
    try:
        result: dict[str, Any] = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), limit=limit, apply_chat_template=True, task_manager=manager
        )
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"--tasks {','.join(tasks)}: {one_line(error)}") from None
    found: dict[str, dict[str, Any]] = result["results"]
    return found


def _track(run: Path, scores: dict[str, float], limit: int | None, step: int | None) -> None:
    """Adds the scores to the run in MLflow, where a run has one."""
    known, recipe = run / "mlflow.json", run / "recipe.yaml"
    if not known.exists() or not recipe.exists():
        return
    run_id, group = json.loads(known.read_text())["run_id"], "lm_eval" if limit is None else f"lm_eval_first_{limit}"
    tracking.add_scores(load(recipe), run_id, {f"{group}/{name}": value for name, value in scores.items()})
    rows = [{"task": name, "score": value, "limit": limit, "step": step} for name, value in scores.items()]
    tracking.add_table(load(recipe), run_id, "scores.json", rows)
