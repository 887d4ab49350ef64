"""The model of a recipe: its folder checked, its cost, its weights, with adapters where the recipe has them."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from transformers import AutoConfig

from burnish.config import Recipe
from burnish.data.balance import Cost
from burnish.errors import RecipeError, one_line
from burnish.train.adapters import check_adapters

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
    config = text_configuration(recipe)
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
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if config.model_type in _WINDOW_BY_MASK and window and recipe.data.max_length > window:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the window of {window} tokens that {path} keeps by a "
            f"mask alone, which packed attention does not read; write data.max_length: {window}"
        )
    longest = _longest_apart(config)
    if longest is not None and recipe.data.max_length > longest:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the {longest} positions beyond which {path} turns all "
            f"samples of a pack otherwise, by its longest one, so that they would change each other; write "
            f"data.max_length: {longest}"
        )


def _longest_apart(config: Any) -> int | None:
    """The longest sample with which rotary positions of others in its pack stay as they are; None where any is.

    transformers chooses the frequencies of these two kinds by the largest position of the whole row
    (`modeling_rope_utils.dynamic_rope_update`).
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    found = []
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind:
            found.append(int(config.max_position_embeddings))
        elif kind == "longrope":
            found.append(int(rope.get("original_max_position_embeddings") or config.max_position_embeddings))
    return min(found, default=None)


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


def shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a model folder by name, from the safetensors headers alone."""
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, file.stat().st_size)))
        except (OSError, struct.error, ValueError) as error:
            raise RecipeError(
                f"model.path: {file} is no safetensors file ({error}); was it cloned without git lfs?"
            ) from None
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found


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


def embedded_tokens(recipe: Recipe) -> int:
    """How many tokens the model has embeddings of; ids lie below."""
    return int(text_configuration(recipe).vocab_size)


def unembedded(input_ids: NDArray[np.int32], embedded: int) -> int | None:
    """One of these tokens that a model with embeddings of so many does not have, or None."""
    largest = int(input_ids.max(initial=-1))
    return largest if largest >= embedded else None


def pack_cost(recipe: Recipe) -> Cost:
    """The time of a pack for this model, in floating-point operations of the forward and backward pass."""
    return cost(text_configuration(recipe), adapters=recipe.lora is not None)


def cost(config: Any, adapters: bool) -> Cost:
    """The time of a pack for a model with this text configuration.

    A token costs 6 operations for each matrix weight, 4 where only `adapters` are trained, since the gradients of the
    weights are not computed; attention costs 2 * layers * width for each pair of tokens, three times over (PaLM, arXiv
    2204.02311, appendix B; half of the pairs, since attention is causal).
    """
    layers = list(enumerate(_layers(config)))
    matrices = sum(_matrices(layer, index) for index, layer in layers)
    matrices += _number(layers[0][1], 0, "hidden_size", 1024) * _number(layers[0][1], 0, "vocab_size", 0)
    kinds = list(getattr(config, "layer_types", None) or [])
    return Cost(
        per_token=float((4 if adapters else 6) * matrices),
        per_pair=float(3 * sum(_number(each, i, "num_attention_heads", 16) * sum(_widths(each, i)) for i, each in layers)),
        sliding=kinds.count("sliding_attention") / len(kinds) if kinds else 0.0,
        window=max(_number(each, i, "sliding_window", 1) for i, each in layers),
    )


def _matrices(layer: Any, index: int) -> int:
    """Matrix weights that a token meets in a layer."""
    width, heads = _number(layer, index, "hidden_size", 1024), _number(layer, index, "num_attention_heads", 16)
    kv_heads = _number(layer, index, "num_key_value_heads", heads)
    experts = _number(layer, index, "num_experts_per_tok", 1)
    inner = _number(layer, index, "moe_intermediate_size", _number(layer, index, "intermediate_size", 4 * width))
    query, value = _widths(layer, index)
    rank, kv_rank = _number(layer, index, "q_lora_rank", 0), _number(layer, index, "kv_lora_rank", 0)
    to_query = rank * (width + heads * query) if rank else width * heads * query
    to_kv = kv_rank * (width + heads * (query + value)) if kv_rank else width * kv_heads * (query + value)
    return to_query + to_kv + width * (heads * value + 3 * experts * inner)


def head_widths(config: Any) -> frozenset[tuple[int, int]]:
    """Widths of the attention heads of all layers: of queries and keys, and of values.

    Layers of Gemma 4 differ, and so do queries and values in multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
    """
    return frozenset(_widths(layer, index) for index, layer in enumerate(_layers(config)))


def layer_widths(config: Any) -> tuple[int, int]:
    """The widths of hidden states and of the widest layer within."""
    layers = list(enumerate(_layers(config)))
    width = max(_number(layer, index, "hidden_size", 1024) for index, layer in layers)
    return width, max(_number(layer, index, "intermediate_size", 4 * width) for index, layer in layers)


def attention_dropout(config: Any) -> float:
    """The largest dropout of attention scores in any layer."""
    return max(float(getattr(layer, "attention_dropout", 0.0) or 0.0) for layer in _layers(config))


def _widths(layer: Any, index: int) -> tuple[int, int]:
    plain = _number(layer, index, "hidden_size", 1024) // _number(layer, index, "num_attention_heads", 16)
    query = _number(layer, index, "head_dim", plain)
    if getattr(layer, "qk_nope_head_dim", None) is not None:  # latent attention: there head_dim is the part that is rotated
        query = _number(layer, index, "qk_nope_head_dim", 0) + _number(layer, index, "qk_rope_head_dim", 0)
    return query, _number(layer, index, "v_head_dim", query)


def _layers(config: Any) -> list[Any]:
    """The configuration of each layer; that of the whole model raises when it is asked for what differs by layer."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * _number(config, 0, "num_hidden_layers", 24)


def _number(layer: Any, index: int, name: str, default: int) -> int:
    """A number of a layer, or the default; some configurations list one for each layer."""
    value = getattr(layer, name, None)
    return int((value[index % len(value)] if isinstance(value, list) else value) or default)


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
            **options,
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise RecipeError(recipe.model.unloadable(error)) from None
    check_loaded(model, found, f"model.path: {recipe.model.path}")
    return model


def check_loaded(model: Any, found: dict[str, Any], place: str) -> None:
    """Raises RecipeError where a weight was in none of the files, so that it is random, or is no number.

    `found` is what transformers says of the loading.
    """
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
    if found is not None and (found._is_stateful or not found._supports_attention_backend):
        why = "keeps a state from token to token" if found._is_stateful else "does not compute attention by a kernel of ours"
        raise RecipeError(
            f"model.path: {recipe.model.path} is a {found.__name__}, which {why}, so packed samples would leak"
        )


def configuration(recipe: Recipe) -> Any:
    """The configuration of the recipe's model. Raises RecipeError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(recipe.located().model.path, **recipe.model.loading())
    except (OSError, ValueError, StrictDataclassError) as error:
        raise RecipeError(recipe.model.unloadable(error)) from None


def text_configuration(recipe: Recipe) -> Any:
    """The part of the configuration that is of text; raises RecipeError where there are several."""
    config = configuration(recipe)
    try:
        return config.get_text_config()
    except ValueError:
        raise RecipeError(f"model.path: {recipe.model.path} has several text models; name a model with one") from None
