"""Recipes, for any values."""

import yaml
from hypothesis import given
from hypothesis import strategies as st

from burnish.config import Recipe, leaves, override, parse
from burnish.errors import RecipeError
from tests.unit.test_config import SMALL

KNOWN = {path.split(".")[-1] for path, _, _ in leaves(Recipe)} | set(Recipe.model_fields)


@given(
    st.integers(1, 512),
    st.floats(1e-9, 1.0),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["all-linear", ["q_proj"]]),
    st.none() | st.integers(1, 10**6),
)
def test_a_recipe_is_what_its_yaml_says(rank, rate, dropout, targets, steps):
    tree = SMALL | {
        "lora": {"rank": rank, "dropout": dropout, "target_modules": targets},
        "optim": {"learning_rate": rate},
        "train": {"max_steps": steps},
    }
    recipe = parse(tree, "t")
    assert parse(yaml.safe_load(recipe.to_yaml()), "t") == recipe
    assert parse(override(SMALL, [f"lora.rank={rank}", f"optim.learning_rate={rate!r}"]), "t").optim.learning_rate == rate


@given(
    st.sampled_from(["", "model", "lora", "data", "optim", "train", "engine", "scale", "checkpoint", "tracking"]), st.text()
)
def test_an_unknown_key_is_always_refused_by_name(section, key):
    if key in KNOWN:
        return
    tree = yaml.safe_load(yaml.safe_dump(SMALL))
    (tree.setdefault(section, {}) if section else tree)[key] = 1
    try:
        parse(tree, "t")
    except RecipeError as error:
        assert "no such key" in str(error) and key in str(error)
    else:
        raise AssertionError(f"{section}.{key} was accepted")
