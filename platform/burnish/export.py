"""From a run to a model folder that plain transformers (and peft) loads and that serves the template it was trained with."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from burnish import tracking
from burnish.card import card
from burnish.config import Recipe, load
from burnish.data.contract import Contract, difference
from burnish.data.tokenizer import load_template, trained_token_ids
from burnish.errors import BurnishError, DataError, RecipeError
from burnish.train import checkpoint
from burnish.train.adapters import with_adapters, with_saved_adapters
from burnish.train.home import Home
from burnish.train.model import load_weights, model_digest
from burnish.train.shelf import Shelf

_NEAR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How far logits of the same weights may lie apart, relative to their norm: sums in another order, and for a merged adapter
the rounding of each merged weight."""
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a base model that are no part of its weights or tokenizer and that servers read."""
_PROBES = 3
"""Probes of the contract whose logits are compared."""
_FIRST_TOKENS = 16
"""Tokens whose logits are compared where there is no probe."""


@dataclass(frozen=True)
class Origin:
    """Where an export came from; export.json in its folder.

    `identity` tells the run from an earlier one of its name; `base_sha256` is `model_digest` of a local base model.
    """

    run: str
    identity: str | None
    step: int
    behaviour_sha256: str
    merged: bool
    base_sha256: str | None


def export(run: str, folder: Path, merge: bool = False, step: int | None = None) -> Path:
    """Writes the model of a checkpoint to a new folder: all weights, the adapter, or the adapter merged.

    The checkpoint is that of `step`; without it the best one where the recipe has `checkpoint.best`, else the newest.
    The folder holds safetensors, tokenizer, chat_template.jinja equal to the one trained, generation config with the stop
    tokens, model card, contract.json and export.json; it appears whole or not at all, and only after plain transformers (and
    peft) loaded it to the same weights and logits. The same export again is left as it is.
    Raises RecipeError where there is no run, or another thing in the way, and BurnishError where what it wrote is not good.
    """
    home = Home.at(run).arrive()
    try:
        return _export(home, folder, merge, step)
    finally:
        home.leave()


def register(run: str, folder: Path, name: str, alias: str) -> str:
    """Registers an exported folder in MLflow, under the run that trained it; the version that the alias then names.

    Raises RecipeError where the run has no MLflow or the folder is no export of it, and what `tracking.register` raises.
    """
    home, origin = Home.at(run).arrive(), _origin(folder)
    try:
        recipe, known = load(home.folder / "recipe.yaml"), home.folder / "mlflow.json"
        if origin is None or (origin.run, origin.identity) != (recipe.name, home.identity()):
            raise RecipeError(f"--register {name}: {folder} is no export of {run}")
        if recipe.tracking.uri is None or not known.exists():
            raise RecipeError(f"--register {name}: {run} has no run in MLflow (tracking.uri: {recipe.tracking.uri})")
        place = f"model-step-{origin.step}{'-merged' if origin.merged else ''}"
        return tracking.register(recipe, json.loads(known.read_text())["run_id"], folder, name, alias, place)
    finally:
        home.leave()


def _export(home: Home, folder: Path, merge: bool, step: int | None) -> Path:
    run, shelf = home.shown, home.shelf()
    if not (home.folder / "recipe.yaml").exists():
        raise RecipeError(f"{run}: no run; name a run folder, for example runs/quickstart")
    recipe = load(home.folder / "recipe.yaml")
    if not (home.folder / "contract.json").exists():
        raise RecipeError(f"{run}: is no training run; of a sweep, export a trial, for example {run}/trials/trial-000")
    contract = Contract.read(home.folder)
    found = _wanted(shelf, recipe, step)
    if found is None:
        raise DataError(f"{run}: has no checkpoint yet; train it first")
    _check_unchanged(recipe, contract, found, home.folder)
    if merge and recipe.lora is None:
        raise RecipeError(f"{run}: trained every weight, so there is no adapter to merge; leave --merge out")
    base = model_digest(recipe.model.path)
    origin = Origin(recipe.name, home.identity(), found.progress.step, contract.behaviour_sha256, merge, base)
    if folder.exists():
        if _origin(folder) == origin:
            return folder
        raise RecipeError(
            f"{folder}: {_held(_origin(folder))}, not {_held(origin)}; name another folder: burnish export {run} FOLDER"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with shelf.fetched(found.name, home.folder / "export", only=checkpoint.WEIGHTS) as checkpoint_folder:
            weights = checkpoint_folder / checkpoint.WEIGHTS
            known = _write_model(recipe, weights, contract, partial, merge)
            for file in partial.glob("*.safetensors"):
                _check_tensors(file)
            _check_reload(recipe, partial, known, _probe_ids(contract), None if merge else weights)
        _write_tokenizer(recipe, contract, partial)
        if merge or recipe.lora is None:
            _write_processors(recipe, partial)
        (partial / "contract.json").write_text(contract.to_json(), encoding="utf-8")
        data = json.loads((home.folder / "data.json").read_text())
        (partial / "README.md").write_text(card(recipe, contract, data, found.metrics, origin.step, merge), encoding="utf-8")
        (partial / "export.json").write_text(json.dumps(asdict(origin), indent=2) + "\n")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _wanted(shelf: Shelf, recipe: Recipe, step: int | None) -> checkpoint.Checkpoint | None:
    """The checkpoint to export, or None where there is none; raises RecipeError where that of `step` does not stand."""
    leader = checkpoint.best(shelf, recipe.checkpoint.best) if recipe.checkpoint.best and step is None else None
    name = leader[0] if leader else None if step is None else checkpoint.name_of(step)
    if name is None:
        return checkpoint.newest(shelf)
    found = checkpoint.verify(shelf, name) if name in shelf.names() else None
    if found is None:
        raise RecipeError(f"--step: {shelf.path(name)} does not stand or is broken; those that stand: {shelf.names()}")
    return found


def _check_unchanged(recipe: Recipe, contract: Contract, found: checkpoint.Checkpoint, run: Path) -> None:
    """Raises RecipeError or DataError unless model, tokenizer and template still are those that were trained."""
    place = Path(recipe.model.path)
    if place.is_absolute() and not place.is_dir():
        raise RecipeError(f"model.path: the base model {place} of this run is gone; put it back to export")
    if json.loads((run / "data.json").read_text()).get("model") != model_digest(recipe.model.path):
        raise DataError(f"{place}: the base model's files have changed since {run} was trained; put the old ones back")
    if contract.behaviour_sha256 != found.behaviour_sha256:
        raise DataError(f"{run}: the checkpoint {found.name} was trained under another contract; nothing was exported")
    changed = difference(contract, Contract.of(load_template(recipe, contract.date)))
    if changed is not None:
        raise DataError(f"{run}: template or tokenizer behave otherwise than in training: {changed}; nothing was exported")


def _origin(folder: Path) -> Origin | None:
    try:
        return Origin(**json.loads((folder / "export.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _held(origin: Origin | None) -> str:
    """What a folder is, for people."""
    if origin is None:
        return "exists and is no export"
    merged = "with its adapter merged, " if origin.merged else ""
    run = f"run {origin.run!r} ({(origin.identity or 'of an earlier version')[:8]})"
    return f"step {origin.step} of {run}, {merged}contract {origin.behaviour_sha256[:8]}"


@dataclass(frozen=True)
class _Known:
    """What a model gave before it was saved: logits of each probe, [tokens, vocabulary], and what of them is its adapter's
    doing; nothing where no adapter is merged."""

    logits: list[torch.Tensor]
    changes: list[torch.Tensor]


def _write_model(recipe: Recipe, weights: Path, contract: Contract, folder: Path, merge: bool) -> _Known:
    """Saves the base model with the trained weights put in, as all weights or as an adapter; what it gave before that."""
    model = load_weights(recipe)
    if recipe.lora is not None:
        model = with_adapters(model, recipe.lora, trained_token_ids(recipe))
    trained = load_file(weights)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted != set(trained):
        odd = sorted(wanted ^ set(trained))[:3]
        raise DataError(f"{weights}: does not hold the weights of this recipe's model; they differ in {', '.join(odd)}")
    model.load_state_dict(trained, strict=False)
    probes, changes = _probe_ids(contract), []
    logits = _logits(model, probes)
    if merge:
        with model.disable_adapter():
            before = _logits(model, probes)
        changes = [own - plain for own, plain in zip(logits, before, strict=True)]
        model = model.merge_and_unload()
    base = model.get_base_model() if recipe.lora is not None and not merge else model
    base.config.use_cache = True
    generation: GenerationConfig = base.generation_config
    generation.eos_token_id = contract.stop_ids
    # transformers saves what it would refuse today, as values of sampling without `do_sample`, only where it is unchanged.
    generation._original_object_hash = hash(generation)
    if recipe.lora is not None and not merge:  # peft then loads the base at the commit that was trained
        model.peft_config["default"].revision = recipe.model.revision
    model.save_pretrained(folder)
    if recipe.lora is not None and not merge:
        generation.save_pretrained(folder)
        adapter = folder / "adapter_model.safetensors"
        tensors = load_file(adapter)
        # An adapter travels alone; its file says under which contract it was trained.
        save_file(tensors, adapter, metadata={"format": "pt", "chat_contract": f"sha256:{contract.behaviour_sha256}"})
    return _Known(logits, changes)


def _probe_ids(contract: Contract) -> list[torch.Tensor]:
    """Token ids of some short probes, each [1, tokens]; of the first tokens where the template renders none of them."""
    known = sorted((probe.ids for probe in contract.probes if probe.ids and not probe.prompt), key=len)
    return [torch.tensor(ids)[None] for ids in known[:_PROBES] or [list(range(_FIRST_TOKENS))]]


def _logits(model: Any, probes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 logits of each probe, [tokens, vocabulary]."""
    model.eval()
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in probes]


def _check_reload(recipe: Recipe, folder: Path, known: _Known, probes: list[torch.Tensor], weights: Path | None) -> None:
    """Raises BurnishError unless a folder loads, in plain transformers (and peft), as the model that was trained.

    `weights` are the trained ones, which must come back bit for bit; None where an adapter was merged into others. Those are
    rounded to the model's dtype, in which small changes may be lost.
    """
    adapter = (folder / "adapter_config.json").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(
        recipe.located().model.path if adapter else folder,
        **recipe.model.loading(),
        use_safetensors=True,
        dtype=getattr(torch, recipe.model.dtype),
    )
    model = with_saved_adapters(model, folder) if adapter else model
    found = dict(model.named_parameters())
    if weights is not None:
        with safe_open(weights, "pt") as trained:
            for name in trained.keys():  # noqa: SIM118  # safe_open is no mapping
                if name not in found or not torch.equal(found[name].detach(), trained.get_tensor(name)):
                    raise BurnishError(f"{folder}: {name} does not load as it was trained; the export is not good")
    again = _logits(model, probes)
    for ids, before, after in zip(probes, known.logits, again, strict=True):
        error = float((after - before).norm() / before.norm())
        if not error <= _NEAR[recipe.model.dtype]:
            raise BurnishError(
                f"{folder}: logits of {ids.shape[1]} tokens differ by {error:.1%} from those of the trained model after "
                "loading; the export is not good"
            )
    if known.changes:
        _check_merged(recipe, known, again)


def _check_merged(recipe: Recipe, known: _Known, merged: list[torch.Tensor]) -> None:
    """Raises BurnishError where merged logits have less than half of what the adapter changes.

    What is measured is the projection on that change, with which other rounding does not correlate.
    """
    whole = sum(float(change.square().sum()) for change in known.changes)
    moved = zip(known.logits, merged, known.changes, strict=True)
    lost = sum(float(((before - after) * change).sum()) for before, after, change in moved)
    if 2 * lost > whole:
        raise BurnishError(
            f"--merge: merged weights, rounded to {recipe.model.dtype}, lose {lost / whole:.0%} of what the adapter "
            "changes; export the adapter itself, without --merge"
        )


def _write_tokenizer(recipe: Recipe, contract: Contract, folder: Path) -> None:
    """The tokenizer with the trained template, which must come back equal from the file."""
    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.located().model.path, **recipe.model.loading())
    tokenizer.chat_template = contract.template
    tokenizer.save_pretrained(folder)
    if (folder / "chat_template.jinja").read_text(encoding="utf-8") != contract.template:
        raise BurnishError(f"{folder}: chat_template.jinja is not the template that was trained")


def _write_processors(recipe: Recipe, folder: Path) -> None:
    """What a server needs beside the tokenizer for a model that also takes images, sound or video, as the base has it."""
    place, loading = recipe.located().model.path, recipe.model.loading()
    for name in _PROCESSORS:
        file = cached_file(place, name, revision=loading["revision"], _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copy(file, folder / name)


def _check_tensors(file: Path) -> None:
    """Raises BurnishError where a saved tensor is empty or not finite; ZeRO-3 with adapters is known to save empty ones."""
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
            tensor = tensors.get_tensor(name)
            if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
                raise BurnishError(f"{file.name}: the tensor {name} is empty or not finite; the export is not good")
