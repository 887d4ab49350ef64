"""The model of a recipe: its folder checked, its weights loaded and checked."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import find_adapter_config_file

from burnish.config import Recipe
from burnish.errors import RecipeError, one_line
from burnish.train.adapters import check_adapters
from burnish.train.architecture import configuration, longest_apart, positions, text_configuration
from burnish.train.weight_files import shapes

if TYPE_CHECKING:
    import torch
_ISOLATED_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types in which the packed kernel keeps samples apart; linear attention and state spaces are not among them."""

_WINDOW_BY_MASK = {"phimoe", "qwen2_moe"}
"""Models of transformers whose layers do not tell attention their window."""


def check_model(recipe: Recipe) -> None:
    """Raises RecipeError unless the model folder holds a configuration and weights that packed attention can train.

    A name that is no folder but looks like a Hub id (`owner/name`) is left to the Hub.
    """
    if recipe.model.trust_remote_code and not recipe.train.self_test:
        raise RecipeError(
            "train.self_test: false leaves unproven that the code of model.trust_remote_code keeps packed samples apart; "
            "write train.self_test: true"
        )
    path = Path(recipe.model.path).expanduser()
    if not path.is_dir():
        if path.exists() or recipe.model.path.startswith((".", "/", "~")) or recipe.model.path.count("/") != 1:
            raise RecipeError(f"model.path: {recipe.model.path!r} is no folder; write one with a Hugging Face model")
    else:
        if not (path / "config.json").exists():
            raise RecipeError(f"model.path: {path} has no config.json, so it is no Hugging Face model folder")
        _check_files(path)
        if recipe.lora is not None:
            check_adapters(recipe.lora, shapes(path), recipe.model.quantize)
    _check_architecture(recipe, path)


def _check_architecture(recipe: Recipe, path: Path) -> None:
    """Raises RecipeError unless a model's configuration is one that packed attention keeps samples apart in."""
    config = text_configuration(recipe)
    if find_adapter_config_file(recipe.located().model.path, revision=recipe.model.revision) is not None:
        raise RecipeError(
            f"model.path: {path} holds an adapter (adapter_config.json), which transformers would load too; merge "
            "it first, or take that file out to train the model without it"
        )
    quantised = getattr(configuration(recipe), "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise RecipeError(
            f"model.path: {path} is quantised already ({kind}), and such weights cannot be trained; name the model that it "
            "was made from, and where memory is short write model.quantize: nf4"
        )
    layers = set(getattr(config, "layer_types", None) or ()) - _ISOLATED_LAYERS
    if layers:
        raise RecipeError(
            f"model.path: {path} has layers of type {', '.join(sorted(layers))}, which cannot keep packed samples apart"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise RecipeError(f"model.path: {path} uses attention softcapping, which packed attention does not support")
    sinks = path.is_dir() and any(name.endswith(".sinks") for name in shapes(path))
    if sinks or config.model_type == "gpt_oss":
        raise RecipeError(f"model.path: {path} uses attention sinks, which packed attention does not support")
    _check_length(recipe, config, path)


def _check_length(recipe: Recipe, config: Any, path: Path) -> None:
    """Raises RecipeError where a sample may be longer than the model can take, or be packed."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if config.model_type in _WINDOW_BY_MASK and window and recipe.data.max_length > window:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the window of {window} tokens that {path} keeps by a "
            f"mask alone, which packed attention does not read; write data.max_length: {window}"
        )
    longest = longest_apart(config)
    if longest is not None and recipe.data.max_length > longest:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the {longest} positions beyond which {path} turns all "
            f"samples of a pack otherwise, by its longest one, so that they would change each other; write "
            f"data.max_length: {longest}"
        )
    most = positions(config)
    if most is not None and recipe.data.max_length > most:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the {most} positions that {path} knows; write "
            f"data.max_length: {most}, or, to teach it longer ones, max_position_embeddings in its config.json"
        )


def _check_files(folder: Path) -> None:
    """Raises RecipeError unless a model folder has its weights as safetensors, all of them in the folder itself."""
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise RecipeError(
                f"model.path: {folder} has its weights in {pickled[0]}, a pickle, which can run code when it is read; "
                'convert it where nothing can be harmed: python -c "from transformers import AutoModelForCausalLM as M; '
                "M.from_pretrained('OLD').save_pretrained('NEW')\", and name the new folder with the tokenizer's files"
            )
        raise RecipeError(f"model.path: {folder} has no weights (*.safetensors); copy them there or name another folder")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"model.path: {index} is no index of weights: {one_line(error)}; copy it again") from None
        for name in sorted(named):
            if Path(name).name != name:
                raise RecipeError(
                    f"model.path: {index} names {name!r}, which is no file of this folder; write its bare name"
                )


def model_digest(path: str) -> str | None:
    """The sha256 of a local model's files, None for a Hub model. The chat template is the contract's to judge.

    Of a file over 8 MiB the size and 64 blocks of 64 KiB at even distances count, so that it takes seconds for any model;
    another training of the same model differs in every one of them.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    endings = {".safetensors", ".bin", ".json", ".model"}
    files = [path for path in folder.iterdir() if path.suffix in endings and path.name != "tokenizer_config.json"]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            if size <= 8 << 20:
                digest.update(stream.read())
                continue
            for block in range(64):
                stream.seek(block * (size - (64 << 10)) // 63)
                digest.update(stream.read(64 << 10))
    return digest.hexdigest()


def newest_commit(path: str) -> str:
    """The commit at which a Hub model stands now, whose configuration has been read."""
    return Path(hf_hub_download(path, "config.json")).parent.name


def load_weights(recipe: Recipe, **options: Any) -> Any:
    """The base model in the recipe's dtype, its weights from safetensors alone: a pickle can run code when it is read.

    Raises RecipeError where there are none, where one is missing or no number, or where the model needs code that the recipe
    does not trust.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # Otherwise a Hub model without safetensors would be read from a pull request that a bot opened there.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            recipe.located().model.path,
            **recipe.model.loading(),
            use_safetensors=True,
            dtype=getattr(torch, recipe.model.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` names them
            **options,
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise RecipeError(recipe.model.unloadable(error)) from None
    if "quantization_config" in options:
        _check_files_finite(recipe)
    check_loaded(model, found, f"model.path: {recipe.model.path}")
    return model


def _check_files_finite(recipe: Recipe) -> None:
    """Raises RecipeError where a weight in a model's files is no number; in fewer bits that no longer shows."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    path = recipe.located().model.path
    config = cached_file(path, "config.json", revision=recipe.model.revision)
    for file in sorted(Path(str(config)).parent.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # safe_open is no mapping
                check_finite(weights.get_tensor(name), name, f"model.path: {path}")


def check_loaded(model: Any, found: dict[str, Any], place: str) -> None:
    """Raises RecipeError where a weight was in none of the files or has another shape there, so that it is random, or is no
    number.

    `found` is what transformers says of the loading.
    """
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        raise RecipeError(
            f"{place} has {name} of shape {list(shape)}, where its config.json asks for {list(wanted)}; copy it again, whole"
        )
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise RecipeError(
            f"{place} lacks {len(found['missing_keys'])} of the model's weights, {names}; copy it again, whole"
        )
    for name, weight in model.named_parameters():
        check_finite(weight.detach(), name, place)


def is_finite(weight: "torch.Tensor") -> bool:
    """Whether all numbers of a weight are finite; no copy is made."""
    import torch

    return bool(torch.isfinite(weight.sum(dtype=torch.float32)))  # whatever is not finite shows in the sum


def check_finite(weight: "torch.Tensor", name: str, place: str) -> None:
    """Raises RecipeError where a weight is no number."""
    if not is_finite(weight):
        raise RecipeError(f"{place}: {name} is not finite (NaN or infinite); copy the model again, or take another")


def decoder_layers(model: Any) -> Any:
    """The layers of the text decoder, a `torch.nn.ModuleList`: the outermost list of modules in it."""
    import torch

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # else a tower of vision may come first
    return next(each for each in decoder.modules() if isinstance(each, torch.nn.ModuleList))


def recompute(model: Any) -> None:
    """Has a model recompute the activations of each layer in the backward pass, even if its embeddings are not trained."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def check_class(recipe: Recipe, config: Any) -> None:
    """Raises RecipeError where the model's class keeps a state, or computes attention past the registered kernel."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    # Code of the Hub need not say of itself what it does; it is proven at the first step.
    own = found is not None and found.__module__.startswith("transformers.")
    if own and (found._is_stateful or not found._supports_attention_backend):
        why = "keeps a state from token to token" if found._is_stateful else "does not compute attention by a kernel of ours"
        raise RecipeError(
            f"model.path: {recipe.model.path} is a {found.__name__}, which {why}, so packed samples would leak"
        )
