"""Steps of packs of about equal cost: exact small worlds, and any."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.balance import Cost, balance, deal, round_steps, steps
from burnish.data.packing import pack


def test_a_pack_costs_its_tokens_and_its_pairs():
    cost = Cost(per_token=10.0, per_pair=1.0)
    assert cost.of(np.array([3, 2, 4]), np.array([0, 2, 3, 3])).tolist() == [10 * 5 + 9 + 4, 10 * 4 + 16, 0]
    half = Cost(per_token=0.0, per_pair=1.0, sliding=0.5, window=2)
    assert half.of(np.array([4, 1]), np.array([0, 2])).tolist() == [0.5 * 17 + 0.5 * (4 * 2 + 1)]


def test_steps_have_neighbours_in_cost_and_the_short_one_is_last():
    costs = np.array([5.0, 1.0, 4.0, 2.0, 6.0, 3.0, 0.5])
    made = [step.tolist() for step in steps(costs, np.zeros(7, int), 3, np.random.default_rng(0))]
    assert sorted(made[:2]) == [[4, 0, 2], [5, 3, 1]]
    assert made[2] == [6]


def test_an_epoch_ends_before_the_next_begins():
    costs, epochs = np.arange(10.0), np.array([0] * 5 + [1] * 5)
    made = [step.tolist() for step in steps(costs, epochs, 2, np.random.default_rng(0))]
    assert sorted(made[:2]) == [[2, 1], [4, 3]]
    assert made[2] == [5, 0], "the cheapest of both"
    assert sorted(made[3:]) == [[7, 6], [9, 8]]
    assert [step.tolist() for step in steps(costs[:4], np.arange(4), 3, np.random.default_rng(0))] == [[2, 1, 0], [3]]


@given(
    st.lists(st.tuples(st.floats(0, 9), st.integers(0, 2)), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3)
)
def test_every_pack_is_in_one_step_and_only_the_last_is_short(drawn, size, seed):
    costs, epochs = np.array([c for c, _ in drawn]), np.sort(np.array([e for _, e in drawn]))
    made = steps(costs, epochs, size, np.random.default_rng(seed))
    assert sorted(int(i) for step in made for i in step) == list(range(len(drawn)))
    assert all(len(step) == size for step in made[:-1]) and 0 < len(made[-1]) <= size
    assert all((np.diff(costs[step]) <= 0).all() for step in made)
    first = [int(epochs[step].min()) for step in made]
    assert first == sorted(first) and all(epochs[a].max() <= epochs[b].min() for a, b in itertools.pairwise(made))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_each_worker_gets_every_workers_th_pack(workers):
    dealt = deal(8, workers).reshape(workers, -1)
    assert [share.tolist() for share in dealt] == [list(range(w, 8, workers)) for w in range(workers)]
    # Each micro-batch, one pack of every worker, is a run of neighbours in cost.
    assert (np.sort(dealt.T.ravel()) == dealt.T.ravel()).all()
    assert balance(np.array([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]), 2) == (8.0, 8.0)
    assert balance(np.array([4.0, 2.0, 1.0, 0.0]), 2) == (3.5, 5.0)


MIXES = {"ultrachat 4k": (1220, 0.55, 4096), "tulu 8k": (690, 1.0, 8192), "long tail 32k": (1291, 1.4, 32768)}


@pytest.mark.parametrize("mix", MIXES)
def test_packs_are_full_and_eight_workers_balanced(mix):
    # An 8B model under LoRA: 36 layers of width 4,096, 7.5e9 weights.
    mean, sigma, capacity = MIXES[mix]
    rng, cost = np.random.default_rng(0), Cost(4 * 7.5e9, 6 * 36 * 4096)
    lengths = np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, 50_000)).astype(np.int32).clip(8)
    lengths = lengths[lengths <= capacity]
    costs, tokens = [], 0
    for start in range(0, len(lengths) - 4096, 4096):
        window = lengths[start : start + 4096]
        packs = pack(np.zeros(window.sum(), np.int32), np.ones(window.sum(), bool), window, capacity, rng)
        tokens += int(window.sum())
        costs.append(cost.of(packs.seq_lens, packs.firsts))
    every = np.concatenate(costs)
    assert tokens / (len(every) * capacity) >= 0.995
    size = 8 * round_steps(8)
    rounds = [every[start : start + size] for start in range(0, len(every) - size, size)]
    sums = [balance(each[step], 8) for each in rounds for step in steps(each, np.zeros(size), 8, rng)]
    assert sum(mean for mean, _ in sums) / sum(largest for _, largest in sums) >= 0.99
