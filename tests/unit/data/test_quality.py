"""Copies, near copies and evaluation rows are found, and nothing else is; rows that train next to nothing are told apart."""

import numpy as np
import pytest

from burnish.data import quality
from burnish.data.conversation import Refused
from burnish.data.quality import SHINGLE_WORDS, evaluation_grams, judge, marks, too_little
from burnish.data.rendered import Rendered
from burnish.sections import FiltersSpec

WORDS = [f"word{i}" for i in range(400)]
ALL = FiltersSpec(exact_duplicates=True, near_duplicates=0.8, decontaminate=("eval.jsonl",))


def row(question: str, answer: str, *before: dict) -> dict:
    return {"messages": [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def found(rows, filters=ALL, evaluation=()):
    grams = evaluation_grams(evaluation, filters.decontaminate_words)
    marked = [(f"rows#{i}", marks(each, grams, near=True)) for i, each in enumerate(rows)]
    return [(f.position, f.code, f.dropped, f.message) for f in judge(marked, filters)]


def changed(share: float, seed: int = 0) -> str:
    """The first words, of which a share is others: each changes five runs of five words."""
    rng = np.random.default_rng(seed)
    words = WORDS[:200]
    for i in rng.choice(200, int(share * 200), replace=False):
        words[i] = f"other{seed}{i}"
    return " ".join(words)


def test_a_copy_is_named_after_the_first_row_that_says_it_and_other_fields_are_no_copies():
    rows = [row("a", "b"), row("a", "c"), row("a", "b"), row("A", "b"), row("a", "b", {"role": "system", "content": "s"})]
    rows.append({**row("a", "b"), "tools": [{"type": "function", "function": {"name": "f"}}]})
    rows.append({**row("a", "b"), "id": 7, "source": "elsewhere"})
    exact = FiltersSpec(exact_duplicates=True)
    assert [(i, code, kept) for i, code, kept, _ in found(rows, exact) if code == "duplicate"] == [
        (2, "duplicate", True), (6, "duplicate", True),
    ]  # fmt: skip
    assert "rows#0" in found(rows, exact)[0][3]


@pytest.mark.parametrize(("share", "near"), [(0.0, True), (0.01, True), (0.2, False), (1.0, False)])
def test_near_copies_are_told_by_the_share_of_their_runs_of_words(share, near):
    rows = [row(changed(0), "yes"), row(changed(share, 1) + " !!", "yes")]
    codes = [code for _, code, _, _ in found(rows)]
    assert codes == (["near-duplicate"] if near else [])


def test_the_estimate_is_that_of_the_sets_and_no_near_copy_of_many_is_missed():
    rows = [row(changed(0, i), f"{i} " * 3) for i in range(1)] + [row(changed(0.01, i), "answer") for i in range(1, 60)]
    near = [position for position, code, _, _ in found(rows) if code == "near-duplicate"]
    # 2 of 200 words changed leave a similarity of 0.9 with the first row.
    assert len(near) >= 57


def test_a_shared_system_prompt_makes_no_near_copies():
    system = {"role": "system", "content": " ".join(WORDS)}
    rows = [row(f"what is {i} times {i * 7} and why does it matter", f"it is {i * i * 7}", system) for i in range(20)]
    assert found(rows) == []


def test_a_row_that_shares_a_run_of_words_with_an_evaluation_is_contaminated():
    evaluation = [row("Which planet is the largest of all in our own solar system, by mass and volume?", "Jupiter")]
    close = "Tell me: WHICH planet is the largest of all in our own solar system by mass... please"
    rows = [row(close, "It is Jupiter"), row("Which planet is the largest?", "Jupiter"), row("Say it again", close)]
    assert [(i, code) for i, code, _, _ in found(rows, evaluation=evaluation)] == [(0, "contaminated"), (2, "contaminated")]
    assert "'which planet is the largest of all in our own solar system by'" in found(rows, evaluation=evaluation)[0][3]
    kept = [(i, code, dropped) for i, code, dropped, _ in found(rows, FiltersSpec(), evaluation)]
    assert kept == [(0, "contaminated", False), (2, "contaminated", False), (2, "near-duplicate", False)]


def test_short_evaluation_texts_are_looked_for_whole_and_shorter_ones_not_at_all():
    evaluation = [{"question": "What is two plus two?", "choices": ["four", "five"], "id": 3}, Refused("bad-row", "torn")]
    rows = [row("Hm. What is two plus two? Quick", "four"), row("two plus two", "four or five")]
    assert [i for i, code, _, _ in found(rows, evaluation=evaluation) if code == "contaminated"] == [0]


def test_scripts_without_spaces_are_compared_letter_by_letter():
    text = "今天天气怎么样我想知道明天会不会下雨因为我要出门"
    assert [code for _, code, _, _ in found([row(text, "好"), row(text + "吗", "好")])] == ["near-duplicate"]
    assert [code for _, code, _, _ in found([row("请问" + text, "好")], evaluation=[row(text, "x")])] == ["contaminated"]


def test_a_row_dropped_for_one_reason_is_no_reason_to_drop_its_copy():
    evaluation = [row(" ".join(WORDS[:20]), "x")]
    rows = [row(" ".join(WORDS[:200]), "yes"), row(" ".join(["new", *WORDS[8:200]]), "yes")]
    assert [(i, code) for i, code, _, _ in found(rows, evaluation=evaluation)] == [(0, "contaminated")]
    kept = FiltersSpec(near_duplicates=0.8)
    assert [(i, c, d) for i, c, d, _ in found(rows, kept, evaluation)] == [
        (0, "contaminated", False),
        (1, "near-duplicate", True),
    ]


def test_what_is_not_named_is_found_and_kept_and_does_not_change_what_is_dropped():
    rows = [row("a b c d e f", "g"), row("a b c d e f", "g"), row("A b c d e f!", "g"), row("q", "r")]
    assert [(i, c, d) for i, c, d, _ in found(rows, FiltersSpec())] == [
        (1, "duplicate", False),
        (2, "near-duplicate", False),
    ]
    assert [(i, c, d) for i, c, d, _ in found(rows, FiltersSpec(exact_duplicates=True))] == [
        (1, "duplicate", True), (2, "near-duplicate", False),
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [None, 7, {}, {"messages": []}, {"messages": "x"}, Refused("bad-row", "torn")])
def test_a_row_that_is_no_conversation_has_no_marks(bad):
    assert marks(bad, {}, near=True) is None


def test_rows_that_train_little_are_told_by_count_and_share():
    tokens, trained = np.array([0, 10, 100, 100, 1000]), np.array([0, 3, 4, 50, 5])
    assert too_little(tokens, trained, FiltersSpec()) == []
    assert [(i, c) for i, c, _ in too_little(tokens, trained, FiltersSpec(min_trained_tokens=4))] == [(1, "short-answer")]
    both = FiltersSpec(min_trained_tokens=4, min_trained_share=0.01)
    assert too_little(tokens, trained, both) == [
        (1, "short-answer", "3 of 10 tokens are trained"), (4, "low-share", "5 of 1000 tokens are trained"),
    ]  # fmt: skip


def test_tokens_of_rows_add_up_over_the_samples_of_a_row():
    trained = np.array([False, True, True, False, True, False, False, True])
    rendered = Rendered(
        np.arange(8, dtype=np.int32), trained, np.array([3, 2, 3], np.int32), np.array([0, 0, 2], np.int32), (), 4
    )
    tokens, of_them = quality.tokens_of_rows(rendered)
    assert tokens.tolist() == [5, 0, 3, 0] and of_them.tolist() == [3, 0, 1, 0]


def test_hashes_of_runs_depend_on_order_and_on_every_word():
    runs = quality._hashes(["a", "b", "c", "d", "e", "f", "a", "b", "c", "d", "e"], SHINGLE_WORDS)
    assert len(runs) == 7 and runs[0] == runs[6] and len(np.unique(runs)) == 6
    assert not set(quality._hashes(["a", "c", "b", "d", "e"], 5)) & set(runs)
