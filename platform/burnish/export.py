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
from transformers import AutoTokenizer, GenerationConfig

from burnish.config import Recipe, load
from burnish.data.contract import Contract, difference
from burnish.data.tokenizer import load_template
from burnish.errors import BurnishError, DataError, RecipeError
from burnish.train import checkpoint
from burnish.train.adapters import with_adapters
from burnish.train.home import Home
from burnish.train.model import load_weights, model_digest


@dataclass(frozen=True)
class Origin:
    """Where an export came from; export.json in its folder."""

    run: str
    step: int
    behaviour_sha256: str
    merged: bool


def export(run: str, folder: Path, merge: bool = False) -> Path:
    """Writes the newest checkpoint's model to a new folder: all weights, the adapter, or the adapter merged.

    The folder holds safetensors, tokenizer, chat_template.jinja equal to the one trained, generation config with the stop
    tokens, contract.json and export.json; it appears whole or not at all. The same export again is left as it is.
    Raises RecipeError where there is no run, or another thing in the way.
    """
    home = Home.at(run).arrive()
    try:
        return _export(home, folder, merge)
    finally:
        home.leave()


def _export(home: Home, folder: Path, merge: bool) -> Path:
    run, shelf = home.shown, home.shelf()
    if not (home.folder / "recipe.yaml").exists():
        raise RecipeError(f"{run}: no run; name a run folder, for example runs/quickstart")
    recipe = load(home.folder / "recipe.yaml")
    if not (home.folder / "contract.json").exists():
        raise RecipeError(f"{run}: is no training run; of a sweep, export a trial, for example {run}/trials/trial-000")
    contract = Contract.read(home.folder)
    found = checkpoint.newest(shelf)
    if found is None:
        raise DataError(f"{run}: has no checkpoint yet; train it first")
    _check_unchanged(recipe, contract, found, home.folder)
    if merge and recipe.lora is None:
        raise RecipeError(f"{run}: trained every weight, so there is no adapter to merge; leave --merge out")
    origin = Origin(recipe.name, found.progress.step, contract.behaviour_sha256, merge)
    if folder.exists():
        if _origin(folder) == origin:
            return folder
        raise RecipeError(f"{folder}: exists and is no export of step {origin.step} of {run}; name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with shelf.fetched(found.name, home.folder / "export", only=checkpoint.WEIGHTS) as checkpoint_folder:
        _write_model(recipe, checkpoint_folder / checkpoint.WEIGHTS, contract, partial, merge)
    _write_tokenizer(recipe, contract, partial)
    (partial / "contract.json").write_text(contract.to_json(), encoding="utf-8")
    (partial / "export.json").write_text(json.dumps(asdict(origin), indent=2) + "\n")
    for file in partial.glob("*.safetensors"):
        _check_tensors(file)
    os.replace(partial, folder)
    return folder


def _check_unchanged(recipe: Recipe, contract: Contract, found: checkpoint.Checkpoint, run: Path) -> None:
    """Raises RecipeError or DataError unless model, tokenizer and template still are those that were trained."""
    place = Path(recipe.model.path)
    if place.is_absolute() and not place.is_dir():
        raise RecipeError(f"model.path: the base model {place} of this run is gone; put it back to export")
    if json.loads((run / "data.json").read_text()).get("model") != model_digest(recipe):
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


def _write_model(recipe: Recipe, weights: Path, contract: Contract, folder: Path, merge: bool) -> None:
    """The base model with the trained weights put in, saved as all weights or as an adapter."""
    model = load_weights(recipe)
    if recipe.lora is not None:
        model = with_adapters(model, recipe.lora)
    trained = load_file(weights)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted != set(trained):
        odd = sorted(wanted ^ set(trained))[:3]
        raise DataError(f"{weights}: does not hold the weights of this recipe's model; they differ in {', '.join(odd)}")
    model.load_state_dict(trained, strict=False)
    if merge:
        model = model.merge_and_unload()
    base = model.get_base_model() if recipe.lora is not None and not merge else model
    base.config.use_cache = True
    base.generation_config.eos_token_id = contract.stop_ids
    model.save_pretrained(folder)
    if recipe.lora is not None and not merge:
        generation: GenerationConfig = base.generation_config
        generation.save_pretrained(folder)
        adapter = folder / "adapter_model.safetensors"
        tensors = load_file(adapter)
        # An adapter travels alone; its file says under which contract it was trained.
        save_file(tensors, adapter, metadata={"format": "pt", "chat_contract": f"sha256:{contract.behaviour_sha256}"})


def _write_tokenizer(recipe: Recipe, contract: Contract, folder: Path) -> None:
    """The tokenizer with the trained template, which must come back equal from the file."""
    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.located().model.path, **recipe.model.loading())
    tokenizer.chat_template = contract.template
    tokenizer.save_pretrained(folder)
    if (folder / "chat_template.jinja").read_text(encoding="utf-8") != contract.template:
        raise BurnishError(f"{folder}: chat_template.jinja is not the template that was trained")


def _check_tensors(file: Path) -> None:
    """Raises BurnishError where a saved tensor is empty or not finite; ZeRO-3 with adapters is known to save empty ones."""
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
            tensor = tensors.get_tensor(name)
            if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
                raise BurnishError(f"{file.name}: the tensor {name} is empty or not finite; the export is not good")
