"""The recipe: the full typed description of a run, read from YAML and overrides.

Precedence: defaults < YAML < ``section.field=value`` on the command line.
"""

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from burnish.complaint import complaint, nearest
from burnish.errors import RecipeError, one_line
from burnish.redact import secrets
from burnish.sections import (
    CheckpointSpec,
    DataSpec,
    EngineSpec,
    LoraSpec,
    ModelSpec,
    OptimSpec,
    ScaleSpec,
    Spec,
    SweepSpec,
    TemplateSpec,
    TrackingSpec,
    TrainSpec,
)

RunName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,46}$")]


class Recipe(Spec):
    """The full description of a run. Equal recipes train equal models."""

    name: RunName
    """Names the run, its folder and its MLflow run; the same name again goes on with that run."""
    model: ModelSpec
    lora: LoraSpec | None = Field(default_factory=LoraSpec)
    template: TemplateSpec = Field(default_factory=TemplateSpec)
    data: DataSpec
    optim: OptimSpec = Field(default_factory=OptimSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    engine: EngineSpec = Field(default_factory=EngineSpec)
    scale: ScaleSpec = Field(default_factory=ScaleSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    sweep: SweepSpec | None = None

    @model_validator(mode="after")
    def the_global_batch_divides_over_the_workers(self) -> "Recipe":
        """Raises ValueError unless every worker gets the same number of packs in each step."""
        packs, (fewest, most) = self.train.global_batch_size, self.scale.bounds()
        if not self.widths():
            near = max(most, round(packs / most) * most)
            number = str(most) if fewest == most else f"[{fewest}, {most}]"
            raise ValueError(
                f"train.global_batch_size ({packs} packs) cannot be divided over scale.num_workers ({number}); "
                f"write train.global_batch_size: {near}, or a number of workers that divides {packs}"
            )
        return self

    def widths(self) -> tuple[int, ...]:
        """Numbers of workers that an attempt may have, largest first; each divides the packs of a step."""
        fewest, most = self.scale.bounds()
        return tuple(number for number in range(most, fewest - 1, -1) if self.train.global_batch_size % number == 0)

    @model_validator(mode="after")
    def what_is_quantised_is_frozen_and_whole(self) -> "Recipe":
        """Raises ValueError for quantised weights that would be trained, or shared out over workers."""
        kind = self.model.quantize
        if kind is not None and self.lora is None:
            raise ValueError(f"model.quantize: {kind} keeps weights that are not trained; write lora: {{rank: 16}}")
        if kind == "int8" and self.lora is not None and self.lora.variant == "dora":  # PEFT would lose the scales of rows
            raise ValueError("model.quantize: int8 has no dora; write model.quantize: nf4, or lora.variant: rslora")
        if kind is not None and self.engine.zero_stage == 3:
            raise ValueError(f"model.quantize: {kind} keeps weights whole on each worker; write engine.zero_stage: auto")
        return self

    @model_validator(mode="after")
    def evaluation_has_what_it_needs(self) -> "Recipe":
        """Raises ValueError where nothing is evaluated and a key waits for it, or may end training without what it needs."""
        waiting = {
            "checkpoint.best: eval/loss": self.checkpoint.best == "eval/loss",
            f"train.eval_every_steps: {self.train.eval_every_steps}": self.train.eval_every_steps is not None,
        }
        if self.train.early_stopping is None:
            found = next((words for words, waits in waiting.items() if waits and not self.data.eval), None)
            if found is not None:
                raise ValueError(f"{found} needs held-out rows; write data.eval: [{{path: held-out.jsonl}}], or take it out")
            return self
        lacking = {
            "data.eval: [{path: held-out.jsonl}]": not self.data.eval,
            "train.eval_every_steps: 50": self.train.eval_every_steps is None,
            "checkpoint.best: eval/loss": self.checkpoint.best != "eval/loss",
        }
        if any(lacking.values()):
            words = ", ".join(words for words, is_lacking in lacking.items() if is_lacking)
            raise ValueError(f"train.early_stopping ({self.train.early_stopping}) needs more; write {words}")
        return self

    @model_validator(mode="after")
    def a_recipe_holds_no_secret(self) -> "Recipe":
        """Raises ValueError for a secret: recipes are copied into run folders, contracts, MLflow and reports."""
        found = next(secrets(self.dump()), None)
        if found is not None:
            raise ValueError(
                f"{found}: holds a secret, which would be copied into the run folder, MLflow and reports; take it out and "
                "give it in the environment of every node, as MLFLOW_TRACKING_PASSWORD, HF_TOKEN or AWS_SECRET_ACCESS_KEY"
            )
        return self

    @model_validator(mode="after")
    def sweep_axes_are_fields_of_the_recipe(self) -> "Recipe":
        """Raises ValueError for an axis that is no field, with the nearest field."""
        fields = {path for path, _, _ in leaves(Recipe)}
        for axis in self.sweep.space if self.sweep else ():
            if axis not in fields or axis == "name" or axis.startswith(("sweep.", "tracking.", "checkpoint.")):
                raise ValueError(f"sweep.space: {axis!r} is no field that a sweep can vary{nearest(axis, fields)}")
        return self

    def run_place(self) -> str:
        """Where this run lives, ``<storage>/<name>``: an absolute folder, or a URI as s3://bucket/runs/<name>."""
        return below(self._storage(), self.name)

    def _storage(self) -> str:
        storage = self.checkpoint.storage.removeprefix("file://")
        return storage if "://" in storage else str(Path(storage).expanduser().absolute())

    def cache_folder(self) -> str | None:
        """Where rendered rows are kept, absolute; None where they are not."""
        folder = self.data.cache
        if folder == "auto":
            return below(self._storage(), ".cache")
        return folder if folder is None or "://" in folder else str(Path(folder).expanduser().absolute())

    def located(self) -> "Recipe":
        """The same recipe with every local path absolute, for workers and trials, which run in folders of their own."""

        def absolute(path: str) -> str:
            return str(Path(path).expanduser().absolute())

        tree = self.dump()
        if Path(self.model.path).expanduser().is_dir():
            tree["model"]["path"] = absolute(self.model.path)
        for source in tree["data"]["train"] + tree["data"]["eval"]:
            here = source["split"] is None or Path(source["path"]).expanduser().exists()
            if here and "://" not in source["path"]:
                source["path"] = absolute(source["path"])
        filters = tree["data"]["filters"]
        filters["decontaminate"] = [path if "://" in path else absolute(path) for path in filters["decontaminate"]]
        tree["data"]["cache"] = self.cache_folder()
        if self.template.path is not None:
            tree["template"]["path"] = absolute(self.template.path)
        tree["checkpoint"]["storage"] = self._storage()
        if (self.tracking.uri or "").startswith("sqlite:///"):
            tree["tracking"]["uri"] = "sqlite:///" + absolute(str(self.tracking.uri).removeprefix("sqlite:///"))
        return Recipe.model_validate(tree)

    def dump(self) -> dict[str, Any]:
        """The whole recipe as plain JSON types, defaults written out; `Recipe.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The whole recipe as YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice, the second time near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with ``section.field=value`` overrides applied.

    Raises RecipeError with one line for each problem: the file, the key, what was found and what to write.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; a ready one is jobs/recipes/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from None
    try:
        tree = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping that starts like 'name: my-run'; found {tree!r:.80}")
    return parse(override(tree, overrides), where=str(path))


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a recipe's mapping with dotted ``key=value`` assignments applied; values are read as YAML.

    Raises RecipeError for an assignment that has no ``=`` or that goes through a plain value.
    """
    tree = yaml.safe_load(yaml.safe_dump(tree))
    for assignment in overrides:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"override {assignment!r}: write section.field=value, for example lora.rank=8")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RecipeError(f"override {assignment!r}: the value is not YAML; put it in quotes") from None
        *sections, field = path.strip().split(".")
        node = tree
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise RecipeError(f"override {assignment!r}: {section!r} is no section of the recipe")
        node[field] = value
    return tree


def parse(tree: dict[str, Any], where: str) -> Recipe:
    """The recipe of a mapping; raises RecipeError that names `where`, each wrong key and what to write."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
        # pydantic reports a list as too short when one of its items failed; only the item's own error helps.
        inner = [d for d in details if not any(d is not e and e["loc"][: len(d["loc"])] == d["loc"] for e in details)]
        lines = [f"{where}: {complaint(Recipe, detail)}" for detail in inner or details]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def below(place: str, name: str) -> str:
    """The path of what lies below a folder or URI; options behind a `?`, as s3://bucket/a?region=x has, stay at the end."""
    path, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def differences(ours: Recipe, theirs: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted paths whose values differ between two recipes, with both values."""

    def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from flat(value, f"{path}.{key}" if path else key)
        else:
            yield path, tree

    a, b = dict(flat(ours.dump())), dict(flat(theirs.dump()))
    return {path: (a.get(path), b.get(path)) for path in {**a, **b} if a.get(path) != b.get(path)}


def leaves(spec: type[Spec], prefix: str = "") -> Iterator[tuple[str, typing.Any, str]]:
    """Every plain field below a spec: dotted path, pydantic's field information, one line of documentation."""
    for name, field in spec.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield prefix + name, field, field.description or ""
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def _section(annotation: Any) -> type[Spec] | None:
    """The spec that an annotation like ``LoraSpec`` or ``LoraSpec | None`` holds, or None."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Spec):
            return None if typing.get_origin(annotation) in (tuple, dict) else part
    return None
