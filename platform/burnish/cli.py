"""The command line: one verb a function, errors as one message and an exit code."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from burnish import __version__
from burnish.config import Recipe, load
from burnish.errors import BurnishError, RecipeError
from burnish.redact import known_secrets, redact

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0 done, else that of the error, as burnish.errors lists them."""
    quiet()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest  # argparse stops at the first option; overrides may stand after it
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        verb: Verb = arguments.verb
        return verb(arguments)
    except BurnishError as error:
        print(f"burnish {arguments.command}: {_redacted(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception:
        print(_redacted(traceback.format_exc()), end="", file=sys.stderr)
        return 1


class Redacting(logging.Formatter):
    """Log records, with their tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, secrets taken out."""
        return _redacted(super().format(record))


def _redacted(text: str) -> str:
    return redact(text, known_secrets(os.environ))


def quiet() -> None:
    """Keeps the progress bars and device notices of libraries from drowning what a command says."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="burnish", description="Fine-tune chat models on Ray.")
    parser.add_argument("--version", action="version", version=f"burnish {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def recipe_verb(name: str, verb: Verb, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument("recipe", help="recipe file (YAML)")
        sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the recipe")
        sub.set_defaults(verb=verb)
        return sub

    train = recipe_verb("train", _train, "Train a recipe, or go on with the run of its name.")
    train.add_argument("--dry-run", action="store_true", help="check the recipe, print it whole, start nothing")
    recipe_verb("sweep", _sweep, "Search the recipe's sweep.space with Ray Tune.")
    preview = recipe_verb("preview", _preview, "Show what is trained in each row and what is not.")
    preview.add_argument("--json", action="store_true", help="one JSON object for each row")
    preview.add_argument("--html", metavar="FILE", type=Path, help="one web page with every token and its mask")
    shown = "rows to show; default 10, 100 with --html, all with --json"
    preview.add_argument("--limit", type=_count, default=None, metavar="N", help=shown)
    plan = recipe_verb("plan", _plan, "Count rows, packs, tokens and steps without training.")
    plan.add_argument("--json", action="store_true", help="one JSON object")

    _add_model_verbs(verbs)
    doctor = verbs.add_parser("doctor", help="Show versions, devices and what is missing.")
    doctor.set_defaults(verb=_doctor)
    return parser


def _add_model_verbs(verbs: Any) -> None:
    """Adds the verbs of what was trained; `verbs` are argparse's subparsers, which have no public type."""
    export = verbs.add_parser(
        "export", help="Write a run's model to a folder.", description="Write a run's model to a folder."
    )
    export.add_argument("run", help="run folder, for example runs/quickstart")
    export.add_argument("folder", nargs="?", help="new folder; default <run>/export")
    export.add_argument("--merge", action="store_true", help="add the adapter into the base weights")
    export.add_argument("--step", type=_count, metavar="N", help="of this checkpoint; default the best or the newest")
    export.add_argument("--register", metavar="NAME", help="also register it in MLflow as a version of this model")
    export.add_argument("--alias", default="candidate", metavar="ALIAS", help="that names the version; default candidate")
    export.set_defaults(verb=_export)

    report = verbs.add_parser("report", help="Write a run's report.", description="Write a run's report as one web page.")
    report.add_argument("run", help="run folder, for example runs/quickstart")
    report.set_defaults(verb=_report)

    scores = verbs.add_parser(
        "score",
        help="Score an exported model on lm-eval's tasks.",
        description="Score an exported model on tasks of lm-eval, asked through the template that was trained.",
    )
    scores.add_argument("run", type=Path, help="run folder with an export, or exported folder")
    scores.add_argument("--tasks", required=True, metavar="TASK,TASK", help="tasks of lm-eval, for example ifeval,gsm8k")
    scores.add_argument("--limit", type=_count, metavar="N", help="only the first N questions of each task")
    scores.add_argument(
        "--include", type=Path, metavar="FOLDER", help="folder with tasks of your own, as lm-eval writes them"
    )
    scores.set_defaults(verb=_score)

    chat = verbs.add_parser("chat", help="Talk to a model.", description="Talk to a model.")
    chat.add_argument("model", help="exported folder, or run folder with an export")
    chat.add_argument("--message", action="append", help="ask this and exit; may be given several times")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    chat.set_defaults(verb=_chat)

    verify = verbs.add_parser(
        "verify",
        help="Check that a folder, or a server, keeps the template contract.",
        description="Check that an exported folder, or a running server, keeps the template contract of the training.",
    )
    verify.add_argument("folder", type=Path, help="exported folder, or run folder with an export")
    verify.add_argument("--server", metavar="URL", help="ask this server for the prompt of every probe")
    verify.add_argument("--model", metavar="NAME", help="the model's name there; default: the first that it lists")
    verify.add_argument("--skip", action="append", default=[], metavar="PROBE", help="a probe that the server need not keep")
    verify.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable with the server's API key")
    verify.set_defaults(verb=_verify)


def _count(text: str) -> int:
    """A number that is not negative, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; found {text!r}")
    return int(text)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return load(arguments.recipe, arguments.overrides)


def _libraries() -> "redirect_stdout[TextIO]":
    """What libraries print while the block runs goes to stderr: stdout has the command's result and nothing else."""
    return redirect_stdout(sys.stderr)


def _train(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    if arguments.dry_run:
        print(recipe.to_yaml(), end="")
        return 0
    from burnish.progress import ProgressLine
    from burnish.train.launch import train

    with ProgressLine(recipe) as progress, _libraries():
        result = train(recipe, watch=progress)
    print(result.to_json(), flush=True)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from burnish.sweep.launch import sweep

    with _libraries():
        result = sweep(_recipe(arguments), show=lambda text: print(text, file=sys.stderr))
    print(json.dumps(result), flush=True)
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    from burnish.page import write
    from burnish.preview import rows, show

    recipe = _recipe(arguments)
    if arguments.html:
        write(recipe, 100 if arguments.limit is None else arguments.limit, arguments.html)
        print(arguments.html)
    elif arguments.json:
        for row in rows(recipe, arguments.limit):
            print(json.dumps(row.to_json(), ensure_ascii=False))
    else:
        show(recipe, 10 if arguments.limit is None else arguments.limit)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from burnish.plan import plan, show

    with _libraries():
        result = plan(_recipe(arguments))
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
    if result["misfit"]:
        raise RecipeError(result["misfit"])
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from burnish.export import export, register

    if arguments.folder is None and "://" in arguments.run:
        raise RecipeError(f"{arguments.run}: a model is exported to a folder of this machine; name one behind the run")
    folder = Path(arguments.folder) if arguments.folder else Path(arguments.run) / "export"
    with _libraries():
        exported = export(arguments.run, folder, merge=arguments.merge, step=arguments.step)
        if arguments.register:
            version = register(arguments.run, exported, arguments.register, arguments.alias)
            print(f"burnish export: version {version} of {arguments.register} is now {arguments.alias}", file=sys.stderr)
    print(exported)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from burnish.report import report_of

    print(report_of(arguments.run))
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from burnish.scores import score

    with _libraries():
        found = score(arguments.run, arguments.tasks.split(","), arguments.limit, arguments.include)
    print(json.dumps(found))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from burnish.chat import Chat

    chat = Chat.open(Path(arguments.model), arguments.max_new_tokens)
    for message in arguments.message or ():
        print(chat.answer(message), flush=True)
    if not arguments.message:
        chat.talk(sys.stdin, sys.stdout)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from burnish.verify import verify, verify_server

    variable = arguments.api_key_env
    if variable and variable not in os.environ:
        raise RecipeError(f"--api-key-env {variable}: no such environment variable")
    if arguments.server:
        key = os.environ[variable] if variable else None
        verdict = verify_server(arguments.folder, arguments.server, arguments.model, key, arguments.skip)
    else:
        verdict = verify(arguments.folder)
    for note in verdict.notes:
        print(f"burnish verify: note: {note}", file=sys.stderr)
    print(f"kept: {verdict.probes} probes, compared with {verdict.against}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from burnish.doctor import examine

    return examine()


if __name__ == "__main__":
    sys.exit(main())
