"""Packs: exact small worlds."""

import numpy as np

from burnish.data.packing import Pack, Sample, pack, plan, position_ids


def sample(*ids: int) -> Sample:
    return Sample(np.array(ids, np.int32), np.array([False] + [True] * (len(ids) - 1)), (1,))


def test_best_fit_decreasing_fills_the_fullest_pack_that_has_room():
    # 6 opens a pack, 5 another; 4 fits the first exactly, 3 and 2 the second exactly.
    assert plan([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert plan([], 10) == []
    assert plan([10, 10], 10) == [[0], [1]]


def test_the_number_of_packs_depends_on_lengths_alone():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 500).tolist()
    assert len({len(plan([lengths[i] for i in rng.permutation(500)], 128)) for _ in range(5)}) == 1


def test_a_pack_lays_samples_end_to_end():
    packed = Pack.of([sample(1, 2, 3), sample(4, 5)])
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert packed.labels.tolist() == [-100, 2, 3, -100, 5]
    assert packed.seq_lens.tolist() == [3, 2]
    assert packed.trained_tokens == 3
    assert position_ids(packed.seq_lens).tolist() == [0, 1, 2, 0, 1]


def test_the_order_of_packs_is_a_function_of_the_seed():
    ids = np.arange(34, dtype=np.int32)
    trained, lengths = np.arange(34) % 3 > 0, np.array([5, 7, 3, 9, 4, 6], np.int32)
    made = (pack(ids, trained, lengths, 12, np.random.default_rng(seed)) for seed in (1, 1, 2))
    one, same, other = ([each[p].input_ids.tolist() for p in range(len(each))] for each in made)
    assert one == same != other
    assert sorted(map(sorted, one)) == sorted(map(sorted, other))


def test_an_empty_pack_trains_nothing():
    empty = Pack.of([])
    assert (len(empty.input_ids), len(empty.seq_lens), empty.trained_tokens) == (0, 0, 0)
