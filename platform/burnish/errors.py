"""Every failure that burnish reports on purpose, each with the exit code that the command line returns.

    BurnishError                1   something unexpected that still has a clear message
      RecipeError               2   the recipe or the command line asks for something impossible
        DoesNotFit              2   no layout that the recipe leaves open fits into the memory of its workers
      DataError                 3   the rows, the tokenizer or the chat template cannot be used
      InfrastructureError       4   a machine, a disk or a cluster failed; a retry may help
      TrainingError             5   training failed for good (NaN loss)
        OutOfMemory             5   memory did not suffice in any layout that the recipe leaves open
      Stopped                  75   stopped on request, with a checkpoint; the same command goes on

Each carries one message that says where, what was found and what to write instead. All of them
pickle, because they cross process borders inside Ray.
"""

from burnish.redact import redact


class BurnishError(Exception):
    """A failure with one clear message and an exit code."""

    exit_code = 1


class RecipeError(BurnishError):
    """The recipe or the command line is wrong; nothing was started."""

    exit_code = 2


class DoesNotFit(RecipeError):
    """No layout fits into the memory of the workers, which had to start to tell; a retry would start them again."""


class DataError(BurnishError):
    """The data, the tokenizer or the chat template cannot be used as they are."""

    exit_code = 3


class InfrastructureError(BurnishError):
    """A machine, a disk or a cluster failed; the same command may succeed later."""

    exit_code = 4


class TrainingError(BurnishError):
    """Training failed in a way that a retry would repeat."""

    exit_code = 5


class OutOfMemory(TrainingError):
    """Memory did not suffice. A retry would repeat it, unless in another layout."""


class Stopped(BurnishError):
    """Training stopped on request after a checkpoint; the same command goes on from it."""

    exit_code = 75


def one_line(error: BaseException) -> str:
    """The first 300 characters of an error's text, as one line of a message, without the secrets that libraries quote."""
    return redact(" ".join(str(error).split()))[:300]
