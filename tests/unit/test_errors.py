"""Errors cross process borders and keep their exit codes."""

import pickle

from burnish import errors
from burnish.data.conversation import Refused


def test_every_error_pickles_and_has_the_exit_code_of_the_contract():
    codes = {
        "BurnishError": 1,
        "RecipeError": 2,
        "DataError": 3,
        "InfrastructureError": 4,
        "TrainingError": 5,
        "Stopped": 75,
    }
    for name, code in codes.items():
        error = pickle.loads(pickle.dumps(getattr(errors, name)("what")))
        assert (type(error).__name__, str(error), error.exit_code) == (name, "what", code)


def test_a_refusal_pickles():
    refusal = pickle.loads(pickle.dumps(Refused("no-stop", "why", 3)))
    assert refusal.to_json() == {"code": "no-stop", "turn": 3, "message": "why"}
