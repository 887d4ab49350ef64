"""One line for each thing that is wrong in a recipe: the key, what was found, and the nearest key that exists."""

import difflib
import math
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from burnish.redact import redact_tree


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest of names, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def complaint(schema: type[BaseModel], detail: ErrorDetails) -> str:
    """One line for one of pydantic's errors: the key, the message, what was found, the nearest name."""
    place = [str(part) for part in detail["loc"]]
    found = redact_tree(detail["input"], place[-1] if place else "")
    shown = "" if isinstance(found, dict | BaseModel) else f" (found {found!r:.60})"
    if isinstance(found, float) and math.isnan(found):
        shown = " (found NaN)"
    if detail["type"] == "extra_forbidden":
        spec: type[BaseModel] | None = schema
        for part in place[:-1]:
            field = spec.model_fields.get(part) if spec else None
            spec = _inner(field.annotation) if field else spec
        names = list(spec.model_fields) if spec else []
        return f"{'.'.join(place)}: no such key{shown}{nearest(place[-1], names)}"
    if detail["type"] == "missing":
        return f"{'.'.join(place)}: is required and missing"
    message = detail["msg"].removeprefix("Value error, ")
    if place == ["name"]:
        message = "must be lower-case letters, digits and dashes, start with a letter, and have at most 47 characters"
    return f"{'.'.join(place)}: {message}{shown}" if place else message


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The spec inside an annotation, also inside tuples and dicts of specs."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        found = _inner(part)
        if found is not None:
            return found
    return None
