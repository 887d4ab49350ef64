"""What a recipe will cost, counted by the same graph that training streams from."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from burnish.config import Recipe
from burnish.data import order, pipeline, quality, survey
from burnish.data.order import Cursor
from burnish.data.quality import Finding
from burnish.data.stages import Patience, Stages
from burnish.train.adapters import num_weights
from burnish.train.cluster import connected, role_labels
from burnish.train.model import shapes
from burnish.train.prepare import prepare

_EXAMPLES = 3
"""Rows shown of each reason to leave rows out."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Rows, refusals by code, samples, packs, tokens, steps, balance and memory of one epoch of a recipe.

    Renders and packs every row, on Ray. `balance` is mean/max cost over world ranks, the mean of all steps; 1 is perfect.
    Raises what `prepare` raises.
    """
    prepared = prepare(recipe)
    one_epoch = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    codes: Counter[str] = Counter()
    rows = samples = packs = tokens = trained = steps = 0
    balanced = 0.0
    with connected(recipe.widths()[0]):
        rendering, rounds, labels = prepared.rendering(), prepared.rounds(), role_labels(recipe, "data")
        found = survey.survey(recipe, prepared.train, prepared.decontaminate or prepared.eval, rendering, labels)
        windows = order.train_slices(one_epoch, found.kept(), Cursor())
        stages = Stages()
        stream = pipeline.stream(windows, rendering, rounds, recipe.widths()[0], Cursor(), stages)
        stream.context.execution_options.preserve_order = True
        stream.context.execution_options.label_selector = labels
        shares = iter(stream.iter_batches(batch_size=None, batch_format="pyarrow"))
        for number, block in enumerate(Patience(recipe.scale.stall_seconds, stages).each(shares)):
            samples += len(block.column("seq_lens").combine_chunks().flatten())
            if number % recipe.widths()[0]:
                continue  # the same steps as another worker meets them
            for meta, _ in pipeline.steps_of(block, recipe.train.global_batch_size // recipe.widths()[0]):
                codes.update(refusal["code"] for refusal in meta.refused)
                rows += meta.rows
                packs += len(meta.packs)
                tokens += meta.tokens
                trained += meta.trained_tokens
                steps += bool(meta.packs)
                balanced += meta.balance * meta.tokens
    total_steps = -(-packs * recipe.train.epochs // recipe.train.global_batch_size)
    return {
        "rows": rows,
        "refused": dict(codes),
        "samples": samples,
        "packs": packs,
        "packing_efficiency": tokens / max(1, packs * recipe.data.max_length),
        "total_tokens": tokens,
        "trained_tokens": trained,
        "steps_per_epoch": steps,
        "steps": min(total_steps, recipe.train.max_steps or total_steps),
        "tokens_per_step": tokens / max(1, steps),
        "balance": balanced / tokens if tokens else 1.0,
        "quality": quality_of(found, recipe),
        "memory": memory(recipe),
    }


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


def memory(recipe: Recipe) -> dict[str, int] | None:
    """Bytes that weights, gradients and optimizer take on each worker, activations apart; None for a Hub model.

    AdamW keeps two float32 moments, and float32 masters where training is in 16 bits (ZeRO, arXiv 1910.02054, 3.1).
    """
    folder = Path(recipe.model.path).expanduser()
    found = shapes(folder) if folder.is_dir() else {}
    if not found:
        return None
    weights = sum(int(np.prod(shape)) for shape in found.values())
    adapter = num_weights(recipe.lora, found) if recipe.lora else 0
    trained = adapter if recipe.lora else weights
    size, stage, workers = _DTYPE_BYTES[recipe.model.dtype], recipe.engine.zero_stage, recipe.widths()[0]
    states = 8 if size == 4 else 12
    return {
        "weights": (weights + adapter) * size // (workers if stage == 3 else 1),
        "gradients": trained * size // (workers if stage >= 2 else 1),
        "optimizer": trained * states // (workers if stage >= 1 else 1),
    }


def show(result: dict[str, Any]) -> None:
    """The plan as a table for people."""
    table = Table(show_header=False, box=None)
    refused = ", ".join(f"{code} {count}" for code, count in result["refused"].items()) or "none"
    usage = result["memory"]
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
        (
            "memory a worker",
            f"{sum(usage.values()) / 1e9:.2f} GB without activations" if usage else "unknown before download",
        ),
    ):
        table.add_row(name, value)
    Console(highlight=False).print(table)
