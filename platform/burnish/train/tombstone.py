"""A run that failed for good says so at once when it is started again, so that an automatic retry burns no GPUs."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from burnish import errors
from burnish.errors import BurnishError, DoesNotFit, InfrastructureError, RecipeError, Stopped
from burnish.redact import redact
from burnish.train.ledger import replace_text

FILE = "failed.json"


def fingerprint(recipe_yaml: str, digests: dict[str, str]) -> str:
    """The sha256 of all that a run was started from; another one may succeed where this one failed."""
    return hashlib.sha256(json.dumps([recipe_yaml, digests]).encode()).hexdigest()


def bury(folder: Path, error: BaseException, started_from: str) -> None:
    """Notes an error that would come again: not one of a machine or cluster, and not a stop.

    What else is wrong with a recipe is found again before a worker starts, or may be mended where `started_from` does not
    see it, as by a library that is installed or a damaged model that is copied again.
    """
    passes = isinstance(error, InfrastructureError | Stopped | RecipeError) and not isinstance(error, DoesNotFit)
    if isinstance(error, BurnishError) and not passes:
        note = {"error": type(error).__name__, "message": redact(str(error)), "started_from": started_from}
        with suppress(OSError):  # what ended the run is what is told
            replace_text(folder / FILE, json.dumps(note, indent=2) + "\n")


def check(folder: Path, started_from: str, shown: str) -> None:
    """Raises the error with which this run failed for good; forgets it where the run is started from something else.

    `shown` is what a person would write to name the note.
    """
    try:
        note = json.loads((folder / FILE).read_text())
        kind, message, was = getattr(errors, note["error"]), note["message"], note["started_from"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return
    if was != started_from:
        (folder / FILE).unlink(missing_ok=True)
        return
    raise kind(
        f"{message} (This run failed so before, and nothing of its recipe and data has changed, so nothing was started. "
        f"To try it again as it is, delete {shown})"
    )
