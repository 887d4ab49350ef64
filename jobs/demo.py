"""The quickstart from nothing: make a model, train it, export it, and ask it three questions before and after.

    make demo

Each step is a command that you can type yourself; what is finished already is not done again.
"""

import subprocess
import sys
import time
from pathlib import Path

from burnish.cli import quiet

ROOT = Path(__file__).resolve().parent.parent
BASE, RUN = Path("runs/quickstart-base"), Path("runs/quickstart")
QUESTIONS = {
    "What is bronze made of?": "Bronze is copper with a little tin.",
    "Why does iron rust?": "Iron rusts because it reacts with water and oxygen.",
    "At what temperature does gold melt?": "Gold melts at 1064 degrees Celsius.",
}
NEXT = """
Where everything is
  runs/quickstart             checkpoints, ledger.jsonl (what each step trained), metrics.jsonl, contract.json
  runs/quickstart/export      the model, ready for transformers and any server
  mlflow.db                   parameters, metrics and the template of every run

What to type next
  .venv/bin/burnish chat runs/quickstart
  .venv/bin/burnish preview jobs/recipes/quickstart.yaml
  .venv/bin/burnish sweep jobs/recipes/quickstart-sweep.yaml
  .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db
  .venv/bin/burnish train my.yaml       your own model and data; docs/recipe.md explains every key"""


def step(number: int, title: str, command: list[str] | None = None) -> None:
    """Prints a heading, and runs a command under it; ends the demo where the command fails."""
    print(f"\n{number}. {title}", flush=True)
    if command is not None:
        shown = " ".join(command)
        print(f"   $ python {shown}", flush=True)
        code = subprocess.run([sys.executable, *command]).returncode
        if code:
            sys.exit(code)


def ask(model: Path) -> list[str]:
    """Asks the three questions and prints the answers."""
    from burnish.chat import Chat  # after `quiet`, which it must be told of before its libraries load

    chat = Chat.open(model, max_new_tokens=24)
    answers = [chat.answer(question) for question in QUESTIONS]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"   {question}\n      {answer}", flush=True)
    return answers


def main() -> int:
    """Runs the demo; 1 where an answer after training is wrong."""
    quiet()
    started = time.monotonic()
    step(1, "A small model with random weights and its own tokenizer", ["jobs/quickstart/make_model.py", str(BASE)])
    step(2, "Three questions before training")
    ask(BASE)
    step(3, "Training: two workers, DeepSpeed ZeRO-3, every weight", ["jobs/train.py", "jobs/recipes/quickstart.yaml"])
    step(4, "Export", ["jobs/export.py", str(RUN)])
    step(5, "The same questions after training")
    answers = ask(RUN / "export")
    right = answers == list(QUESTIONS.values())
    print(
        f"\n{'All three answers are right' if right else 'An answer is wrong'} ({time.monotonic() - started:.0f} s).",
        flush=True,
    )
    print(NEXT if right else "")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
