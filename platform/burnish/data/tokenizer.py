"""The tokenizer of a recipe, with the chat template and the stop tokens that serving will use."""

import datetime
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template, _plain_template_data

from burnish.complaint import nearest
from burnish.config import Recipe
from burnish.data import syntax
from burnish.data.contract import renders
from burnish.data.template import Template
from burnish.errors import DataError, RecipeError, one_line


class _Direct:
    """A tokenizer that renders templates without the copies by which transformers shields itself from its callers.

    What burnish renders is plain JSON already. A template that reads the clock (`strftime_now`) sees a fixed day, if there
    is one; through transformers it cannot.
    """

    def __init__(self, tokenizer: Any, date: datetime.date | None) -> None:
        self._tokenizer, self._special = tokenizer, dict(tokenizer.special_tokens_map)
        self._clock = {"strftime_now": date.strftime} if date else {}

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> str:
        """The text that the tokenizer's own method gives for `tokenize=False`."""
        given = {name: kwargs.pop(name) for name in ("tools", "add_generation_prompt")}
        assert not kwargs.pop("tokenize")
        compiled, functions = _compiled(kwargs.pop("chat_template"))
        shown = {"messages": _alias_reasoning_fields(conversation), "documents": None, **given, **self._clock}
        # A variable of a row that hides what is shown raises TypeError, as it does in transformers.
        shown = dict(**shown, **{**self._special, **_plain_template_data(kwargs)})
        return "".join(compiled.root_render_func(compiled.new_context({**functions, **shown}, shared=True)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # pickle asks before there is a tokenizer to ask
        return getattr(self._tokenizer, name)


@lru_cache
def _compiled(source: str) -> tuple[Any, dict[str, Any]]:
    """A template, and the functions that every template can call; Jinja would gather these anew for each render."""
    compiled = _compile_jinja_template(source)
    return compiled, dict(compiled.globals)


def load_template(recipe: Recipe, date: str | None = None) -> Template:
    """The tokenizer with the resolved chat template and stop tokens that serving will use.

    `date` is the day (ISO) of a run that was started before, shown where the template reads the clock.
    Raises DataError where there is no chat template, or where a stop token is not one token of the vocabulary,
    RecipeError where the tokenizer needs code that the recipe does not trust, or the template does not know a variable.
    """
    tokenizer = _load(recipe)
    source = _source(recipe, tokenizer)
    _check_variables(recipe, syntax.parse(source))
    fixed = recipe.template.date.isoformat() if recipe.template.date else date
    return dated(tokenizer, source, recipe.template.kwargs, _stop_ids(recipe, tokenizer), fixed)


def _check_variables(recipe: Recipe, template: syntax.Syntax) -> None:
    """Raises RecipeError for a variable that the template never looks at, so that it would render as without it."""
    for name in recipe.template.kwargs:
        if name not in template.mentioned:
            near, known = nearest(name, template.variables), ", ".join(sorted(template.variables)) or "none"
            raise RecipeError(f"template.kwargs: the chat template reads no {name!r}{near}; it reads {known}")


def _load(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer  # it imports torch, and data tasks unpickle what stands here

    try:
        return AutoTokenizer.from_pretrained(recipe.located().model.path, **recipe.model.loading())
    except (OSError, ValueError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise RecipeError(recipe.model.unloadable(error)) from None
        raise DataError(f"model.path: {recipe.model.path} has no usable tokenizer: {one_line(error)}") from None


def trained_token_ids(recipe: Recipe) -> tuple[int, ...]:
    """The ids of `lora.train_tokens`, ascending. Raises DataError for a name that is none."""
    names = recipe.lora.train_tokens if recipe.lora else ()
    return tuple(sorted(_single("lora.train_tokens", names, _load(recipe)))) if names else ()


def _single(key: str, names: Iterable[str], tokenizer: Any) -> frozenset[int]:
    """The ids of tokens; raises DataError for a name that is not one token of the vocabulary."""
    ids = {name: tokenizer.encode(name, add_special_tokens=False) for name in names}
    for name, found in ids.items():
        if len(found) != 1:
            raise DataError(f"{key}: {name!r} is {len(found)} tokens in this vocabulary; name a token that is one")
    return frozenset(found[0] for found in ids.values())


def dated(tokenizer: Any, source: str, kwargs: Mapping[str, Any], stop_ids: frozenset[int], date: str | None) -> Template:
    """A template that shows the day `date` (ISO), else today, where it reads the clock. Raises what Template raises."""
    # Generation configurations may name ids of a padded vocabulary, which no text has.
    stop_ids = frozenset(i for i in stop_ids if tokenizer.convert_ids_to_tokens(i) is not None)
    if syntax.parse(source).reads_clock:
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        return Template(_Direct(tokenizer, day), source, kwargs, stop_ids, day.isoformat())
    plain, direct = (Template(each, source, kwargs, stop_ids) for each in (tokenizer, _Direct(tokenizer, None)))
    return direct if list(renders(direct)) == list(renders(plain)) else plain


def _source(recipe: Recipe, tokenizer: Any) -> str:
    """Jinja text of the chat template in force."""
    if recipe.template.path is not None:
        try:
            return Path(recipe.template.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"template.path: {recipe.template.path} cannot be read: {error}") from None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            f"model.path: the tokenizer of {recipe.model.path} has no chat template; "
            "name the Jinja file that serving will use in template.path"
        ) from None


def _stop_ids(recipe: Recipe, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer: the recipe's, else the generation config's and the tokenizer's EOS."""
    if recipe.template.stop_tokens is not None:
        return _single("template.stop_tokens", recipe.template.stop_tokens, tokenizer)
    try:
        generation: Any = GenerationConfig.from_pretrained(recipe.located().model.path, revision=recipe.model.revision)
        stops = generation.eos_token_id
    except (OSError, json.JSONDecodeError):
        stops = None
    listed = stops if isinstance(stops, list) else [stops]
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)
