"""Everything that can be checked before a worker starts, and the run folder that says what a run was started from."""

import errno
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.config import Recipe, differences, load
from burnish.data import order, pipeline, sources
from burnish.data.balance import round_steps
from burnish.data.contract import Contract, difference
from burnish.data.conversation import Refused
from burnish.data.packing import Sample
from burnish.data.question import Question
from burnish.data.rendered import Cache
from burnish.data.slices import Index, Slice
from burnish.data.template import Template
from burnish.data.tokenizer import load_template, trained_token_ids
from burnish.errors import DataError, InfrastructureError, RecipeError
from burnish.sections import SourceSpec
from burnish.tracking import DELIVERED
from burnish.train.architecture import embedded_tokens, pack_cost, unembedded
from burnish.train.attempt import STOP_FILE
from burnish.train.home import Home
from burnish.train.ledger import check_refused, replace_text
from burnish.train.model import check_model, model_digest, newest_commit
from burnish.train.quantized import check_quantized

CONTRACT_ROWS = 64
"""Rows whose tokens and masks the contract remembers."""
HEAD_ROWS = 512
"""Rows of each file that are rendered before a worker starts, so that a wrong template or format fails at once."""
FREE_TO_CHANGE = {
    "data.train", "data.eval", "data.cache", "data.max_refused", "data.filters.decontaminate", "template.path",
    "model.attention", "model.kernels", "model.activation_checkpointing", "train.self_test", "train.early_stopping",
    "train.eval_every_steps", "train.generations", "train.generation_tokens",
}  # fmt: skip
"""Recipe paths that may differ when a run of the same name goes on: what files hold is compared by digest, not by path."""
FREE_SECTIONS = ("checkpoint.", "tracking.", "sweep", "scale.", "engine.")


@dataclass(frozen=True)
class Prepared:
    """Everything that could be checked before a worker starts, checked."""

    recipe: Recipe
    template: Template
    contract: Contract
    train: Index
    eval: Index | None
    decontaminate: Index | None
    questions: tuple[Question, ...]

    def rendering(self) -> pipeline.Rendering:
        """What the tasks that render need."""
        return pipeline.Rendering(self.template, self.recipe, Cache.of(self.recipe, self.contract))

    def rounds(self) -> pipeline.Rounds:
        """What the tasks that pack and cut steps need."""
        return pipeline.Rounds(self.recipe, pack_cost(self.recipe), round_steps(self.recipe.train.global_batch_size))


def prepare(recipe: Recipe, home: Home | None = None) -> Prepared:
    """Checks model, tokenizer, template, files and the first rows. Raises RecipeError or DataError; starts nothing.

    `home` is where the run lives, with its records, if it was started before.
    """
    home = home or Home.of(recipe)
    check_model(recipe)
    recipe = _pinned(recipe, home)
    check_quantized(recipe)
    _check_trained_tokens(recipe)
    template = load_template(recipe, _started_on(home))
    train_index = sources.index(recipe.data.train, recipe.data.window_rows)
    eval_index = sources.index(recipe.data.eval, recipe.data.window_rows) if recipe.data.eval else None
    named = [SourceSpec(path=path) for path in recipe.data.filters.decontaminate]
    evaluation = sources.index(named, recipe.data.window_rows) if named else None
    head = _read_head("data.train", train_index, template, recipe)
    held_out = _read_head("data.eval", eval_index, template, recipe) if eval_index is not None else _Head()
    questions = tuple(Question.of(row, sample) for row, sample in held_out.firsts[: recipe.train.generations])
    masks = {"rows": head.rows, "refused": dict(head.codes), "tokens": head.tokens, "trained_tokens": head.trained}
    contract = Contract.of(template, masks, head.digests)
    return Prepared(recipe, template, contract, train_index, eval_index, evaluation, questions)


def _pinned(recipe: Recipe, home: Home) -> Recipe:
    """The recipe with the commit of a Hub model: the one that its run was started with, else the newest.

    Every worker, every later start and the export then have the same weights, though the Hub may have others by then.
    """
    if recipe.model.revision is not None or Path(recipe.model.path).expanduser().is_dir():
        return recipe
    if _has_trained(home):
        model = load(home.folder / "recipe.yaml").model
        commit = model.revision if model.path == recipe.model.path else None
    else:
        commit = newest_commit(recipe.model.path)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})


def _check_trained_tokens(recipe: Recipe) -> None:
    """Raises DataError for a name that is no token, RecipeError for a token that the model has no row for."""
    missing = [token for token in trained_token_ids(recipe) if token >= embedded_tokens(recipe)]
    if missing:
        raise RecipeError(
            f"lora.train_tokens: the token {missing[0]} lies beyond the model's {embedded_tokens(recipe):,} embeddings; "
            "take a model that was resized for this tokenizer"
        )


@dataclass
class _Head:
    """What the first rows of the files gave: counts, the sha256 of tokens and mask of the first `CONTRACT_ROWS`, and the
    last sample of each of those."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)
    firsts: list[tuple[str, Sample]] = field(default_factory=list)


def _read_head(name: str, index: Index, template: Template, recipe: Recipe) -> _Head:
    """Renders the first rows of each file; raises DataError where none can be trained or too many are refused."""
    head = _Head()
    embedded = embedded_tokens(recipe)
    for file in dict.fromkeys(part.name for part in index.slices):
        parts = [part for part in index.slices if part.name == file]
        heads = ((part, position, row) for part in parts for position, row in sources.read(part))
        _read_rows(f"{name}: {file}", islice(heads, HEAD_ROWS), template, recipe, embedded, head)
    return head


def _read_rows(
    name: str, heads: Iterable[tuple[Slice, int, Any]], template: Template, recipe: Recipe, embedded: int, head: _Head
) -> None:
    codes: Counter[str] = Counter()
    first: tuple[str, Refused] | None = None
    rows = 0
    for part, position, row in heads:
        rows += 1
        place = part.row_name(position)
        try:
            samples = pipeline.render_row(row, template, recipe)
        except Refused as refusal:
            codes[refusal.code] += 1
            if first is None or (first[1].code == "overlong" and refusal.code != "overlong"):
                first = (place, refusal)
            continue
        for sample in samples:
            token = unembedded(sample.input_ids, embedded)
            if token is not None:
                raise RecipeError(
                    f"model.path: {place} has the token {template.decode([token])!r} ({token}), and the model has "
                    f"embeddings of {embedded:,} tokens: take the tokenizer that it was made with, or one resized for this"
                )
        head.tokens += sum(map(len, samples))
        head.trained += sum(int(sample.trained.sum()) for sample in samples)
        if len(head.digests) < CONTRACT_ROWS:
            arrays = [array.tobytes() for sample in samples for array in (sample.input_ids, sample.trained)]
            head.digests[place] = hashlib.sha256(b"".join(arrays)).hexdigest()
            head.firsts.append((place, samples[-1]))
    head.rows += rows
    head.codes += codes
    if first is None:
        return
    place, shown = first
    turn = "" if shown.turn is None else f", turn {shown.turn}"
    example = f"{place}{turn}: {shown.code}: {shown.message}"
    if codes.total() == rows:
        raise DataError(f"{name}: none of the first {rows} rows can be trained. {example}")
    try:
        check_refused(codes, recipe.data.max_refused * rows, "`burnish preview`")
    except DataError as error:
        raise DataError(f"{name}: of the first {rows} rows, {error}. {example}") from None


def check_same_run(prepared: Prepared, home: Home) -> None:
    """Raises RecipeError or DataError where a run of this name was started with another recipe, data or template."""
    recipe, folder = prepared.recipe, home.folder
    if not _has_trained(home):
        return
    check_same_recipe(recipe, folder)
    was, now = json.loads((folder / "data.json").read_text()), digests(prepared)
    was = {key: value for key, value in was.items() if key not in ("rows", "run")}
    if was != now:
        odd = ", ".join(key for key in {**was, **now} if was.get(key) != now.get(key))
        raise DataError(f"name: what run {recipe.name!r} reads has changed since it was started ({odd}). Choose a new name")
    changed = difference(Contract.read(folder), prepared.contract)
    if changed is not None:
        raise DataError(
            f"name: the chat template or tokenizer of run {recipe.name!r} behaves otherwise than at its start: {changed}. "
            "Put the old one back, or choose a new name"
        )


def check_same_filters(kept: Index, home: Home) -> None:
    """Notes what data.filters leave out of a run; raises DataError where a run that was started before left out other rows.

    Another version of the library that finds near copies would otherwise move rows between packs in silence.
    """
    rows = [(part.slice, row, code) for part in kept.slices for row, code, _ in part.dropped]
    now = {"sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(), "rows": len(rows)}
    path = home.folder / "filters.json"
    if _has_trained(home) and path.exists() and json.loads(path.read_text()) != now:
        raise DataError(
            f"name: data.filters leave out other rows than at the start of this run ({home.path(path.name)}); the code that "
            "compares rows has changed. Choose a new name, or go on with the versions that the run was started with"
        )
    write_json(path, now)


def _started_on(home: Home) -> str | None:
    """The day that the template of a run shows which was started before; None where it shows none."""
    return Contract.read(home.folder).date if _has_trained(home) else None


def check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Raises RecipeError, with the differences, where the folder was started with a recipe that trains otherwise."""
    if not (folder / "recipe.yaml").exists():
        return
    changed = differences(load(folder / "recipe.yaml"), recipe.located())
    changed = {p: pair for p, pair in changed.items() if p not in FREE_TO_CHANGE and not p.startswith(FREE_SECTIONS)}
    if all(str(place).startswith("/") for place in changed.get("model.path", [""])):
        del changed["model.path"]  # folders that moved; what they hold is compared by digest
    if changed:
        shown = "; ".join(f"{path}: {was!r} became {now!r}" for path, (was, now) in changed.items())
        raise RecipeError(
            f"name: the run {recipe.name!r} in {folder} was started with another recipe ({shown}). Choose a new name"
        )


def write_json(path: Path, tree: Any) -> None:
    """Replaces a JSON file in one step, so that a crash leaves the old or the new one."""
    replace_text(path, json.dumps(tree, indent=2) + "\n")


def make_run_folder(folder: Path) -> None:
    """The folder of a run; raises RecipeError where the storage cannot be written, InfrastructureError where it is full."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / STOP_FILE).touch()
        (folder / STOP_FILE).unlink()
    except OSError as error:
        message = f"checkpoint.storage: {folder} cannot be written: {error.strerror}; name a folder that can"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        raise (InfrastructureError(message) if full else RecipeError(message)) from None


def _has_trained(home: Home) -> bool:
    """Whether a run has anything to go on from; one that has not may still be changed."""
    shelf = home.shelf()
    return (home.folder / "recipe.yaml").exists() and bool(shelf.names() or shelf.broken())


def write_run_folder(prepared: Prepared, home: Home) -> None:
    """What the run was started from, written once; recipe.yaml last, since it says that the rest stands.

    Of a run that goes on the recipe alone is written anew, with what was free to change.
    """
    folder = home.folder
    goes_on = _has_trained(home)
    try:
        if not goes_on:
            for name in ("mlflow.json", DELIVERED, "attempts.jsonl"):
                (folder / name).unlink(missing_ok=True)
            (folder / "contract.json").write_text(prepared.contract.to_json(), encoding="utf-8")
            (folder / "chat_template.jinja").write_text(prepared.contract.template, encoding="utf-8")
            counted = {"train": prepared.train.num_rows, **({"eval": prepared.eval.num_rows} if prepared.eval else {})}
            write_json(folder / "data.json", {**digests(prepared), "rows": counted, "run": uuid.uuid4().hex})
        replace_text(folder / "recipe.yaml", prepared.recipe.located().to_yaml())
    except OSError as error:
        raise InfrastructureError(f"checkpoint.storage: {folder} cannot be written: {error}") from error


def digests(prepared: Prepared) -> dict[str, str]:
    """What a run reads: sha256 of training, held-out and evaluation rows and a local model's files; the order of packs."""
    held_out = {"eval": prepared.eval.digest} if prepared.eval else {}
    held_out |= {"decontaminate": prepared.decontaminate.digest} if prepared.decontaminate else {}
    model = model_digest(prepared.recipe.model.path)
    return {"train": prepared.train.digest, **held_out, **({"model": model} if model else {}), "order": order.ORDER}
