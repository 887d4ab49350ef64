"""The model of a recipe: its folder checked, its tokenizer and template, its weights with or without adapters."""

import datetime
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template, _plain_template_data

from burnish.config import LoraSpec, Recipe
from burnish.data import syntax
from burnish.data.balance import Cost
from burnish.data.contract import renders
from burnish.data.template import Template
from burnish.errors import DataError, RecipeError

if TYPE_CHECKING:
    import torch
_ISOLATED_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types in which the packed kernel keeps samples apart; linear attention and state spaces are not among them."""


def check_model(recipe: Recipe) -> None:
    """Raises RecipeError unless the model folder holds a configuration and weights that packed attention can train.

    A name that is no folder but looks like a Hub id (`owner/name`) is left to the Hub.
    """
    path = Path(recipe.model.path).expanduser()
    if not path.is_dir():
        if path.exists() or recipe.model.path.startswith((".", "/", "~")) or recipe.model.path.count("/") != 1:
            raise RecipeError(f"model.path: {recipe.model.path!r} is no folder; write one with a Hugging Face model")
    else:
        if not (path / "config.json").exists():
            raise RecipeError(f"model.path: {path} has no config.json, so it is no Hugging Face model folder")
        if not [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
            raise RecipeError(f"model.path: {path} has no weights (*.safetensors); copy them there or name another folder")
        _check_targets(recipe, path)
    config = _configuration(recipe).get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - _ISOLATED_LAYERS
    if layers:
        raise RecipeError(
            f"model.path: {path} has layers of type {', '.join(sorted(layers))}, which cannot keep packed samples apart"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise RecipeError(f"model.path: {path} uses attention softcapping, which packed attention does not support")


def _check_targets(recipe: Recipe, folder: Path) -> None:
    """Raises RecipeError where a target module is the name of no linear layer of the model."""
    targets = recipe.lora.target_modules if recipe.lora else "all-linear"
    matrices = [name.removesuffix(".weight") for name, shape in shapes(folder).items() if len(shape) == 2]
    if isinstance(targets, str) or not matrices:
        return
    known = sorted({name.split(".")[-1] for name in matrices if "embed" not in name})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            raise RecipeError(
                f"lora.target_modules: the model has no {target!r}; write all-linear or some of {', '.join(known)}"
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


def model_digest(recipe: Recipe) -> str | None:
    """The sha256 of a local model's files, None for a Hub model. The chat template is the contract's to judge.

    Of a file over 8 MiB the size and 64 blocks of 64 KiB at even distances count, so that it takes seconds for any model;
    another training of the same model differs in every one of them.
    """
    folder = Path(recipe.model.path).expanduser()
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


class _Direct:
    """A tokenizer that renders templates without the copies by which transformers shields itself from its callers.

    What burnish renders is plain JSON already. A template that reads the clock (`strftime_now`) sees a fixed day, if there
    is one; through transformers it cannot.
    """

    def __init__(self, tokenizer: Any, date: datetime.date | None) -> None:
        self._tokenizer, self._special = tokenizer, dict(tokenizer.special_tokens_map)
        self._clock = {"strftime_now": date.strftime} if date else {}

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> str:
        """The text that the tokenizer's own method gives for `tokenize=False`."""
        given = {name: kwargs.pop(name) for name in ("tools", "add_generation_prompt")}
        assert not kwargs.pop("tokenize")
        compiled = _compile_jinja_template(kwargs.pop("chat_template"))
        shown = {"messages": _alias_reasoning_fields(conversation), "documents": None, **given, **self._clock}
        return str(compiled.render(**shown, **{**self._special, **_plain_template_data(kwargs)}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # pickle asks before there is a tokenizer to ask
        return getattr(self._tokenizer, name)


def load_template(recipe: Recipe, date: str | None = None) -> Template:
    """The tokenizer with the resolved chat template and stop tokens that serving will use.

    `date` is the day (ISO) of a run that was started before, shown where the template reads the clock.
    Raises DataError where there is no chat template, or where a stop token is not one token of the vocabulary.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(_place(recipe), revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: {recipe.model.path} has no usable tokenizer: {_line(error)}") from None
    fixed = recipe.template.date.isoformat() if recipe.template.date else date
    return dated(tokenizer, _source(recipe, tokenizer), recipe.template.kwargs, _stop_ids(recipe, tokenizer), fixed)


def dated(tokenizer: Any, source: str, kwargs: Mapping[str, Any], stop_ids: frozenset[int], date: str | None) -> Template:
    """A template that shows the day `date` (ISO), else today, where it reads the clock. Raises what Template raises."""
    # Generation configurations may name ids of a padded vocabulary, which no text has.
    stop_ids = frozenset(i for i in stop_ids if tokenizer.convert_ids_to_tokens(i) is not None)
    if syntax.parse(source).reads_clock:
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        return Template(_Direct(tokenizer, day), source, kwargs, stop_ids, day.isoformat())
    plain, direct = (Template(each, source, kwargs, stop_ids) for each in (tokenizer, _Direct(tokenizer, None)))
    return direct if list(renders(direct)) == list(renders(plain)) else plain


def pack_cost(recipe: Recipe) -> Cost:
    """The time of a pack for this model, in floating-point operations of the forward and backward pass.

    A token costs 6 operations for each matrix weight, 4 where the weights themselves are not trained, since their gradients
    are not computed; attention costs 2 * layers * width for each pair of tokens, three times over (PaLM, arXiv 2204.02311,
    appendix B; half of the pairs, since attention is causal).
    """
    config = _configuration(recipe).get_text_config()
    width, layers = int(getattr(config, "hidden_size", 1024)), int(getattr(config, "num_hidden_layers", 24))
    heads = int(getattr(config, "num_attention_heads", 0) or 16)
    head_dim = int(getattr(config, "head_dim", None) or width // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    inner = int(getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width)
    matrices = layers * width * (2 * heads * head_dim + 2 * kv_heads * head_dim + 3 * experts * inner)
    matrices += width * int(getattr(config, "vocab_size", 0))
    kinds = list(getattr(config, "layer_types", None) or [])
    return Cost(
        per_token=float((4 if recipe.lora else 6) * matrices),
        per_pair=float(3 * 2 * layers * heads * head_dim),
        sliding=kinds.count("sliding_attention") / len(kinds) if kinds else 0.0,
        window=int(getattr(config, "sliding_window", None) or 1),
    )


def build_model(recipe: Recipe, cuda: bool) -> "torch.nn.Module":
    """The model with packed attention, in the recipe's dtype on the CPU, adapters added where the recipe has LoRA.

    Equal on every worker: adapters are drawn from `train.seed`. Only what is trained requires gradients.
    Raises RecipeError for target modules that the model does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from burnish.train import attention

    kernel = attention.register(recipe.model.attention, cuda, half=recipe.model.dtype != "float32")
    dtype: torch.dtype = getattr(torch, recipe.model.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        _place(recipe), revision=recipe.model.revision, dtype=dtype, attn_implementation=kernel
    )
    model.config.use_cache = False
    torch.manual_seed(recipe.train.seed)
    if recipe.lora is not None:
        model = with_adapters(model, recipe.lora)
    checkpointing = recipe.model.activation_checkpointing
    if cuda if checkpointing == "auto" else checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.lora is not None:
            model.enable_input_require_grads()
    result: torch.nn.Module = model.train()
    return result


def with_adapters(model: Any, spec: LoraSpec) -> Any:
    """The model with fresh LoRA adapters in its own dtype; DeepSpeed keeps the float32 masters."""
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules
    tied = {"lm_head", "embed_tokens", "wte"} & set([] if isinstance(targets, str) else targets)
    if tied and model.config.get_text_config().tie_word_embeddings:
        raise RecipeError(
            f"lora.target_modules: {', '.join(sorted(tied))} shares its weight between input and output in this model, "
            "so a merged adapter would be another model; take it out"
        )
    lora = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RecipeError(f"lora.target_modules: {_line(error)}") from None


def _place(recipe: Recipe) -> str:
    return recipe.located().model.path


def _configuration(recipe: Recipe) -> Any:
    try:
        return AutoConfig.from_pretrained(_place(recipe), revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.path: {recipe.model.path} cannot be loaded: {_line(error)}") from None


def _source(recipe: Recipe, tokenizer: Any) -> str:
    """Jinja text of the chat template in force."""
    if recipe.template.path is not None:
        try:
            return Path(recipe.template.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"template.path: {recipe.template.path} cannot be read: {error}") from None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            f"model.path: the tokenizer of {recipe.model.path} has no chat template; "
            "name the Jinja file that serving will use in template.path"
        ) from None


def _stop_ids(recipe: Recipe, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer: the recipe's, else the generation config's and the tokenizer's EOS."""
    if recipe.template.stop_tokens is not None:
        ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in recipe.template.stop_tokens}
        for token, found in ids.items():
            if len(found) != 1:
                raise DataError(
                    f"template.stop_tokens: {token!r} is {len(found)} tokens in this vocabulary; name a token that is one"
                )
        return frozenset(found[0] for found in ids.values())
    try:
        generation: Any = GenerationConfig.from_pretrained(_place(recipe), revision=recipe.model.revision)
        stops = generation.eos_token_id
    except (OSError, json.JSONDecodeError):
        stops = None
    listed = stops if isinstance(stops, list) else [stops]
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)


def _line(error: BaseException) -> str:
    """The first 300 characters of an error's text on one line."""
    return " ".join(str(error).split())[:300]
