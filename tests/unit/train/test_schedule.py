"""The learning rate follows the share of the run that is done."""

import pytest

from burnish.sections import OptimSpec
from burnish.train.schedule import evaluations_without_gain, kept_losses, learning_rate


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_it_warms_up_and_decays_to_zero(schedule, middle):
    optim = OptimSpec(learning_rate=1.0, schedule=schedule, warmup_steps=3)
    assert [learning_rate(optim, step, 0.0) for step in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(optim, 50, 0.5) == pytest.approx(middle)
    assert learning_rate(optim, 99, 1.0) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(OptimSpec(learning_rate=2e-4, warmup_steps=0), 1, 0.0) == 2e-4


def test_evaluations_behind_the_best_are_counted():
    for losses, wanted in (
        ([], 0),
        ([2.0], 0),
        ([2.0, 1.0], 0),
        ([1.0, 1.0], 1),
        ([2.0, 1.0, 1.5, 1.0], 2),
        ([1, 2, 3, 0.5], 0),
    ):
        assert evaluations_without_gain(losses) == wanted


def test_losses_of_weights_that_were_not_kept_do_not_end_a_run():
    assert kept_losses([1.0, 1.1, 1.2], None) == ()
    assert kept_losses([1.0, 1.1, 1.2], 1.1) == (1.1, 1.2)
    assert kept_losses([2.0, 1.0, 1.1], 1.0) == (2.0, 1.0, 1.1)
    assert kept_losses([], 1.0) == ()
