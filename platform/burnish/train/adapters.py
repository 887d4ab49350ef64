"""Adapters: what a recipe names for them, checked against the model, and a model that has them (peft)."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.errors import RecipeError, one_line
from burnish.sections import LoraSpec

logger = logging.getLogger(__name__)


def check_adapters(spec: LoraSpec, shapes: Mapping[str, list[int]], quantize: str | None = None) -> None:
    """Raises RecipeError where a name of the recipe is that of no module of a model whose tensors have these shapes.

    So it does for a linear layer to be trained whole that is kept in fewer bits. Nothing is checked where no tensor is a
    plain matrix, as in quantised files.
    """
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    if not matrices:
        return
    linear = [name for name in matrices if "embed" not in name]
    for target in () if isinstance(spec.target_modules, str) else spec.target_modules:
        if not any(_is_named(name, target) for name in matrices):
            known = ", ".join(sorted({name.split(".")[-1] for name in linear}))
            raise RecipeError(f"lora.target_modules: the model has no {target!r}; write all-linear or some of {known}")
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    inner = [name for name in linear if not _is_named(name, "lm_head")]
    _check_saved(spec, modules, inner)
    for saved in spec.modules_to_save if quantize else ():
        if any(_is_named(name, saved) for name in inner):
            raise RecipeError(f"lora.modules_to_save: {saved!r} is kept in {quantize}, which cannot be trained; take it out")


def with_adapters(model: Any, spec: LoraSpec, token_ids: Sequence[int] = ()) -> Any:
    """The model with fresh adapters in its own dtype; DeepSpeed keeps the float32 masters. Only what they are is trained.

    `token_ids` are those of `train_tokens`, whose rows of embeddings and head are trained too.
    Raises RecipeError for names that the model does not have, and for a weight that input and output share.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_untied(model, spec)
    modules = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    head = model.get_output_embeddings()
    linear = [path for path, each in model.named_modules() if isinstance(each, torch.nn.Linear) and each is not head]
    _check_saved(spec, modules, linear)
    if token_ids and getattr(head, "bias", None) is not None:  # PEFT would compute the head without it
        raise RecipeError("lora.train_tokens: the head of this model has a bias; write lora.modules_to_save instead")
    # Whole paths: PEFT takes every module whose path ends with these letters, and passes over names that nothing has.
    saved = [path for path in modules if any(_is_named(path, name) for name in spec.modules_to_save)]
    lora = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.variant == "rslora",
        use_dora=spec.variant == "dora",
        target_modules=spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules),
        modules_to_save=saved or None,
        trainable_token_indices=_token_rows(model, token_ids) or None,
        task_type="CAUSAL_LM",
    )
    dtype = model.get_input_embeddings().weight.dtype
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"lora.target_modules: {one_line(error)}") from None
    _check_adapted(adapted, spec, linear)
    for weight in adapted.parameters():  # those beside quantised weights, or none, would be in float32
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return adapted


def copied(model: Any, spec: LoraSpec) -> list[Any]:
    """The modules of which adapters copy weights: those that are trained whole, and those of which rows are."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if spec.train_tokens else []
    named = [module for path, module in model.named_modules() if any(_is_named(path, name) for name in spec.modules_to_save)]
    return [*ends, *named]


def _check_adapted(adapted: Any, spec: LoraSpec, linear: Collection[str]) -> None:
    """Raises RecipeError for a name that PEFT passed over; says what `all-linear` leaves without an adapter."""
    config, reached = adapted.peft_config["default"], set(adapted.targeted_module_names)
    if isinstance(spec.target_modules, str):
        left = [path for path in linear if path not in reached]
        if left:
            kinds = ", ".join(sorted({path.rpartition(".")[2] for path in left}))
            logger.warning("lora.target_modules: %d linear layers get no adapter from PEFT (%s)", len(left), kinds)
        return
    for name in spec.target_modules:
        # What PEFT takes for parts of expert weights is no longer among the modules.
        if name in (config.target_modules or ()) and not any(_is_named(path, name) for path in reached):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise RecipeError(f"lora.target_modules: the model has no {name!r}; write all-linear or some of {known}")


def _token_rows(model: Any, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """The rows that are trained, by the path of their module; a head that shares its weight with the embeddings has none."""
    if not token_ids:
        return {}
    ends = [model.get_input_embeddings()]
    if ends[0].weight is not model.get_output_embeddings().weight:
        ends.append(model.get_output_embeddings())
    return {path: list(token_ids) for path, module in model.named_modules() if any(module is end for end in ends)}


def with_saved_adapters(model: Any, folder: Path) -> Any:
    """A base model with the adapters that a folder holds, computed in the model's own dtype as they were in training."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)


def _check_untied(model: Any, spec: LoraSpec) -> None:
    if not model.config.get_text_config().tie_word_embeddings:
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    targets = () if isinstance(spec.target_modules, str) else spec.target_modules
    for key, names in (("target_modules", targets), ("modules_to_save", spec.modules_to_save)):
        tied = {name for name in names if any(_is_named(path, name) for path in paths)}
        if tied:
            raise RecipeError(
                f"lora.{key}: {', '.join(sorted(tied))} shares its weight between input and output in this model, "
                "so what is merged would be another model; take it out"
            )


def _check_saved(spec: LoraSpec, modules: Collection[str], linear: Collection[str]) -> None:
    """Raises RecipeError for a module to save that the model does not have, or that gets an adapter, being linear."""
    targets = spec.target_modules
    for name in spec.modules_to_save:
        found = [path for path in modules if _is_named(path, name)]
        if not found:
            known = ", ".join(sorted({path.split(".")[-1] for path in modules}))
            raise RecipeError(f"lora.modules_to_save: the model has no {name!r}; write some of {known}")
        adapted = linear if isinstance(targets, str) else [p for p in found if any(_is_named(p, each) for each in targets)]
        if set(found) & set(adapted):
            raise RecipeError(
                f"lora.modules_to_save: {name!r} has an adapter already; take it out here, or out of lora.target_modules"
            )


def _is_named(path: str, name: str) -> bool:
    """Whether a module's path ends with a name, in whole components: `norm` is no name of `input_layernorm`."""
    return path == name or path.endswith(f".{name}")
