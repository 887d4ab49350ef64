"""Packing, for any lengths."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.packing import IGNORE_INDEX, Pack, Sample, pack, plan, position_ids

CAPACITY = 64
lengths = st.lists(st.integers(2, CAPACITY), max_size=60)


def samples_of(sizes: list[int]) -> list[Sample]:
    rng = np.random.default_rng(len(sizes))
    made = []
    for number, size in enumerate(sizes):
        trained = rng.random(size) < 0.5
        trained[0], trained[-1] = False, True
        made.append(Sample(np.full(size, number, np.int32), trained, (1,)))
    return made


def packed(samples: list[Sample], seed: int) -> list[Pack]:
    made = pack(
        np.concatenate([sample.input_ids for sample in samples] or [np.empty(0, np.int32)]),
        np.concatenate([sample.trained for sample in samples] or [np.empty(0, bool)]),
        np.array([len(sample) for sample in samples], np.int32),
        CAPACITY,
        np.random.default_rng(seed),
    )
    assert made.trained_tokens().tolist() == [made[p].trained_tokens for p in range(len(made))]
    return [made[p] for p in range(len(made))]


@given(lengths)
def test_every_sample_stands_in_one_pack_that_it_fits(sizes):
    groups = plan(sizes, CAPACITY)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in group) <= CAPACITY for group in groups)


@given(lengths)
def test_best_fit_decreasing_keeps_its_bound(sizes):
    # At most 11/9 of the best possible and 4 packs (Johnson 1973); the sum of lengths bounds the best from below, and so
    # does the number of samples that are longer than half a pack.
    best = max(-(-sum(sizes) // CAPACITY), sum(size > CAPACITY / 2 for size in sizes))
    no_two_fit = plan(sizes, CAPACITY)
    fill = sorted(sum(sizes[i] for i in group) for group in no_two_fit)
    assert len(no_two_fit) >= best
    assert len(fill) < 2 or fill[0] + fill[1] > CAPACITY, "two packs could have been one"


@given(lengths, st.integers(0, 5))
def test_tokens_labels_and_borders_survive(sizes, seed):
    samples = samples_of(sizes)
    packs = packed(samples, seed)
    seen = []
    for each in packs:
        assert len(each.input_ids) == len(each.labels) == each.seq_lens.sum() <= CAPACITY
        for end, size in zip(np.cumsum(each.seq_lens), each.seq_lens, strict=True):
            ids, labels = each.input_ids[end - size : end], each.labels[end - size : end]
            (number,) = set(ids.tolist())
            seen.append(number)
            assert labels.tolist() == samples[number].labels().tolist()
            assert labels[0] == IGNORE_INDEX, "no target crosses a border"
    assert sorted(seen) == list(range(len(samples)))
    assert sum(p.trained_tokens for p in packs) == sum(int(s.trained.sum()) for s in samples)


@given(lengths, st.integers(0, 5))
def test_packing_is_a_function_of_samples_and_seed(sizes, seed):
    one, other = ([p.input_ids.tolist() for p in packed(samples_of(sizes), seed)] for _ in range(2))
    assert one == other


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_positions_restart_with_every_sample(sizes):
    assert position_ids(np.array(sizes, np.int32)).tolist() == [i for size in sizes for i in range(size)]


def test_the_first_property_can_fail():
    empty = Pack.of([])
    assert len(empty.seq_lens) == 0
    lost = plan([3, 3], CAPACITY)[0][:1]
    assert sorted(lost) != [0, 1]
