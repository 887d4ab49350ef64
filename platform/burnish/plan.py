"""What a recipe will cost, counted by the same graph that training streams from."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from burnish.config import Recipe
from burnish.data import order, pipeline, quality, survey
from burnish.data.order import Cursor
from burnish.data.quality import Finding
from burnish.data.stages import Patience, Stages
from burnish.errors import RecipeError, one_line
from burnish.train.cluster import connected, role_labels
from burnish.train.footprint import lay_out
from burnish.train.layout import Layout, Room
from burnish.train.prepare import Prepared, prepare
from burnish.train.rehearsal import Rehearsal, rehearse

logger = logging.getLogger(__name__)

_PARTS = ("weights", "gradients", "optimizer", "activations")
_PATIENCE_SECONDS = 300.0
"""How long to wait for a device to be free, and for the run to be tried on it."""
_EXAMPLES = 3
"""Rows shown of each reason to leave rows out."""


def plan(recipe: Recipe) -> dict[str, Any]:
    """Rows, refusals by code, samples, packs, tokens, steps and balance of one epoch; memory of a worker; the time.

    Renders and packs every row, on Ray. `balance` is mean/max cost over world ranks, the mean of all steps; 1 is perfect.
    `seconds` is the time that workers compute at least, in all epochs; `misfit` says why the model does not fit, if so.
    Raises what `prepare` raises.
    """
    prepared = prepare(recipe)
    with connected(recipe.widths()[0]):
        tried, misfit = _rehearse(recipe)
        rendering, labels = prepared.rendering(), role_labels(recipe, "data")
        found = survey.survey(recipe, prepared.train, prepared.decontaminate or prepared.eval, rendering, labels)
        epoch = _count(recipe, prepared, found)
    balance = epoch.balanced / epoch.tokens if epoch.tokens else 1.0
    total_steps = -(-epoch.packs * recipe.train.epochs // recipe.train.global_batch_size)
    steps = min(total_steps, recipe.train.max_steps or total_steps)
    rate = tried and tried.flops_per_second
    return {
        "rows": epoch.rows,
        "refused": dict(epoch.codes),
        "samples": epoch.samples,
        "packs": epoch.packs,
        "packing_efficiency": epoch.tokens / max(1, epoch.packs * recipe.data.max_length),
        "total_tokens": epoch.tokens,
        "trained_tokens": epoch.trained,
        "steps_per_epoch": epoch.steps,
        "steps": steps,
        "tokens_per_step": epoch.tokens / max(1, epoch.steps),
        "balance": balance,
        "quality": quality_of(found, recipe),
        "misfit": misfit,
        "memory": tried and _memory(tried),
        "seconds": rate and epoch.flops * steps / max(1, epoch.steps) / (rate * recipe.widths()[0] * balance),
    }


@dataclass
class _Epoch:
    """What one epoch has. `balanced` is the balance of each step weighed by its tokens, `flops` are of all samples."""

    codes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    samples: int = 0
    packs: int = 0
    tokens: int = 0
    trained: int = 0
    steps: int = 0
    balanced: float = 0.0
    flops: float = 0.0


def _count(recipe: Recipe, prepared: Prepared, found: survey.Survey) -> _Epoch:
    """Streams one epoch as training does."""
    one_epoch = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    windows, rounds, width = order.train_slices(one_epoch, found.kept(), Cursor()), prepared.rounds(), recipe.widths()[0]
    stages, epoch = Stages(), _Epoch()
    stream = pipeline.stream(windows, prepared.rendering(), rounds, width, Cursor(), stages)
    stream.context.execution_options.preserve_order = True
    stream.context.execution_options.label_selector = role_labels(recipe, "data")
    shares = iter(stream.iter_batches(batch_size=None, batch_format="pyarrow"))
    for number, block in enumerate(Patience(recipe.scale.stall_seconds, stages).each(shares)):
        lengths = np.asarray(block.column("seq_lens").combine_chunks().flatten())
        epoch.samples += len(lengths)
        epoch.flops += float(rounds.cost.of(lengths, np.array([0, len(lengths)])).sum())
        if number % width:
            continue  # the same steps as another worker meets them
        for meta, _ in pipeline.steps_of(block, recipe.train.global_batch_size // width):
            epoch.codes.update(refusal["code"] for refusal in meta.refused)
            epoch.rows += meta.rows
            epoch.packs += len(meta.packs)
            epoch.tokens += meta.tokens
            epoch.trained += meta.trained_tokens
            epoch.steps += bool(meta.packs)
            epoch.balanced += meta.balance * meta.tokens
    return epoch


def quality_of(found: survey.Survey, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each reason to leave rows out: how many there are, whether the recipe leaves them out, and examples.

    Rows that train too little are counted at the recipe's thresholds, or at those of `quality.PLANNED`.
    """
    filters = recipe.data.filters
    named = {name: value for name, value in filters.model_dump().items() if value is not None}
    counted = quality.PLANNED.model_copy(update=named)
    few = quality.too_little(found.tokens, found.trained, counted)
    own = {row for row, _, _ in quality.too_little(found.tokens, found.trained, filters)}
    every = [*found.findings, *(Finding(row, code, why, row in own) for row, code, why in few)]
    result: dict[str, dict[str, Any]] = {}
    for finding in sorted(every, key=lambda each: each.position):
        about = result.setdefault(finding.code, {"rows": 0, "left_out": 0, "examples": []})
        about["rows"] += 1
        about["left_out"] += finding.dropped
        if len(about["examples"]) < _EXAMPLES:
            about["examples"].append(f"{found.name(finding)}: {finding.message}")
    return result


def _rehearse(recipe: Recipe) -> tuple[Rehearsal | None, str | None]:
    """The recipe tried on the device of one worker, or why it does not fit there."""
    import ray

    num_workers, wanted = recipe.widths()[0], recipe.scale.use_gpu
    has = ray.cluster_resources().get("GPU", 0.0) > 0
    cuda = has if wanted == "auto" else wanted
    # Ray Train puts as many workers on a node as it has places.
    kind = "GPU" if cuda else "CPU"
    places = max([1, *(int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"])])
    options = {"num_gpus": 1} if cuda else {"num_cpus": 1}
    task = ray.remote(rehearse).options(**options, label_selector=role_labels(recipe, "train") or {})
    try:
        if has or not cuda:
            given = (recipe.located(), cuda, num_workers, min(num_workers, places))
            trial = task.remote(*given)
            done, _ = ray.wait([trial], timeout=_PATIENCE_SECONDS)
            if done:
                return ray.get(trial), None
            ray.cancel(trial, force=True)
            logger.warning("the run was not tried on a device: none was free for %.0f s", _PATIENCE_SECONDS)
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, RecipeError):
            raise
        return None, str(error.cause)
    except ray.exceptions.RayError as error:
        logger.warning("the run was not tried on a device: %s", one_line(error))
    decided, needed, _ = lay_out(recipe, Room(sys.maxsize, sys.maxsize if cuda else None), num_workers)
    return Rehearsal("no device here", None, decided, needed, None, None), None


def _memory(tried: Rehearsal) -> dict[str, Any] | None:
    """What a worker's device holds, in bytes, and the layout that was decided; None for a model that cannot be measured."""
    if tried.needed is None:
        return None
    layout = {
        "zero_stage": tried.recipe.engine.stage(),
        "activation_checkpointing": tried.recipe.model.recomputes(),
        "device": tried.device,
        "capacity": tried.room and tried.room.device,
        "reason": tried.reason,
    }
    return asdict(tried.needed) | {"total": tried.needed.total} | layout


def show(result: dict[str, Any]) -> None:
    """The plan as a table for people."""
    table = Table(show_header=False, box=None)
    refused = ", ".join(f"{code} {count}" for code, count in result["refused"].items()) or "none"
    odd = [
        (code.replace("-", " "), f"{about['rows']:,}, {about['left_out']:,} of them left out; {about['examples'][0]}")
        for code, about in result["quality"].items()
    ]
    for name, value in (
        ("rows", f"{result['rows']:,}"),
        ("refused", refused),
        *odd,
        ("samples", f"{result['samples']:,}"),
        ("packs", f"{result['packs']:,} ({result['packing_efficiency']:.1%} full)"),
        ("tokens a step", f"{result['tokens_per_step']:,.0f}"),
        ("tokens an epoch", f"{result['total_tokens']:,}, of them {result['trained_tokens']:,} trained"),
        ("steps", f"{result['steps']:,} ({result['steps_per_epoch']:,} an epoch)"),
        ("balance over workers", f"{result['balance']:.3f}"),
        *_on_workers(result),
    ):
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _on_workers(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the plan says of memory and time."""
    usage, seconds = result["memory"], result["seconds"]
    if usage is None:
        yield "memory a worker", "does not fit" if result["misfit"] else "cannot be told of this model"
    else:
        of = f" of {usage['capacity'] / 1e9:.1f}" if usage["capacity"] else ""
        parts = ", ".join(f"{part} {usage[part] / 1e9:.2f}" for part in _PARTS)
        yield "memory a worker", f"{usage['total'] / 1e9:.2f}{of} GB ({parts}), {usage['device']}"
        yield "layout", usage["reason"] or str(Layout(usage["zero_stage"], usage["activation_checkpointing"]))
    if seconds is None:
        yield "time", "cannot be told here"
    else:
        yield "time", f"at least {timedelta(seconds=round(seconds))} of computing; what workers send each other comes on top"
