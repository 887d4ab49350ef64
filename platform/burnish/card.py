"""The model card of an export: README.md, which says what the model learned from, how it is served, and how it is loaded."""

import json
from typing import Any

from burnish.config import Recipe
from burnish.data.contract import Contract


def card(
    recipe: Recipe, contract: Contract, data: dict[str, Any], metrics: dict[str, float], step: int, merged: bool
) -> str:
    """Markdown with the metadata block that model hubs read; `recipe` is located, `data` the run's file, `metrics` the
    step's. It claims nothing that the run did not measure; a licence is the owner's to write.
    """
    adapter = recipe.lora is not None and not merged
    base = recipe.model.path
    metadata = {
        **({} if base.startswith("/") else {"base_model": base}),  # hubs know names, not folders
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["burnish", "conversational", *(["lora"] if recipe.lora else [])],
    }
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    rows = data.get("rows", {})
    facts = {
        "Base model": f"`{base}`" + (f", commit {recipe.model.revision}" if recipe.model.revision else ""),
        "Trained": _trained(recipe, merged),
        "Data": ", ".join(f"`{source.path}`" for source in recipe.data.train)
        + (f"; {rows['train']:,} rows" if "train" in rows else ""),
        "Data sha256": f"`{data['train']}`" if "train" in data else "",
        "Steps": f"{step:,} of {recipe.train.global_batch_size} packs of {recipe.data.max_length:,} tokens",
        "Loss": f"{metrics['train/loss']:.4f} at this step" if "train/loss" in metrics else "",
        "Held-out loss": f"{metrics['eval/loss']:.4f}" if "eval/loss" in metrics else "",
        "Stop tokens": ", ".join(f"`{token}`" for token in contract.stop_tokens),
        "Template variables": f"`{json.dumps(contract.kwargs, ensure_ascii=False)}`" if contract.kwargs else "",
        "Template": f"`chat_template.jinja`, behaviour sha256 `{contract.behaviour_sha256}`",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value)
    return (
        f"---\n{head}---\n\n# {recipe.name}\n\n| | |\n| --- | --- |\n{table}\n"
        "The model was trained on prompts rendered by exactly this template. A server that renders others asks it for "
        "something that it has not learned; `burnish verify FOLDER --server URL` compares them.\n\n"
        f"```python\n{_loading(adapter, contract)}```\n"
    )


def _trained(recipe: Recipe, merged: bool) -> str:
    if recipe.lora is None:
        return "all weights"
    spec = recipe.lora
    where = spec.target_modules if isinstance(spec.target_modules, str) else ", ".join(spec.target_modules)
    whole = f"; whole: {', '.join(spec.modules_to_save)}" if spec.modules_to_save else ""
    whole += f"; tokens: {', '.join(spec.train_tokens)}" if spec.train_tokens else ""
    words = [
        f"{spec.variant} of rank {spec.rank}, alpha {spec.alpha:g}, on {where}{whole}",
        *(["merged here"] if merged else []),
    ]
    words += [f"in training the base was kept in {recipe.model.quantize}"] if recipe.model.quantize else []
    return "; ".join(words)


def _loading(adapter: bool, contract: Contract) -> str:
    """Code that loads the folder and answers as `burnish chat` does; an adapter's own stop tokens must be handed over."""
    kind, library = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    kwargs = "".join(f", {name}={value!r}" for name, value in contract.kwargs.items())
    return (
        f"from {library} import {kind}\n"
        "from transformers import AutoTokenizer, GenerationConfig\n\n"
        'folder = "."\n'
        f'model = {kind}.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'messages = [{"role": "user", "content": "Hello"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{kwargs}\n'
        ")\n"
        "stop = GenerationConfig.from_pretrained(folder).eos_token_id\n"
        "answer = model.generate(**inputs, eos_token_id=stop, do_sample=False, max_new_tokens=256)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n'
    )
