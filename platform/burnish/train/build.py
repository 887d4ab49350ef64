"""The model as a worker trains it: packed attention, adapters, weights of the base or of a checkpoint.

With ZeRO-3 on several workers each weight is read by world rank 0 alone and shared out before the next ones, so that
no worker ever holds the model: weights larger than its memory can be trained.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from burnish.config import Recipe
from burnish.data.tokenizer import trained_token_ids
from burnish.train import attention, elementwise, kernel_choice, quantized
from burnish.train.adapters import with_adapters
from burnish.train.architecture import attention_dropout, configuration, head_widths, text_configuration
from burnish.train.engine import share_out
from burnish.train.lora_linear import fuse
from burnish.train.model import check_class, check_finite, load_weights, recompute, shapes
from burnish.train.shards import Shards

logger = logging.getLogger(__name__)


def build_model(recipe: Recipe, cuda: bool, num_workers: int = 1, trained: Path | None = None) -> nn.Module:
    """The model in the recipe's dtype, adapters added where the recipe has LoRA; `trained` are weights of a checkpoint.

    Equal on every worker: adapters are drawn from `train.seed`. Only what is trained requires gradients. It is on the CPU,
    or where DeepSpeed keeps what it shared out. A collective call of `num_workers`.
    Raises RecipeError for target modules that the model does not have.
    """
    check_class(recipe, configuration(recipe))
    text = text_configuration(recipe)
    kernel = attention.register(
        recipe.model.attention,
        cuda,
        half=recipe.model.dtype != "float32",
        heads=head_widths(text),
        dropout=attention_dropout(text),
    )
    shares = recipe.engine.stage() == 3 and num_workers > 1
    device = torch.device("cuda", torch.cuda.current_device()) if cuda and shares else torch.device("cpu")
    model, shards = _shared_out(recipe, kernel, num_workers, trained, device) if shares else (None, None)
    whole = model is None
    if model is None:
        model = load_weights(recipe, attn_implementation=kernel, **quantized.loading(recipe))
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it would get no gradient, and the token that pads may be the one that ends answers
    torch.manual_seed(recipe.train.seed)
    if recipe.lora is not None:
        model = with_adapters(model, recipe.lora, trained_token_ids(recipe))
        if whole and shares:
            shards = Shards(model, device, recipe.scale.patience_seconds())
        fuse(model)
    modules = elementwise.replaceable(model)
    elementwise.fuse(modules, kernel_choice.of(recipe, text, cuda, modules))
    if trained is not None and (whole or recipe.lora is not None):
        _put(model, trained)
    if recipe.model.recomputes():
        recompute(model)
        if shards is not None:
            shards.recompute()
    result: nn.Module = model.train()
    return result


def _put(model: nn.Module, file: Path) -> None:
    """Puts the weights of a checkpoint into a model that has them whole."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with safe_open(file, "pt") as weights, torch.no_grad():
        assert set(weights.keys()) == set(wanted), f"{file} is of another model"
        for name, parameter in wanted.items():
            parameter.copy_(weights.get_tensor(name))


def _shared_out(
    recipe: Recipe, kernel: str, num_workers: int, trained: Path | None, device: torch.device
) -> tuple[Any, Shards | None]:
    """The base model with its weights shared out over all workers, and what gathers them; None where it is loaded whole.

    That is so for a Hub model, where the files hold other tensors than the model has (transformers then
    converts them, or scales what is quantised), and for adapters that look at the weights themselves.
    """
    folder = Path(recipe.located().model.path)
    looks = recipe.lora is not None and (
        recipe.lora.variant == "dora" or recipe.lora.modules_to_save or recipe.lora.train_tokens
    )
    if not folder.is_dir() or looks:
        return None, None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            configuration(recipe), dtype=getattr(torch, recipe.model.dtype), attn_implementation=kernel
        )
    model.tie_weights()  # what was empty when it was set is no longer the same
    named = dict(model.named_parameters())
    wanted = {name: list(parameter.shape) for name, parameter in named.items()}
    # A tensor in two files may be either; transformers knows which. Buffers that are saved are no weights.
    names = [name for file in folder.glob("*.safetensors") for name in _files_of(file)]
    saved = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    if shapes(folder) != wanted or len(names) != len(wanted) or saved:
        if dist.get_rank() == 0:
            logger.warning("%s: its files hold other tensors than the model, so every worker loads all of it", folder)
        return None, None
    files = {name: file for each in folder.glob("*.safetensors") for name, file in _files_of(each).items()}
    shards = None
    if recipe.lora is None:
        share_out(_weights(model, files | (_files_of(trained) if trained else {})), recipe, num_workers)
    else:
        called = {weight: name for name, weight in model.requires_grad_(False).named_parameters()}
        shards = Shards(
            model, device, recipe.scale.patience_seconds(), lambda weight: _read(files[called[weight]], called[weight])
        )
    device = next(model.parameters()).device
    for module in model.modules():  # DeepSpeed leaves buffers where they are, since the weights are shared out already
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model, shards


def _weights(model: nn.Module, files: dict[str, Path]) -> Iterator[nn.Parameter]:
    """Each weight of a model without any, filled on world rank 0 when it is asked for; tied ones stay one."""
    real: dict[nn.Parameter, nn.Parameter] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = [
        (module, key, each) for module in model.modules() for key, each in module._parameters.items() if each is not None
    ]
    for module, key, empty in places:
        if empty not in real:
            first, name = dist.get_rank() == 0, names[empty]
            weight = _read(files[name], name).to(empty.dtype) if first else torch.empty(empty.shape, dtype=empty.dtype)
            real[empty] = nn.Parameter(weight, requires_grad=empty.requires_grad)
            module._parameters[key] = real[empty]
            del weight
            yield real[empty]
        module._parameters[key] = real[empty]


def _read(file: Path, name: str) -> torch.Tensor:
    """A weight, alone in memory; raises RecipeError where it is no number."""
    with safe_open(file, "pt") as weights:
        weight: torch.Tensor = weights.get_tensor(name)
    check_finite(weight, name, f"model.path: {file.parent}")
    return weight


def _files_of(file: Path) -> dict[str, Path]:
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(weights.keys(), file)
