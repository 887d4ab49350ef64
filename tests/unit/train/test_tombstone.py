"""A run that failed for good ends at once when nothing has changed, and only then."""

import pytest

from burnish.errors import DataError, DoesNotFit, InfrastructureError, RecipeError, Stopped, TrainingError
from burnish.train.tombstone import bury, check, fingerprint

STARTED_FROM = fingerprint("optim: {learning_rate: 1}", {"train": "ab"})


@pytest.mark.parametrize(
    "error", [TrainingError("the loss of step 3 is nan"), DataError("too many rows refused"), DoesNotFit("x")]
)
def test_an_error_that_would_come_again_comes_at_once(tmp_path, error):
    check(tmp_path, STARTED_FROM, "failed.json")
    bury(tmp_path, error, STARTED_FROM)
    with pytest.raises(type(error), match=f"{error}.*delete .*failed.json") as found:
        check(tmp_path, STARTED_FROM, "failed.json")
    assert found.value.exit_code == error.exit_code


@pytest.mark.parametrize("error", [InfrastructureError("x"), Stopped("x"), RecipeError("x"), KeyboardInterrupt()])
def test_what_may_pass_is_tried_again(tmp_path, error):
    bury(tmp_path, error, STARTED_FROM)
    check(tmp_path, STARTED_FROM, "failed.json")
    assert list(tmp_path.iterdir()) == []


def test_another_recipe_or_other_rows_are_tried(tmp_path):
    for other in (fingerprint("optim: {learning_rate: 2}", {"train": "ab"}), fingerprint("optim: {}", {"train": "cd"})):
        bury(tmp_path, TrainingError("x"), STARTED_FROM)
        check(tmp_path, other, "failed.json")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "failed.json").write_text("torn")
    check(tmp_path, STARTED_FROM, "failed.json")
