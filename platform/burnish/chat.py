"""Talk to a model folder: the template and stop tokens of its contract, greedy answers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.errors import DataError, RecipeError, one_line
from burnish.train.adapters import with_saved_adapters
from burnish.train.model import check_loaded, model_digest


@dataclass(frozen=True)
class Chat:
    """A loaded model with its tokenizer; `kwargs` are the template variables it was trained with."""

    model: Any
    tokenizer: Any
    kwargs: dict[str, Any]
    max_new_tokens: int

    @classmethod
    def open(cls, path: Path, max_new_tokens: int = 256) -> "Chat":
        """The model in a folder: an export (all weights or an adapter), a base model, or a run with an export.

        Raises RecipeError where there is no model, DataError where it has no chat template.
        """
        folder = path / "export" if (path / "export").is_dir() else path
        if (folder / "recipe.yaml").exists():
            raise RecipeError(f"{folder}: is a run without an export; first type: burnish export {folder}")
        adapter = folder / "adapter_config.json"
        if not adapter.exists() and not (folder / "config.json").exists():
            raise RecipeError(f"{folder}: no model; name an exported folder, for example runs/quickstart/export")
        tokenizer: Any = _loaded(AutoTokenizer, str(folder))
        if not tokenizer.chat_template:
            raise DataError(f"{folder}: the tokenizer has no chat template, so there is no way to chat")
        known = json.loads(adapter.read_text()) if adapter.exists() else {}
        base = str(known.get("base_model_name_or_path", folder))
        if adapter.exists():
            _check_base(folder, base)
        options = {"use_safetensors": True, "dtype": "auto", "output_loading_info": True, "revision": known.get("revision")}
        model, found = _loaded(AutoModelForCausalLM, base, **options)
        check_loaded(model, found, base)
        if adapter.exists():
            if not (folder / "adapter_model.safetensors").exists():
                raise RecipeError(f"{folder}: has no adapter_model.safetensors, and an adapter is read from no other file")
            model = with_saved_adapters(model, folder)
        contract = folder / "contract.json"
        known = json.loads(contract.read_text()) if contract.exists() else {"kwargs": {}}
        if "stop_ids" in known:
            model.generation_config.eos_token_id = known["stop_ids"]
        return cls(model.eval(), tokenizer, known["kwargs"], max_new_tokens)

    def answer(self, message: str, history: list[dict[str, str]] | None = None) -> str:
        """The greedy answer to a message after a history, without its stop token."""
        messages = [*(history or []), {"role": "user", "content": message}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **self.kwargs)
        inputs = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()

    def talk(self, source: TextIO, sink: TextIO) -> None:
        """A conversation over lines, until the input ends."""
        history: list[dict[str, str]] = []
        print("Ask something; an empty line starts anew, Ctrl-D ends.", file=sink)
        while True:
            print("> ", end="", file=sink, flush=True)
            line = source.readline()
            if not line:
                return
            if not line.strip():
                history = []
                continue
            answer = self.answer(line.strip(), history)
            history += [{"role": "user", "content": line.strip()}, {"role": "assistant", "content": answer}]
            print(answer, file=sink)


def _check_base(folder: Path, base: str) -> None:
    """Raises RecipeError where a local base model is not the one that an exported adapter was trained on."""
    origin = folder / "export.json"
    trained_on = json.loads(origin.read_text()).get("base_sha256") if origin.exists() else None
    if trained_on is not None and model_digest(base) not in (trained_on, None):
        raise RecipeError(
            f"{folder}: its adapter was trained on another base model than {base} now holds; put the old files back"
        )


def _loaded(kind: Any, place: str, **options: Any) -> Any:
    """What a folder holds, loaded without any code that it brings; raises RecipeError where that cannot be."""
    try:
        return kind.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{place}: cannot be loaded without code or pickles of its own: {one_line(error)}") from None
