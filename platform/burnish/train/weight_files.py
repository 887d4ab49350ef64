"""The files of a model's weights: what tensors they hold, and whether workers can load parts of them."""

import json
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from burnish.config import Recipe
from burnish.errors import InfrastructureError, RecipeError, one_line


def shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a model folder by name, from the safetensors headers alone."""
    return {name: shape for file in folder.glob("*.safetensors") for name, shape in shapes_in(file).items()}


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of one safetensors file. Raises RecipeError where it is none."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
    except (OSError, struct.error, ValueError) as error:
        raise RecipeError(f"model.path: {file} is no safetensors file ({error}); was it cloned without git lfs?") from None
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def files_of_parts(recipe: Recipe, model: Any, **options: Any) -> dict[str, Path] | None:
    """The file of each weight of a base model, where workers can load a part of each alone; None where they must load all.

    That is so where the files hold other tensors than the model has (transformers then converts them, or scales what is
    quantised) or one of them twice, and for DoRA, which looks at all weights. A Hub model is downloaded, with these options
    of `hf_hub_download`; of one that `local_files_only` does not find nothing is known, and the files are none.
    """
    if recipe.lora is not None and recipe.lora.variant == "dora":
        return None
    if getattr(model.config, "transformers_weights", None):  # names other files than transformers' own
        return None
    files = _weight_files(recipe, **options)
    if not files and options.get("local_files_only"):
        return {}
    held = [(name, file, shape) for file in files for name, shape in shapes_in(file).items()]
    wanted = {name: list(weight.shape) for name, weight in model.named_parameters()}
    # Buffers that are saved are no weights.
    saved = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    if saved or len(held) != len(wanted) or {name: shape for name, _, shape in held} != wanted:
        return None
    return {name: file for name, file, _ in held}


def _weight_files(recipe: Recipe, **options: Any) -> list[Path]:
    """Files that transformers reads weights from: model.safetensors, else those that an index names; none if one lacks.

    Raises RecipeError for a Hub model that may not be read, InfrastructureError where the Hub does not answer.
    """
    path = recipe.located().model.path

    def file(name: str) -> Path | None:
        if Path(path).is_dir():
            return Path(path, name) if Path(path, name).exists() else None
        try:
            return Path(hf_hub_download(path, name, revision=recipe.model.revision, **options))
        except LocalEntryNotFoundError as error:
            if options.get("local_files_only") or is_offline_mode():
                return None
            raise InfrastructureError(f"model.path: {path} cannot be downloaded now: {one_line(error)}") from None
        except EntryNotFoundError:
            return None
        except OSError as error:
            if error.errno is not None:  # a disk that is full, say
                raise
            raise RecipeError(recipe.model.unloadable(error)) from None

    single, index = file("model.safetensors"), None
    if single is None:
        index = file("model.safetensors.index.json")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else []
    files = [single] if single else [file(name) for name in names]
    return [] if None in files else [each for each in files if each]
