"""A frozen base whose linear layers are kept in 8 or 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes."""

import importlib.util
from typing import Any

import torch
from torch import nn

from burnish.config import Recipe
from burnish.errors import RecipeError

_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a weight with its scales: for nf4 one byte for 64 weights and four for 256 of those (QLoRA, section 3)."""


def check_quantized(recipe: Recipe) -> None:
    """Raises RecipeError where the library that `model.quantize` needs is not installed."""
    if recipe.model.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"model.quantize: {recipe.model.quantize} needs bitsandbytes, which is not installed; write "
            "pip install -e '.[quantize]', or model.quantize: null"
        )


def loading(recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` is told so that linear layers, the head apart, are quantised while they are read."""
    from transformers import BitsAndBytesConfig

    if recipe.model.quantize is None:
        return {}
    check_quantized(recipe)
    if recipe.model.quantize == "int8":
        # By default columns are picked by the largest values of all rows, so that packed samples would touch each other.
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.model.dtype),
    )
    return {"quantization_config": four}


def saved_bytes(recipe: Recipe, model: Any) -> tuple[int, int]:
    """Bytes by which quantised weights are smaller than those of a model as it is, and those of the largest one made whole.

    A weight is made whole again for each product.
    """
    if recipe.model.quantize is None:
        return 0, 0
    head = model.get_output_embeddings()
    head = getattr(head, "original_module", head)  # PEFT's wrapper of one that is trained
    linear = [each.weight for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    frozen = [weight for weight in linear if not weight.requires_grad]
    saved = sum(weight.nbytes - int(weight.numel() * _BYTES[recipe.model.quantize]) for weight in frozen)
    return saved, max((weight.nbytes for weight in frozen), default=0)
