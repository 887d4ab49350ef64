"""The model as a worker trains it: packed attention, adapters, weights of the base or of a checkpoint.

With ZeRO-3 on several workers each weight is read by world rank 0 alone and shared out before the next ones, so that
no worker ever holds the model: weights larger than its memory can be trained.
"""

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from burnish.config import Recipe
from burnish.data.tokenizer import trained_token_ids
from burnish.train import attention, elementwise, kernel_choice, quantized
from burnish.train.adapters import copied, with_adapters
from burnish.train.architecture import attention_dropout, configuration, fresh, head_widths, text_configuration
from burnish.train.engine import share_out
from burnish.train.lora_linear import fuse
from burnish.train.model import check_class, check_finite, load_weights, recompute
from burnish.train.shards import Shards
from burnish.train.weight_files import files_of_parts, shapes_in

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

    World rank 0 decides, on whose machine alone the weights of a Hub model then are.
    """
    with init_empty_weights(include_buffers=False):
        model = fresh(recipe, kernel)
    model.tie_weights()  # what was empty when it was set is no longer the same
    # Nobody gives up while it is downloaded.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    files = files_of_parts(recipe, model) if dist.get_rank() == 0 else None
    in_parts = torch.tensor(int(files is not None))
    dist.broadcast(in_parts, 0, group=group)
    dist.destroy_process_group(group)
    if not in_parts:
        if dist.get_rank() == 0:
            logger.warning("model.path: %s cannot be loaded in parts, so every worker loads all of it", recipe.model.path)
        return None, None
    files, shards = files or {}, None
    if recipe.lora is None:
        ours = dict.fromkeys(shapes_in(trained), trained) if trained else {}
        share_out(_weights(model, files | ours), recipe, num_workers)
    else:
        called = {weight: name for name, weight in model.requires_grad_(False).named_parameters()}
        for module in copied(model, recipe.lora):
            module.requires_grad_()  # so that every worker has it whole
        shards = Shards(
            model,
            device,
            recipe.scale.patience_seconds(),
            lambda weight: _read(files[called[weight]], called[weight], weight.dtype),
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
            weight = _read(files[name], name, empty.dtype) if first else torch.empty(empty.shape, dtype=empty.dtype)
            real[empty] = nn.Parameter(weight, requires_grad=empty.requires_grad)
            module._parameters[key] = real[empty]
            del weight
            yield real[empty]
        module._parameters[key] = real[empty]


def _read(file: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight, alone in memory; raises RecipeError where it is no number, or too large a one for its type."""
    with safe_open(file, "pt") as weights:
        weight: torch.Tensor = weights.get_tensor(name).to(dtype)
    check_finite(weight, name, f"model.path: {file.parent}")
    return weight
