"""docs/recipe.md, made from the schema: `python -m burnish.reference`."""

import datetime
import json
import typing
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from burnish.config import Recipe, leaves
from burnish.sections import AxisSpec, SourceSpec, Spec

_HEAD = """# The recipe

One YAML file describes a run. Defaults < YAML < `section.field=value` on the command line; the value is read as YAML,
so `lora=null` trains every weight. An unknown key is refused with the nearest name. This page is made from the schema
in `platform/burnish/sections.py` by `make docs`.
"""


def reference() -> str:
    """The whole page."""
    sections = [_section("", Recipe, "Top level")]
    for name, field in Recipe.model_fields.items():
        inner = next((t for t in (field.annotation, *typing.get_args(field.annotation)) if _is_spec(t)), None)
        if inner is not None:
            sections.append(_section(f"{name}.", inner, f"`{name}`"))
    sections.append(_section("", SourceSpec, "A source, an item of `data.train` and `data.eval`"))
    sections.append(_section("", AxisSpec, "An axis, a value of `sweep.space`"))
    return "\n".join([_HEAD, *sections])


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)


def _section(prefix: str, spec: type[Spec], title: str) -> str:
    rows = [(path, field, text) for path, field, text in leaves(spec, prefix) if spec is not Recipe or "." not in path]
    lines = [
        f"## {title}",
        "",
        " ".join((spec.__doc__ or "").split()),
        "",
        "| key | values | default | meaning |",
        "|---|---|---|---|",
    ]
    for path, field, text in rows:
        lines.append(f"| `{path}` | {_values(field)} | {_default(field)} | {' '.join(text.split())} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "required" if value is PydanticUndefined else f"`{json.dumps(value)}`"


def _values(field: FieldInfo) -> str:
    """The type of a field in YAML's words, with its bounds."""
    bounds = [
        f"{symbol} {getattr(item, name)}"
        for item in field.metadata
        for name, symbol in _BOUNDS.items()
        if hasattr(item, name)
    ]
    return ", ".join([_kind(field.annotation), *bounds])


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_KINDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", typing.Any: "any"}
_KINDS[datetime.date] = "day like 2026-01-31"


def _kind(annotation: Any) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return f"mapping of text to {_kind(parts[1])}"
    if origin is typing.Annotated:
        return _kind(parts[0])
    if _is_spec(annotation):
        return {SourceSpec: "sources", AxisSpec: "axes"}.get(annotation, "section")
    return " or ".join(_kind(part) for part in parts)


if __name__ == "__main__":
    print(reference(), end="")
