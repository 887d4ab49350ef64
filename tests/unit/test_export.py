"""What is exported loads in plain transformers and peft as the model that was trained, or nothing is written."""

import json
import shutil
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from burnish import export as module
from burnish.chat import Chat
from burnish.errors import BurnishError, InfrastructureError, RecipeError
from burnish.export import export, register
from burnish.train import checkpoint
from burnish.train.adapters import with_adapters
from burnish.train.attempt import Progress
from burnish.train.home import Home
from burnish.train.model import load_weights
from burnish.train.prepare import make_run_folder, prepare, write_json, write_run_folder
from burnish.train.writer import Place, Writer
from tests.conftest import CHATML, write_model

LORA = {"rank": 4, "variant": "dora", "modules_to_save": ["lm_head"]}


def test_a_template_that_renders_no_probe_leaves_tokens_to_compare(make_recipe):
    contract = prepare(make_recipe()).contract
    probes = module._probe_ids(contract)
    assert len(probes) == 3 and all(each.shape[0] == 1 for each in probes)
    (first,) = module._probe_ids(replace(contract, probes=[]))
    assert first.shape == (1, 16)


@pytest.fixture
def trained(make_recipe, tmp_path):
    """A run of this recipe with a checkpoint at each step, whose trained weights are the fresh ones moved a little."""

    def make(steps=types.MappingProxyType({3: 2.0}), revision=None, beside=None, **sections) -> Path:
        base = write_model(tmp_path / "base")
        for name, keys in (beside or {}).items():
            known = json.loads((base / name).read_text()) if (base / name).exists() else {}
            (base / name).write_text(json.dumps({**known, **keys}))
        recipe = make_recipe(model={"path": str(base), "revision": revision, **sections.pop("model", {})}, **sections)
        folder = Path(recipe.run_place())
        make_run_folder(folder)
        prepared = prepare(recipe)
        write_run_folder(prepared, Home(folder))
        model = load_weights(recipe)
        model = with_adapters(model, recipe.lora) if recipe.lora else model
        torch.manual_seed(1)
        spec = recipe.checkpoint
        place = Place(Home(folder), "attempt", spec.keep, spec.best, prepared.contract.behaviour_sha256)
        writer = Writer(place, 0, 1)
        for step, loss in steps.items():
            moved = {
                name: (weight + 0.05 * torch.randn_like(weight)).detach()
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }
            files = {checkpoint.WEIGHTS: (moved, {}), f"{checkpoint.OPTIMIZER}/0": ({}, {})}
            writer.write(Progress(step=step), {"train/loss": loss, "eval/loss": loss}, lambda files=files: files)
            writer.wait()
        return folder

    return make


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_trained_model_answers_alike_in_plain_transformers_and_in_chat(trained, tmp_path, lora):
    template = tmp_path / "shouts.jinja"
    template.write_text("{%- if shout %}{%- endif %}" + CHATML)
    run = trained(lora=lora, template={"path": str(template), "kwargs": {"shout": True}})
    folder = export(str(run), tmp_path / "out")
    kind = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contract = json.loads((folder / "contract.json").read_text())
    stop = GenerationConfig.from_pretrained(folder).eos_token_id
    assert stop == contract["stop_ids"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = model.generate(**inputs, eos_token_id=stop, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer and Chat.open(folder, 24).answer("Hi") == answer
    card = (folder / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert f'library_name: "{"peft" if lora else "transformers"}"' in head and "base_model" not in head
    assert contract["behaviour_sha256"] in body and "train.jsonl" in body and "40 rows" in body
    assert ("dora of rank 4" in body) == bool(lora) and ("all weights" in body) == (lora is None)
    _, code, _ = card.split("```")
    assert "shout=True" in code
    compile(code.removeprefix("python\n"), "card", "exec")


def test_the_code_of_the_card_runs(trained, tmp_path, monkeypatch, capsys):
    folder = export(str(trained(lora={"rank": 2})), tmp_path / "out")
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n").replace("=256", "=8")
    monkeypatch.chdir(folder)
    exec(code, {})
    assert capsys.readouterr().out.strip() == Chat.open(folder, 8).answer("Hello")


def test_a_merged_adapter_has_the_logits_of_the_adapter_and_needs_no_base(trained, tmp_path):
    run = trained(lora=LORA)
    adapter = AutoPeftModelForCausalLM.from_pretrained(export(str(run), tmp_path / "adapter")).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = adapter(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(export(str(run), tmp_path / "merged", merge=True)).eval()
        assert (merged(ids).logits - wanted).norm() < 1e-4 * wanted.norm()
    assert "merged here" in (tmp_path / "merged" / "README.md").read_text()
    shutil.rmtree(tmp_path / "base")
    assert Chat.open(tmp_path / "merged", 4).answer("Hi") is not None
    with pytest.raises(RecipeError, match="base"):
        Chat.open(tmp_path / "adapter", 4)


def test_the_best_checkpoint_is_exported_where_the_recipe_names_a_metric_and_another_by_its_step(trained, tmp_path):
    run = trained(steps={3: 2.0, 5: 1.0, 7: 3.0}, lora={"rank": 2}, checkpoint={"best": "train/loss", "keep": 2})

    def exported(name: str, **options) -> tuple[int, torch.Tensor]:
        folder = export(str(run), tmp_path / name, **options)
        tensors = load_file(folder / "adapter_model.safetensors")
        return json.loads((folder / "export.json").read_text())["step"], tensors[sorted(tensors)[0]]

    (best, first), (newest, second) = exported("best"), exported("seven", step=7)
    for name, loss in (("best", "1.0000"), ("seven", "3.0000")):
        assert f"| Held-out loss | {loss} |" in (tmp_path / name / "README.md").read_text(), "of these weights"
    assert (best, newest) == (5, 7) and not torch.equal(first, second)
    with pytest.raises(RecipeError, match=r"step-00000003 does not stand or is broken; .*step-00000005.*step-00000007"):
        exported("three", step=3)
    (run / "checkpoints/step-00000005/weights.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="step-00000005 does not stand or is broken"):
        exported("again")


def _changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which one number is another."""
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1e-3
    return tensors


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_base_whose_generation_config_would_be_refused_today_is_exported(trained, tmp_path, lora):
    # As published before sampling values without do_sample were refused.
    run = trained(lora=lora, beside={"generation_config.json": {"temperature": 0.9, "top_p": 0.6}})
    folder = export(str(run), tmp_path / "out")
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"]) == (0.9, 0.6)
    assert written["eos_token_id"] == json.loads((folder / "contract.json").read_text())["stop_ids"]


@pytest.mark.parametrize("merge", [False, True])
def test_what_a_base_needs_for_images_travels_with_a_whole_model(trained, tmp_path, merge):
    run = trained(lora={"rank": 4}, beside={"preprocessor_config.json": {"size": 1}})
    folder = export(str(run), tmp_path / "out", merge=merge)
    assert (folder / "preprocessor_config.json").exists() is merge and not (folder / "processor_config.json").exists()


def test_an_adapter_that_loads_otherwise_than_it_was_trained_is_not_exported(trained, tmp_path, monkeypatch):
    run = trained(lora={"rank": 4})
    monkeypatch.setattr(module, "save_file", lambda tensors, *more, **other: save_file(_changed(tensors), *more, **other))
    with pytest.raises(BurnishError, match="does not load as it was trained"):
        export(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_from_the_file_are_not_exported(trained, tmp_path, monkeypatch):
    run, written = trained(), module._check_tensors

    def check_and_drop(file: Path) -> None:
        written(file)
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(module, "_check_tensors", check_and_drop)
    with pytest.raises(BurnishError, match=r"model\.norm\.weight does not load as it was trained"):
        export(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_not_merged_is_not_exported_as_merged(trained, tmp_path, monkeypatch):
    run = trained(lora={"rank": 4})
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(BurnishError, match=r"logits of \d+ tokens differ by"):
        export(str(run), tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_tensor_that_is_empty_or_no_number_is_not_exported_and_nothing_stays(trained, tmp_path, monkeypatch, value):
    def spoiled(tensors, *more, **other) -> None:
        name = sorted(tensors)[0]
        save_file({**tensors, name: torch.empty(0) if value is None else tensors[name] * value}, *more, **other)

    run = trained(lora={"rank": 4})
    monkeypatch.setattr(module, "save_file", spoiled)
    with pytest.raises(BurnishError, match="is empty or not finite; the export is not good"):
        export(str(run), tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_what_stands_in_the_folder_is_left_alone(trained, tmp_path):
    run, folder = trained(lora={"rank": 4}), tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"exists and is no export, not step 3 .*name another folder"):
        export(str(run), folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_an_export_of_an_earlier_run_of_that_name_is_no_export_of_this_one(trained, tmp_path):
    run = trained(lora={"rank": 4})
    folder = export(str(run), tmp_path / "out")
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "base")
    again = trained(lora={"rank": 4}, tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    assert again == run
    write_json(run / "mlflow.json", {"run_id": "0" * 32})
    with pytest.raises(RecipeError, match=r"step 3 of run 'small' \(\w{8}\), .* not step 3 of run 'small' \(\w{8}\)"):
        export(str(run), folder)
    with pytest.raises(RecipeError, match="is no export of"):
        register(str(run), folder, "smith", "candidate")


@pytest.mark.parametrize("kept", [1.0, 0.4])
def test_a_merge_that_loses_most_of_what_the_adapter_changes_is_not_exported(trained, tmp_path, monkeypatch, kept):
    """Though all logits lie as near as those of sixteen bits may."""
    run = trained(lora={"rank": 4, "alpha": 1.0}, model={"dtype": "bfloat16"})

    def lossy(self):
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= kept
        return self.base_model.merge_and_unload()

    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lossy, raising=False)
    if kept == 1.0:
        assert export(str(run), tmp_path / "merged", merge=True).exists()
        return
    with pytest.raises(BurnishError, match=r"--merge: .* rounded to bfloat16, lose (59|6\d)% of what the adapter changes"):
        export(str(run), tmp_path / "merged", merge=True)
    assert export(str(run), tmp_path / "adapter").exists()


def test_a_base_that_is_another_than_the_adapters_is_refused(trained, tmp_path):
    folder = export(str(trained(lora={"rank": 2})), tmp_path / "out")
    weights = tmp_path / "base" / "model.safetensors"
    save_file(_changed(load_file(weights)), weights, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="trained on another base model"):
        Chat.open(folder)


def test_an_export_is_registered_once_and_named_by_an_alias(trained, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = trained(lora={"rank": 2}, tracking={"uri": uri})
    folder = export(str(run), tmp_path / "out")
    with pytest.raises(RecipeError, match="has no run in MLflow"):
        register(str(run), folder, "smith", "candidate")
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    write_json(run / "mlflow.json", {"run_id": run_id})
    assert [register(str(run), folder, "smith", alias) for alias in ("candidate", "champion", "candidate")] == ["1"] * 3
    merged = export(str(run), tmp_path / "merged", merge=True)
    assert register(str(run), merged, "smith", "champion") == "2"
    version = client.get_model_version_by_alias("smith", "candidate")
    assert (int(version.version), version.run_id) == (1, run_id)
    assert client.get_model_version_by_alias("smith", "champion").version in (2, "2")
    (tmp_path / "served").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    served = download_artifacts("models:/smith@candidate", dst_path=str(tmp_path / "served"))
    assert {path.name: path.read_bytes() for path in Path(served).iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    with pytest.raises(RecipeError, match="MLflow says"):
        register(str(run), folder, "a/b", "candidate")
    with pytest.raises(RecipeError, match="is no export of"):
        register(str(run), tmp_path / "base", "smith", "candidate")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(uri, "http://127.0.0.1:9"))
    with pytest.raises(InfrastructureError, match="the export stands in"):
        register(str(run), folder, "smith", "candidate")


def test_an_adapter_stands_on_the_commit_of_the_base_that_was_trained(trained, tmp_path, monkeypatch):
    """In plain peft, and in `burnish chat` and `burnish score`; a folder has no commits, so they are only asked for one."""
    folder = export(str(trained(lora={"rank": 2}, revision="b" * 40)), tmp_path / "export")
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "b" * 40
    asked, plain = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: asked.append(kwargs["revision"]) or plain(*args, **kwargs),
    )
    Chat.open(folder)
    AutoPeftModelForCausalLM.from_pretrained(str(folder))
    assert asked == ["b" * 40] * 2
