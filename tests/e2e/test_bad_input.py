"""What people get wrong: one clear message, its exit code, and no worker started."""

import fcntl
import json

import pytest

from burnish.cli import main
from burnish.data.contract import Contract
from burnish.data.tokenizer import load_template
from burnish.train.checkpoint import newest
from burnish.train.ledger import lines
from burnish.train.prepare import write_run_folder
from burnish.train.shelf import Shelf
from tests.conftest import conversation, write_model, write_rows

pytestmark = pytest.mark.e2e


@pytest.fixture
def command(make_recipe, tmp_path, capsys):
    """Runs a verb on a recipe with changes; gives the exit code and what it said."""

    def run(*overrides, verb="train", recipe=None):
        path = tmp_path / "recipe.yaml"
        path.write_text((recipe or make_recipe()).to_yaml())
        code = main([verb, str(path), *overrides])
        captured = capsys.readouterr()
        assert captured.out == "", "stdout is for results"
        return code, captured.err

    return run


def rows(tmp_path, *items):
    path = write_rows(tmp_path / "bad.jsonl", list(items))
    return f"data.train=[{{path: {path}}}]"


def test_wrong_keys_types_and_sizes(command):
    for override, words in (
        ("lora.rnk=8", "lora.rnk: no such key (found 8); did you mean 'rank'?"),
        ("train.epochs=many", "train.epochs: Input should be a valid integer"),
        ("train.global_batch_size=3", "write train.global_batch_size: 4"),
    ):
        code, said = command(override, *(["scale.num_workers=2"] if "global" in override else []))
        assert code == 2 and words in said, said


def test_files_that_are_missing_empty_or_broken(command, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1xxxxPAR1")
    for name, words in (
        ("absent.jsonl", "no such file"),
        ("empty.jsonl", "holds no row"),
        ("broken.parquet", "cannot be read"),
    ):
        code, said = command(f"data.train=[{{path: {tmp_path / name}}}]")
        assert code == 3 and words in said and name in said, said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda path: path.unlink(), "No such file", marks=pytest.mark.soak),
        (lambda path: path.write_text(path.read_text().replace("copper", "bronze")), "are not what they were"),
    ],
    ids=["vanishes", "changes"],
)
def test_a_file_that_is_no_longer_what_it_was_ends_the_run(cluster, command, tmp_path, monkeypatch, change, words):
    def write_and_change(*arguments) -> None:
        write_run_folder(*arguments)
        change(tmp_path / "train.jsonl")  # after the run looked at it, before a task reads it

    monkeypatch.setattr("burnish.train.launch.write_run_folder", write_and_change)
    code, said = command("data.cache=null")
    assert code == 3 and words in said and "train.jsonl" in said, said


@pytest.mark.soak
def test_what_was_trained_stands_though_the_last_evaluation_fails(cluster, command, tmp_path, monkeypatch):
    held_out = write_rows(tmp_path / "held-out.jsonl", [conversation(1)])

    def write_and_lose(*arguments) -> None:
        write_run_folder(*arguments)
        held_out.unlink()

    monkeypatch.setattr("burnish.train.launch.write_run_folder", write_and_lose)
    code, said = command(
        "data.cache=null", f"data.eval=[{{path: {held_out}}}]", "checkpoint.every_steps=null", "train.generations=0"
    )
    assert code == 3 and "held-out.jsonl" in said, said
    steps = len(list(lines(tmp_path / "runs/small/ledger.jsonl")))
    assert steps and newest(Shelf(str(tmp_path / "runs/small/checkpoints"))).progress.step == steps


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "#0: no-assistant: no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turn 0: assistant-first"),
        ({"messages": [conversation(1)["messages"][0], *[conversation(1)["messages"][1]] * 2]}, "turn 2: role-order"),
        ({"text": "x"}, "#0: bad-row: the row needs `messages`, or"),
        ("{broken", "#0: bad-row"),
    ],
)
def test_rows_that_cannot_be_trained(command, tmp_path, row, words):
    code, said = command(rows(tmp_path, row))
    assert code == 3 and words in said and "none of the first 1 rows" in said, said


def test_more_refused_rows_than_allowed_fail_before_a_worker_starts(command, tmp_path):
    good = [conversation(i) for i in range(20)]
    code, said = command(rows(tmp_path, *good, {"messages": []}))
    assert code == 3
    assert "1 rows were refused, more than the 0.21 that data.max_refused allows (bad-row: 1)" in said, said
    assert "#20: bad-row" in said


def test_models_that_cannot_be_trained(command, tmp_path, make_recipe):
    without = write_model(tmp_path / "without-template", template=None)
    code, said = command(f"model.path={without}")
    assert code == 3 and "has no chat template" in said and "template.path" in said, said
    (without / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    code, said = command(f"model.path={without}")
    assert code == 2 and "no safetensors file" in said and "git lfs" in said, said
    (without / "model.safetensors").unlink()
    code, said = command(f"model.path={without}")
    assert code == 2 and "has no weights" in said, said
    code, said = command(f"model.path={tmp_path / 'absent'}")
    assert code == 2 and "is no folder" in said, said
    (tmp_path / "empty").mkdir()
    code, said = command(f"model.path={tmp_path / 'empty'}")
    assert code == 2 and "no config.json" in said, said


def test_a_model_that_packed_attention_cannot_isolate_is_refused_by_name(command, model_folder, tmp_path):
    folder = write_model(tmp_path / "hybrid", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention", "linear_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    code, said = command(f"model.path={folder}")
    assert code == 2 and "linear_attention" in said, said


def test_a_target_module_that_the_model_does_not_have(command, make_recipe):
    code, said = command("lora.target_modules=[q_proj, qproj]", recipe=make_recipe(lora={"rank": 4}))
    assert code == 2 and "the model has no 'qproj'" in said and "q_proj" in said.split("some of")[1], said


def test_a_stop_token_that_is_none(command):
    code, said = command("template.stop_tokens=['no such token']")
    assert code == 3 and "'no such token' is" in said and "tokens in this vocabulary" in said, said


def test_a_storage_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, said = command(f"checkpoint.storage={tmp_path / 'file'}")
    assert code == 2 and "cannot be written" in said, said


def test_more_workers_than_the_cluster_can_place(cluster, command):
    code, said = command("scale.num_workers=16", "train.global_batch_size=16")
    assert code == 2 and "this cluster has 4" in said and "scale.num_workers: 3" in said, said


def test_a_model_that_does_not_fit_is_refused_with_what_would(cluster, command, capsys, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20_000_000}))
    long = (f"model.path={folder}", "data.max_length=20000000")
    code, said = command(*long)
    words = "does not fit: each of 1 workers has "
    assert code == 2 and words in said and "with packs of 20,000,000 tokens. Write " in said, said
    assert not (tmp_path / "runs" / "small" / "ledger.jsonl").exists(), "nothing was trained"
    code, said = command(*long)
    assert code == 2 and words in said and "nothing was started" in said, "a retry holds no GPU"
    path = tmp_path / "recipe.yaml"
    assert main(["plan", str(path), *long, "--json"]) == 2
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert words in captured.err and words in plan["misfit"] and plan["memory"] is plan["seconds"] is None
    assert plan["rows"] == 40, "what can be counted is"
    monkeypatch.setattr("burnish.plan.plan", lambda recipe: plan)  # the same once more, as a table
    assert main(["plan", str(path), *long]) == 2
    assert "memory a worker" in (shown := capsys.readouterr().out) and "does not fit" in shown


def test_a_changed_recipe_under_an_old_name(command, make_recipe, tmp_path):
    run = tmp_path / "runs" / "small"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "recipe.yaml").write_text(make_recipe().to_yaml())
    (run / "contract.json").write_text(Contract.of(load_template(make_recipe())).to_json())
    code, said = command("optim.learning_rate=0.5")
    assert code == 2 and "optim.learning_rate: 0.001 became 0.5" in said and "Choose a new name" in said, said


def test_a_run_that_another_command_holds(command, tmp_path):
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    with open(run / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, said = command()
    assert code == 2 and "another command is training" in said and str(run) in said, said


def test_export_and_chat_of_what_is_not_there(capsys, tmp_path):
    assert main(["export", str(tmp_path / "absent")]) == 2
    assert "no run" in capsys.readouterr().err
    assert main(["chat", str(tmp_path)]) == 2
    assert "no model" in capsys.readouterr().err


def test_a_limit_that_is_no_count(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["preview", "x.yaml", "--limit", "-1"])
    assert stop.value.code == 2 and "must be a whole number" in capsys.readouterr().err


def test_a_sweep_without_a_space_or_without_held_out_rows(command, make_recipe):
    code, said = command(verb="sweep")
    assert code == 2 and "sweep.space" in said
    axis = {"sweep": {"space": {"optim.learning_rate": {"choice": [1e-3, 1e-4]}}}}
    code, said = command(verb="sweep", recipe=make_recipe(**axis))
    assert code == 2 and "needs data.eval" in said


def test_an_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian", "x.yaml"])
    assert stop.value.code == 2
