"""What the Jinja source of a chat template says of itself, read from its syntax tree without running it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from burnish.errors import DataError

_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "dict",
          "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"}  # fmt: skip
"""Names that transformers itself gives to a template; any other one is a variable of the one who renders."""


class _Generation(Extension):
    """Reads `{% generation %}` blocks, with which transformers marks answers in templates made for training."""

    tags = {"generation"}  # noqa: RUF012  # the attribute that jinja reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body alone, as a server that ignores the tag renders it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class Syntax:
    """Facts of one template source.

    `sha256` is blind to comments, to spacing inside tags and to quoting. `literals` are its string constants of two
    characters and more, the longest first. `names` are all names and strings by which it may reach a field of a message.
    `variables` are the names that the one who renders may set: those that the template never sets itself, or asks whether
    they are defined, or gives a default. `mentioned` are all names of variables that stand in it, its own too.
    """

    sha256: str
    literals: tuple[str, ...]
    names: frozenset[str]
    variables: frozenset[str]
    mentioned: frozenset[str]
    reads_clock: bool


@lru_cache(maxsize=8)
def parse(source: str) -> Syntax:
    """The facts of a template, read with the settings with which transformers compiles it.

    Raises DataError with the line where the source is no Jinja.
    """
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    try:
        tree = environment.parse(source)
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template is no Jinja: {error.message}, line {error.lineno}") from None
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    undeclared = meta.find_undeclared_variables(tree)
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    asked = {
        node.node.name
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in ("defined", "default", "d") and isinstance(node.node, nodes.Name)
    }
    return Syntax(
        sha256=hashlib.sha256(json.dumps(_dump(tree), ensure_ascii=False).encode("utf-8", "replace")).hexdigest(),
        literals=tuple(sorted((text for text in constants if len(text.strip()) > 1), key=lambda text: (-len(text), text))),
        names=frozenset(constants | {node.attr for node in tree.find_all(nodes.Getattr)}),
        variables=frozenset((undeclared - own | undeclared & asked) - _GIVEN),
        mentioned=frozenset(node.name for node in tree.find_all(nodes.Name)),
        reads_clock="strftime_now" in undeclared,
    )


def _dump(node: Any) -> Any:
    """A node as plain lists; adjacent literal text is joined, since a comment between two pieces changes nothing."""
    if isinstance(node, nodes.Node):
        fields = [[name, _dump(value)] for name, value in node.iter_fields() if name != "ctx"]
        return [type(node).__name__, *fields]
    if isinstance(node, list | tuple):
        return list(_joined([_dump(item) for item in node]))
    return node if isinstance(node, str | int | float | bool | None) else repr(node)


def _joined(items: list[Any]) -> Iterator[Any]:
    held = ""
    for item in items:
        if isinstance(item, list) and item[:1] == ["TemplateData"]:
            held += item[1][1]
            continue
        if held:
            yield ["TemplateData", held]
            held = ""
        yield item
    if held:
        yield ["TemplateData", held]
