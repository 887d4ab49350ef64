"""What lm-eval is asked, and where its answer goes."""

import importlib.util
import json
from functools import partial

import pytest

from burnish.cli import main
from burnish.data.contract import Contract
from burnish.data.tokenizer import load_template
from burnish.errors import RecipeError
from burnish.scores import score
from tests.conftest import write_model, write_rows

TASK = """
task: copper
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["nothing"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list: [{{name: first-word, filter: [{{function: regex, regex_pattern: "(.+)"}}, {{function: take_first}}]}}]
"""


@pytest.fixture
def exported(tmp_path, make_recipe, monkeypatch):
    """What an export of all weights holds as far as scores read it, and tasks of its own, without lm-eval's thousands."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    folder = write_model(tmp_path / "run" / "export")
    recipe = make_recipe(model={"path": str(folder)})
    contract = Contract.of(load_template(recipe), {}, {})
    (folder / "contract.json").write_text(contract.to_json())
    (folder / "export.json").write_text('{"step": 7}')
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"question": f"Is {number} odd?", "answer": number % 2} for number in range(6)]
    )
    (tmp_path / "tasks").mkdir()
    for name, task in (("copper", TASK), ("written", WRITTEN)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(rows=rows))
    return tmp_path


def test_a_task_is_scored_through_the_trained_template(exported, monkeypatch, capsys):
    from lm_eval.models.huggingface import HFLM

    asked, plain = [], HFLM.loglikelihood

    def spied(self, requests, **kwargs):
        asked.extend(request.args for request in requests)
        return plain(self, requests, **kwargs)

    monkeypatch.setattr(HFLM, "loglikelihood", spied)
    assert (
        main(["score", str(exported / "run"), "--tasks", "copper", "--include", str(exported / "tasks"), "--limit", "4"])
        == 0
    )
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == ["copper/acc"] and 0 <= scores["copper/acc"] <= 1
    assert len(asked) == 8 and asked[0][0] == "<|im_start|>user\nIs 0 odd?<|im_end|>\n<|im_start|>assistant\n"
    kept = json.loads((exported / "run" / "export" / "scores.json").read_text())
    assert kept == {"copper/acc": {"score": scores["copper/acc"], "limit": 4}}


def test_answers_end_at_the_stop_tokens_of_the_contract(exported, monkeypatch):
    """Of an adapter, too, whose base knows another end."""
    from lm_eval.models.huggingface import HFLM

    seen, plain = [], HFLM._model_generate

    def spied(self, context, *args, **kwargs):
        seen.append((self.model.generation_config.eos_token_id, self.tokenizer.decode(context[0]), self.add_bos_token))
        return plain(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", spied)
    contract = Contract.read(exported / "run" / "export")
    scores = score(exported / "run", ["written"], limit=1, include=exported / "tasks")
    assert list(scores) == ["written/exact_match/first-word"]
    assert seen == [(contract.stop_ids, "<|im_start|>user\nIs 0 odd?<|im_end|>\n<|im_start|>assistant\n", False)]


def test_scores_go_to_the_run_in_mlflow(exported, make_recipe):
    from mlflow.tracking import MlflowClient

    from burnish import tracking

    recipe = make_recipe(tracking={"uri": f"sqlite:///{exported}/mlflow.db"})
    run_id = tracking.open_run(recipe, None)
    (exported / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    (exported / "run" / "mlflow.json").write_text(json.dumps({"run_id": run_id}))
    scores = score(exported / "run", ["copper"], include=exported / "tasks")
    first = score(exported / "run" / "export", ["written"], limit=2, include=exported / "tasks")
    client = MlflowClient(recipe.tracking.uri)
    assert client.get_run(run_id).data.metrics == {
        "lm_eval/copper/acc": scores["copper/acc"],
        "lm_eval_first_2/written/exact_match/first-word": first["written/exact_match/first-word"],
    }
    assert set(json.loads((exported / "run" / "export" / "scores.json").read_text())) == {*scores, *first}
    assert "scores.json" in [file.path for file in client.list_artifacts(run_id)]


def test_what_cannot_be_scored_is_refused(exported, monkeypatch):
    with pytest.raises(RecipeError, match=r"--tasks: lm-eval knows no 'coper'"):
        score(exported / "run", ["coper"], include=exported / "tasks")
    (exported / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"empty: is no export; first type: burnish export"):
        score(exported / "empty", ["copper"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest))
    with pytest.raises(RecipeError, match=r"pip install -e '\.\[eval\]'"):
        score(exported / "run", ["copper"])
