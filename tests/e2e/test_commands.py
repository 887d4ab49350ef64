"""train, plan, preview, export and chat as a user types them, on four architectures and two template families."""

import hashlib
import json
import math
import os
import time
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.cli import main
from burnish.train.ledger import lines
from tests.conftest import CHATML, LLAMA3, Training, conversation, processes_below, write_model, write_rows

pytestmark = pytest.mark.e2e


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(each) for each in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def recipe_file(tmp_path, make_recipe):
    def write(**sections) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(make_recipe(**sections).to_yaml())
        return path

    return write


def test_what_a_library_prints_is_no_part_of_the_result(capsys, recipe_file, monkeypatch):
    from burnish.train import launch

    result = launch.Result("finished", "small", None, 1, "checkpoint", {})
    monkeypatch.setattr(launch, "train", lambda recipe, watch: print("a tip of a library") or result)
    code, out, err = run(capsys, "train", recipe_file())
    assert (code, json.loads(out)["status"]) == (0, "finished")
    assert "a tip of a library" in err


@pytest.mark.parametrize(
    ("architecture", "template", "lora", "workers", "stage", "dtype"),
    [
        ("llama", LLAMA3, {"rank": 4, "variant": "rslora", "train_tokens": ["<|eot_id|>"]}, 2, 3, "bfloat16"),
        (
            "mistral",
            CHATML,
            {"rank": 4, "variant": "dora", "modules_to_save": ["embed_tokens", "lm_head"]},
            1,
            "auto",
            "float32",
        ),
        pytest.param("qwen3", CHATML, None, 2, 2, "float32", marks=pytest.mark.soak),
        pytest.param("gemma", LLAMA3, None, 1, 3, "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_a_model_of_ones_own_is_trained_exported_and_answers(
    cluster, capsys, tmp_path, recipe_file, architecture, template, lora, workers, stage, dtype
):
    base = write_model(tmp_path / "base", architecture, template)
    rows = [conversation(i, 1 + i % 2) for i in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(i) for i in range(30, 36)])
    path = recipe_file(
        model={"path": str(base), "dtype": dtype, "activation_checkpointing": "auto" if stage == "auto" else False},
        lora={**lora, "alpha": 8} if lora else None,
        data={"train": [{"path": str(tmp_path / "rows.parquet")}], "eval": [{"path": str(held_out)}]},
        optim={"learning_rate": 1e-2},
        train={"epochs": 2, "eval_every_steps": 2, "generation_tokens": 8},
        engine={"zero_stage": stage},
        scale={"num_workers": workers},
        checkpoint={"best": "eval/loss"},
    )
    code, out, err = run(capsys, "train", path)
    assert code == 0, err
    assert out.count("\n") == 1, out
    result = json.loads(out)
    folder = tmp_path / "runs" / "small"
    assert list(result) == ["status", "run", "run_id", "steps", "checkpoint", "metrics"]
    ledger = [json.loads(entry) for entry in (folder / "ledger.jsonl").read_text().splitlines()]
    assert (result["status"], result["run"], result["steps"]) == ("finished", "small", len(ledger))
    assert result["checkpoint"] == str(folder / "checkpoints" / f"step-{len(ledger):08d}")
    assert {"train/loss", "train/grad_norm", "eval/loss", "eval/perplexity"} <= set(result["metrics"])
    assert result["metrics"]["engine/zero_stage"] == (2 if stage == "auto" else stage), "a small model is never shared out"
    assert result["metrics"]["engine/activation_checkpointing"] == 0
    assert ledger[-1]["loss"] < ledger[0]["loss"]
    evaluated = sorted({*range(2, len(ledger) + 1, 2), len(ledger)})
    losses = {line["step"]: line["eval/loss"] for line in lines(folder / "metrics.jsonl") if "eval/loss" in line}
    assert sorted(losses) == evaluated
    best = min(losses, key=losses.get)
    assert {path.name for path in (folder / "checkpoints").glob("step-*")} == {
        f"step-{step:08d}" for step in {*evaluated[-2:], best}
    }
    assert {"recipe.yaml", "contract.json", "refused.jsonl", "ledger.jsonl", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    generated = list(lines(folder / "generations.jsonl"))
    assert [(line["step"], line["row"]) for line in generated] == [
        (step, f"{held_out}#{number}") for step in (0, *evaluated) for number in (0, 1)
    ]

    code, again, _ = run(capsys, "train", path)
    assert (code, json.loads(again)) == (0, result), "a finished run is not trained again"
    exported = check_export(capsys, folder, base, bool(lora), 1e-4 if dtype == "float32" else 5e-2)
    measured = loss_of(capsys, exported, path, held_out)
    assert measured == pytest.approx(losses[best], rel=1e-5 if dtype == "float32" else 1e-2), "of each trained token alike"
    assert json.loads((folder / "export/export.json").read_text())["step"] == best
    if dtype == "float32":
        asked = [line for line in generated if line["step"] == best]
        questions = [conversation(number)["messages"][0]["content"] for number in (30, 31)]
        _, told, _ = run(capsys, "chat", folder, "--max-new-tokens", 8, *(f"--message={each}" for each in questions))
        assert told == "".join(answer_of(line, base) + "\n" for line in asked), (
            "what it answered in training, it answers now"
        )


def answer_of(line: dict, base: Path) -> str:
    """What `burnish chat` shows of an answer that a model wrote in training."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(line["answer"], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def loss_of(capsys, model, recipe: Path, rows: Path) -> float:
    """The mean loss of a plain model over the trained tokens of rows, each sample alone."""
    code, out, err = run(capsys, "preview", recipe, f"data.train=[{{path: {rows}}}]", "data.eval=[]", "train.eval_every_steps=null",
                         "checkpoint.best=null", "--json")  # fmt: skip
    assert code == 0, err
    total = count = 0
    for sample in (sample for line in out.splitlines() for sample in json.loads(line)["samples"]):
        labels = torch.tensor(sample["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([sample["input_ids"]])).logits[0, :-1].float()
        total += cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def check_export(capsys, folder: Path, base: Path, adapter: bool, tolerance: float) -> nn.Module:
    """The exports load in plain transformers (and peft), answer alike, and carry the template byte for byte; the model."""
    code, out, err = run(capsys, "export", folder)
    assert code == 0, err
    exported = Path(out.strip())
    assert (exported / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    contract = json.loads((exported / "contract.json").read_text())
    assert contract == json.loads((folder / "contract.json").read_text())
    step = json.loads((exported / "export.json").read_text())["step"]
    newest = folder / f"checkpoints/step-{step:08d}"
    assert contract == json.loads((newest / "contract.json").read_text())
    for file in [newest / "weights.safetensors", *exported.glob("adapter_model.safetensors")]:
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata()["chat_contract"] == f"sha256:{contract['behaviour_sha256']}"
    assert run(capsys, "verify", folder)[:2] == (0, f"kept: {len(contract['probes'])} probes, compared with {exported}\n")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        if adapter:
            from peft import AutoPeftModelForCausalLM

            assert {path.suffix for path in exported.glob("adapter_*")} == {".json", ".safetensors"}
            loaded = AutoPeftModelForCausalLM.from_pretrained(str(exported)).eval()
            assert run(capsys, "export", folder, folder / "merged", "--merge")[0] == 0
            merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
            assert (loaded(ids).logits - merged(ids).logits).abs().max() < tolerance
        else:
            loaded = AutoModelForCausalLM.from_pretrained(exported).eval()
            assert loaded.generation_config.eos_token_id == contract["stop_ids"]
            assert run(capsys, "export", folder, folder / "merged", "--merge")[0] == 2
        before = AutoModelForCausalLM.from_pretrained(base).eval()
        assert (loaded(ids).logits - before(ids).logits).abs().max() > 1e-3, "training changed nothing"
    assert AutoTokenizer.from_pretrained(exported).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    code, answer, _ = run(capsys, "chat", folder, "--max-new-tokens", 8, "--message", "Hi", "--message", "Hi")
    first, second = answer.removesuffix("\n").split("\n") if answer.count("\n") == 2 else (None, None)
    assert code == 0 and first == second
    assert run(capsys, "export", folder)[1].strip() == str(exported), "the same export again is left as it is"
    return loaded


@pytest.mark.soak
def test_a_run_on_a_base_in_four_bits_is_exported_on_the_base_as_it_is(cluster, capsys, recipe_file):
    """With everything of its layout left to burnish."""
    path = recipe_file(
        model={"quantize": "nf4", "activation_checkpointing": "auto"}, engine={"zero_stage": "auto"}, lora={"rank": 4},
        optim={"learning_rate": 1e-2}, scale={"num_workers": 2},
    )  # fmt: skip
    code, out, err = run(capsys, "train", path)
    assert code == 0, err
    result = json.loads(out)
    metrics = result["metrics"]
    assert (metrics["engine/zero_stage"], metrics["engine/activation_checkpointing"]) == (2.0, 0.0)
    assert 0 < metrics["engine/estimated_memory_gib"] < metrics["train/peak_memory_gib"]
    folder = Path(result["checkpoint"]).parents[1]
    for merge in ([], ["--merge"]):
        code, out, err = run(capsys, "export", folder, *([folder / "merged"] if merge else []), *merge)
        assert code == 0, err
        card = (Path(out.strip()) / "README.md").read_text()
        assert "in training the base was kept in nf4" in card
    assert run(capsys, "chat", folder, "--max-new-tokens", 4, "--message", "Hi")[0] == 0


def test_plan_and_preview_have_the_form_of_the_contract_and_agree(cluster, capsys, tmp_path, recipe_file):
    bad = {"messages": [{"role": "user", "content": "x"}]}
    long = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "y"}]}
    rows = write_rows(tmp_path / "rows.jsonl", [*(conversation(i) for i in range(30)), bad, long])
    path = recipe_file(data={"train": [{"path": str(rows)}], "max_refused": 0.1}, scale={"num_workers": 2})
    code, out, _ = run(capsys, "preview", path, "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["row"] for line in lines] == [f"{rows}#{i}" for i in range(32)]
    assert all(list(line) == ["row", "refused", "samples"] for line in lines)
    assert [line["refused"] and line["refused"]["code"] for line in lines[29:]] == [None, "no-assistant", "overlong"]
    assert set(lines[30]["refused"]) == {"code", "turn", "message"}
    sample = lines[0]["samples"][0]
    assert list(sample) == ["turns", "input_ids", "labels"] and sample["turns"] == [1]
    assert all(label in (-100, token) for token, label in zip(sample["input_ids"], sample["labels"], strict=True))

    code, out, err = run(capsys, "plan", path, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert {key: plan[key] for key in ("rows", "refused", "samples")} == {
        "rows": 32, "refused": {"no-assistant": 1, "overlong": 1}, "samples": 30,
    }  # fmt: skip
    samples = [sample for line in lines for sample in line["samples"]]
    assert plan["total_tokens"] == sum(len(sample["input_ids"]) for sample in samples)
    assert plan["trained_tokens"] == sum(label != -100 for sample in samples for label in sample["labels"])
    assert plan["steps_per_epoch"] == plan["steps"] == -(-plan["packs"] // 4)
    assert plan["packing_efficiency"] == plan["total_tokens"] / (plan["packs"] * 256)
    assert 0.5 < plan["balance"] <= 1.0
    assert plan["memory"]["total"] == sum(
        plan["memory"][part] for part in ("weights", "gradients", "optimizer", "activations")
    )
    assert plan["memory"]["total"] < plan["memory"]["capacity"] and plan["seconds"] > 0

    code, out, _ = run(capsys, "preview", path, "--limit", 1)
    assert "{+Answer 0 <|im_end|>+}" in out


def test_dry_run_prints_the_whole_recipe_and_doctor_finds_the_stack(capsys, recipe_file):
    code, out, _ = run(capsys, "train", recipe_file(), "--dry-run", "train.epochs=3")
    assert code == 0 and "epochs: 3" in out and "schedule: cosine" in out
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "deepspeed" in out and "ready to train" in out


def table_of(client, run_id: str, name: str) -> list[dict]:
    """The rows of a table among a run's artifacts."""
    table = json.loads(Path(client.download_artifacts(run_id, name)).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_mlflow_holds_recipe_metrics_template_and_data_and_an_outage_stops_nothing(cluster, capsys, tmp_path, recipe_file):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(30)] + [{"messages": []}])
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(i) for i in range(40, 44)])
    path = recipe_file(
        tracking={"uri": uri},
        train={"epochs": 3, "max_steps": 4, "eval_every_steps": 3, "generations": 1, "generation_tokens": 4},
        data={"train": [{"path": str(rows)}], "eval": [{"path": str(held_out)}], "max_refused": 0.1},
    )
    code, out, err = run(capsys, "train", path)
    assert code == 0, err
    result = json.loads(out)
    client = MlflowClient(uri)
    found = client.get_run(result["run_id"])
    contract = json.loads((tmp_path / "runs/small/contract.json").read_text())
    assert (found.info.status, found.info.run_name) == ("FINISHED", "small")
    assert found.data.params["optim.learning_rate"] == "0.001" and found.data.params["train.max_steps"] == "4"
    for name in ("source", "syntax", "behaviour", "tokenizer"):
        assert found.data.tags[f"template.{name}_sha256"] == contract[f"{name}_sha256"]
    whole = hashlib.sha256((tmp_path / "runs/small/contract.json").read_bytes()).hexdigest()
    assert found.data.tags["contract.sha256"] == whole
    assert found.data.metrics["data/refused/bad-row"] == 1
    assert {file.path for file in client.list_artifacts(result["run_id"])} == {
        "recipe.yaml", "contract.json", "chat_template.jinja", "report.html", "evaluations.json", "generations.json",
    }  # fmt: skip
    assert len(found.inputs.dataset_inputs) == 2
    evaluated = client.get_metric_history(result["run_id"], "eval/loss")
    assert [each.step for each in evaluated] == [3, 4]
    table = table_of(client, result["run_id"], "evaluations.json")
    assert [line["step"] for line in table] == [3, 4]
    assert [line["eval/loss"] for line in table] == pytest.approx([each.value for each in evaluated])
    assert all(line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"])) for line in table)
    answers = table_of(client, result["run_id"], "generations.json")
    assert [(line["step"], line["row"]) for line in answers] == [(step, f"{held_out}#0") for step in (0, 3, 4)]
    assert all(line["answer"] and line["prompt"] and line["reference"] for line in answers)
    ledger = [json.loads(line) for line in (tmp_path / "runs/small/ledger.jsonl").read_text().splitlines()]
    losses = client.get_metric_history(result["run_id"], "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(line["step"], line["loss"]) for line in ledger]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/trained_tokens",
            "data/packing_efficiency", "data/wait_share"} <= set(found.data.metrics)  # fmt: skip
    code, out, err = run(capsys, "export", tmp_path / "runs/small", "--register", "smith")
    assert code == 0 and "version 1 of smith is now candidate" in err, err
    assert client.get_model_version_by_alias("smith", "candidate").run_id == result["run_id"]

    path = recipe_file(name="outage", tracking={"uri": "http://127.0.0.1:9"}, train={"max_steps": 1})
    code, out, err = run(capsys, "train", path)
    assert code == 0, err
    assert json.loads(out)["run_id"] is None and json.loads(out)["steps"] == 1
    # The same command, when MLflow is there: nothing is trained again, and all that was measured is sent.
    code, out, err = run(capsys, "train", path, f"tracking.uri={uri}")
    assert code == 0, err
    late = json.loads(out)
    assert late["steps"] == 1 and client.get_run(late["run_id"]).info.status == "FINISHED"
    (line,) = (json.loads(line) for line in (tmp_path / "runs/outage/ledger.jsonl").read_text().splitlines())
    assert [(m.step, m.value) for m in client.get_metric_history(late["run_id"], "train/loss")] == [(1, line["loss"])]
    assert 0 < late["metrics"]["run/goodput"] < 1 and late["metrics"]["run/restarts"] == 0


def test_a_loss_that_is_no_number_ends_the_run_with_exit_5_and_names_the_packs(cluster, capsys, recipe_file, tmp_path):
    path = recipe_file(optim={"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0}, train={"epochs": 4})
    code, out, err = run(capsys, "train", path)
    assert (code, out) == (5, ""), err
    # Weights of 1e30 still give a finite loss behind their norms; the gradient tells.
    assert "the loss of step 2 is" in err and "nan; its packs (epoch, window, index) are (0, " in err, err
    assert "learning_rate" in err
    page = (tmp_path / "runs/small/report.html").read_text()
    assert "not finished" in page and "<figcaption><span>loss</span>" in page
    again, out, err = run(capsys, "train", path)
    assert (again, out) == (5, "") and "the loss of step 2 is" in err and "nothing was started" in err, err
    attempts = (tmp_path / "runs/small/attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in attempts] == ["start", "end"]


@pytest.mark.parametrize("self_test", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_the_first_batch_proves_that_samples_are_apart_unless_the_recipe_says_otherwise(
    cluster, capsys, recipe_file, tmp_path, self_test
):
    folder = write_model(tmp_path / "overflows")
    weights = load_file(folder / "model.safetensors")
    # Finite weights that no file check minds, and values behind the second layer that are no numbers.
    for name in ("up_proj", "down_proj"):
        weights[f"model.layers.1.mlp.{name}.weight"] *= 1e25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = recipe_file(model={"path": str(folder)}, train={"max_steps": 1, "self_test": self_test})
    code, out, err = run(capsys, "train", path)
    assert (code, out) == (5, ""), err
    if self_test:
        assert "train.self_test: this model cannot be trained on packed samples" in err and "layer 1" in err, err
        assert not list(lines(tmp_path / "runs/small/ledger.jsonl"))
    else:
        assert "the loss of step 1 is nan" in err, err


def kill_a_worker_behind_a_checkpoint(folder: Path) -> None:
    """Kills the worker of the run that this process trains, as soon as a checkpoint stands."""
    deadline = time.monotonic() + Training.deadline_seconds
    while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in processes_below(os.getpid(), "RayTrainWorker"):
        worker.kill()


def test_a_killed_worker_costs_no_step_and_refused_rows_are_none_and_their_reasons_are_kept(
    cluster, capsys, recipe_file, tmp_path, caplog
):
    bad = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)]
    rows = write_rows(tmp_path / "rows.jsonl", [*(conversation(i) for i in range(4)), *bad])
    path = recipe_file(
        data={"train": [{"path": str(rows)}], "window_rows": 4, "max_refused": 0.5},
        train={"global_batch_size": 1, "epochs": 3},
    )
    killer = Thread(target=kill_a_worker_behind_a_checkpoint, args=(tmp_path / "runs" / "small",))
    killer.start()
    code, out, err = run(capsys, "train", path)
    killer.join()
    assert code == 0, err
    assert json.loads(out)["metrics"]["run/restarts"] == 1 and "a worker was lost" in caplog.text
    ledger = [json.loads(line) for line in (tmp_path / "runs/small/ledger.jsonl").read_text().splitlines()]
    assert json.loads(out)["steps"] == len(ledger) and all(line["packs"] and line["trained_tokens"] for line in ledger)
    assert [line["step"] for line in ledger] == list(range(1, len(ledger) + 1))
    packs = [tuple(pack) for line in ledger for pack in line["packs"]]
    assert len(packs) == len(set(packs))
    starts = [line["from_step"] for line in lines(tmp_path / "runs/small/attempts.jsonl") if line["event"] == "start"]
    assert len(starts) == 2 and starts[1] >= 2
    assert {epoch for line in ledger for epoch, _, _ in line["packs"]} == {0, 1, 2}
    refused = [json.loads(line) for line in (tmp_path / "runs/small/refused.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in refused) == [f"{rows}#{i}" for i in range(4, 8)], "each once, not each epoch"
    assert {line["code"] for line in refused} == {"no-assistant"}
    assert not list((tmp_path / "runs/small").glob(".ray"))
    page = (tmp_path / "runs/small/report.html").read_text()
    assert "<th>not trained: no-assistant<td>4" in page and "<th>rows of data.train<td>8" in page


def test_what_plan_has_rendered_is_not_rendered_again(cluster, capsys, recipe_file, tmp_path, caplog):
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(i) for i in range(50, 54)])
    waits = {
        "data": {"eval": [{"path": str(held_out)}]},
        "optim": {"learning_rate": 1e-30},
        "train": {"max_steps": 8, "epochs": 3, "eval_every_steps": 1, "early_stopping": 1, "generations": 0},
        "checkpoint": {"every_steps": None, "best": "eval/loss"},
    }
    code, out, err = run(capsys, "plan", recipe_file(**waits), "--json")
    assert code == 0 and json.loads(out)["rows"] == 40, err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / ".cache").rglob("*.arrow")}
    assert len(kept) == 5, "plan keeps every slice of 8 rows"
    # Nothing is learned, so the evaluation of step 2 is the first without a gain.
    code, out, err = run(capsys, "train", recipe_file(**waits))
    assert code == 0 and json.loads(out)["steps"] == 2, err
    assert "stopped early at step 2" in caplog.text and not (tmp_path / "runs/small/generations.jsonl").read_text()
    assert {path.name for path in (tmp_path / "runs/small/checkpoints").glob("step-*")} == {"step-00000001", "step-00000002"}
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / ".cache").rglob("*.arrow")}
    assert {path: now[path] for path in kept} == kept and len(now) == 6, "a run renders nothing again but held-out rows"
