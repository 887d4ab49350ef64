"""The trials of a sweep: a pure function of its spec and a seed."""

import itertools
import json
import math
from typing import Any

import numpy as np

from burnish.config import Recipe, below, override, parse
from burnish.sections import AxisSpec, SweepSpec

Assignment = dict[str, Any]
"""One trial: a value for each dotted recipe path of the space."""

_DRAWS = 1000
"""Draws for each trial, after which a space counts as used up."""


def draw(spec: SweepSpec, seed: int) -> list[Assignment]:
    """The trials of a sweep, none twice: the whole grid where it is small enough, else seeded draws.

    Fewer than `spec.trials` come back where the space has hardly more, as a narrow range of four digits.
    """
    axes = {path: axis.choice for path, axis in spec.space.items()}
    size = math.prod(len(choice) if choice else spec.trials + 1 for choice in axes.values())
    rng = np.random.default_rng(seed)
    if size <= spec.trials:
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*(choice or () for choice in axes.values()))
        ]
    trials: list[Assignment] = []
    for _ in range(_DRAWS * spec.trials):
        trial = {path: _value(axis, rng) for path, axis in spec.space.items()}
        if trial not in trials:
            trials.append(trial)
        if len(trials) == spec.trials:
            break
    return trials


def _value(axis: AxisSpec, rng: np.random.Generator) -> Any:
    if axis.choice is not None:
        return axis.choice[int(rng.integers(len(axis.choice)))]
    if axis.uniform is not None:
        return float(rng.uniform(*axis.uniform))
    assert axis.log_uniform is not None
    low, high = axis.log_uniform
    # Four digits are all that a learning rate needs, and they survive a recipe file unchanged.
    return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")


def trial_recipe(recipe: Recipe, number: int, assignment: Assignment) -> Recipe:
    """The recipe of one trial: the sweep's own with the assignment made, named and stored below the sweep's folder.

    Raises RecipeError where a value does not fit its field.
    """
    located = recipe.located()
    tree = located.dump() | {"name": f"trial-{number:03d}", "sweep": None}
    tree["checkpoint"]["storage"] = below(located.run_place(), "trials")
    assigned = override(tree, [f"{path}={json.dumps(value)}" for path, value in assignment.items()])
    return parse(assigned, f"trial {number} of {recipe.name}").located()  # a trial runs in another folder
