"""Secrets are known by their key and by their shape, and leave by no message, log line, parameter or recipe."""

import logging
import re
import sys

import pytest
import yaml

from burnish import cli, tracking
from burnish.config import Recipe, load, parse
from burnish.errors import RecipeError, one_line
from burnish.redact import is_secret_key, known_secrets, redact, redact_tree, secrets
from tests.conftest import ROOT
from tests.unit.test_config import SMALL

HF = "hf_" + "aB3dE5gH7j" * 3 + "Kl9p"
AWS = "AKIA" + "IOSFODNN7EXAMPLE"

PLACES = {
    "a login in the tracking server's address": {"tracking": {"uri": "https://user:pa55@mlflow.example"}},
    "a login with a slash": {"tracking": {"uri": "postgresql://user:pa/55@db/mlflow"}},
    "an API key of a template": {"template": {"kwargs": {"api_key": "pa55"}}},
    "a token below a template's variable": {"template": {"kwargs": {"tools": [{"headers": {"authorization": "pa55"}}]}}},
    "a token by its shape": {"template": {"kwargs": {"note": f"use {HF}pa55"}}},
    "a token as a key": {"template": {"kwargs": {f"{HF}pa55": 1}}},
    "a signed address": {"data": {"train": [{"path": "https://b.example/a.jsonl?X-Amz-Signature=pa55"}]}},
    "a key in the cache's address": {"data": {"train": [{"path": "a"}], "cache": "s3://b/c?secret_key=pa55"}},
    "a login of evaluation rows": {"data": {"train": [{"path": "a"}], "filters": {"decontaminate": ["s3://k:pa55@b/x"]}}},
    "a login in a storage address": {"checkpoint": {"storage": "s3://k:pa55@b/runs"}},
    "a token in a sweep": {"sweep": {"space": {"model.path": {"choice": [f"https://x:{HF}pa55@hf.co/m"]}}}},
    "a key that no recipe has": {"tracking": {"password": "pa55"}},
    "a key under a wrong name": {"trackin": {"uri": "https://user:pa55@mlflow.example"}},
    "a wrong value": {"optim": {"learning_rate": "https://user:pa55@mlflow.example"}},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_in_a_recipe_is_refused_and_never_shown(place, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **PLACES[place]}))
    assert cli.main(["train", "--dry-run", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "pa55" not in shown.err and "aB3d" not in shown.err
    with pytest.raises(RecipeError) as error:
        load(path)
    assert "pa55" not in redact(str(error.value))


def test_the_refusal_says_where_and_what_to_do():
    with pytest.raises(RecipeError, match=r"^t: tracking.uri: holds a secret, .* MLFLOW_TRACKING_PASSWORD"):
        parse({**SMALL, "tracking": {"uri": "https://u:p@h"}}, "t")


def test_what_is_no_secret_stays_in_a_recipe():
    kwargs = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "max_new_tokens": 5,
        "key": "a",
        "tokens": ["x"],
        "reasoning": "sk-low",
    }
    uris = ("http://mlflow.example:5000/a@b", "sqlite:///runs/mlflow.db", "databricks", "file:///shared/ml")
    for uri in uris:
        tree = {**SMALL, "template": {"kwargs": kwargs, "stop_tokens": ["<|im_end|>"]}, "tracking": {"uri": uri}}
        tree["model"] = {"path": "m", "revision": "0123456789abcdef0123456789abcdef01234567"}
        assert parse(tree, "t").template.kwargs == kwargs


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/etc", "a\n", "a\x00", "~", "a b", ""])
def test_a_run_cannot_be_named_out_of_its_storage(name):
    with pytest.raises(RecipeError, match="t: name: must be lower-case"):
        parse({**SMALL, "name": name}, "t")


@pytest.mark.parametrize("key", ["token", "HF_TOKEN", "apiKey", "api_key", "AWS_SECRET_ACCESS_KEY", "password", "Passwd",
    "aws_session_token", "Authorization", "client-secret", "X-Amz-Signature", "credentials", "RAY_AUTH_TOKEN"])  # fmt: skip
def test_a_key_of_a_secret_is_known(key):
    assert is_secret_key(key)
    tree = {"env": {key: "plain words", "other": ["kept", {"deep": 1}]}, "n": None}
    assert redact_tree(tree) == {"env": {key: "***", "other": ["kept", {"deep": 1}]}, "n": None}
    assert redact_tree({key: ["a", {"b": "c", "n": 5}]}) == {key: ["***", {"b": "***", "n": 5}]}
    assert list(secrets(tree)) == [f"env.{key}"]


@pytest.mark.parametrize("key", ["eos_token", "tokens", "max_new_tokens", "per_token", "key", "keys", "tokenizer", "author",
    "signal", "secret_name", "RAY_AUTH_TOKEN_PATH", "stop_tokens", "trained_tokens", "behaviour_sha256"])  # fmt: skip
def test_a_key_of_something_else_is_left_alone(key):
    assert not is_secret_key(key)


def test_every_field_of_a_recipe_may_be_written():
    recipe = parse(SMALL, "t").located()
    assert redact_tree(recipe.dump()) == recipe.dump()
    assert Recipe.model_validate(redact_tree(recipe.dump())) == recipe


def test_error_texts_of_libraries_hold_no_secret():
    assert one_line(OSError(f"401 for https://u:p@h/x\n token {HF}")) == "401 for https://***@h/x token ***"
    assert one_line(ValueError("x" * 290 + " password=pa55word")).count("pa55") == 0


def test_what_the_command_line_says_holds_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "plain words of mine")

    def fail(text):
        def verb(_):
            raise RecipeError(text) if text.startswith("recipe") else RuntimeError(text)

        return verb

    for text, code in (("recipe of plain words of mine", 2), (f"{HF} and plain words of mine", 1)):
        monkeypatch.setattr(cli, "_doctor", fail(text))
        assert cli.main(["doctor"]) == code
        said = capsys.readouterr().err
        assert "***" in said and "plain words" not in said and HF not in said
        assert ("Traceback" in said) == (code == 1)


def test_log_records_and_their_tracebacks_hold_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    try:
        raise ValueError(f"bad {HF}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s", ("s3://k:pa55@b 0123456789abcdef",), sys.exc_info())
    text = cli.Redacting("%(name)s: %(message)s").format(record)
    assert text.startswith("x: at s3://***@b ***\nTraceback") and HF not in text
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    cli.main(["train", "--dry-run", "absent.yaml"])
    assert [type(handler.formatter) for handler in root.handlers] == [cli.Redacting]


def test_parameters_and_tags_of_mlflow_hold_no_secret(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = parse({**SMALL, "tracking": {"uri": uri}}, "t")
    planted = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": f"https://u:pa55@h/{HF}"})})
    run_id = tracking.open_run(planted, None)
    tracking.describe(planted, run_id, {"a": f"x {HF}", "api_key": "pa55"}, [], {})
    run = MlflowClient(uri).get_run(run_id)
    assert run.data.params["model.path"] == "https://***@h/***"
    assert (run.data.tags["a"], run.data.tags["api_key"]) == ("x ***", "***")
    assert run.data.params["data.max_length"] == "4096"


def test_what_travels_with_a_job_in_its_environment_holds_no_secret():
    found = 0
    for path in [*ROOT.glob("jobs/**/*.yaml"), *ROOT.glob("k8s/**/*.yaml"), *ROOT.glob("cluster/*.yaml")]:
        for document in yaml.safe_load_all(path.read_text()):
            # Names of the cluster's secrets stand below keys that say so.
            names = re.compile(r"secretName$|secretKeyRef|authOptions|file_mounts\.|volumes\.\d+\.secret\.")
            named = [place for place in secrets(document) if not names.search(place)]
            assert named == [], f"{path}: {named}"
            text = (document or {}).get("spec", {}).get("runtimeEnvYAML") if isinstance(document, dict) else None
            if text:
                assert list(secrets(yaml.safe_load(text))) == []
                found += 1
    assert found


def test_known_secrets_are_those_of_the_environment():
    environment = {
        "HF_TOKEN": "abcdefgh",
        "PATH": "/usr/bin:/bin",
        "X_PASSWORD": "short",
        "RAY_AUTH_TOKEN_PATH": "/home/x/t",
    }
    assert known_secrets(environment) == {"abcdefgh"}
