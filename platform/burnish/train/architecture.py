"""What a model's configuration says: how many tokens and positions it has, how wide its layers are, what a pack costs."""

from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.config import Recipe
from burnish.data.balance import Cost
from burnish.errors import RecipeError


def configuration(recipe: Recipe) -> Any:
    """The configuration of the recipe's model. Raises RecipeError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(recipe.located().model.path, **recipe.model.loading())
    except (OSError, ValueError, StrictDataclassError) as error:
        raise RecipeError(recipe.model.unloadable(error)) from None


def fresh(recipe: Recipe, kernel: str, config: Any = None) -> Any:
    """The model of the recipe's configuration, or of another one, with attention by a registered kernel and fresh weights.

    Of code that the model brings, only that of the recipe's revision is run, and only where the recipe trusts it.
    """
    config = configuration(recipe) if config is None else config
    options: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    is_loaded = known is not None and not known.__module__.startswith("transformers.")
    if recipe.model.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}) and not is_loaded:
        options["code_revision"] = recipe.model.revision  # which would become an argument of a class that is loaded already
    dtype = getattr(torch, recipe.model.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel, **options)
    model.config.use_cache = False
    return model


def text_configuration(recipe: Recipe) -> Any:
    """The part of the configuration that is of text; raises RecipeError where there are several."""
    config = configuration(recipe)
    try:
        return config.get_text_config()
    except ValueError:
        raise RecipeError(f"model.path: {recipe.model.path} has several text models; name a model with one") from None


def embedded_tokens(recipe: Recipe) -> int:
    """How many tokens the model has embeddings of; ids lie below."""
    return int(text_configuration(recipe).vocab_size)


def unembedded(input_ids: NDArray[np.int32], embedded: int) -> int | None:
    """One of these tokens that a model with embeddings of so many does not have, or None."""
    largest = int(input_ids.max(initial=-1))
    return largest if largest >= embedded else None


def positions(config: Any) -> int | None:
    """How many positions a model knows, those among them that its rotary ones are stretched to; None where it has no end.

    YaRN and linear scaling stretch `original_max_position_embeddings`, or those of the configuration, by `factor`.
    """
    own = getattr(config, "max_position_embeddings", None)
    if not own:
        return None
    stretched = (
        float(rope.get("factor") or 1) * int(rope.get("original_max_position_embeddings") or own) for rope in _ropes(config)
    )
    return max(int(own), *map(int, stretched))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary positions, of all layers and of each type of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    return [ropes, *(each for each in ropes.values() if isinstance(each, dict))]


def longest_apart(config: Any) -> int | None:
    """The longest sample with which rotary positions of others in its pack stay as they are; None where any is.

    transformers chooses the frequencies of these two kinds by the largest position of the whole row
    (`modeling_rope_utils.dynamic_rope_update`).
    """
    found = []
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind:
            found.append(int(config.max_position_embeddings))
        elif kind == "longrope":
            found.append(int(rope.get("original_max_position_embeddings") or config.max_position_embeddings))
    return min(found, default=None)


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
